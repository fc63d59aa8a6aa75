"""Loss spikes: losses far above those of the steps before, told from their median and its deviation."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW_STEPS = 64
"""Steps whose losses a new one is held against."""
FIRST_STEPS = 16
"""Losses that must be known before any is called a spike."""
SMALLEST_NATS = 0.25
"""Nothing less above the median is a spike."""
DEVIATIONS = 6.0
"""Standard deviations above the median from which on a loss is a spike."""
DEVIATION_OF_MEDIAN_DEVIATION = 1.4826
"""Standard deviation of normal numbers over the median of their distances from their median."""


class LossSpikes:
    """Says of each loss whether it is a spike.

    Args:
        losses: of the steps before, in nats per token, in their order.
    """

    def __init__(self, losses: Iterable[float]) -> None:
        self._losses = deque(losses, maxlen=WINDOW_STEPS)

    def add(self, loss: float) -> float | None:
        """Takes the loss of the next step; gives how far it stands above the median, in nats, if it is a spike."""
        if not math.isfinite(loss):
            return None
        above = None
        if len(self._losses) >= FIRST_STEPS:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(each - median) for each in self._losses) * DEVIATION_OF_MEDIAN_DEVIATION
            if loss - median > max(SMALLEST_NATS, DEVIATIONS * spread):
                above = loss - median
        self._losses.append(loss)
        return above
