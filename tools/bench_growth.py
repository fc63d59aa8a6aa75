"""How the cost of a step grows with the model's size, the micro-batch and the sequence length.

Each sweep changes one of the three and keeps the others. Every point is a `compare speed` of the modes: seconds per
step, tokens/s, predicted peak bytes. Growth is the slope in double logarithms, by least squares over the points: 1 is
in proportion. Beside it stands the slope that theory gives:

    time     that of the operations of matrix products, counted
    bytes    full rank in fp32: 16 P for weights, gradient and two moments of P parameters, and per token and block
             4 (8 D + 3 I) for what a block keeps (the table in nn/llama.py); other modes are held against it

Against size, x is the number of parameters. Sequence length grows at the same number of sequences.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import environment, environment_line, wide_console, write_json
from rich.console import Console
from rich.table import Table

from velora_pretrain.config import Run
from velora_pretrain.plots import COLOURS
from velora_pretrain.recipe import resolve
from velora_pretrain.speed import Entry, compare_speed
from velora_pretrain.variants import parse_variants

AXES = {"size": "parameters", "micro_batch": "sequences per micro-batch", "sequence_length": "tokens per sequence"}
"""The sweeps, and what grows."""


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of log y against log x, by least squares."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread_u = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread_u


def theory_bytes(run: Run) -> int:
    """What a full-rank step in fp32 holds by the formula above."""
    model, batch = run.llama, run.batch
    assert batch.micro_batch != "auto"
    per_token = 4 * model.num_hidden_layers * (8 * model.hidden_size + 3 * model.intermediate_size)
    return 16 * model.num_parameters + batch.micro_batch * batch.sequence_length * per_token


def points(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Axis and place of every point."""
    base = {"size": options.size, "micro_batch": options.micro_batch, "sequence_length": options.sequence_length}
    lists = {"size": options.sizes, "micro_batch": options.micro_batches, "sequence_length": options.sequence_lengths}
    return [(axis, {**base, axis: value}) for axis, values in lists.items() for value in values]


def runs_at(place: Mapping[str, Any], options: argparse.Namespace) -> list[Entry]:
    """The modes at one point."""
    values = {
        "size": place["size"],
        "precision": options.precision,
        "device": options.device,
        "batch.sequences": place["micro_batch"],
        "batch.micro_batch": place["micro_batch"],
        "batch.sequence_length": place["sequence_length"],
        "data": "sample",
        "packing": "pack",
    }
    positions = f"model.max_position_embeddings={max(1024, place['sequence_length'])}"
    return [
        Entry(
            label=variant.label,
            run=resolve(None, {**values, "mode": variant.mode}, [positions, *options.set, *variant.assignments]),
        )
        for variant in parse_variants(options.modes)
    ]


def measure_point(axis: str, place: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per mode."""
    entries = runs_at(place, options)
    result = compare_speed(entries, rounds=options.rounds)
    run = entries[0].run
    return [
        {
            "axis": axis,
            "x": run.llama.num_parameters if axis == "size" else place[axis],
            **place,
            "mode": row["variant"],
            "seconds": row["wall_seconds"]["median"],
            "tokens_per_second": row["tokens_per_second"],
            "matmul_operations": row["matmul_operations"],
            "peak_bytes": row["predicted"]["peak_bytes"],
            "theory_bytes": theory_bytes(run),
        }
        for row in result["rows"]
    ]


def slopes_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Growth along every axis with more than one point, by mode, beside that of theory."""
    found = []
    for axis, mode in dict.fromkeys((row["axis"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["axis"], row["mode"]) == (axis, mode)]
        xs = [row["x"] for row in own]
        if len(set(xs)) < 2:
            continue
        keys = ("seconds", "matmul_operations", "peak_bytes", "theory_bytes")
        found.append({"axis": axis, "mode": mode, **{key: slope(xs, [row[key] for row in own]) for key in keys}})
    return found


def print_growth(rows: Sequence[Mapping[str, Any]], slopes: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Every point, then the slopes."""
    table = Table(title="Cost of a step", title_justify="left")
    for heading in ("grows", "mode"):
        table.add_column(heading)
    headings = ("size", "micro-batch", "length", "step, ms", "tokens/s", "GFLOP of products", "peak GiB, predicted")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        place = (row["size"] or "custom", str(row["micro_batch"]), str(row["sequence_length"]))
        figures = (f"{row['seconds'] * 1e3:,.0f}", f"{row['tokens_per_second']:,.0f}")
        sizes = (f"{row['matmul_operations'] / 1e9:,.0f}", f"{row['peak_bytes'] / 2**30:.3f}")
        table.add_row(row["axis"], row["mode"], *place, *figures, *sizes)
    console.print(table)
    table = Table(title="Growth: slope in double logarithms, 1 is in proportion", title_justify="left")
    for heading in ("against", "mode"):
        table.add_column(heading)
    for heading in ("time", "theory: products", "bytes", "theory: full rank"):
        table.add_column(heading, justify="right")
    for each in slopes:
        figures = [f"{each[key]:.2f}" for key in ("seconds", "matmul_operations", "peak_bytes", "theory_bytes")]
        table.add_row(AXES[each["axis"]], each["mode"], *figures)
    console.print(table)


def plot(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Time and bytes along every axis as growth.png and growth.svg; dashed is theory through the first point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, NullLocator

    kinds = {"seconds": ("matmul_operations", "seconds per step"), "peak_bytes": ("theory_bytes", "peak bytes")}
    figure, panels = pyplot.subplots(len(kinds), len(AXES), figsize=(12, 7), squeeze=False, layout="constrained")
    for panel_row, (key, (theory, label)) in zip(panels, kinds.items(), strict=True):
        for panel, (axis, words) in zip(panel_row, AXES.items(), strict=True):
            if not any(row["axis"] == axis for row in rows):
                panel.set_axis_off()
                continue
            for number, mode in enumerate(dict.fromkeys(row["mode"] for row in rows)):
                own = sorted(
                    (row for row in rows if (row["axis"], row["mode"]) == (axis, mode)), key=lambda row: row["x"]
                )
                xs, colour = [row["x"] for row in own], COLOURS[number % len(COLOURS)]
                panel.plot(xs, [row[key] for row in own], "o-", color=colour, label=mode)
                if own and (key == "seconds" or mode == "full"):
                    scaled = [row[theory] * own[0][key] / own[0][theory] for row in own]
                    panel.plot(xs, scaled, "--", color=colour, alpha=0.6, label=f"{mode}: slope of theory")
            panel.set(xscale="log", yscale="log", xlabel=words, ylabel=label)
            # Ticks at what was measured: those of a decade fall on each other where there is less than one.
            panel.set_xticks(sorted({row["x"] for row in rows if row["axis"] == axis}))
            panel.xaxis.set_major_formatter(EngFormatter(sep="", places=0) if axis == "size" else "{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(EngFormatter(sep=" ", places=0) if key == "peak_bytes" else "{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(which="both", alpha=0.2)
    figure.legend(*next(p for p in panels[0] if p.lines).get_legend_handles_labels(), loc="outside upper center")
    folder.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(folder / f"growth.{ending}", dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="full,velora[layers=all]", help="as of `compare speed`")
    parser.add_argument("--sizes", nargs="*", default=["9m", "20m", "60m", "130m"], metavar="SIZE")
    parser.add_argument("--micro-batches", nargs="*", type=int, default=[1, 2, 4, 8, 16], metavar="SEQUENCES")
    parser.add_argument("--sequence-lengths", nargs="*", type=int, default=[128, 256, 512, 1024], metavar="TOKENS")
    parser.add_argument("--size", default="60m", help="where another axis grows")
    parser.add_argument("--micro-batch", type=int, default=4, help="likewise, in sequences")
    parser.add_argument("--sequence-length", type=int, default=256, help="likewise, in tokens")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each mode at each point")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write growth.png and growth.svg")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - for standard output")
    options = parser.parse_args(arguments)
    options.size = options.size or None
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for axis, place in points(options):
        rows += measure_point(axis, place, options)
        print(f"{axis} {place[axis]} done", file=sys.stderr, flush=True)
    slopes, facts, console = slopes_of(rows), environment(options.device), wide_console(stderr=options.json == "-")
    print_growth(rows, slopes, console)
    console.print(environment_line(facts))
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        write_json(options.json, {"environment": facts, "rows": rows, "slopes": slopes})


if __name__ == "__main__":
    main()
