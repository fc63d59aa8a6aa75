"""The pictures of a report: curves of runs, their memory, and what that bought. matplotlib is the extra `plot`.

A mode has one colour in all of them. Up to `MOST_NAMED` runs have a name each in the legend, with a line style of their
own within their mode; of more, the legend has the modes. Figures are as wide as a phone shows without shrinking them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from velora_pretrain.memory_plot import PART_COLOURS, PARTS
from velora_pretrain.plots import (
    GREY,
    HIDDEN_SHARE,
    LINES,
    MARKERS,
    MODE_COLOURS,
    MOST_POINTS,
    SMOOTHED_SHARE,
    moving_mean,
)
from velora_pretrain.run_view import RunView, are_timed, memory_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 8
"""Runs that have names of their own in the legends."""
WIDTH_INCHES, HEIGHT_INCHES = 4.7, 3.1
"""Of a picture without its legend: on a phone its text is then as large as that of the page."""
LEGEND_CHARACTERS, LEGEND_ROW_INCHES = 50, 0.185
"""Of a row of a legend; longer names lose their middle."""
BAR_INCHES = 0.58
"""Height of one run's place in the picture of memory."""
POINTS_IN_ALL = 8_000
"""Points drawn of all curves of one picture together."""
SPEED_SHARE = 0.05
"""Window of the speed's moving mean, as a share of the steps."""
LOG_RATIO = 5.0
"""Highest over lowest value from which on an axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One figure, and what it shows in words."""

    name: str
    """Of its files."""
    title: str
    description: str
    """For those who cannot see it: kind of chart, axes and last values."""
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run's line in one picture."""

    view: RunView
    x: list[float]
    y: list[float]


Values = Callable[[RunView], Iterable[tuple[float | None, float | None]]]


def draw_pictures(views: Sequence[RunView]) -> list[Picture]:
    """Every picture that the runs have data for, in the order of a report."""
    steps_only = not are_timed(views)
    hours_of = {id(view): view.hours(steps_only=steps_only) for view in views}
    hours_unit, per_hour = _time_unit(max((each.last for each in hours_of.values()), default=0.0))
    tokens, time = "tokens read", f"training time ({hours_unit}, {'steps only' if steps_only else 'without pauses'})"

    def times(hours: Sequence[float | None]) -> list[float | None]:
        return [None if hour is None else hour * per_hour for hour in hours]

    def of_steps(key: str) -> tuple[Values, Values]:
        """A training figure against tokens and against time."""
        return (
            lambda view: ((record.get("tokens"), record.get(key)) for record in view.training),
            lambda view: zip(
                times(hours_of[id(view)].training), [each.get(key) for each in view.training], strict=True
            ),
        )

    def perplexity_tokens(view: RunView) -> Iterable[tuple[float | None, float | None]]:
        tokens_at = {record["step"]: record.get("tokens") for record in view.training}
        return ((tokens_at.get(each["step"]), each["perplexity"]) for each in view.evaluations)

    def perplexity_time(view: RunView) -> Iterable[tuple[float | None, float | None]]:
        return zip(
            times(hours_of[id(view)].evaluations), [each["perplexity"] for each in view.evaluations], strict=True
        )

    loss_tokens, loss_hours = of_steps("loss_nats_per_token")
    rate, norm, speed = (of_steps(key)[0] for key in ("learning_rate", "grad_norm", "tokens_per_second"))
    loss, perplexity, share = "training loss (nats per token)", "validation perplexity", SMOOTHED_SHARE
    drawn = [
        _lines(views, loss_tokens, "loss_tokens", "Training loss by tokens", tokens, loss, smoothed_share=share),
        _lines(views, loss_hours, "loss_hours", "Training loss by time", time, loss, smoothed_share=share),
        _lines(views, perplexity_tokens, "perplexity_tokens", "Validation perplexity by tokens", tokens, perplexity),
        _lines(views, perplexity_time, "perplexity_hours", "Validation perplexity by time", time, perplexity),
        _memory_bars(views),
        _perplexity_memory(views),
        _lines(views, rate, "learning_rate", "Learning rate", tokens, "learning rate", from_zero=True),
        _lines(views, norm, "gradient_norm", "Gradient norm", tokens, "norm before clipping", smoothed_share=share),
        _lines(views, speed, "speed", "Speed", tokens, "tokens per second", smoothed_share=SPEED_SHARE, from_zero=True),
    ]
    return [picture for picture in drawn if picture is not None]


def _time_unit(longest: float) -> tuple[str, float]:
    """Hours, or a shorter unit where so many are few; and how many of it an hour has."""
    return ("hours", 1.0) if longest >= 1 else ("minutes", 60.0) if longest * 60 >= 2 else ("seconds", 3600.0)


def looks(views: Sequence[RunView]) -> list[dict[str, Any]]:
    """Colour, marker and line style of each run: the colour is the mode's, the others tell its runs apart."""
    places: dict[str, itertools.count[int]] = {}
    found = []
    for view in views:
        place = next(places.setdefault(view.run.mode, itertools.count()))
        styles = {"marker": MARKERS[place % len(MARKERS)], "linestyle": LINES[place % len(LINES)]}
        found.append({"color": MODE_COLOURS.get(view.run.mode, GREY), **styles})
    return found


def _lines(
    views: Sequence[RunView],
    values: Values,
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    *,
    smoothed_share: float = 0.0,
    from_zero: bool = False,
) -> Picture | None:
    """A line per run; None where no run has values."""
    curves = [_curve(view, values, smoothed_share) for view in views]
    drawn = [(curve, look) for curve, look in zip(curves, looks(views), strict=True) if curve.x]
    if not drawn:
        return None
    figure, axes = _new_figure()
    every_nth = max(1.0, len(drawn) * MOST_POINTS / POINTS_IN_ALL)
    are_named = len(views) <= MOST_NAMED
    for place, (curve, look) in enumerate(drawn):
        stride = max(1, math.ceil(len(curve.x) * every_nth / MOST_POINTS))
        # The last value is always there.
        at = sorted({*range(0, len(curve.x), stride), len(curve.x) - 1})
        axes.plot(
            [curve.x[each] for each in at],
            [curve.y[each] for each in at],
            gid=f"{name}-mark-{place}",
            linewidth=1.7 if are_named else 1.0,
            alpha=1.0 if are_named else 0.75,
            color=look["color"],
            linestyle=look["linestyle"] if are_named else "-",
            marker=look["marker"] if len(curve.x) <= 30 else None,
            markersize=4,
        )
    _limit_y(axes, [curve for curve, _ in drawn], from_zero=from_zero)
    axes.set_xlim(left=0)
    _label_axes(axes, x_label, y_label)
    _add_legend(figure, views, {id(curve.view) for curve, _ in drawn}, with_lines=True)
    last = _listed([(curve.view.name, f"{curve.y[-1]:.4g}") for curve, _ in drawn])
    return Picture(
        name=name,
        title=title,
        description=f"Line chart: {y_label} against {x_label}, {_count(len(drawn))}. Last values: {last}.",
        figure=figure,
    )


def _curve(view: RunView, values: Values, smoothed_share: float) -> Curve:
    """The finite values of a run, each a mean over so large a share of them around it."""
    pairs = [(x, y) for x, y in values(view) if x is not None and y is not None]
    y = [float(pair[1]) for pair in pairs]
    y = moving_mean(y, max(1, 2 * round(len(y) * smoothed_share / 2) + 1))
    return Curve(view=view, x=[float(pair[0]) for pair in pairs], y=y)


def _limit_y(axes: Axes, curves: Sequence[Curve], *, from_zero: bool = False) -> None:
    """Chooses scale and limits by runs that did not fail, and not by their first values, which are of the warm-up."""
    sound = [curve for curve in curves if curve.view.state != "failed"] or curves
    later = [value for curve in sound for value in curve.y[int(HIDDEN_SHARE * len(curve.y)) :]]
    low, high = min(later), max(later)
    # Of curves that begin at zero it is the peaks that may lie orders of magnitude apart.
    lowest = min(max(curve.y) for curve in sound) if from_zero else low
    if lowest > 0 and high / lowest >= (LOG_RATIO**2 if from_zero else LOG_RATIO):
        set_log(axes, high / low if low > 0 else high / lowest)
        low = low if low > 0 else lowest / 10
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        return
    margin = 0.06 * (high - (0 if from_zero else low)) or 0.05 * abs(high) or 1.0
    axes.set_ylim(0.0 if from_zero or low - margin < 0 <= low else low - margin, high + margin)
    axes.yaxis.set_major_formatter(_tick)


def set_log(axes: Axes, ratio: float) -> None:
    """Makes the y axis logarithmic, with plain numbers at as many places as a range of that ratio has room for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 100 else (1,), numticks=12))
    axes.yaxis.set_major_formatter(_tick)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float, _: object = None) -> str:
    """A number at an axis: 0.002, 15, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _memory_bars(views: Sequence[RunView]) -> Picture | None:
    """Bytes by category at a step's peak, predicted above measured; one place for runs that need the same."""
    shown: dict[Any, list[RunView]] = {}
    for view in views:
        predicted = memory_of(view.summary, "predicted")
        if predicted:
            shown.setdefault((view.run.mode, *(predicted.get(key, 0) for key in PARTS)), []).append(view)
    if not shown:
        return None
    groups = list(shown.values())
    uses = [(memory_of(group[0].summary, "predicted") or {}, _measured(group)) for group in groups]
    unit, size = byte_unit(max(use.get("peak_bytes", 0) for pair in uses for use in pair))
    figure, axes = _new_figure(height=1.1 + BAR_INCHES * len(groups))
    for place, (group, (predicted, measured)) in enumerate(zip(groups, uses, strict=True)):
        label = shortened(group[0].name) if len(group) == 1 else f"{group[0].run.mode}, {len(group)} runs"
        axes.annotate(label, (0, place - 0.36), xytext=(2, 0), textcoords="offset points", va="center", fontsize=8)
        _bar(axes, place - 0.08, predicted, size, f"memory-mark-{place}", hatch=None)
        if any(measured.get(key) for key in PARTS):
            _bar(axes, place + 0.2, measured, size, f"memory-measured-{place}", hatch="////")
        elif measured:
            axes.plot(measured["peak_bytes"] / size, place - 0.08, "|", color="#000000", markersize=14)
    axes.set_ylim(len(groups) - 0.5, -0.55)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit} at the peak of a training step")
    _add_part_legend(figure, uses)
    listed = _listed(
        [(group[0].name, f"{use[0]['peak_bytes'] / size:.4g}") for group, use in zip(groups, uses, strict=True)]
    )
    return Picture(
        name="memory",
        title="Peak memory by category",
        description=f"Stacked bars: {unit} by category at the peak of a training step, predicted, and measured where"
        f" that was done. Predicted peaks: {listed}.",
        figure=figure,
    )


def _measured(group: Sequence[RunView]) -> dict[str, int]:
    """The largest measurement of runs that need the same; on a device that counts no categories, its peak alone."""
    found = [use for view in group if (use := memory_of(view.summary, "measured"))]
    if found:
        return max(found, key=lambda use: use["peak_bytes"])
    raw = [((view.summary or {}).get("measured_memory") or {}).get("allocated_peak_bytes") or 0 for view in group]
    return {"peak_bytes": max(raw)} if any(raw) else {}


def _bar(axes: Axes, place: float, use: Mapping[str, int], size: int, gid: str, *, hatch: str | None) -> None:
    left = 0.0
    for key in PARTS:
        width = use.get(key, 0) / size
        if width:
            (bar,) = axes.barh(
                place,
                width,
                left=left,
                height=0.26,
                color=PART_COLOURS[key],
                hatch=hatch,
                edgecolor="#ffffff",
                linewidth=0,
            )
            bar.set_gid(f"{gid}-{key}")
            left += width
    axes.annotate(f"{left:.3g}", (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _add_part_legend(figure: Figure, uses: Sequence[tuple[Mapping[str, int], Mapping[str, int]]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys = [key for key in PARTS if any(use.get(key) for pair in uses for use in pair)]
    handles: list[Any] = [Patch(color=PART_COLOURS[key], label=PARTS[key]) for key in keys]
    if any(measured.get(key) for _, measured in uses for key in PARTS):
        handles.append(Patch(facecolor=GREY, edgecolor="#ffffff", hatch="////", label="measured"))
    if any(measured and not any(measured.get(key) for key in PARTS) for _, measured in uses):
        handles.append(
            Line2D([], [], linestyle="none", marker="|", markersize=10, color="#000000", label="measured peak")
        )
    _place_legend(figure, handles, columns=3)


def _perplexity_memory(views: Sequence[RunView]) -> Picture | None:
    """A point per run: what its memory bought."""
    points = [
        (view, look, memory["peak_bytes"], view.final_evaluation["perplexity"])
        for view, look in zip(views, looks(views), strict=True)
        if (memory := memory_of(view.summary, "predicted")) and view.final_evaluation.get("perplexity") is not None
    ]
    if not points:
        return None
    unit, size = byte_unit(max(peak for _, _, peak, _ in points))
    figure, axes = _new_figure()
    for place, (_, look, peak, perplexity) in enumerate(points):
        axes.plot(
            peak / size,
            perplexity,
            gid=f"perplexity_memory-mark-{place}",
            linestyle="none",
            marker=look["marker"],
            markersize=7,
            color=look["color"],
            alpha=0.85,
        )
    axes.margins(0.12, 0.15)
    lowest, highest = (choose(perplexity for *_, perplexity in points) for choose in (min, max))
    if highest / lowest >= LOG_RATIO:
        set_log(axes, highest / lowest)
    _label_axes(axes, f"predicted peak memory of a training step ({unit})", "validation perplexity")
    _add_legend(figure, views, {id(view) for view, *_ in points}, with_lines=False)
    listed = _listed([(view.name, f"{perplexity:.4g} at {peak / size:.3g}") for view, _, peak, perplexity in points])
    return Picture(
        name="perplexity_memory",
        title="Perplexity against memory",
        description=f"Scatter chart: final validation perplexity against {unit} of predicted peak memory: {listed}.",
        figure=figure,
    )


def byte_unit(largest_bytes: int) -> tuple[str, int]:
    """The unit in which sizes up to that read best, and its bytes."""
    return ("GiB", 2**30) if largest_bytes >= 2**29 else ("MiB", 2**20) if largest_bytes >= 2**19 else ("KiB", 2**10)


def shortened(name: str, most: int = LEGEND_CHARACTERS) -> str:
    """The name, its middle left out where it is too long."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[len(name) - most // 2 :]}"


def _new_figure(height: float = HEIGHT_INCHES) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.add_subplot()


def _label_axes(axes: Axes, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(_tick)


def _add_legend(figure: Figure, views: Sequence[RunView], shown: set[int], *, with_lines: bool) -> None:
    """Names of few runs, or the modes of many, below the picture."""
    from matplotlib.lines import Line2D

    handles = []
    if len(views) <= MOST_NAMED:
        for view, look in zip(views, looks(views), strict=True):
            if id(view) in shown:
                style = look if with_lines else {**look, "linestyle": "none"}
                handles.append(Line2D([], [], label=shortened(view.name), linewidth=1.7, markersize=5, **style))
    else:
        modes = [view.run.mode for view in views if id(view) in shown]
        for mode in dict.fromkeys(modes):
            label = f"{mode} ({_count(modes.count(mode))})"
            handles.append(Line2D([], [], label=label, linewidth=3, color=MODE_COLOURS.get(mode, GREY)))
    longest = max(len(handle.get_label()) for handle in handles)
    _place_legend(figure, handles, columns=max(1, min(3, LEGEND_CHARACTERS // (longest + 7))))


def _place_legend(figure: Figure, handles: Sequence[Any], *, columns: int) -> None:
    """A legend below the axes, in a figure that is higher by as much."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_ROW_INCHES * math.ceil(len(handles) / columns))
    labels = [handle.get_label() for handle in handles]
    # An underscore at the beginning hides a label before matplotlib 3.10.
    labels = [f"\u200b{label}" if label.startswith("_") else label for label in labels]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.2, handlelength=1.8
    )


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    parts = [f"{name} {value}" for name, value in pairs[:MOST_NAMED]]
    return ", ".join(parts) + (f" and {len(pairs) - MOST_NAMED} more" if len(pairs) > MOST_NAMED else "")


def _count(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"
