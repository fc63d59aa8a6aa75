"""Several processes on the CPU train as one does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import launches
import pytest

from velora_pretrain.config import MODES
from velora_pretrain.run_lock import RunLock

EXACT = ("full", "velora")
"""Modes whose step is smooth in the gradient: they agree to the rounding of sums."""
QUICK = [(mode, 2) for mode in ("full", "galore", "lora", "flora", "velora")] + [(mode, 4) for mode in EXACT]
SLOW = [(mode, processes) for mode in MODES for processes in (2, 4) if (mode, processes) not in QUICK]


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """One process's run of a recipe, once for each mode."""
    done: dict[str, Path] = {}

    def run(recipe: Path, mode: str) -> Path:
        if mode not in done:
            folder = tmp_path_factory.mktemp("single") / "run"
            launches.train(recipe, folder)
            done[mode] = folder
        return done[mode]

    return run


Single = Callable[[Path, str], Path]


@pytest.mark.parametrize(
    ("mode", "processes"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_several_processes_give_the_numbers_of_one(
    tiny_recipe: Callable[..., Path], tmp_path: Path, single: Single, mode: str, processes: int
) -> None:
    changes = dict(launches.SETTINGS)
    if "flora" in mode:
        # Two micro-batches in each process at least: sums of several are kept, and clipped, in a form of their own.
        changes["batch__micro_batch"] = 1
    recipe, several = tiny_recipe(mode=mode, **changes), tmp_path / "several"
    launches.train(recipe, several, processes=processes)
    launches.assert_same(single(recipe, mode), several, rel=1e-5 if mode in EXACT else 1e-4)


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(
    tiny_recipe: Callable[..., Path], tmp_path: Path, single: Single, before: int, after: int
) -> None:
    recipe = tiny_recipe(mode="velora", **launches.SETTINGS)
    straight = single(recipe, "velora")
    first = straight
    if before > 1:
        first = tmp_path / "first"
        launches.train(recipe, first, processes=before)
    again = launches.cut_back(first, tmp_path / "again")
    launches.train(recipe, again, "--resume", processes=after)
    launches.assert_same(straight, again, rel=1e-5)


def test_accelerate_launches_it_too(
    tiny_recipe: Callable[..., Path], tmp_path: Path, single: Single, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the first process tracks, and that changes no number.
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = tiny_recipe(mode="velora", tracking__trackers=["wandb"], **launches.SETTINGS)
    # By its name for several GPUs: what it starts in several processes on CPUs needs MPI.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0", "-m"]
    train = ["velora_pretrain", "train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "two")]
    done = launches.finished([*launcher, *train])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    launches.assert_same(single(recipe, "velora"), tmp_path / "two", rel=1e-5)
    assert len(list((tmp_path / "two" / "wandb").glob("offline-run-*"))) == 1


def test_compressed_gradients_are_what_is_exchanged(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    reduced = {}
    for mode in ("full", "velora"):
        recipe = tiny_recipe(mode=mode, modes__velora__layers="all", schedule__steps=2)
        reduced[mode] = launches.train(recipe, tmp_path / mode, processes=2)["reduced_bytes_per_step"]
    # fp32 gradients: matrices of a block in full; the embedding, the head and norms.
    hidden, width, blocks, vocabulary = 32, 48, 2, 128
    in_blocks = blocks * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * width)
    around = 2 * vocabulary * hidden + (2 * blocks + 1) * hidden
    assert reduced["full"] == {"projections": 4 * in_blocks, "other": 4 * around}
    assert reduced["velora"] == {"projections": 4 * in_blocks // 16, "other": 4 * around}
    assert reduced["full"]["projections"] >= 6 * reduced["velora"]["projections"]


def test_stepping_in_the_backward_pass_is_refused(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(optimizer__update="in_backward", batch__micro_batch=2)
    refused = launches.torchrun(2, "train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert refused.returncode != 0
    assert "optimizer.update: in_backward moves weights before the processes have exchanged" in refused.stderr


def test_processes_that_cannot_share_the_batch_are_told(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(batch__sequences=9, batch__micro_batch=3)
    refused = launches.torchrun(2, "train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert refused.returncode != 0
    assert "batch.sequences: 9 sequences cannot be shared evenly by 2 processes" in refused.stderr


def test_a_start_that_one_process_refuses_is_told_without_a_traceback(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, folder = tiny_recipe(checkpoint__every_steps=3), tmp_path / "run"
    launches.train(recipe, folder)
    with RunLock(folder) as lock:
        lock.take()
        refused = launches.torchrun(2, "train", "--resume", "--run-dir", str(folder))
    assert refused.returncode != 0
    assert "is training in this folder" in refused.stderr
    assert "error: another process ended, or cannot be reached, before the run began" in refused.stderr
    assert "velora_pretrain/trainer.py" not in refused.stderr
