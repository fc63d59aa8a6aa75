"""The table of `compare memory`, on standard output. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from velora_pretrain.tables import MEMORY_CATEGORIES, common_options, decimals_of, gib, output_console, words


def print_memory_rows(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints memory by category, one line per mode and option set, predicted and, where there is one, measured.

    Args:
        rows: as `compare memory` gives them in JSON.
        console: where to; standard output by default.
    """
    common = common_options([row["options"] for row in rows])
    budgets = {row["budget_bytes"] for row in rows if row.get("budget_bytes")}
    asked = f"; the most that fits in {gib(max(budgets))} GiB" if budgets else ""
    table = Table(title=f"Memory of a training step in GiB: {words(common)}{asked}", title_justify="left")
    uses = [row[kind] for row in rows for kind in ("predicted", "measured") if row[kind]]
    decimals = decimals_of(uses)
    shown = {
        key: name
        for key, name in MEMORY_CATEGORIES.items()
        if key == "peak_bytes" or any(float(gib(use.get(key) or 0, decimals)) for use in uses)
    }
    table.add_column("mode")
    table.add_column("options")
    if any(row["measured"] for row in rows):
        table.add_column("")
    for name in shown.values():
        table.add_column(name, justify="right")
    has_savings = any("saving_bytes" in row for row in rows)
    for name in ("at", "saves", "%", "products × full") if has_savings else ():
        table.add_column(name, justify="left" if name == "at" else "right")
    own = [words({key: value for key, value in row["options"].items() if key not in common}) for row in rows]
    for row, options in zip(rows, own, strict=True):
        for kind in ("predicted", "measured"):
            use = row[kind]
            if not use:
                continue
            cells = [row["mode"], options or "default"] + ([kind] if any(row["measured"] for row in rows) else [])
            cells += [gib(use[key], decimals) if use.get(key) is not None else "" for key in shown]
            table.add_row(*cells, *(_saving_cells(row, kind, decimals) if has_savings else []))
    console = console or output_console()
    console.print(table)
    if has_savings:
        console.print(
            "saves: against full rank that keeps everything, at the same micro-batch. products × full: operations of"
            " matrix products in a step, with those that recomputation repeats; it is the ratio of step times where"
            " only they take time. What is done once in many steps, such as finding subspaces, is in neither."
        )
    for row, options in zip(rows, own, strict=True):
        misfit = ["does not fit even so"] if row.get("fits_budget") is False else []
        for note in (*misfit, *row.get("notes", ())):
            console.print(f"{row['mode']}, {options or 'default'}: {note}", markup=False, highlight=False)
    if any("published" in row for row in rows):
        _print_published(rows, own, console)


def _saving_cells(row: Mapping[str, Any], kind: str, decimals: int) -> list[str]:
    moment = (row[kind] or {}).get("peak_moment", "")
    if kind == "measured":
        return [moment, "", "", ""]
    saving = gib(row["saving_bytes"], decimals)
    return [moment, saving, f"{row['saving_percent']:.1f}", f"{row['operations_ratio']:.2f}"]


def _print_published(rows: Sequence[Mapping[str, Any]], own: Sequence[str], console: Console) -> None:
    """The accountings of published tables beside ours, and what each counts."""
    table = Table(title="Published accountings, in GB of 10⁹ bytes", title_justify="left")
    for name in ("mode", "options", "weights + states, bf16", "our peak, one sequence", "published peak"):
        table.add_column(name, justify="left" if name in ("mode", "options") else "right")
    for row, options in zip(rows, own, strict=True):
        figures = row["published"].values()
        table.add_row(row["mode"], options or "default", *("" if each is None else f"{each:.2f}" for each in figures))
    console.print(table)
    for line in (
        "weights + states, bf16: two bytes for each number in weights and optimizer state, as the tables of"
        " arXiv 2403.03507 and 2412.05270 count; gradients, activations, loss and temporaries are left out.",
        "our peak, one sequence: everything alive at the peak of a step on one sequence, in this table's precision.",
        "published peak: GPU memory as published in arXiv 2405.17991 (60m, 130m; its own layers, no recomputation);"
        " what of an allocator's and a kernel's memory it has in it is not said.",
    ):
        console.print(line, markup=False, highlight=False)
