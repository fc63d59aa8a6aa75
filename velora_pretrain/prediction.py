"""What a run will need before it is paid for: peak memory without a device, and the micro-batch that fits."""

from __future__ import annotations

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_pretrain.config import Run
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, default_dtype
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


def predict_memory(run: Run, micro_batch: int, *, accumulates: bool) -> MemoryUse:
    """Peak memory of a training step on one device, by category; arguments as for `predict`."""
    return predict(run, micro_batch, accumulates=accumulates).memory


def free_memory_bytes(device: torch.device) -> int:
    """Memory that tensors on `device` could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def choose_micro_batch(run: Run, *, local_sequences: int, device_type: str, budget_bytes: int) -> int:
    """Sequences per forward pass on one device: as given, else the largest sensible number whose step fits.

    Args:
        run: the run.
        local_sequences: sequences per optimizer step on one device; the result divides it.
        device_type: cpu, cuda or mps.
        budget_bytes: memory that a step may take. Where nothing fits, the answer is 1.
    """
    most = run.batch.micro_batch
    if most != "auto":
        return _divisors(local_sequences, most)[0]
    candidates = _divisors(local_sequences, max(1, MICRO_BATCH_TOKENS[device_type] // run.batch.sequence_length))
    for micro_batch in candidates[:-1]:
        if predict_memory(run, micro_batch, accumulates=micro_batch < local_sequences).peak_bytes <= budget_bytes:
            return micro_batch
    return candidates[-1]


def _divisors(number: int, most: int) -> list[int]:
    """Divisors of `number` up to `most`, the largest first."""
    return [n for n in range(min(most, number), 0, -1) if number % n == 0]
