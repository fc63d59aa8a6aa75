"""Runs of several processes, and what two runs have in common."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
from safetensors.torch import load_file

SETTINGS: dict[str, Any] = {
    "modes__velora__layers": "all",
    "modes__velora__refresh_every": 3,
    "modes__galore__rank": 8,
    "modes__galore__update_gap": 3,
    "modes__galore__finder": "svd",
    "modes__lora__dropout": 0.0,
    "modes__lora__restart_every": 4,
    "modes__flora__kappa": 2,
    "batch__micro_batch": 2,
    "optimizer__clip_norm": 1.0,
    "evaluation__every_steps": 3,
    "checkpoint__every_steps": 3,
}
"""What a run of 6 steps has that processes could get wrong."""


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the tool in several processes, to its end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return finished([*launcher, "-m", "velora_pretrain", *arguments])


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a launcher to its end."""
    return subprocess.run(
        command, env=runs.environment(), capture_output=True, text=True, timeout=300, check=False, cwd=runs.ROOT
    )


def train(recipe: Path, folder: Path, *arguments: str, processes: int = 1) -> dict[str, Any]:
    """Trains to the end, in one process or several; gives the summary."""
    command = ["train", "--recipe", str(recipe), "--run-dir", str(folder), *arguments]
    done = runs.tool(*command) if processes == 1 else torchrun(processes, *command)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "summary.json").read_text())


def cut_back(folder: Path, copy: Path, step: int = 3) -> Path:
    """A copy of a run as if it had been stopped after `step`."""
    shutil.copytree(folder, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name != f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    return copy


def assert_same(one: Path, other: Path, *, rel: float, steps: int = 6) -> None:
    """Two runs read the same documents and came to the same numbers, within `rel`."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert len(lines[0]) == len(lines[1]) == steps + 2
    for single, several in zip(*lines, strict=True):
        assert single.keys() == several.keys()
        for key in ("step", "tokens", "eval_tokens", "batch_digest"):
            assert single.get(key) == several.get(key)
        measured = {"loss_nats_per_token", "grad_norm", "perplexity", "perplexity_paper", "bits_per_byte"}
        for key in measured & single.keys():
            assert single[key] == pytest.approx(several[key], rel=rel), (key, single["step"])
    assert_same_tensors(one, other, rel=10 * rel, steps=steps)


def assert_same_tensors(one: Path, other: Path, *, rel: float, steps: int = 6) -> None:
    """The last checkpoints hold the same tensors, within `rel` of themselves or of a step; 0 is to the bit."""
    for file in ("model.safetensors", "training_state.safetensors"):
        ours, theirs = (load_file(run / f"checkpoints/step-{steps:08d}" / file) for run in (one, other))
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"random.cpu"}:
            difference = (ours[name].double() - theirs[name].double()).abs()
            assert (difference <= rel * (1 + ours[name].double().abs())).all(), (name, difference.max())
