"""The tables of `doctor`, on standard output. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from velora_pretrain.records import GIB
from velora_pretrain.tables import output_console


def print_examination(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what was found, the sizes that fit, and what to do about it.

    Args:
        facts: of `doctor`, as its JSON has them.
        console: where to; standard output by default.
    """
    console = console or output_console()
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(facts):
        table.add_row(name, Text(value))
    console.print(table)
    console.print()
    console.print(
        f"The most sequences in a pass whose step fits in {_gib(facts['budget_bytes'])}, predicted, in"
        f" {facts['recipe']['precision']}; up to {facts['most_sequences']}, beyond which a pass hardly gets faster:"
    )
    console.print(_sizes_table(facts))
    if facts["advice"]:
        console.print()
    for line in facts["advice"]:
        console.print(f"! {line}", soft_wrap=not console.is_terminal)


def _lines(facts: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    device, host, disk, versions = (facts[key] for key in ("device", "host", "disk", "versions"))
    count = f"{device['count']} × " if device["kind"] == "cuda" else ""
    threads = f"{host['threads']} thread{'s' if host['threads'] != 1 else ''} on {host['usable_cores']} usable cores"
    lines = [("device", f"{device['kind']}: {count}{device['name']}")]
    if device["kind"] == "cuda":
        lines.append(("device memory", f"{_gib(device['free_memory_bytes'])} free of {_gib(device['memory_bytes'])}"))
    lines += [
        ("host", f"{host['cpu']}, {threads}" if device["kind"] != "cpu" else threads),
        ("host memory", f"{_gib(host['free_memory_bytes'])} free of {_gib(host['memory_bytes'])}"),
        ("disk", f"{_gib(disk['free_bytes'])} free in {disk['folder']}"),
        ("matrix products", _formats(facts["formats"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("hub", f"reachable ({facts['hub']['endpoint']})" if facts["hub"]["is_reachable"] else facts["hub"]["fault"]),
        ("extras", _extras(facts["extras"])),
        ("--compile", _compiler(facts["compiler"])),
        *_recipe_lines(facts["recipe"]),
    ]
    return lines


def _formats(formats: Mapping[str, Any]) -> str:
    parts = []
    for name, each in formats.items():
        if not each["is_supported"]:
            parts.append(f"none in {name}")
            continue
        ratio = "" if name == "fp32" else f" ({each['fp32_ratio']:.2f} × fp32)"
        parts.append(f"{name} {_rate(each['operations_per_second'])}{ratio}")
    return ", ".join(parts)


def _rate(operations_per_second: float) -> str:
    if operations_per_second >= 1e13:
        return f"{operations_per_second / 1e12:,.0f} TFLOP/s"
    return f"{operations_per_second / 1e9:,.0f} GFLOP/s"


def _extras(missing: Mapping[str, Sequence[str]] | None) -> str:
    if missing is None:
        return "unknown: the package runs from its source and is not installed"
    there = [name for name, requirements in missing.items() if not requirements]
    lacking = [f"{name} ({', '.join(requirements)})" for name, requirements in missing.items() if requirements]
    how = 'not there, for pip install "velora-pretrain[NAME]": '
    return "; ".join([", ".join(there) or "none", *([how + ", ".join(lacking)] if lacking else [])])


def _compiler(compiler: Mapping[str, Any]) -> str:
    if compiler["missing"]:
        return f"would fail, for want of {' and '.join(compiler['missing'])}"
    return f"has its compiler, {compiler['path']}" if compiler["path"] else "needs no compiler of the system"


def _recipe_lines(recipe: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    what = f"{recipe['size'] or 'a model of its own'}, mode {recipe['mode']}, {recipe['precision']}"
    tokens = recipe["steps"] * recipe["step_tokens"]
    lines = [
        (
            f"recipe {recipe['name']}",
            f"{what}: {recipe['steps']:,} steps of {recipe['step_tokens']:,} tokens, {tokens:,} in all",
        ),
        (
            "  its memory",
            f"{_gib(recipe['peak_bytes'])} at {recipe['micro_batch_sequences']} sequences a pass, predicted"
            + ("" if recipe["fits"] else "; more than there is"),
        ),
    ]
    if recipe["seconds"] is not None:
        step = recipe["measured_step"]
        lines.append(
            (
                "  its time",
                f"about {_duration(recipe['seconds'])} without evaluations: {recipe['tokens_per_second']:,.0f}"
                f" tokens/s, {recipe['gemm_rate_share'] * 100:.0f} % of the rate of matrix products, from steps of"
                f" {step['micro_batch_sequences']} sequences taken here and now",
            )
        )
    elif recipe["seconds_at_least"] is not None:
        lines.append(
            (
                "  its time",
                f"at least {_duration(recipe['seconds_at_least'])}, if only matrix products took time; no step was"
                f" measured: {recipe['not_measured_because']}",
            )
        )
    else:
        lines.append(("  its time", f"unknown: {recipe['not_measured_because']}"))
    return lines


def _sizes_table(facts: Mapping[str, Any]) -> Table:
    rows = facts["sizes"]
    table = Table("size")
    for name in ("parameters", *rows[0]["micro_batch_sequences"]):
        table.add_column(name, justify="right")
    for row in rows:
        fitting = (str(number) if number else "none" for number in row["micro_batch_sequences"].values())
        table.add_row(row["size"], f"{row['parameters'] / 1e6:,.0f}M", *fitting)
    return table


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:,.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:,.1f} days"
    return str(timedelta(seconds=round(seconds)))
