"""Full sharding: some rows of everything in each process, and the numbers of one process that has all."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import launches
import pytest
import runs

SHARDED = ("--set", "distributed.sharding=full")
WHOLE = ("--set", "distributed.sharding=none")


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """One process's run of a recipe, once for each key."""
    done: dict[object, Path] = {}

    def run(recipe: Path, *key: object) -> Path:
        if key not in done:
            done[key] = tmp_path_factory.mktemp("single") / "run"
            launches.train(recipe, done[key])
        return done[key]

    return run


Single = Callable[..., Path]


@pytest.mark.parametrize(
    ("mode", "processes"),
    [
        ("full", 2),
        ("velora", 2),
        # 3 divides neither the 128 rows of the embedding nor the 32 of a norm.
        pytest.param("velora", 3, marks=pytest.mark.slow),
        pytest.param("full", 4, marks=pytest.mark.slow),
        pytest.param("velora", 4, marks=pytest.mark.slow),
    ],
)
def test_shards_give_the_numbers_of_one_process(
    tiny_recipe: Callable[..., Path], tmp_path: Path, single: Single, mode: str, processes: int
) -> None:
    changes = dict(launches.SETTINGS)
    if mode == "full":
        # One sequence to score, so that all processes but one have none, and take part in the passes all the same.
        changes["evaluation__tokens"] = 5
    if processes == 3:
        changes["batch__sequences"] = 12
    recipe = tiny_recipe(mode=mode, **changes)
    one, several = single(recipe, mode, processes == 3), tmp_path / "several"
    summary = launches.train(recipe, several, *SHARDED, processes=processes)
    launches.assert_same(one, several, rel=1e-5)
    assert summary["reduced_bytes_per_step"]["projections"] > 0


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_and_without_shards(
    tiny_recipe: Callable[..., Path], tmp_path: Path, single: Single, before: int, after: int
) -> None:
    recipe = tiny_recipe(mode="velora", **launches.SETTINGS)
    straight = single(recipe, "velora", False)
    first = straight
    if before > 1:
        first = tmp_path / "first"
        launches.train(recipe, first, *SHARDED, processes=before)
    again = launches.cut_back(first, tmp_path / "again")
    launches.train(recipe, again, "--resume", *(SHARDED if after > 1 else WHOLE), processes=after)
    launches.assert_same(straight, again, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["elementwise", "mlp", "block"])
def test_recomputation_gathers_again(
    tiny_recipe: Callable[..., Path], tmp_path: Path, single: Single, recompute: str
) -> None:
    recipe = tiny_recipe(mode="velora", memory__recompute=recompute, **launches.SETTINGS)
    launches.train(recipe, tmp_path / "two", *SHARDED, processes=2)
    launches.assert_same(single(recipe, recompute), tmp_path / "two", rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16", marks=pytest.mark.slow)])
def test_low_precision(tiny_recipe: Callable[..., Path], tmp_path: Path, precision: str) -> None:
    # Against two whole replicas, which round the same sums: bf16 has 8 bits, and Adam's first steps are signs.
    changes = launches.SETTINGS | {"precision": precision, "schedule__steps": 2, "optimizer__rounding": "nearest"}
    recipe = tiny_recipe(mode="velora", **changes)
    launches.train(recipe, tmp_path / "whole", processes=2)
    launches.train(recipe, tmp_path / "sharded", *SHARDED, processes=2)
    losses = [
        [json.loads(line).get("loss_nats_per_token") for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "sharded")
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=2e-2)


HELD = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from velora_pretrain.display import Display
from velora_pretrain.recipe import resolve
from velora_pretrain.records import RunFolder
from velora_pretrain.run_lock import RunLock
from velora_pretrain.trainer import Trainer
run = resolve(sys.argv[1], {}, sys.argv[3:])
folder = RunFolder(Path(sys.argv[2]))
trainer = Trainer(run, folder, resume=False, display=Display(), lock=RunLock(folder.path))
trainer.train()
size = lambda tensors: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
states = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
print("HELD", dist.get_rank(), size(trainer.own.parameters()), size(states), flush=True)
"""


def test_each_process_holds_half(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "held.py"
    script.write_text(HELD)
    recipe = tiny_recipe(mode="velora", modes__velora__layers="all", schedule__steps=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    held = {}
    for sharding in ("none", "full"):
        arguments = [str(recipe), str(tmp_path / sharding), f"distributed.sharding={sharding}"]
        done = launches.finished([*launcher, *arguments])
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines() if "HELD" in line]
        held[sharding] = {int(rank): (int(weights), int(states)) for _, rank, weights, states in lines}
    for rank in (0, 1):
        for whole, part in zip(held["none"][rank], held["full"][rank], strict=True):
            # Beside the rows: one number of each handle, one count of steps of each parameter.
            assert part == pytest.approx(whole / 2, abs=4 * 40)


@pytest.mark.parametrize(
    ("processes", "changes", "reason"),
    [
        (1, {}, "it is for several processes, and this is one; launch with torchrun"),
        (2, {"mode": "galore"}, "mode galore needs whole gradients or weights"),
        (2, {"mode": "lora+velora"}, "mode lora+velora needs whole gradients or weights"),
        (2, {"optimizer__state_bits": 8}, "optimizer.state_bits = 8 packs moments across rows; set 32"),
        (2, {"compile": True}, "parameters that are gathered for each pass are not compiled; leave out compile"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(
    tiny_run: Callable[..., object], processes: int, changes: dict[str, object], reason: str
) -> None:
    from velora_pretrain.errors import UserError
    from velora_pretrain.setup import check_sharding

    run = tiny_run(distributed__sharding="full", **changes)
    with pytest.raises(UserError, match=r"distributed\.sharding: .*, or set distributed\.sharding = none") as refused:
        check_sharding(run, processes)
    assert reason in str(refused.value)


def test_one_process_is_told_by_the_command(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    refused = runs.tool("train", "--recipe", str(tiny_recipe()), "--run-dir", str(tmp_path / "run"), *SHARDED)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: distributed.sharding: it is for several processes")
    assert not (tmp_path / "run").exists()
