"""Learning-rate schedules: pure functions from a step to a multiplier of the peak."""

from __future__ import annotations

import math
from typing import Literal


def lr_multiplier(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    kind: Literal["cosine", "linear", "constant"],
    min_lr_ratio: float,
) -> float:
    """Learning rate of a step, as a share of the peak.

    Linear warm-up reaches the peak at step `warmup_steps`; the decay reaches `min_lr_ratio` at the last step.

    Args:
        step: the optimizer step that is about to be taken, counted from 1.
        steps: optimizer steps of the run.
        warmup_steps: steps of linear warm-up.
        kind: course after the warm-up.
        min_lr_ratio: share of the peak that cosine and linear end at.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
    return min_lr_ratio + (1.0 - min_lr_ratio) * remaining


def restart_multiplier(step: int, *, restart_every: int, warmup_steps: int) -> float:
    """Factor on the learning rate after restarts (arXiv 2307.05695, section 3): a short warm-up after each.

    Args:
        step: the optimizer step that is about to be taken, counted from 1.
        restart_every: restarts are at the end of its multiples; 0: there are none.
        warmup_steps: steps after a restart in which the factor rises linearly; it is 1 at the last of them.
    """
    if not restart_every or step <= restart_every:
        return 1.0
    steps_since = (step - 1) % restart_every + 1
    return min(1.0, steps_since / max(1, warmup_steps))
