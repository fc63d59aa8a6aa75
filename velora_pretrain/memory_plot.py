"""The picture of a memory table: a stacked bar per row, as PNG and SVG. No torch; matplotlib is the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora_pretrain.errors import UserError
from velora_pretrain.plots import COLOURS, STYLE, save_figures
from velora_pretrain.records import GIB
from velora_pretrain.tables import MEMORY_CATEGORIES, common_options, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {key: name for key, name in MEMORY_CATEGORIES.items() if key != "peak_bytes"}
"""Fields that add up to the peak, with their names."""
PART_COLOURS = dict(zip(PARTS, (*COLOURS[1:], COLOURS[0]), strict=False))
"""One colour per field, in every picture of memory."""


def write_memory_plot(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws memory.png and memory.svg.

    Args:
        rows: as `compare memory` gives them in JSON.
        folder: where the files go.

    Returns:
        The files.

    Raises:
        UserError: they cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        try:
            return save_figures({"memory": _memory_figure(rows)}, folder)
        except OSError as error:
            raise UserError(f"{folder}: plots cannot be written there: {error.strerror}") from None


def _memory_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted bytes by category, the first row on top; a mark where a peak was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.6 + 0.32 * len(rows)), layout="constrained")
    axes: Axes = figure.add_subplot()
    common = common_options([row["options"] for row in rows])
    names = []
    for row in rows:
        own = words({key: value for key, value in row["options"].items() if key not in common})
        names.append(f"{row['mode']}, {own}" if own else row["mode"])
    places = range(len(rows))
    left = [0.0] * len(rows)
    for key, part in PARTS.items():
        sizes = [row["predicted"][key] / GIB for row in rows]
        if any(sizes):
            axes.barh(places, sizes, left=left, color=PART_COLOURS[key], label=part, height=0.7)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, peak in zip(places, left, strict=True):
        axes.annotate(f"{peak:.2f}", (peak, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    measured = [
        (row["measured"]["peak_bytes"] / GIB, place) for place, row in zip(places, rows, strict=True) if row["measured"]
    ]
    if measured:
        peaks, at = zip(*measured, strict=True)
        axes.plot(peaks, at, linestyle="none", marker="|", markersize=16, color="#000000", label="measured peak")
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlabel("GiB at the peak of a training step, predicted")
    axes.set_title(f"Memory of a training step: {words(common)}", loc="left", fontsize=10, wrap=True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
