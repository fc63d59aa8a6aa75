"""Memory of steps as they are taken: on a CPU by category, through the tracker that predicts; on CUDA by its allocator.

A run measures one step after its warm-up. The tracker watches operations and changes none, so the run's numbers are
the same, bit for bit, with it and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from velora_pretrain.config import Run
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, peak_memory_bytes
from velora_pretrain.gradients import Gradients, SteppingOptimizer
from velora_pretrain.memory import MemoryTracker
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.step_memory import peak_of_step, take_step

MEASURED_STEP = 3
"""The step of a run, counted from 1 in each of its processes' lives, that is measured: optimizer states are there."""


class StepMemory:
    """Measures one step of a run.

    Args:
        model: as it trains.
        optimizer: over its parameters.
        device: where.
    """

    def __init__(self, model: nn.Module, optimizer: SteppingOptimizer, device: torch.device) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._earlier_peak_bytes = 0
        self.measured: dict[str, Any] | None = None
        """What was measured: on a CPU a `MemoryUse`, on CUDA `allocated_peak_bytes` and `reserved_peak_bytes`."""

    @property
    def peak_memory_bytes(self) -> int:
        """Most memory in use so far, see `devices.peak_memory_bytes`; a measurement does not make it forget."""
        return max(self._earlier_peak_bytes, peak_memory_bytes(self._device))

    @contextmanager
    def watch(self, *, is_due: bool) -> Iterator[None]:
        """Around a whole step; measures it if it is due."""
        if is_due and self._device.type == "cuda":
            self._earlier_peak_bytes = self.peak_memory_bytes
            with _cuda_peaks(self._device) as peaks:
                yield
            self.measured = peaks
        elif is_due and self._device.type == "cpu":
            with MemoryTracker(self._model, self._optimizer) as tracker:
                tracker.forget_peak()
                yield
                self.measured = asdict(tracker.use)
        else:
            yield


@contextmanager
def _cuda_peaks(device: torch.device) -> Iterator[dict[str, Any]]:
    """Gives a table that holds the allocator's peaks over what was done within, once it is over."""
    peaks: dict[str, Any] = {}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peaks
    torch.cuda.synchronize(device)
    peaks["allocated_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    peaks["reserved_peak_bytes"] = torch.cuda.max_memory_reserved(device)


def measure_memory(run: Run, micro_batch: int, *, accumulates: bool, device: torch.device) -> dict[str, Any]:
    """Peak memory of a training step on random tokens, after the step that has made the optimizer's state.

    Args:
        run: the run.
        micro_batch: sequences per forward pass.
        accumulates: whether a step has more than one micro-batch; then it has two.
        device: a CPU or CUDA.

    Returns:
        On a CPU the fields of a `MemoryUse`; on CUDA `peak_bytes`, `allocated_peak_bytes` and `reserved_peak_bytes`.
    """
    mode = build_mode(run)
    model = Llama(run.llama, seed=run.seed, recompute=run.memory.recompute)
    mode.adapt(model)
    model.to(device=device, dtype=WEIGHT_DTYPES[run.precision])
    optimizer = mode.build_optimizer(model)
    shape = (micro_batch, run.batch.sequence_length)
    tokens = torch.randint(run.llama.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def loss() -> torch.Tensor:
        with autocast(run.precision, device.type):
            return model(tokens, tokens)

    def run_forward() -> None:
        with torch.no_grad():
            loss()

    mode.before_step(model, optimizer, 1, run_forward)
    in_backward = run.optimizer.update == "in_backward"
    losses = [loss] * (2 if accumulates else 1)
    if device.type != "cuda":
        return asdict(peak_of_step(model, optimizer, losses, in_backward=in_backward))
    gradients = Gradients(model, optimizer, in_backward=in_backward)
    for _ in range(2):
        take_step(gradients, losses)
    with _cuda_peaks(device) as peaks:
        take_step(gradients, losses)
    return {"peak_bytes": peaks["allocated_peak_bytes"], **peaks}
