"""Comparison of training modes by speed: the steps of several runs, side by side in one process.

Each run's model, mode and optimizer are the real ones, and so is its loader, which reads ahead in a thread beside the
step as in training. Beside each figure stands its limit: the ratio that counting the operations of matrix products
gives, and the rate at which the device does such products, measured between the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from velora_pretrain.config import BASELINE, Run
from velora_pretrain.contender import batches_of, contender_of, micro_batch_of, operations_of, settled
from velora_pretrain.devices import environment, pick_device
from velora_pretrain.gemm_rate import GemmRate, Shape
from velora_pretrain.memory import MemoryUse
from velora_pretrain.modes import build_mode
from velora_pretrain.prediction import USABLE_SHARE, free_memory_bytes, predict_memory
from velora_pretrain.timing import Contender, Measured, figures_of, measure, spread, warm_up

PUBLISHED_BATCH_TOKENS = 2**17
"""Tokens of an optimizer step in the published runs: 512 sequences of 256."""
BLOCKS = 3
"""Blocks of rounds that each contender is built anew for, where memory does not hold all of them."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a comparison."""

    label: str
    run: Run


def compare_speed(
    entries: Sequence[Entry], *, rounds: int, warmup_steps: int = 3, note: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Steps of all runs in turn, and what they say.

    Args:
        entries: runs of one model, batch, precision and device.
        rounds: timed steps of each.
        warmup_steps: untimed steps of each before.
        note: is told what a reader should know, as it turns up; the result has the same lines.

    Returns:
        `rows`, one per entry; `gemm`, `settings`, `environment`, and `notes`.
    """
    device = pick_device(entries[0].run.device)
    entries = [Entry(label=entry.label, run=settled(entry.run, device.type)) for entry in entries]
    first = entries[0].run
    notes: list[str] = []

    def tell(line: str) -> None:
        if line not in notes:
            notes.append(line)
            note(line)

    uses = [predict_memory(e.run, micro_batch_of(e.run), accumulates=_accumulates(e.run)) for e in entries]
    blocks = 0 if fit_together(entries, uses, free_memory_bytes(device)) else min(BLOCKS, rounds)
    if blocks:
        tell(
            f"memory does not hold all {len(entries)} at once: each ran alone, in {blocks} alternating blocks of steps;"
            " the two sides of a ratio lie minutes apart, so trust small differences less"
        )
    names = [str(index) for index in range(len(entries))]

    def build(name: str, measured: Measured) -> Contender:
        run = entries[int(name)].run
        contender = contender_of(run, batches=batches_of(run, device, tell), device=device)
        warm_up(contender, measured, warmup_steps)
        return contender

    gemm = GemmRate(gemm_shapes(first), dtype=product_dtype(first), device=device)
    measured = measure(names, build, rounds=rounds, blocks=blocks, beside=lambda index: gemm.sample())
    baseline = next((name for name, e in zip(names, entries, strict=True) if e.run.mode == BASELINE), names[0])
    model_operations = next(
        (measured[name].operations for name, e in zip(names, entries, strict=True) if _is_plain(e.run)), None
    ) or operations_of(_full_rank(first))
    rows = [
        {
            "mode": entry.run.mode,
            "variant": entry.label,
            "options": _options(entry.run),
            "predicted": asdict(use),
            "measured": None,
            **figures_of(measured[name], measured[baseline]),
            **utilisation(measured[name], model_operations, gemm.operations_per_second),
            **_optimizer_share(measured[name], entry.run),
        }
        for name, entry, use in zip(names, entries, uses, strict=True)
    ]
    return {
        "rows": rows,
        "settings": {
            "baseline": entries[int(baseline)].label,
            "rounds": rounds,
            "blocks": blocks,
            "step_tokens": first.batch.sequences * first.batch.sequence_length,
            "model_operations": model_operations,
        },
        "gemm": {
            "operations_per_second": gemm.operations_per_second,
            "dtype": str(product_dtype(first)).removeprefix("torch."),
            "shapes": {
                name: {"shape": list(gemm_shapes(first)[name]), "operations_per_second": spread(samples)}
                for name, samples in gemm.samples.items()
            },
        },
        "environment": environment(device),
        "notes": notes,
    }


def fit_together(entries: Sequence[Entry], uses: Sequence[MemoryUse], free_bytes: int) -> bool:
    """Whether memory holds what all contenders keep between their steps, and the step of the largest."""
    kept_bytes, largest_bytes = 0, 0
    for entry, use in zip(entries, uses, strict=True):
        kept = use.weights_bytes + use.buffers_bytes + use.optimizer_state_bytes
        largest_bytes = max(largest_bytes, use.peak_bytes - kept)
        # Each pace has an optimizer of its own.
        kept_bytes += kept + len(build_mode(entry.run).periods()) * use.optimizer_state_bytes
    return kept_bytes + largest_bytes <= USABLE_SHARE * free_bytes


def utilisation(measured: Measured, model_operations: int, operations_per_second: float) -> dict[str, float]:
    """Model FLOP/s count what full rank needs without recomputation, in every mode; the matmul's, what is done."""
    seconds = statistics.median(step.wall_seconds for step in measured.amortised_steps)
    return {
        "model_flops_per_second": model_operations / seconds,
        "model_flops_utilisation": model_operations / seconds / operations_per_second,
        "matmul_utilisation": measured.amortised_operations / seconds / operations_per_second,
    }


def _optimizer_share(measured: Measured, run: Run) -> dict[str, float | None]:
    """Share of the optimizer in a step over the published batch, from its time and that of the passes here."""
    if run.optimizer.update == "in_backward":
        return {"optimizer_share_at_131072_tokens": None}
    steps = measured.amortised_steps
    optimizer = statistics.median(step.optimizer_seconds for step in steps)
    passes = statistics.median(step.wall_seconds - step.optimizer_seconds for step in steps)
    times = PUBLISHED_BATCH_TOKENS / (run.batch.sequences * run.batch.sequence_length)
    return {"optimizer_share_at_131072_tokens": optimizer / (optimizer + times * passes)}


def gemm_shapes(run: Run) -> dict[str, Shape]:
    """Products of a forward pass: projections, MLP, a chunk of the head; and a square one."""
    model, rows = run.llama, micro_batch_of(run) * run.batch.sequence_length
    hidden, width = model.hidden_size, model.intermediate_size
    return {
        "projection": (rows, hidden, hidden),
        "mlp": (rows, hidden, width),
        "head": (min(rows, 512), hidden, model.vocab_size),
        "square": (width, width, width),
    }


def _options(run: Run) -> dict[str, Any]:
    """What sets a row apart from others."""
    return {
        "size": run.size,
        "micro_batch_sequences": micro_batch_of(run),
        "sequence_length": run.batch.sequence_length,
        "step_sequences": run.batch.sequences,
        "precision": run.precision,
        "recompute": run.memory.recompute,
        "update": run.optimizer.update,
        "state_bits": run.optimizer.state_bits,
        "compile": run.compile,
        **build_mode(run).options(),
    }


def _accumulates(run: Run) -> bool:
    return micro_batch_of(run) < run.batch.sequences


def _full_rank(run: Run) -> Run:
    memory = run.memory.model_copy(update={"recompute": "none"})
    return run.model_copy(update={"mode": BASELINE, "memory": memory})


def _is_plain(run: Run) -> bool:
    """Whether the products of a step are those that the model needs, and no others."""
    return run.mode == BASELINE and run.memory.recompute == "none"


def product_dtype(run: Run) -> torch.dtype:
    """Format of the operands of a run's matrix products."""
    return torch.float32 if run.precision == "fp32" else torch.bfloat16
