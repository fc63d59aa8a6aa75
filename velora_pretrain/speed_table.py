"""The table of `compare speed`, on standard output. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("data", "forward", "backward", "optimizer")


def print_speed(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints one line per mode, then what the figures are held against.

    Args:
        result: as `compare speed` gives it in JSON.
        console: where to; standard output by default.
    """
    console = console or _output_console()
    rows, settings, gemm = result["rows"], result["settings"], result["gemm"]
    console.print(_table(rows, settings))
    shapes = ", ".join(
        f"{'×'.join(map(str, each['shape']))} {each['operations_per_second']['median'] / 1e9:,.0f}"
        for each in gemm["shapes"].values()
    )
    lines = [
        f"Matrix products in {gemm['dtype']}, measured between the rounds, in GFLOP/s: {shapes}; utilisation is of the"
        " highest. Model FLOP/s count what full rank needs without recomputation, in every mode.",
        f"Limit: × {settings['baseline']} if only matrix products took time. Forward and backward are to be read"
        " together: the loss makes its gradient in the forward pass.",
        *(line for row in rows for line in _rare_lines(row)),
        *result["notes"],
        ", ".join(f"{key} {value}" for key, value in result["environment"].items()),
    ]
    for line in lines:
        console.print(line, soft_wrap=True)


def _table(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Table:
    options = rows[0]["options"]
    order = f"{settings['blocks']} blocks, one mode at a time" if settings["blocks"] else "interleaved"
    passes = options["step_sequences"] // options["micro_batch_sequences"]
    batch = f"{passes} × " if passes > 1 else ""
    title = (
        f"{options['size'] or 'custom'}, {batch}{options['micro_batch_sequences']} × {options['sequence_length']}"
        f" tokens a step, {options['precision']}, recompute {options['recompute']}, {settings['rounds']} steps of each,"
        f" {order}; median (quartiles)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("mode", overflow="fold", min_width=12)
    headings = ["tokens/s", "step, ms", *PARTS, "CPU, ms", f"× {settings['baseline']}", "limit"]
    headings += ["model GFLOP/s", "utilisation %", "optimizer at 131k tokens, %"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        share = row["optimizer_share_at_131072_tokens"]
        table.add_row(
            row["variant"],
            f"{row['tokens_per_second']:,.0f}",
            _quartiles(row["wall_seconds"], 1e3, 0),
            *(f"{row[f'{part}_seconds']['median'] * 1e3:,.1f}" for part in PARTS),
            f"{row['cpu_seconds']['median'] * 1e3:,.0f}",
            _quartiles(row["wall_speed_ratio"], 1.0, 3),
            f"{row['matmul_limit_ratio']:.3f}",
            f"{row['model_flops_per_second'] / 1e9:,.0f}",
            f"{row['model_flops_utilisation'] * 100:.0f}",
            "in backward" if share is None else f"{share * 100:.1f}",
        )
    return table


def _rare_lines(row: Mapping[str, Any]) -> list[str]:
    """What is done seldom, and what it adds to a step."""
    return [
        f"{row['variant']}: what it does once in {work['period_steps']} steps takes"
        f" {_quartiles(work['seconds'], 1e3, 0)} ms: {work['share_of_step'] * 100:.2f} % of each step, which is in the"
        " figures"
        for work in row["rare_work"]
    ]


def _quartiles(values: Mapping[str, float], factor: float, decimals: int) -> str:
    low, mid, high = (values[key] * factor for key in ("lower_quartile", "median", "upper_quartile"))
    return f"{mid:,.{decimals}f} ({low:,.{decimals}f}–{high:,.{decimals}f})"


def _output_console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table to keep its lines."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=200)
