"""What `show` prints: the runs there are, or one of them. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from velora_pretrain.config import Run
from velora_pretrain.dimensions import SIZES
from velora_pretrain.display import evaluation_line, step_figures
from velora_pretrain.recipe import differences
from velora_pretrain.run_view import RunView, age_seconds, evaluation_record, memory_of, printable, training_record
from velora_pretrain.sparkline import sparkline
from velora_pretrain.tables import gib, output_console

STATE_STYLES = {"running": "bold cyan", "finished": "green", "failed": "bold red", "stopped": "yellow"}
LAST_RECORDS = 5
"""Training records and evaluations shown of one run."""
SPARKLINE_CHARACTERS = 60


def print_runs(glances: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints a line for each run.

    Args:
        glances: as `run_view.glance` gives them.
        console: where to; standard output by default.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("mode", "size", "state"):
        table.add_column(name)
    for name in ("step", "loss", "perplexity", "tokens/s", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in glances:
        if each["state"] == "unreadable":
            figures = [Text("unreadable", style="bold red"), *[""] * 4]
        else:
            figures = [
                Text(each["state"], style=STATE_STYLES[each["state"]]),
                f"{each['step']:,}/{each['steps']:,}",
                _figure(each["loss_nats_per_token"], ".4f"),
                _figure(each["perplexity"], ".2f"),
                _figure(each["tokens_per_second"], ",.0f"),
            ]
        mode, size = each.get("mode", ""), (each.get("size") or "custom") if "mode" in each else ""
        table.add_row(
            Text(printable(Path(each["run_dir"]).name)), mode, size, *figures, short_time(each["age_seconds"])
        )
    console = console or output_console()
    console.print(table)
    for each in glances:
        if each["state"] == "unreadable":
            console.print(f"{each['run_dir']}: {each['reason']}", markup=False, highlight=False, soft_wrap=True)


def run_facts(view: RunView) -> dict[str, Any]:
    """One run for JSON: its settings that are not defaults, last records, evaluations, checkpoints and how it ended."""
    checkpoints = [
        {"path": str(path), "size_bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file())}
        for path in reversed(view.folder.checkpoints_newest_first())
    ]
    return {
        "run_dir": str(view.folder.path),
        "state": view.state,
        "age_seconds": age_seconds(view.folder),
        "settings": changed_settings(view.run),
        "steps": view.run.steps,
        "last_records": view.training[-LAST_RECORDS:],
        "evaluations": view.evaluations,
        "samples": view.samples,
        "checkpoints": checkpoints,
        "summary": view.summary,
        "failure": view.failure,
    }


def changed_settings(run: Run) -> dict[str, Any]:
    """Dotted keys that are not as the defaults have them."""
    default = Run(size=next(iter(SIZES)))
    changed = {key: value for key, (value, _) in differences(run, default).items() if key != "size"}
    return ({"size": run.size} if run.size else {}) | changed


def print_run(view: RunView, console: Console | None = None) -> None:
    """Prints one run.

    Args:
        view: the run.
        console: where to; standard output by default.
    """
    console, facts = console or output_console(), run_facts(view)
    step = view.training[-1]["step"] if view.training else 0
    head = Text(printable(facts["run_dir"]), style="bold")
    head.append(f"  {view.state}", style=STATE_STYLES[view.state])
    head.append(
        f", step {step:,} of {view.run.steps:,}, last written {short_time(facts['age_seconds'])} ago", style="not bold"
    )
    console.print(head, soft_wrap=True)
    if view.failure:
        _lines(console, "failed", [f"step {view.failure.get('step')}: {view.failure.get('reason')}"])
    _lines(console, "settings", [f"{key} = {value}" for key, value in facts["settings"].items()])
    losses = [record["loss_nats_per_token"] for record in view.training if record["loss_nats_per_token"] is not None]
    if losses:
        _lines(
            console, "loss", [f"{sparkline(losses, SPARKLINE_CHARACTERS)}  from {losses[0]:.4f} to {losses[-1]:.4f}"]
        )
    _lines(console, f"last {LAST_RECORDS} steps", map(_step_line, view.training[-LAST_RECORDS:]))
    _lines(
        console, "evaluations", (evaluation_line(evaluation_record(each)) for each in view.evaluations[-LAST_RECORDS:])
    )
    samples = view.last_samples()
    if samples:
        console.print(Text(f"samples at step {samples[0]['step']}", style="dim"))
        for each in samples:
            prompt, text = (printable(" ".join(each[key].split())) for key in ("prompt", "continuation"))
            console.print(Text.assemble("  ", prompt, (f" → {text}", "bold")), soft_wrap=True, highlight=False)
    _lines(
        console,
        "checkpoints",
        [f"{Path(each['path']).name}  {each['size_bytes'] / 2**20:,.1f} MiB" for each in facts["checkpoints"]],
    )
    if view.summary:
        peaks = {kind: memory_of(view.summary, kind) for kind in ("predicted", "measured")}
        step_peaks = [f"{kind} {gib(use['peak_bytes'], 4)} GiB at a step's peak" for kind, use in peaks.items() if use]
        _lines(console, "memory", step_peaks)


def _lines(console: Console, title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        console.print(Text(title, style="dim"))
        for line in lines:
            console.print(f"  {printable(line)}", markup=False, highlight=False, soft_wrap=True)


def _step_line(fields: Mapping[str, Any]) -> str:
    return f"step {fields['step']}  {'  '.join(step_figures(training_record(fields)))}"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def short_time(seconds: float) -> str:
    """A time in its largest unit."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{timedelta(seconds=round(seconds)).seconds} s"
