"""Comparisons of training modes: where the bytes go, predicted without a device and measured on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from velora_pretrain.config import BASELINE, Run
from velora_pretrain.devices import pick_device
from velora_pretrain.errors import UserError
from velora_pretrain.measurement import measure_memory
from velora_pretrain.modes import build_mode
from velora_pretrain.prediction import (
    MICRO_BATCH_TOKENS,
    USABLE_SHARE,
    free_memory_bytes,
    largest_micro_batch,
    largest_size,
    predict,
)
from velora_pretrain.records import GIB
from velora_pretrain.sharding import Sharding, per_device
from velora_pretrain.step_memory import StepPrediction

SAME_SHARE = 0.999
"""Share of another row's saved activations from which on nothing worth naming is saved."""


@dataclass(frozen=True, kw_only=True)
class MemoryQuestion:
    """What is asked about every run."""

    measure_on: torch.device | None = None
    """Also takes the step, on this device."""
    budget_bytes: int | None = None
    """Looks for what fits."""
    any_size: bool = False
    """Whether a budget is answered by the largest size, not by the largest micro-batch."""
    devices: int = 1
    sharding: Sharding = "none"
    published: bool = False
    """Also gives the published accountings."""


class MemoryComparison:
    """Rows of a memory table; a step that several rows ask for is predicted once.

    Args:
        question: what is asked.
    """

    def __init__(self, question: MemoryQuestion) -> None:
        self.question = question
        self._known: dict[tuple[str, int, bool], StepPrediction] = {}

    def predict(self, run: Run, micro_batch: int, *, accumulates: bool) -> StepPrediction:
        """As `prediction.predict`, per device."""
        key = (run.sha256, micro_batch, accumulates)
        if key not in self._known:
            found, question = predict(run, micro_batch, accumulates=accumulates), self.question
            use = per_device(found, devices=question.devices, sharding=question.sharding)
            self._known[key] = replace(found, memory=use)
        return self._known[key]

    def row(self, run: Run) -> dict[str, Any]:
        """One row: mode, options, predicted and measured bytes (or null), what it saves, and notes.

        Raises:
            UserError: what is asked cannot be had at this run's settings.
        """
        question = self.question
        local = _local_sequences(run, question)
        fits = None
        if question.budget_bytes is None:
            micro_batch = _micro_batch(run, local)
            found = self.predict(run, micro_batch, accumulates=micro_batch < local)
        elif question.any_size:
            micro_batch = 1 if run.batch.micro_batch == "auto" else run.batch.micro_batch
            run, found, fits = largest_size(
                run,
                micro_batch,
                accumulates=micro_batch < local,
                budget_bytes=question.budget_bytes,
                predict=self.predict,
            )
        else:
            largest, found = largest_micro_batch(
                run,
                budget_bytes=question.budget_bytes,
                local_sequences=local,
                most=local,
                predict=self.predict,
            )
            micro_batch, fits = max(1, largest), largest > 0
        accumulates = micro_batch < local
        # Operations per sequence do not depend on the micro-batch; a saving does, so it needs the same one.
        full = self.predict(_full_rank(run), micro_batch, accumulates=accumulates)
        saving = full.memory.peak_bytes - found.memory.peak_bytes
        row = {
            "mode": run.mode,
            "options": _options(run, micro_batch, question),
            "predicted": asdict(found.memory),
            "measured": None,
            "saving_bytes": saving,
            "saving_percent": 100 * saving / full.memory.peak_bytes,
            "operations_ratio": _operations(found, micro_batch, local) / _operations(full, micro_batch, local),
            "notes": self._notes(run, found, micro_batch, accumulates),
        }
        if fits is not None:
            row |= {"budget_bytes": question.budget_bytes, "fits_budget": fits}
        if question.published:
            row["published"] = self._published(run, found)
        if question.measure_on is not None:
            self._measure(row, run, micro_batch, accumulates=accumulates, needed_bytes=found.memory.peak_bytes)
        return row

    def _notes(self, run: Run, found: StepPrediction, micro_batch: int, accumulates: bool) -> list[str]:
        """What looks like a saving and is none."""
        notes = build_mode(run).memory_notes()
        if any(hasattr(table, "layers") for table in run.mode_tables.values()):
            same = run.memory.recompute
            rival = self.predict(_full_rank(run, recompute=same), micro_batch, accumulates=accumulates).memory
            if found.memory.saved_activations_bytes >= SAME_SHARE * rival.saved_activations_bytes:
                notes.append(f"saves no activations beside full rank with recompute {same}")
        return notes

    def _published(self, run: Run, found: StepPrediction) -> dict[str, float | None]:
        """The published accountings of this row, in decimal GB, and the published figure where there is one."""
        single = self.predict(run, 1, accumulates=False).memory
        return {
            "weights_and_states_bf16_gb": 2 * (found.weight_elements + found.state_elements) / 1e9,
            "one_sequence_peak_gb": single.peak_bytes / 1e9,
            "paper_gb": build_mode(run).published_memory_gb(),
        }

    def _measure(
        self, row: dict[str, Any], run: Run, micro_batch: int, *, accumulates: bool, needed_bytes: int
    ) -> None:
        """Takes the row's step where it fits the device, else notes that it does not."""
        device = self.question.measure_on
        assert device is not None
        free = free_memory_bytes(device)
        if needed_bytes > USABLE_SHARE * free:
            row["notes"].append(f"not measured: {device.type} has {free / GIB:.1f} GiB free")
            return
        row["measured"] = measure_memory(run, micro_batch, accumulates=accumulates, device=device)


def memory_rows(
    runs: Sequence[Run],
    *,
    measure: bool = False,
    budget_bytes: int | None = None,
    any_size: bool = False,
    devices: int = 1,
    sharding: Sharding = "none",
    published: bool = False,
) -> list[dict[str, Any]]:
    """One row per run, see `MemoryComparison.row`; options as in `MemoryQuestion`.

    Where `batch.micro_batch` is auto it is the number of sequences that a CPU would take.

    Raises:
        UserError: the runs' device is not there, or what is asked cannot be had at a run's settings.
    """
    question = MemoryQuestion(
        measure_on=pick_device(runs[0].device) if measure and runs else None,
        budget_bytes=budget_bytes,
        any_size=any_size,
        devices=devices,
        sharding=sharding,
        published=published,
    )
    comparison = MemoryComparison(question)
    return [comparison.row(run) for run in runs]


def _local_sequences(run: Run, question: MemoryQuestion) -> int:
    if question.devices > 1 and question.sharding == "data-parallel" and run.optimizer.update == "in_backward":
        raise UserError("--update in_backward: works on one device only; give --update step, or leave --devices out")
    return max(1, run.batch.sequences // question.devices)


def _micro_batch(run: Run, local_sequences: int) -> int:
    auto = max(1, MICRO_BATCH_TOKENS["cpu"] // run.batch.sequence_length)
    return min(local_sequences, auto if run.batch.micro_batch == "auto" else run.batch.micro_batch)


def _full_rank(run: Run, recompute: str = "none") -> Run:
    """What a row is held against: full rank, everything kept, stepping afterwards, with moments of 32 bits."""
    memory = run.memory.model_copy(update={"recompute": recompute})
    optimizer = run.optimizer.model_copy(update={"update": "step", "state_bits": 32})
    return run.model_copy(update={"mode": BASELINE, "memory": memory, "optimizer": optimizer})


def _operations(found: StepPrediction, micro_batch: int, local_sequences: int) -> float:
    """Operations of matrix products of a whole optimizer step on one device."""
    return found.pass_operations * local_sequences / micro_batch + found.step_operations


def _options(run: Run, micro_batch: int, question: MemoryQuestion) -> dict[str, Any]:
    """What sets a row apart from others."""
    several = {"devices": question.devices, "sharding": question.sharding} if question.devices > 1 else {}
    return {
        "size": run.size,
        "micro_batch_sequences": micro_batch,
        "sequence_length": run.batch.sequence_length,
        "precision": run.precision,
        "recompute": run.memory.recompute,
        "update": run.optimizer.update,
        "state_bits": run.optimizer.state_bits,
        **several,
        **build_mode(run).options(),
    }
