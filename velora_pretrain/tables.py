"""Result tables of the commands, on standard output. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from velora_pretrain.records import GIB

MIB = 2**20
"""Bytes in one MiB."""

MEMORY_CATEGORIES = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_state_bytes": "optimizer state",
    "buffers_bytes": "buffers",
    "saved_activations_bytes": "saved activations",
    "loss_bytes": "loss",
    "temporaries_bytes": "temporaries",
    "peak_bytes": "peak",
}
"""Fields of a memory prediction or measurement, in the order shown, with their headings."""


def print_evaluation(fields: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the figures of one evaluation.

    Args:
        fields: those of an `EvaluationRecord`, and the names of what was evaluated.
        console: where to; standard output by default.
    """
    table = _grid()
    _add_evaluation(table, fields)
    for key, name in {"checkpoint": "checkpoint", "data": "data", "tokenizer_sha256": "tokenizer SHA-256"}.items():
        if fields.get(key) is not None:
            table.add_row(name, Text(str(fields[key])))
    (console or output_console()).print(table)


def print_harness(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what lm-evaluation-harness found, a line for each task and metric.

    Args:
        result: as `eval harness` gives it in JSON.
        console: where to; standard output by default.
    """
    first = f", first {result['limit']:,} documents of each task" if result["limit"] else ""
    table = Table(title=f"{result['checkpoint']}{first}", title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("value", "± standard error", "examples in the prompt", "documents"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        figures = (f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key]) for key in ("value", "stderr"))
        counts = (f"{row[key]:,}" if isinstance(row[key], int) else "" for key in ("few_shot", "documents"))
        cells = [row["task"], metric, *("" if each == "None" else each for each in figures), *counts]
        table.add_row(*map(Text, cells))
    (console or output_console()).print(table)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what a finished run came to.

    Args:
        summary: as the trainer returns it: final evaluation, memory, speed and where the run lies.
        console: where to; standard output by default.
    """
    table = _grid()
    _add_evaluation(table, summary["final_evaluation"])
    table.add_row("peak memory", gib(summary["peak_memory_bytes"]) + " GiB measured (on a CPU: the whole process)")
    predicted = summary.get("predicted_memory")
    if predicted:
        decimals = decimals_of([predicted])
        table.add_row("predicted, in GiB", _memory_parts(predicted, decimals))
        measured = summary.get("measured_memory") or {}
        if "peak_bytes" in measured:
            table.add_row("measured, in GiB", _memory_parts(measured, decimals) + " (one step, by the same accounting)")
        elif measured:
            allocated, reserved = (gib(measured[f"{key}_peak_bytes"], decimals) for key in ("allocated", "reserved"))
            table.add_row("measured, in GiB", f"allocated {allocated}, reserved {reserved} (peaks of one step)")
    reduced = summary.get("reduced_bytes_per_step")
    if reduced:
        decimals = 2 if max(reduced.values()) >= MIB else 4
        parts = ", ".join(f"{kind} {size / MIB:,.{decimals}f}" for kind, size in reduced.items())
        table.add_row("reduced, in MiB", f"{parts} (gradients that each process gives to be averaged, per step)")
    table.add_row("speed", f"{summary['tokens_per_second']:,.0f} tokens/s (median step)")
    elapsed = timedelta(seconds=round(summary["seconds"]))
    table.add_row("trained", f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {elapsed}")
    table.add_row("data", Text(str(summary["data"])))
    table.add_row("run folder", Text(str(summary["run_dir"])))
    (console or output_console()).print(table)


def print_perplexity(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints each variant at its best learning rate, what to know about it, and every cell.

    Args:
        result: as `compare perplexity` gives it in JSON.
        console: where to; standard output by default.
    """
    rows, shared = result["rows"], result["settings"]
    console = console or output_console()
    console.print(_best_rates_table(rows, shared))
    for row in rows:
        for note in _perplexity_notes(row):
            console.print(f"{row['variant']}: {note}", markup=False, highlight=False)
    if any(row["side_by_side"] for row in rows):
        console.print("Speeds were taken with cells side by side: they are lower than alone, and say little.")
    if len(shared["devices"]) > 1:
        console.print(f"Cells ran on {', '.join(shared['devices'])}: their speeds and memory cannot be compared.")
    for environment in shared["environments"] if len(shared["environments"]) > 1 else ():
        console.print(f"Some cells ran on {environment}", markup=False, highlight=False)
    console.print("Memory measured on a CPU is that of the whole process.")
    console.print(_cells_table(rows, shared["seeds"]))


def _best_rates_table(rows: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Table:
    seeds = len(shared["seeds"])
    table = Table(
        title=f"Validation perplexity after {shared['steps']:,} steps, each variant at its best learning rate"
        + (f", mean ± sd over {seeds} seeds" if seeds > 1 else ", one seed"),
        title_justify="left",
    )
    table.add_column("variant", overflow="fold")
    own = [words(_unlabelled(row)) for row in rows]
    if any(own):
        table.add_column("other settings", overflow="fold")
    baseline = shared["baseline"] or "the baseline"
    for name in (
        "learning rate",
        "perplexity",
        f"gap to {baseline} in %",
        "peak GiB, predicted",
        "measured",
        "tokens/s",
    ):
        table.add_column(name, justify="right")
    peaks = [row["peak_memory_bytes"] for row in rows]
    decimals = decimals_of([{"peak_bytes": value} for peak in peaks for value in peak.values() if value is not None])
    for row, settings in zip(rows, own, strict=True):
        memory = [None if peak is None else gib(peak, decimals) for peak in row["peak_memory_bytes"].values()]
        table.add_row(
            row["variant"],
            *([settings] if any(own) else []),
            "none" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            _spread(row["perplexity_mean"], row["perplexity_sd"], seeds),
            "" if row["variant"] == shared["baseline"] else _gap(row, seeds),
            *(figure or "n/a" for figure in memory),
            "n/a" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        )
    return table


def _perplexity_notes(row: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting a row."""
    cells, notes = row["cells"], []
    rates = [cell["learning_rate"] for cell in cells]
    if row["at_edge"]:
        ways = [way for way, edge in (("smaller", min(rates)), ("larger", max(rates))) if row["learning_rate"] == edge]
        if len(ways) > 1:
            notes.append("only one learning rate tried: try a smaller and a larger one")
        else:
            notes.append(f"best at the edge of the rates tried: try a {ways[0]} one")
    diverged = [cell for cell in cells if cell["diverged_at_step"] is not None]
    notes += [
        f"diverged at step {cell['diverged_at_step']} (learning rate {cell['learning_rate']:g}, seed {cell['seed']})"
        for cell in diverged
    ]
    return notes


def _cells_table(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Table:
    """Validation perplexity of every cell; the best learning rate of each variant is marked."""
    table = Table(title="Validation perplexity of every run, best learning rates marked *", title_justify="left")
    table.add_column("variant", overflow="fold")
    table.add_column("learning rate", justify="right")
    for seed in seeds:
        table.add_column(f"seed {seed}", justify="right")
    for row in rows:
        for rate in dict.fromkeys(cell["learning_rate"] for cell in row["cells"]):
            own = {cell["seed"]: cell for cell in row["cells"] if cell["learning_rate"] == rate}
            mark = " *" if rate == row["learning_rate"] else "  "
            figures = [
                "diverged" if own[seed]["diverged_at_step"] is not None else _spread(own[seed]["perplexity"], None, 1)
                for seed in seeds
            ]
            table.add_row(row["variant"], f"{rate:g}{mark}", *figures)
    return table


def _unlabelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """The mode's settings that do not stand in the variant's label."""
    return {key: value for key, value in row["options"].items() if f"{key}=" not in row["variant"].replace(" ", "")}


def _spread(mean: float | None, sd: float | None, seeds: int) -> str:
    if mean is None or not math.isfinite(mean):
        return "not finite"
    return f"{mean:.2f}" + ("" if seeds == 1 else " ± n/a" if sd is None else f" ± {sd:.2f}")


def _gap(row: Mapping[str, Any], seeds: int) -> str:
    mean, sd = row["gap_to_full_percent"], row["gap_to_full_percent_sd"]
    if mean is None:
        return "n/a"
    return f"{mean:+.1f}" + ("" if seeds == 1 else " ± n/a" if sd is None else f" ± {sd:.1f}")


def output_console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table to keep its lines."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=180)


def gib(size_bytes: int, decimals: int = 2) -> str:
    """A size in GiB, without its unit."""
    return f"{size_bytes / GIB:.{decimals}f}"


def decimals_of(uses: Sequence[Mapping[str, int]]) -> int:
    """Two decimals, or four where even the peaks are below one GiB and two would show nothing."""
    return 2 if max((use["peak_bytes"] for use in uses), default=GIB) >= GIB else 4


def _add_evaluation(table: Table, fields: Mapping[str, Any]) -> None:
    loss = f"loss {_figure(fields['eval_loss_nats_per_token'], 4)} nats/token"
    perplexity = _figure(fields["perplexity"], 2)
    table.add_row("validation perplexity", f"{perplexity}  ({loss}, {fields['eval_tokens']:,} tokens)")
    table.add_row(
        "perplexity_paper",
        f"{_figure(fields['perplexity_paper'], 2)}  (as the published tables compute it; far too low over few tokens)",
    )
    table.add_row("bits per byte", _figure(fields["bits_per_byte"], 4))


def _memory_parts(use: Mapping[str, Any], decimals: int) -> str:
    return ", ".join(f"{name} {gib(use[key], decimals)}" for key, name in MEMORY_CATEGORIES.items() if use.get(key))


def _figure(value: float | None, decimals: int) -> str:
    """A number; records have None for one that is not finite."""
    return "not finite" if value is None else f"{value:.{decimals}f}"


def _grid() -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def common_options(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that all rows share, with the same value."""
    first = dict(options[0]) if options else {}
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in options)}


def words(options: Mapping[str, Any]) -> str:
    """Options on one line."""
    return ", ".join(f"{key} {value}" for key, value in options.items())
