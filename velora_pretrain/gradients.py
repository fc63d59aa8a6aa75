"""The gradients of a step: how they arrive, how large they are, and when they move the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class SteppingOptimizer(Protocol):
    """What is asked of an optimizer; `optim.adamw.AdamW` says what each does."""

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """What it keeps of each parameter."""
        ...

    @property
    def accumulates(self) -> bool:
        """Whether some gradients are summed in a form of their own."""
        ...

    def accumulate(self, parameter: Tensor) -> None:
        """Takes a gradient into such a sum, and frees it."""

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """What has come for the next step of a parameter."""
        ...

    def step_parameter(self, parameter: Tensor) -> None:
        """Takes the step of one parameter."""

    def step(self) -> None:
        """Takes the steps of all."""


class Gradients:
    """The gradients of one model, from the first micro-batch of a step to the step.

    With `in_backward` a parameter moves as soon as the last micro-batch has completed its gradient, which is then
    freed: two gradients are never alive at once. The numbers are those of stepping afterwards.

    Args:
        model: whose trainable parameters are followed.
        optimizer: steps.
        in_backward: whether parameters move in the backward pass.
        are_exchanged: whether processes exchange gradients within the backward pass, so that they are complete only
            after it; then nothing may move in it.
        total: where the model holds parts of its parameters, sums what comes of them over those who hold the others.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SteppingOptimizer,
        *,
        in_backward: bool = False,
        are_exchanged: bool = False,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        assert not (in_backward and are_exchanged)
        self._optimizer, self._in_backward, self._total = optimizer, in_backward, total
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._norms: dict[Tensor, Tensor] = {}
        self._is_last = self._is_only = True
        self._collects_after = optimizer.accumulates and are_exchanged
        if (in_backward or optimizer.accumulates) and not are_exchanged:
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def of_micro_batch(self, number: int, count: int) -> Iterator[None]:
        """Around the backward pass of micro-batch `number`, counted from 1, of a step that has `count`."""
        self._is_last, self._is_only = number == count, count == 1
        yield
        if self._collects_after:
            for parameter in (p for p in self._parameters if p.grad is not None):
                self._arrived(parameter)

    def _arrived(self, parameter: Tensor) -> None:
        if not self._is_only:
            self._optimizer.accumulate(parameter)
        if self._in_backward and self._is_last:
            self._norms[parameter] = self._norm_of(parameter)
            self._optimizer.step_parameter(parameter)
            parameter.grad = None

    def _norm_of(self, parameter: Tensor) -> Tensor:
        gradient = self._optimizer.gradient(parameter)
        assert gradient is not None
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)

    def clip(self, max_norm: float) -> float:
        """Scales the gradients so that their global norm is at most `max_norm`; 0 leaves them as they are.

        A gradient that is summed in a random subspace has the norm that it has there, which is right on average.

        Returns:
            The norm before, in fp32 whatever the gradients are.
        """
        gradients = [g for g in map(self._optimizer.gradient, self._parameters) if g is not None]
        if self._in_backward:
            norms = [self._norms[p] for p in self._parameters if p in self._norms]
        else:
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        if self._total:
            norm = self._total(norm.square()).sqrt()
        value = norm.item()
        # A norm that is not finite would spread to every gradient and hide where it came from.
        if max_norm and math.isfinite(value):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        return value

    def step(self) -> None:
        """Moves the parameters that have not moved, and frees all gradients."""
        if not self._in_backward:
            self._optimizer.step()
        self.drop()

    def drop(self) -> None:
        """Frees all gradients, in whatever form they were summed; what has not moved by them does not."""
        for parameter in self._parameters:
            parameter.grad = None
            self._optimizer.state.get(parameter, {}).pop("accumulated", None)
        self._norms.clear()


def first_not_finite(model: nn.Module) -> str:
    """Name of the first weight, else of the first gradient, that holds infinity or NaN."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return name
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "none, the loss alone"
