"""The peak of one training step: of real tensors, as it is taken, and of tensors without memory, in a single pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from velora_pretrain.gradients import Gradients, SteppingOptimizer
from velora_pretrain.memory import MemoryTracker, MemoryUse


def peak_of_step(
    model: nn.Module,
    optimizer: SteppingOptimizer,
    micro_batches: Iterable[Callable[[], Tensor]],
    *,
    in_backward: bool = False,
) -> MemoryUse:
    """The peak of one training step, after a first one that has made the optimizer's state.

    Args:
        model: as it trains.
        optimizer: over its parameters.
        micro_batches: each gives the loss of one micro-batch; two of them show gradients beside activations.
        in_backward: whether parameters move in the backward pass.
    """
    losses = list(micro_batches)
    with MemoryTracker(model, optimizer) as tracker:
        gradients = Gradients(model, optimizer, in_backward=in_backward)
        for _ in range(2):
            tracker.forget_peak()
            take_step(gradients, losses)
            tracker.settle()
        return tracker.use


def take_step(gradients: Gradients, losses: Sequence[Callable[[], Tensor]]) -> None:
    """One training step: the backward pass of each micro-batch's loss, then the optimizer."""
    for number, loss in enumerate(losses, start=1):
        value = loss()
        with gradients.of_micro_batch(number, len(losses)):
            value.backward()
        del value
    gradients.step()


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """What one training step takes."""

    memory: MemoryUse
    pass_operations: int
    """Operations of matrix products of one micro-batch, forward and backward, with what recomputation repeats."""
    step_operations: int
    """Operations of matrix products that the optimizer does once per step."""
    weight_elements: int
    state_elements: int
    """Numbers in weights, and in the optimizer's state, of whatever format."""
    whole_gradients_bytes: int
    """Gradients of all parameters together, whether or not they are ever alive together."""
    largest_unit_bytes: int
    """Weights and gradients of the largest block, or other module with parameters."""


def predict_step(
    model: nn.Module,
    optimizer: SteppingOptimizer,
    loss: Callable[[], Tensor],
    *,
    accumulates: bool = False,
    in_backward: bool = False,
) -> StepPrediction:
    """What `peak_of_step` would find, for tensors without memory: what does not depend on values is not run for them.

    The optimizer's state comes from a step on gradients that no pass has made, and what a first micro-batch leaves
    behind, its gradients, is put there; one pass, the last of a step, is run.

    Args:
        model: as it trains, of fake tensors.
        optimizer: over its parameters.
        loss: gives the loss of one micro-batch.
        accumulates: whether a step has more than one micro-batch, so that gradients stand beside activations.
        in_backward: whether parameters move in the backward pass.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with MemoryTracker(model, optimizer) as tracker:
        gradients = Gradients(model, optimizer, in_backward=in_backward)
        for parameter in parameters:
            parameter.grad = _gradient_like(parameter)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = _gradient_like(parameter) if accumulates else None
            if accumulates:
                optimizer.accumulate(parameter)
        tracker.settle()
        tracker.forget_peak()
        value = loss()
        count = 2 if accumulates else 1
        with gradients.of_micro_batch(count, count):
            value.backward()
        del value
        tracker.settle()
        gradients.step()
        tracker.settle()
        operations = tracker.operations
        at_step = operations["step"] + (operations["hooks"] if in_backward else 0)
        return StepPrediction(
            memory=tracker.use,
            pass_operations=sum(operations.values()) - at_step,
            step_operations=at_step,
            weight_elements=tracker.elements("weights"),
            state_elements=tracker.elements("optimizer_state"),
            whole_gradients_bytes=sum(_whole_bytes(parameter) for parameter in parameters),
            largest_unit_bytes=_largest_unit_bytes(model),
        )


def _gradient_like(parameter: Tensor) -> Tensor:
    # Also for a parameter whose one number is expanded: its gradient is whole.
    return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _whole_bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _largest_unit_bytes(model: nn.Module) -> int:
    """Weights and gradients of the largest of the parts that are gathered together: blocks, and what is in none."""
    units: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        block = re.match(r".*?\.\d+(?=\.)", name)
        unit = block[0] if block else name.rpartition(".")[0]
        stored = parameter.untyped_storage().nbytes()
        units[unit] = units.get(unit, 0) + stored + (_whole_bytes(parameter) if parameter.requires_grad else 0)
    return max(units.values())
