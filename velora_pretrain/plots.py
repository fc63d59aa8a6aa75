"""Plots of a comparison, as PNG and SVG: plain data in, files out. No torch here; matplotlib is the extra `plot`.

Colours are Okabe and Ito's, which colour-blind readers tell apart (https://jfly.uni-koeln.de/color/), one per variant
in every plot, with a marker and a line style of its own; a mode's first variant has the colour that the mode has
everywhere. The same data gives the same SVG, byte for byte.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora_pretrain.config import MODES
from velora_pretrain.errors import UserError
from velora_pretrain.records import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

HOW_TO_INSTALL = 'plots need matplotlib: pip install "velora-pretrain[plot]"'
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
"""Okabe and Ito's palette without its yellow, which is faint on white."""
GREY = "#8A8A8A"
"""An eighth colour, told from the others by its lack of any."""
MODE_COLOURS = {mode: (*COLOURS, GREY)[place % 8] for place, mode in enumerate(MODES)}
"""One colour per mode, in every picture; black stands for the colour of the text, and is white on a dark page."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
SMOOTHED_SHARE = 0.02
"""Window of the loss curves' moving mean, as a share of the steps."""
HIDDEN_SHARE = 0.1
"""Share of a run, its usual warm-up, whose high losses may leave the plot at the top, so that the rest is seen."""
MOST_POINTS = 1_000
"""Points drawn of one curve: more would only make the SVG larger."""
LABEL_CHARACTERS = 40
"""Of a variant's name, beyond which all names stand in a legend below, where they have the width of the figure."""
LEGEND_CHARACTERS, LEGEND_LINE_INCHES = 95, 0.17
"""Of a line in such a legend."""
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "velora-pretrain",
}


def has_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(
    rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Mapping[str, Sequence[float]]], folder: Path
) -> list[Path]:
    """Draws loss.png/.svg and perplexity_memory.png/.svg; a plot that no variant has data for is left out.

    Args:
        rows: as `compare perplexity` gives them in JSON.
        curves: for each variant `tokens` and, at each, `loss` in nats per token.
        folder: where the files go.

    Returns:
        The files.

    Raises:
        UserError: they cannot be written.
    """
    import matplotlib

    looks = variant_looks({row["variant"]: row["mode"] for row in rows})
    with matplotlib.rc_context(STYLE):
        figures = {
            "loss": _loss_figure({name: curve for name, curve in curves.items() if curve["tokens"]}, looks, rows),
            "perplexity_memory": _memory_figure([row for row in rows if row["learning_rate"] is not None], looks),
        }
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        try:
            return save_figures(drawn, folder)
        except OSError as error:
            raise UserError(f"{folder}: plots cannot be written there: {error.strerror}") from None


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Writes each figure in both formats, without what changes from day to day."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for ending, metadata in {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.items():
            written.append(folder / f"{name}.{ending}")
            figure.savefig(written[-1], dpi=160, metadata=metadata)
    return written


def variant_looks(modes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each variant; markers and lines alone tell the first 32 apart.

    Args:
        modes: for each variant its mode. The first of a mode has the mode's colour, others one that no mode here has.
    """
    first = {mode: variant for variant, mode in reversed(list(modes.items()))}
    free = [colour for colour in COLOURS if colour not in {MODE_COLOURS.get(mode) for mode in first}] or [*COLOURS]
    looks: dict[str, dict[str, Any]] = {}
    num_others = 0
    for place, (variant, mode) in enumerate(modes.items()):
        colour = MODE_COLOURS.get(mode)
        if colour is None or first[mode] != variant:
            colour = free[num_others % len(free)]
            num_others += 1
        looks[variant] = {"color": colour, **marker_and_line(place)}
    return looks


def marker_and_line(place: int) -> dict[str, Any]:
    """Marker and line style of the variant at that place: no two of the first 32 are alike."""
    return {
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[(place + place // len(MARKERS)) % len(LINES)],
    }


def _loss_figure(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    looks: Mapping[str, dict[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> Figure | None:
    """Training loss against tokens read."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    if not curves:
        return None
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes: Axes = figure.add_subplot()
    rates = {row["variant"]: row["learning_rate"] for row in rows}
    steps = max(len(curve["loss"]) for curve in curves.values())
    window = max(1, 2 * round(steps * SMOOTHED_SHARE / 2) + 1)
    early: list[float] = []
    late: list[float] = []
    for name, curve in curves.items():
        smooth = moving_mean(curve["loss"], window)
        every = max(1, math.ceil(len(smooth) / MOST_POINTS))
        axes.plot(
            curve["tokens"][::every],
            smooth[::every],
            label=f"{name}, lr {rates[name]:g}",
            gid=f"loss of {name}",
            linewidth=1.6,
            markersize=5,
            markevery=(0.02 + 0.16 * len(late) / len(curves), 0.16),
            **looks[name],
        )
        early.append(smooth[int(HIDDEN_SHARE * len(smooth))])
        late.append(min(smooth))
    margin = 0.05 * (max(early) - min(late)) or 0.1
    axes.set_ylim(min(late) - margin, max(early) + margin)
    axes.set_xlabel("tokens read")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    num_seeds = max((len({cell["seed"] for cell in row["cells"]}) for row in rows), default=1)
    seeds = f", mean over {num_seeds} seeds" if num_seeds > 1 else ""
    axes.set_ylabel("training loss (nats per token)")
    smoothing = f", moving mean over {window} steps" if window > 1 else ""
    axes.set_title(f"Training loss{seeds}{smoothing}", loc="left", fontsize=11)
    if _are_long(curves):
        _add_legend_below(figure, axes)
    else:
        axes.legend(frameon=False, handlelength=3)
    return figure


def _are_long(names: Iterable[str]) -> bool:
    return max(map(len, names)) > LABEL_CHARACTERS


def _add_legend_below(figure: Figure, axes: Axes) -> None:
    """A legend below the axes, long names on several lines, in a figure that is higher by as much."""
    handles, labels = axes.get_legend_handles_labels()
    wrapped = [textwrap.fill(label, LEGEND_CHARACTERS, subsequent_indent="    ") for label in labels]
    width, height = figure.get_size_inches()
    lines = sum(len(label.splitlines()) for label in wrapped)
    figure.set_size_inches(width, height + LEGEND_LINE_INCHES * lines)
    figure.legend(handles, wrapped, loc="outside lower left", frameon=False, handlelength=3, fontsize=8)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` values around each; near the ends over those of them that there are.

    Args:
        values: one per step.
        window: an odd number of steps.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        first, end = max(0, place - window // 2), min(len(values), place + window // 2 + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def _memory_figure(rows: Sequence[Mapping[str, Any]], looks: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Validation perplexity against predicted peak memory, one labelled point per variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["peak_memory_bytes"]["predicted"]]
    if not rows:
        return None
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes: Axes = figure.add_subplot()
    has_deviations = any(row["perplexity_sd"] is not None for row in rows)
    for row in rows:
        look = {key: value for key, value in looks[row["variant"]].items() if key != "linestyle"}
        axes.errorbar(
            row["peak_memory_bytes"]["predicted"] / GIB,
            row["perplexity_mean"],
            yerr=row["perplexity_sd"],
            label=row["variant"],
            gid=f"point of {row['variant']}",
            linestyle="none",
            markersize=7,
            capsize=4,
            elinewidth=1.2,
            **look,
        )
    axes.set_xlabel("predicted peak memory of a training step (GiB)")
    axes.set_ylabel("validation perplexity" + (" (mean ± sd over seeds)" if has_deviations else ""))
    axes.set_title("Perplexity and memory: lower left is better", loc="left", fontsize=11)
    axes.margins(0.18, 0.18)
    FigureCanvasAgg(figure)
    if _are_long(row["variant"] for row in rows):
        _add_legend_below(figure, axes)
    else:
        _place_labels(figure, axes, rows)
    return figure


PLACES = [
    (math.cos(math.radians(degrees)) * distance, math.sin(math.radians(degrees)) * distance)
    for distance in (11, 20, 32, 46, 62)
    for degrees in (25, -25, 155, -155, 70, -70, 110, -110)
]
"""Where a label may stand: offsets from its point, in points of 1/72 inch, the best first."""


def _place_labels(figure: Figure, axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Puts each label at the first place where it covers no point, error bar or label and stays inside the axes."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    points_per_pixel = figure.dpi / 72
    taken: list[Bbox] = []
    for row in rows:
        x, spread = row["peak_memory_bytes"]["predicted"] / GIB, row["perplexity_sd"] or 0.0
        ends = [axes.transData.transform((x, row["perplexity_mean"] + sign * spread)) for sign in (-1, 1)]
        pad = 6 * points_per_pixel
        taken.append(Bbox([ends[0] - pad, ends[1] + pad]))
    room = axes.get_window_extent()
    for row in rows:
        at = (row["peak_memory_bytes"]["predicted"] / GIB, row["perplexity_mean"])
        label = axes.annotate(
            row["variant"],
            at,
            xytext=PLACES[0],
            textcoords="offset points",
            color="#222222",
            fontsize=9,
            va="center",
        )
        costs = {place: _cost(label, place, taken, room) for place in PLACES}
        best = min(costs, key=lambda place: costs[place])
        taken.append(_moved(label, best))
        if math.hypot(*best) > 25:
            # Too far for the eye to follow: a line leads back to the point.
            axes.annotate(
                "", at, xytext=best, textcoords="offset points", arrowprops={"arrowstyle": "-", "color": "#999999"}
            )


def _moved(label: Annotation, place: tuple[float, float]) -> Bbox:
    """The label's box, in pixels, once it stands at that offset."""
    label.set_position(place)
    label.set_horizontalalignment("left" if place[0] > 0 else "right")
    return label.get_window_extent()


def _cost(label: Annotation, place: tuple[float, float], taken: Sequence[Bbox], room: Bbox) -> float:
    """Pixels² that a label at that place would cover of others or stand out of the axes."""
    from matplotlib.transforms import Bbox

    box = _moved(label, place)
    covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
    return covered + box.width * box.height - _area(Bbox.intersection(box, room))


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box is not None else 0.0
