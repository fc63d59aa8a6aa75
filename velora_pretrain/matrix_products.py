"""Operations of matrix products, from the shapes of their operands: what a step costs before anything is timed.

A multiplication and an addition count as two: a product (a, b)(b, c) is 2 a b c. What is counted is what the code
dispatches: products of the model, of a method and of its optimizer, and those that recomputation repeats. Causal
attention is half of its products, since scores above the diagonal are not needed: two forward, and five backward with
the scores that fused kernels make again. Decompositions (QR, SVD, eigenvalues) are no products; nor is anything
elementwise, which is memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    return batch * heads * queries * positions * widths


class Operations(TorchDispatchMode):
    """Operations of the matrix products that are dispatched while it is on, on real tensors and fake ones alike."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += product_operations(func, args)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_operations() -> Iterator[Operations]:
    """Counts within; the number is there at any time."""
    with Operations() as operations:
        yield operations
