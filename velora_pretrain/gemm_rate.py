"""The rate of matrix products on a device: what a library reaches there, not what its maker states.

It is measured in the same run as the figures that are held against it, on products of the model's own shapes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping

import torch

SAMPLE_SECONDS = 0.02
"""Shortest time over which a rate is taken: products of small models are repeated for so long."""

Shape = tuple[int, int, int]
"""(a, b, c) of a product (a, b)(b, c)."""


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
