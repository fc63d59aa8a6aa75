"""Comparisons of training modes: where the bytes go, predicted without a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from velora_pretrain.config import Run
from velora_pretrain.modes import build_mode
from velora_pretrain.prediction import MICRO_BATCH_TOKENS, predict_memory


def memory_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run: mode, options, predicted bytes by category, null for what was not measured, and notes.

    Where `batch.micro_batch` is auto it is the number of sequences that a CPU would take.
    """
    rows = []
    for run in runs:
        auto = max(1, MICRO_BATCH_TOKENS["cpu"] // run.batch.sequence_length)
        micro_batch = auto if run.batch.micro_batch == "auto" else run.batch.micro_batch
        use = predict_memory(run, micro_batch, accumulates=micro_batch < run.batch.sequences)
        rows.append(
            {
                "mode": run.mode,
                "options": _options(run, micro_batch),
                "predicted": asdict(use),
                "measured": None,
                "notes": build_mode(run).memory_notes(),
            }
        )
    return rows


def _options(run: Run, micro_batch: int) -> dict[str, Any]:
    """What sets a row apart from others."""
    return {
        "size": run.size,
        "micro_batch_sequences": micro_batch,
        "sequence_length": run.batch.sequence_length,
        "precision": run.precision,
        "recompute": run.memory.recompute,
        "update": run.optimizer.update,
        "state_bits": run.optimizer.state_bits,
        **build_mode(run).options(),
    }
