"""What a run will need before it is paid for: peak memory without a device, and the micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_pretrain.config import Run
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, default_dtype
from velora_pretrain.dimensions import SIZES
from velora_pretrain.host_memory import free_host_memory_bytes
from velora_pretrain.memory import MemoryUse
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.step_memory import StepPrediction, predict_step

MICRO_BATCH_TOKENS = {"cpu": 4_096, "mps": 16_384, "cuda": 65_536}
"""Tokens per forward pass beyond which a larger micro-batch makes no step faster."""
USABLE_SHARE = 0.85
"""Share of the free memory that a prediction may fill: the rest is for what allocators round up and kernels borrow."""


def predict(run: Run, micro_batch: int, *, accumulates: bool) -> StepPrediction:
    """Memory of a training step on one device, and operations of its matrix products, without allocating anything.

    The model, the mode and the optimizer are the real ones, on tensors without memory.

    Args:
        run: the run.
        micro_batch: sequences per forward pass.
        accumulates: whether a step has more than one micro-batch, so that gradients stand beside activations.
    """
    with FakeTensorMode():
        mode = build_mode(run)
        with default_dtype(WEIGHT_DTYPES[run.precision]):
            model = Llama(run.llama, recompute=run.memory.recompute)
        mode.adapt(model)
        optimizer = mode.build_optimizer(model)
        tokens = torch.zeros(micro_batch, run.batch.sequence_length, dtype=torch.int64)

        def loss() -> torch.Tensor:
            with autocast(run.precision, "cpu"):
                return model(tokens, tokens)

        def run_forward() -> None:
            with torch.no_grad():
                loss()

        mode.before_step(model, optimizer, 1, run_forward)
        in_backward = run.optimizer.update == "in_backward"
        return predict_step(model, optimizer, loss, accumulates=accumulates, in_backward=in_backward)


def predict_by_blocks(run: Run, micro_batch: int, *, accumulates: bool) -> StepPrediction:
    """The same as `predict`, from models of one and of two blocks where that is exact: much faster for deep ones.

    Blocks are alike, so whatever is alive at one moment of a step grows evenly with their number. Where gradients
    accumulate, nothing grows faster than what is alive at the loss: all weights, states and gradients, and all that is
    saved. So a peak that lies there stays there. What is largest at the peak is not told.

    Args:
        run: the run.
        micro_batch: sequences per forward pass.
        accumulates: see `predict`.
    """
    blocks = run.llama.num_hidden_layers
    if blocks > 2 and accumulates:
        one, two = (predict(_with_blocks(run, number), micro_batch, accumulates=True) for number in (1, 2))
        if one.memory.peak_moment == two.memory.peak_moment == "loss":
            found = _continued(asdict(one), asdict(two), blocks)
            memory = MemoryUse(**found.pop("memory") | {"largest_at_peak": ()})
            return StepPrediction(memory=memory, **found)
    return predict(run, micro_batch, accumulates=accumulates)


def _with_blocks(run: Run, number: int) -> Run:
    return run.model_copy(update={"model": run.model.model_copy(update={"num_hidden_layers": number})})


def _continued(one: dict[str, Any], two: dict[str, Any], blocks: int) -> dict[str, Any]:
    """Numbers of one and of two blocks, nested, along the line through both."""
    return {
        key: _continued(first, two[key], blocks)
        if isinstance(first, dict)
        else first + (blocks - 1) * (two[key] - first)
        if isinstance(first, int)
        else first
        for key, first in one.items()
    }


def predict_memory(run: Run, micro_batch: int, *, accumulates: bool) -> MemoryUse:
    """Peak memory of a training step on one device, by category; arguments as for `predict`."""
    return predict(run, micro_batch, accumulates=accumulates).memory


def free_memory_bytes(device: torch.device) -> int:
    """Memory that tensors on `device` could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory_bytes()


def choose_micro_batch(
    run: Run,
    *,
    local_sequences: int,
    device_type: str,
    budget_bytes: int,
    predict: Callable[..., StepPrediction] = predict,
) -> int:
    """Sequences per forward pass on one device: as given, else the largest sensible number whose step fits.

    Args:
        run: the run.
        local_sequences: sequences per optimizer step on one device; the result divides it.
        device_type: cpu, cuda or mps.
        budget_bytes: memory that a step may take. Where nothing fits, the answer is 1.
        predict: takes the arguments of `predict`.
    """
    given = run.batch.micro_batch
    if given != "auto":
        return _largest_divisor(local_sequences, given)
    most = max(1, MICRO_BATCH_TOKENS[device_type] // run.batch.sequence_length)
    largest, _ = largest_micro_batch(
        run,
        budget_bytes=budget_bytes,
        local_sequences=local_sequences,
        most=_largest_divisor(local_sequences, most),
        predict=predict,
    )
    return _largest_divisor(local_sequences, largest) if largest else 1


def largest_micro_batch(
    run: Run,
    *,
    budget_bytes: int,
    local_sequences: int,
    most: int,
    predict: Callable[..., StepPrediction] = predict,
) -> tuple[int, StepPrediction]:
    """The most sequences per forward pass whose step fits, and its prediction; 0 and that of one where one does not.

    The peak grows almost evenly with the micro-batch, so a guess between two known peaks is soon right.

    Args:
        run: the run.
        budget_bytes: memory that a step may take.
        local_sequences: sequences per optimizer step on one device.
        most: where the search ends.
        predict: takes the arguments of `predict`.
    """
    known: dict[int, StepPrediction] = {}

    def peak(number: int) -> int:
        if number not in known:
            known[number] = predict(run, number, accumulates=number < local_sequences)
        return known[number].memory.peak_bytes

    if peak(most) <= budget_bytes:
        return most, known[most]
    if peak(1) > budget_bytes:
        return 0, known[1]
    low, high = 1, most
    for guesses in count():
        if high - low <= 1:
            break
        share = (budget_bytes - peak(low)) / (peak(high) - peak(low)) if guesses < 6 else 0.5
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (guess, high) if peak(guess) <= budget_bytes else (low, guess)
    return low, known[low]


def largest_size(
    run: Run,
    micro_batch: int,
    *,
    accumulates: bool,
    budget_bytes: int,
    predict: Callable[..., StepPrediction] = predict,
) -> tuple[Run, StepPrediction, bool]:
    """The run at the largest published size whose step fits, its prediction, and whether any does; else the smallest.

    Args:
        run: of any size.
        micro_batch: sequences per forward pass.
        accumulates: whether a step has more than one micro-batch.
        budget_bytes: memory that a step may take.
        predict: takes the arguments of `predict`.
    """
    runs = [run.model_copy(update={"size": size}) for size in SIZES]
    runs.sort(key=lambda sized: sized.llama.num_parameters)
    first, beyond = 0, len(runs)
    best = predict(runs[0], micro_batch, accumulates=accumulates)
    if best.memory.peak_bytes > budget_bytes:
        return runs[0], best, False
    while beyond - first > 1:
        middle = (first + beyond) // 2
        found = predict(runs[middle], micro_batch, accumulates=accumulates)
        if found.memory.peak_bytes <= budget_bytes:
            first, best = middle, found
        else:
            beyond = middle
    return runs[first], best, True


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return next(n for n in range(min(most, number), 0, -1) if number % n == 0)
