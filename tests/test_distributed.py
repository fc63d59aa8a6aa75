"""Two processes on the CPU train as one does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "-m", "velora_pretrain", *arguments],
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("mode", ["full", "galore", "lora", "flora", "velora"])
def test_two_processes_give_the_losses_of_one(tiny_recipe: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    recipe = tiny_recipe(
        mode=mode,
        modes__velora__layers="all",
        modes__velora__refresh_every=3,
        modes__galore__rank=8,
        modes__galore__update_gap=3,
        modes__galore__finder="svd",
        modes__lora__dropout=0.0,
        modes__lora__restart_every=4,
        modes__flora__kappa=2,
        batch__micro_batch=2,
        optimizer__clip_norm=1.0,
        evaluation__every_steps=3,
    )
    one = runs.tool("train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    two = torchrun(2, "train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1]) == 8
    for single, double in zip(*lines, strict=True):
        assert single.keys() == double.keys()
        for key in ("step", "tokens", "eval_tokens", "batch_digest"):
            assert single.get(key) == double.get(key)
        measured = {"loss_nats_per_token", "grad_norm", "perplexity", "perplexity_paper", "bits_per_byte"}
        for key in measured & single.keys():
            assert single[key] == pytest.approx(double[key], rel=1e-4), key
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints/step-00000006/model.safetensors") for name in ("one", "two")
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-3)


def test_stepping_in_the_backward_pass_is_refused(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(optimizer__update="in_backward", batch__micro_batch=2)
    refused = torchrun(2, "train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert refused.returncode != 0
    assert "optimizer.update: in_backward moves weights before the processes have exchanged" in refused.stderr


def test_processes_that_cannot_share_the_batch_are_told(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(batch__sequences=9, batch__micro_batch=3)
    refused = torchrun(2, "train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert refused.returncode != 0
    assert "batch.sequences: 9 sequences cannot be shared evenly by 2 processes" in refused.stderr
