"""Gradients of a whole model: their norm, and where numbers failed."""

from __future__ import annotations

import math

import torch
from torch import nn


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scales the gradients so that their global norm is at most `max_norm`; 0 leaves them as they are.

    Returns:
        The norm before, in fp32 whatever the gradients are.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    value = norm.item()
    # A norm that is not finite would spread to every gradient and hide where it came from.
    if max_norm and math.isfinite(value):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value


def first_not_finite(model: nn.Module) -> str:
    """Name of the first weight, else of the first gradient, that holds infinity or NaN."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return name
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return "none, the loss alone"
