"""`compile`: forward and backward pass of every mode are one graph, and give the same weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from compiled_steps import BROKEN, CASES

QUICK = ("full", "lora+velora, elementwise")


def outcomes(*names: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / "tests" / "compiled_steps.py"), *names],
        env={**os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(names: tuple[str, ...]) -> None:
    found = outcomes(*names)
    assert tuple(found) == names
    # Sums in another order: some hundred units of rounding of what the weights have moved by.
    assert all(found[name] < 1e-4 for name in names), found


def test_a_step_is_one_graph_and_gives_the_same_weights() -> None:
    check(QUICK)


@pytest.mark.slow
def test_so_it_is_with_every_kind_of_layer_and_of_recomputation() -> None:
    check(tuple(name for name in CASES if name not in QUICK))


@pytest.mark.slow
def test_a_graph_that_breaks_is_an_error() -> None:
    assert outcomes(BROKEN) == {BROKEN: "Unsupported"}


@pytest.mark.slow
def test_a_compiled_run_comes_to_its_end(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Past the step whose memory an eager run measures, which a compiled one cannot, and through its evaluation."""
    recipe, folder = tiny_recipe(mode="velora", schedule__steps=4), tmp_path / "run"
    done = runs.tool("train", "--recipe", str(recipe), "--run-dir", str(folder), "--compile")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "summary.json").read_text())["measured_memory"] is None
