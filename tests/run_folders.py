"""Run folders as training leaves them, written by hand: in any state, and without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import runs

from velora_pretrain.recipe import build_run
from velora_pretrain.records import EvaluationRecord, RunFolder, TrainingRecord, safe_exp

MEMORY = {
    "weights_bytes": 2**29,
    "gradients_bytes": 2**28,
    "optimizer_state_bytes": 2**30,
    "buffers_bytes": 0,
    "saved_activations_bytes": 2**28,
    "loss_bytes": 2**27,
    "temporaries_bytes": 2**26,
    "peak_bytes": 2**29 + 2**28 + 2**30 + 2**28 + 2**27 + 2**26,
}


def training_record(step: int, *, loss: float | None = None, speed: float = 1000.0) -> TrainingRecord:
    """Records of 2,000 tokens a step, at a loss that falls."""
    return TrainingRecord(
        step=step,
        tokens=2000 * step,
        loss_nats_per_token=3 + 7 / (1 + step) if loss is None else loss,
        learning_rate=1e-3 * step,
        grad_norm=1.0 + 1 / step,
        tokens_per_second=speed,
        peak_memory_bytes=3 * 2**29,
        data_wait_seconds=0.25,
        batch_digest=f"{step:016x}",
        memory_limit_bytes=80 * 2**30,
    )


def evaluation_record(step: int, *, perplexity: float | None = None) -> EvaluationRecord:
    """An evaluation at a loss that falls."""
    loss = 3 + 7 / (1 + step)
    return EvaluationRecord(
        step=step,
        eval_loss_nats_per_token=loss,
        perplexity=safe_exp(loss) if perplexity is None else perplexity,
        perplexity_paper=safe_exp(loss * 0.97),
        bits_per_byte=1.25,
        eval_tokens=10_000,
    )


def write(
    path: Path, *, steps: int = 20, done: int = 20, failure: str | None = None, summary: bool = True, **changes: Any
) -> RunFolder:
    """A run folder with a record for each step done and an evaluation at every fifth.

    Args:
        path: where.
        steps: of the run.
        done: how many of them have records.
        failure: why the numbers failed at the step after.
        summary: whether the run has ended, where all steps are done.
        changes: dotted keys of the configuration, `__` for the dots.
    """
    changes.setdefault("evaluation__every_steps", 5)
    run = build_run(runs.values(Path("d.jsonl"), Path("t.model"), schedule__steps=steps, **changes), where="test")
    folder = RunFolder(path)
    folder.write_run(run)
    for step in range(1, done + 1):
        folder.append(training_record(step))
        if step % 5 == 0:
            folder.append(evaluation_record(step))
    if failure:
        folder.write_failure(done + 1, failure)
    if summary and done == steps:
        last = evaluation_record(step=done)
        folder.write_summary(
            {
                "mode": run.mode,
                "steps": done,
                "tokens": 2000 * done,
                "seconds": 2.0 * done,
                "final_evaluation": vars(last) if math.isfinite(last.perplexity) else None,
                "tokens_per_second": 1000.0,
                "peak_memory_bytes": 3 * 2**29,
                "predicted_memory": MEMORY,
                "measured_memory": {**MEMORY, "peak_bytes": MEMORY["peak_bytes"]},
                "device": "cpu",
                "processes": 1,
                "platform": "Linux-6.1",
                "config_sha256": run.sha256,
                "versions": {"python": "3.11.7", "torch": "2.11.0"},
            }
        )
    return folder
