"""What a memory tracker finds: bytes by category at a step's peak, when that is, and what was alive. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Category = Literal["weights", "gradients", "optimizer_state", "buffers", "saved_activations", "loss", "temporaries"]
CATEGORIES: tuple[Category, ...] = (
    "weights",
    "gradients",
    "optimizer_state",
    "buffers",
    "saved_activations",
    "loss",
    "temporaries",
)
Moment = Literal["forward", "loss", "backward", "step"]
ModuleKind = Literal["attention", "mlp", "norms", "embedding", "head", "other"]


@dataclass(frozen=True, kw_only=True)
class AliveTensors:
    """Tensors of one shape, format and origin that were alive at the peak."""

    category: Category
    origin: str
    """The parameter (layers' numbers as *), the kind of module that saved them, or the operation that made them."""
    shape: tuple[int, ...]
    """Of the first tensor over each storage."""
    dtype: str
    count: int
    total_bytes: int
    """Of the storages of all of them."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes alive at the peak of a step; the categories add up to the peak."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    buffers_bytes: int
    saved_activations_bytes: int
    loss_bytes: int
    temporaries_bytes: int
    peak_bytes: int
    peak_moment: Moment
    """Part of the step in which the peak lies."""
    saved_by_module_bytes: dict[ModuleKind, int]
    """Saved activations by the kind of module that saved them; norms have the residual stream, which they read."""
    largest_at_peak: tuple[AliveTensors, ...]
    """The largest of what was alive, in groups."""
