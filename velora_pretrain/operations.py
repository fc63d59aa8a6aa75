"""Matrix products: how many operations a step asks for, and how many a second the device does.

A product (a, b)(b, c) is 2 a b c operations. They are counted where PyTorch dispatches them, so what is counted is what
the code does: products of the model, of a method and of its optimizer, and those that recomputation repeats. Causal
attention is half of its two products forward and five backward, since the scores above the diagonal are not needed.
Decompositions (QR, SVD, eigenvalues) are no products and are not counted, nor is anything elementwise.

The rate that figures are held against is measured in the same run, on products of the model's own shapes: what a
library on this device reaches, not what its maker states.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

SAMPLE_SECONDS = 0.02
"""Shortest time over which a rate is taken: products of small models are repeated for so long."""

Shape = tuple[int, int, int]
"""(a, b, c) of a product (a, b)(b, c)."""


class Operations:
    """Operations of the matrix products that were seen."""

    total = 0


@contextmanager
def counted_operations() -> Iterator[Operations]:
    """Counts what is dispatched within; real tensors and fake ones alike. The number is there at the end."""
    counted = Operations()
    with FlopCounterMode(display=False, custom_mapping=_ALSO) as counter:
        yield counted
    by_kind = counter.get_flop_counts().get("Global", {})
    counted.total = sum(count // 2 if "attention" in str(kind) else count for kind, count in by_kind.items())


def _added_product(_: Any, a: Any, b: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _matrix_vector(a: Any, _: Any, **__: Any) -> int:
    return 2 * a[0] * a[1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_ALSO: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Products that PyTorch's counter leaves out."""


class GemmRate:
    """The rate of matrix products of some shapes, sampled now and then.

    Args:
        shapes: by name.
        dtype: of the operands.
        device: where they are.
    """

    def __init__(self, shapes: Mapping[str, Shape], *, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._device = dict(shapes), device
        self._operands = {
            name: (
                torch.randn(a, b, dtype=dtype, device=device),
                torch.randn(b, c, dtype=dtype, device=device),
                torch.empty(a, c, dtype=dtype, device=device),
            )
            for name, (a, b, c) in self._shapes.items()
        }
        self._repeats = {name: max(1, math.ceil(SAMPLE_SECONDS / self._seconds(name, 3))) for name in self._shapes}
        self.samples: dict[str, list[float]] = {name: [] for name in self._shapes}
        """Operations per second, by shape."""

    def sample(self) -> None:
        """Takes one sample of every shape."""
        for name, shape in self._shapes.items():
            self.samples[name].append(2 * math.prod(shape) / self._seconds(name, self._repeats[name]))

    @property
    def operations_per_second(self) -> float:
        """The highest of the shapes' medians: what nothing can be hoped to exceed."""
        return max(map(statistics.median, self.samples.values()))

    def _seconds(self, name: str, repeats: int) -> float:
        a, b, out = self._operands[name]
        torch.mm(a, b, out=out)
        synchronise(self._device)
        began = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        synchronise(self._device)
        return (time.perf_counter() - began) / repeats


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
