"""What this machine can do: its devices and formats, the rate of matrix products, what fits, how long a run takes.

Nothing is written, and the rest takes seconds: sizes are predicted, not tried, and of the recipe a few steps are taken,
on random tokens, where they are short. What a run's steps take then follows from theirs; without them the operations
of its matrix products over the measured rate are a lower bound.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from velora_pretrain.advice import advice
from velora_pretrain.cells import usable_cores
from velora_pretrain.config import BASELINE, MODES, Precision, Run
from velora_pretrain.contender import contender_of, random_batches
from velora_pretrain.data.c4 import AUTO_TIMEOUT_SECONDS, hub_fault
from velora_pretrain.data.remote import hub_endpoint
from velora_pretrain.devices import WEIGHT_DTYPES, cpu_model, environment, memory_limit_bytes, pick_device
from velora_pretrain.dimensions import SIZES
from velora_pretrain.errors import UserError
from velora_pretrain.gemm_rate import GemmRate
from velora_pretrain.host_memory import free_host_memory_bytes, host_memory_bytes
from velora_pretrain.installation import busy_cores, compiler_facts, disk_facts, has_idle_gpu, missing_of_extras
from velora_pretrain.prediction import (
    MICRO_BATCH_TOKENS,
    USABLE_SHARE,
    choose_micro_batch,
    free_memory_bytes,
    largest_micro_batch,
    predict_by_blocks,
)
from velora_pretrain.recipe import resolve
from velora_pretrain.timing import StepTimes, take_step

FORMATS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SQUARE_SIDES = {"cpu": 1024, "mps": 4096, "cuda": 8192}
"""Side of the square matrices whose product tells a device's rate: large enough for its full speed, and short."""
RATE_SAMPLES = 3
LONGEST_PASS_SECONDS = 0.5
"""Of the products of a pass, at the measured rate: what takes longer is not tried."""
TIMED_STEPS = 3
TIMED_SECONDS = 3.0
"""After which no other step is begun."""


def examine(
    run: Run, *, recipe: str, runs_folder: Path, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Everything that there is to say, in plain values.

    Args:
        run: the recipe's, on the device that is looked at.
        recipe: its name.
        runs_folder: where run folders lie, or would.
        tell: is told what is being done.

    Raises:
        UserError: the device is not there, or has no memory left for a single matrix product.
    """
    device = pick_device(run.device)
    free_bytes, busy = free_memory_bytes(device), busy_cores()
    tell("asking the hub")
    fault = hub_fault(AUTO_TIMEOUT_SECONDS)
    tell("measuring matrix products")
    rates = product_rates(device)
    tell("looking for what fits")
    budget_bytes = int(USABLE_SHARE * free_bytes)
    sizes = fitting_sizes(run, device.type, budget_bytes)
    tell(f"trying steps of {recipe}")
    facts = {
        "device": _device_facts(device, free_bytes),
        "host": {
            "cpu": cpu_model(),
            "usable_cores": usable_cores(),
            "busy_cores": busy,
            "threads": torch.get_num_threads(),
            "memory_bytes": host_memory_bytes(),
            "free_memory_bytes": free_host_memory_bytes(),
        },
        "disk": disk_facts(runs_folder),
        "formats": rates,
        "versions": {key: environment(device)[key] for key in ("python", "torch", "velora-pretrain")},
        "hub": {"endpoint": hub_endpoint(), "is_reachable": fault is None, "fault": fault},
        "extras": missing_of_extras(),
        "compiler": compiler_facts(device.type),
        "budget_bytes": budget_bytes,
        "most_sequences": max(1, MICRO_BATCH_TOKENS[device.type] // run.batch.sequence_length),
        "sizes": sizes,
        "recipe": {"name": recipe, **run_facts(run, device, rates, budget_bytes)},
    }
    return {**facts, "advice": advice(facts)}


def _device_facts(device: torch.device, free_bytes: int) -> dict[str, Any]:
    name, count = cpu_model(), 1
    if device.type == "cuda":
        name, count = torch.cuda.get_device_name(device), torch.cuda.device_count()
    return {
        "kind": device.type,
        "name": name,
        "count": count,
        "memory_bytes": memory_limit_bytes(device),
        "free_memory_bytes": free_bytes,
        "has_idle_gpu": not torch.cuda.is_available() and has_idle_gpu(device.type),
    }


def product_rates(device: torch.device) -> dict[str, dict[str, Any]]:
    """By format: operations of matrix products per second, and their ratio to fp32; none where there are no products.

    Raises:
        UserError: the device has no memory left for one.
    """
    side, found = SQUARE_SIDES[device.type], {}
    for name, dtype in FORMATS.items():
        try:
            found[name] = GemmRate({"square": (side, side, side)}, dtype=dtype, device=device)
        except torch.OutOfMemoryError:
            raise UserError(
                f"device {device}: has no memory free for one matrix product; other programs hold it"
            ) from None
        except (RuntimeError, TypeError):
            continue  # of this format there are none
    for _ in range(RATE_SAMPLES):
        for rate in found.values():
            rate.sample()
    rates = {name: rate.operations_per_second for name, rate in found.items()}
    return {
        name: {
            "is_supported": name in rates,
            "operations_per_second": rates.get(name),
            "fp32_ratio": rates[name] / rates["fp32"] if name in rates else None,
        }
        for name in FORMATS
    }


def shown_modes() -> Sequence[str]:
    """Full rank, and each mode on its own that compresses what chosen layers read."""
    tables = Run(size=next(iter(SIZES))).modes
    return [BASELINE, *(mode for mode in MODES if hasattr(getattr(tables, mode, None), "layers"))]


def fitting_sizes(run: Run, device_kind: str, budget_bytes: int) -> list[dict[str, Any]]:
    """For each size and mode the most sequences in a pass whose step fits, in the run's format; 0 where one does not.

    Gradients accumulate, as in every batch that is larger than a pass.

    Args:
        run: its precision and sequence length are taken.
        device_kind: cpu, cuda or mps; beyond its sensible number of tokens the search ends.
        budget_bytes: what a step may take.
    """
    length = run.batch.sequence_length
    most = max(1, MICRO_BATCH_TOKENS[device_kind] // length)
    options = {
        "precision": run.precision,
        "batch.sequence_length": length,
        "model.max_position_embeddings": max(length, run.llama.max_position_embeddings),
    }
    largest = dict.fromkeys(shown_modes(), 0)
    rows: list[dict[str, Any]] = []
    for size, dimensions in reversed(SIZES.items()):
        weights_bytes = dimensions.num_parameters * WEIGHT_DTYPES[run.precision].itemsize
        for mode in largest:
            # What fits a larger model fits this one; and weights alone may be too much.
            if largest[mode] < most and weights_bytes <= budget_bytes:
                sized = resolve(None, {**options, "size": size, "mode": mode}, [])
                if predict_by_blocks(sized, 1, accumulates=True).memory.peak_bytes > budget_bytes:
                    continue
                largest[mode], _ = largest_micro_batch(
                    sized,
                    budget_bytes=budget_bytes,
                    local_sequences=most + 1,
                    most=most,
                    predict=predict_by_blocks,
                )
        rows.append({"size": size, "parameters": dimensions.num_parameters, "micro_batch_sequences": {**largest}})
    return rows[::-1]


def run_facts(run: Run, device: torch.device, rates: dict[str, dict[str, Any]], budget_bytes: int) -> dict[str, Any]:
    """What a run needs here, and how long its steps would take, without its evaluations.

    Args:
        run: the run.
        device: where.
        rates: as of `product_rates`.
        budget_bytes: what a step may take.
    """
    sequences, length = run.batch.sequences, run.batch.sequence_length
    micro_batch = choose_micro_batch(
        run,
        local_sequences=sequences,
        device_type=device.type,
        budget_bytes=budget_bytes,
        predict=predict_by_blocks,
    )
    found = predict_by_blocks(run, micro_batch, accumulates=micro_batch < sequences)
    operations = found.pass_operations * sequences // micro_batch + found.step_operations
    rate = rates[product_format(run.precision)]["operations_per_second"]
    fits = found.memory.peak_bytes <= budget_bytes
    step, reason = None, None
    most = int(LONGEST_PASS_SECONDS * rate / (found.pass_operations / micro_batch)) if rate else 0
    if not rate:
        reason = f"{device.type} has no products in {product_format(run.precision)}"
    elif not fits:
        reason = "a step does not fit"
    elif run.optimizer.update == "in_backward":
        reason = "parameters move within the backward pass, whose time alone is not seen"
    elif not most:
        reason = f"one sequence alone would take more than {LONGEST_PASS_SECONDS:g} s"
    else:
        step = step_times(run, device, min(micro_batch, most))
    return {
        "size": run.size,
        "mode": run.mode,
        "precision": run.precision,
        "data": run.data,
        "tokenizer": run.tokenizer,
        "steps": run.steps,
        "step_tokens": sequences * length,
        "micro_batch_sequences": micro_batch,
        "peak_bytes": found.memory.peak_bytes,
        "fits": fits,
        "kept_checkpoints_bytes": (run.checkpoint.keep_last + 1)
        * (found.memory.weights_bytes + found.memory.optimizer_state_bytes),
        "step_operations": operations,
        "seconds_at_least": run.steps * operations / rate if rate else None,
        "measured_step": step,
        "not_measured_because": reason,
        "seconds": run.steps * step["seconds"] if step else None,
        "tokens_per_second": sequences * length / step["seconds"] if step else None,
        "gemm_rate_share": operations / step["seconds"] / rate if step and rate else None,
    }


def step_times(run: Run, device: torch.device, micro_batch: int) -> dict[str, Any]:
    """Time of a whole step of the run, from steps with one forward pass each.

    Args:
        run: the run.
        device: where.
        micro_batch: sequences of that pass.
    """
    batch = run.batch.model_copy(update={"sequences": micro_batch, "micro_batch": micro_batch})
    small = run.model_copy(update={"batch": batch, "compile": False})
    contender = contender_of(small, batches=random_batches(small, device), device=device)
    with closing(contender):
        take_step(contender)  # makes the optimizer's state, and finds what is found once
        steps: list[StepTimes] = []
        while len(steps) < TIMED_STEPS and sum(step.wall_seconds for step in steps) < TIMED_SECONDS:
            steps.append(take_step(contender)[0])
    passes = statistics.median(step.forward_seconds + step.backward_seconds for step in steps)
    optimizer = statistics.median(step.optimizer_seconds for step in steps)
    return {
        "micro_batch_sequences": micro_batch,
        "pass_seconds": passes,
        "optimizer_seconds": optimizer,
        "seconds": passes * run.batch.sequences / micro_batch + optimizer,
    }


def product_format(precision: Precision) -> str:
    """Format of the operands of matrix products."""
    return "fp32" if precision == "fp32" else "bf16"
