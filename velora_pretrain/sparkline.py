"""A course of numbers in one line of text. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
UNSCALED_SHARE = 0.1
"""Share of the course, its warm-up, whose values do not stretch the scale: the rest would be one flat line."""


def sparkline(values: Sequence[float], characters: int, *, blocks: str = BLOCKS) -> str:
    """The values as a line of blocks, each the mean of its share of them, from the lowest to the highest.

    Args:
        values: finite ones, oldest first.
        characters: length of the line, where there are as many values.
        blocks: from the lowest to the highest.
    """
    count = min(characters, len(values))
    if count <= 0:
        return ""
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    scaled = means[int(UNSCALED_SHARE * count) :]
    low, high = min(scaled), max(scaled)
    steps = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[max(0, min(len(blocks) - 1, round((mean - low) * steps)))] for mean in means)


class Course:
    """The values so far, thinned out so that a run of any length takes little memory."""

    def __init__(self, most: int = 512) -> None:
        self._most, self._stride = most, 1
        self._values: list[float] = []
        self._waiting: list[float] = []

    def add(self, value: float) -> None:
        """Takes the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._waiting.append(value)
        if len(self._waiting) == self._stride:
            self._values.append(math.fsum(self._waiting) / self._stride)
            self._waiting = []
        if len(self._values) == self._most:
            self._values = [(a + b) / 2 for a, b in zip(self._values[::2], self._values[1::2], strict=True)]
            self._stride *= 2

    @property
    def values(self) -> list[float]:
        """Means over equal numbers of values, oldest first; the last over those that have not filled up yet."""
        last = [math.fsum(self._waiting) / len(self._waiting)] if self._waiting else []
        return [*self._values, *last]
