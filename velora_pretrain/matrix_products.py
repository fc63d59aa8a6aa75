"""Operations of matrix products, from the shapes of their operands: what a step costs before anything is timed.

A multiplication and an addition count as two. Attention is counted whole, as if no position were masked, and its
backward pass with the scores that fused kernels make again: five products where the forward pass has two. All else
(norms, activations, softmax, the optimizer's arithmetic) is memory traffic and counts nothing.
"""

from __future__ import annotations

from typing import Any

import torch

_aten: Any = torch.ops.aten
_FIRST_OPERAND = {
    _aten.mm: 0,
    _aten.bmm: 0,
    _aten.mv: 0,
    _aten.addmm: 1,
    _aten.addmm_: 1,
    _aten.baddbmm: 1,
    _aten.baddbmm_: 1,
    _aten.addmv: 1,
}
"""Products of two operands, with the place of the first among the arguments."""
_ATTENTION = "_scaled_dot_product"


def product_operations(func: Any, args: tuple[Any, ...]) -> int:
    """Operations of one call of an ATen operation; 0 where it is no matrix product.

    Args:
        func: the overload that is called.
        args: its positional arguments.
    """
    packet = func.overloadpacket
    place = _FIRST_OPERAND.get(packet)
    if place is not None:
        left, right = args[place], args[place + 1]
        columns = right.shape[-1] if right.dim() > 1 else 1
        return 2 * left.numel() * columns
    name = packet.__name__
    if not name.startswith(_ATTENTION):
        return 0
    is_backward = "backward" in name
    query, key, value = args[1:4] if is_backward else args[:3]
    batch, heads, queries, width = query.shape
    positions, value_width = key.shape[-2], value.shape[-1]
    widths = 3 * width + 2 * value_width if is_backward else width + value_width
    return 2 * batch * heads * queries * positions * widths
