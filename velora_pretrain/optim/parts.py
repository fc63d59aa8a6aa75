"""Tensors a few rows at a time: bounds what is made on the way, and keeps it in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def row_parts(elements: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all tensors, as views.

    Args:
        elements: of the first tensor that a part holds; one row, if that has more.
        tensors: with equally many rows. One without dimensions is a row of one element.
    """
    whole = [torch.atleast_1d(tensor) for tensor in tensors]
    rows = max(1, elements // max(1, whole[0][0].numel()))
    return zip(*(tensor.split(rows) for tensor in whole), strict=True)
