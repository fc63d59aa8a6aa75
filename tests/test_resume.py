"""kill -9 at any moment, then --resume: bitwise the straight run."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from run_outcome import outcome

STEPS = 6
KILLER = runs.ROOT / "tools" / "killer.py"
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full", "packing": "pad"},
    "galore": {"mode": "galore", "modes__galore__rank": 8, "modes__galore__update_gap": 3, "packing": "pack"},
    "lora": {"mode": "lora", "modes__lora__rank": 8, "modes__lora__restart_every": 3, "modes__lora__dropout": 0.2},
    "flora": {"mode": "flora", "modes__flora__rank": 8, "modes__flora__kappa": 3},
    "velora": {"mode": "velora", "modes__velora__layers": "all", "modes__velora__refresh_every": 2, "packing": "pack"},
    "flora adamw in backward": {
        "mode": "flora",
        "modes__flora__rank": 8,
        "modes__flora__kappa": 3,
        "modes__flora__inner": "adamw",
        "optimizer__update": "in_backward",
        "memory__recompute": "block",
    },
    "velora cycle": {
        "mode": "velora",
        "modes__velora__layers": "all",
        "modes__velora__init": "svd",
        "modes__velora__refresh": "cycle",
        "modes__velora__refresh_every": 2,
        "modes__velora__refresh_moments": "reproject",
    },
    "galore svd": {
        "mode": "galore",
        "modes__galore__rank": 8,
        "modes__galore__update_gap": 3,
        "modes__galore__finder": "svd",
    },
    "velora reproject": {
        "mode": "velora",
        "modes__velora__layers": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "modes__velora__update": "projected",
        "modes__velora__refresh_every": 2,
        "modes__velora__refresh_moments": "reproject",
    },
    "galore+velora": {
        "mode": "galore+velora",
        "modes__galore__rank": 8,
        "modes__galore__update_gap": 3,
        "modes__galore__finder": "randomised",
        "modes__velora__refresh_every": 2,
        "modes__velora__refresh_moments": "reproject",
        "packing": "pack",
    },
    "flora+velora": {
        "mode": "flora+velora",
        "modes__flora__rank": 8,
        "modes__flora__kappa": 3,
        "modes__velora__refresh_every": 2,
        "modes__velora__refresh_moments": "reset",
    },
    "lora+velora": {
        "mode": "lora+velora",
        "modes__lora__rank": 8,
        "modes__lora__restart_every": 3,
        "modes__velora__init": "running_average",
    },
}
"""Each with an event (a refresh, a restart, a new projection) between its checkpoints, and one at a checkpoint."""
METHODS = ("full", "flora", "velora", "galore+velora")
"""Those of the default run; the others are the slow tests'."""


def recipe_of(tiny_recipe: Callable[..., Path], mode: str, **changes: Any) -> Path:
    """Checkpoints every 2 steps, evaluations every 3, 2 micro-batches a step."""
    options = {"checkpoint__every_steps": 2, "evaluation__every_steps": 3, "schedule__steps": STEPS}
    return tiny_recipe(**(MODES[mode] | options | changes))


def ended(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs Python to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_by(code: str, recipe: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Trains by a program that changes the tool before it runs it."""
    return ended(["-c", code, "train", "--recipe", str(recipe), "--run-dir", str(folder)])


def killed_at(place: str, count: int, *arguments: str) -> None:
    """Runs the tool until it is killed at that place."""
    process = ended([str(KILLER), place, str(count), *arguments])
    assert process.returncode == -signal.SIGKILL, process.stderr


def straight(recipe: Path, folder: Path) -> dict[str, Any]:
    finished = runs.tool("train", "--recipe", str(recipe), "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    return outcome(folder, STEPS)


# Counted over a whole run of 6 steps of 2 micro-batches: each stands within a step, an accumulation or a checkpoint.
KILLS = [
    ("reading", 4),
    ("forward", 8),
    ("backward", 10),
    ("optimizer", 5),
    ("recording", 4),
    ("evaluation", 1),
    ("writing weights", 3),
    ("bringing to disk", 7),
    ("removing old", 2),
]


@pytest.mark.parametrize("mode", METHODS)
def test_killed_and_resumed_again_and_again(tiny_recipe: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    """One run that is killed at three places in turn; the other places are the slow test's."""
    recipe = recipe_of(tiny_recipe, mode)
    expected = straight(recipe, tmp_path / "straight")
    folder = tmp_path / "killed"
    killed_at("backward", 10, "train", "--recipe", str(recipe), "--run-dir", str(folder))
    assert (folder / "checkpoints" / "step-00000002").is_dir()  # that of step 4 may be under way
    killed_at("bringing to disk", 3, "train", "--resume", "--run-dir", str(folder))
    killed_at("optimizer", 2, "train", "--resume", "--run-dir", str(folder))
    finished = runs.tool("train", "--resume", "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    assert outcome(folder, STEPS) == expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_place(tiny_recipe: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    recipe = recipe_of(tiny_recipe, mode)
    expected = straight(recipe, tmp_path / "straight")
    for place, count in KILLS:
        folder = tmp_path / place.replace(" ", "-")
        killed_at(place, count, "train", "--recipe", str(recipe), "--run-dir", str(folder))
        finished = runs.tool("train", "--resume", "--run-dir", str(folder))
        assert finished.returncode == 0, (place, finished.stderr)
        assert outcome(folder, STEPS) == expected, place


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments(tiny_recipe: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    recipe = recipe_of(tiny_recipe, mode)
    began = time.monotonic()
    expected = straight(recipe, tmp_path / "straight")
    seconds = time.monotonic() - began
    draw = random.Random(0)
    for number in range(5):
        folder = tmp_path / f"killed-{number}"
        process = runs.start("train", "--recipe", str(recipe), "--run-dir", str(folder))
        time.sleep(draw.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.communicate()
        again = ["--resume"] if (folder / "config.toml").exists() else ["--recipe", str(recipe)]
        finished = runs.tool("train", *again, "--run-dir", str(folder))
        assert finished.returncode == 0, finished.stderr
        assert outcome(folder, STEPS) == expected


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("trainer.Trainer._backward", signal.SIGINT),
        ("trainer.Trainer._backward", signal.SIGTERM),
        ("validation.evaluate", signal.SIGINT),
    ],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tiny_recipe: Callable[..., Path], tmp_path: Path, place: str, number: signal.Signals
) -> None:
    """In a step, which is finished; in an evaluation, which is left and done again by the resumed run."""
    recipe = recipe_of(tiny_recipe, "velora", checkpoint__every_steps=0)
    expected = straight(recipe, tmp_path / "straight")
    folder = tmp_path / "stopped"
    code = (
        "import os, sys\n"
        "from velora_pretrain import cli, trainer, validation\n"
        f"original, calls = {place}, []\n"
        "def signalled(*args, **kwargs):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {3 if place.endswith('_backward') else 1}: os.kill(os.getpid(), {int(number)})\n"
        "    return original(*args, **kwargs)\n"
        f"{place} = signalled\n"
        "cli.main()\n"
    )
    stopped = train_by(code, recipe, folder)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped after step 3 of 6" in stopped.stdout
    assert f"velora-pretrain train --resume --run-dir {folder}" in stopped.stdout
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    finished = runs.tool("train", "--resume", "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    assert outcome(folder, STEPS) == expected


@pytest.mark.parametrize(
    ("mode", "changes", "step", "saved", "second"),
    [
        ("full", {}, 4, 3, signal.SIGINT),  # saved by the second signal
        ("flora", {}, 4, 3, signal.SIGTERM),  # what was summed of step 4 in a subspace is dropped
        # Weights have moved: what is there already is used.
        ("flora adamw in backward", {"checkpoint__every_steps": 3}, 4, 3, signal.SIGTERM),
        ("full", {}, 1, 0, signal.SIGINT),  # nothing was done
    ],
)
def test_a_second_signal_leaves_the_step_and_loses_no_other(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    mode: str,
    changes: dict[str, Any],
    step: int,
    saved: int,
    second: signal.Signals,
) -> None:
    recipe = recipe_of(tiny_recipe, mode, **{"checkpoint__every_steps": 0} | changes)
    folder = tmp_path / "left"
    stopped = signalled_twice(recipe, folder, step, second)
    assert stopped.returncode == 130, stopped.stderr
    assert f"left step {step} of {STEPS} unfinished" in stopped.stdout
    kept = [path.name for path in folder.glob("checkpoints/step-*")]
    assert kept == ([f"step-{saved:08d}"] if saved else [])
    expected = straight(recipe, tmp_path / "straight")
    again = ["--resume"] if saved else ["--recipe", str(recipe)]
    finished = runs.tool("train", *again, "--run-dir", str(folder))
    assert finished.returncode == 0, finished.stderr
    assert outcome(folder, STEPS) == expected


@pytest.mark.parametrize("mode", ["velora", "flora adamw in backward"])
def test_a_second_signal_waits_where_leaving_would_lose_more(
    tiny_recipe: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    """A direction has turned, or weights have moved, since the last step, and no checkpoint is there."""
    recipe = recipe_of(tiny_recipe, mode, checkpoint__every_steps=0)
    stopped = signalled_twice(recipe, tmp_path / "left", 3, signal.SIGTERM)
    assert stopped.returncode == 130, stopped.stderr
    assert "left step 4 of 6 unfinished" in stopped.stdout or "stopped after step 3 of 6" in stopped.stdout
    assert [path.name for path in (tmp_path / "left").glob("checkpoints/step-*")] == ["step-00000003"]


def signalled_twice(recipe: Path, folder: Path, step: int, second: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Runs the tool and sends two signals within the last backward pass of a step, as a user who is in a hurry does."""
    code = (
        "import os, signal, sys, torch\n"
        "from velora_pretrain import cli, signals\n"
        "signals.SAME_REQUEST_SECONDS = 0.0\n"
        "original, calls = torch.Tensor.backward, []\n"
        "def signalled(*args, **kwargs):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {2 * step}:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        f"        os.kill(os.getpid(), {int(second)})\n"
        "    return original(*args, **kwargs)\n"
        "torch.Tensor.backward = signalled\n"
        "cli.main()\n"
    )
    return train_by(code, recipe, folder)
