"""Linear layers that read one tensor: their products, for functions that keep something else than autograd would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sibling_outputs(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """x W_iᵀ + b_i, each (N, D)(D, M), in the format of x."""
    with torch.autocast(x.device.type, enabled=False):
        return tuple(
            F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            for weight, bias in zip(weights, biases, strict=True)
        )


def sibling_input_gradient(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """dx: Σ over layers of dy_i W_i, (N, M)(M, D), summed in place."""
    dx = dys[0] @ weights[0].to(dys[0].dtype)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight.to(dy.dtype))
    return dx
