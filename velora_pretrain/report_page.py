"""The page of a report: HTML that needs no network and no script, for screens of any width, light or dark.

Everything that comes from a run folder is escaped, and a content security policy forbids what might yet get through.
"""

from __future__ import annotations

import html
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from importlib import resources
from typing import Any

from velora_pretrain import __version__
from velora_pretrain.plots import GREY, MODE_COLOURS
from velora_pretrain.recipe import differences
from velora_pretrain.report_figures import Picture, byte_unit
from velora_pretrain.run_view import RunView, are_timed, memory_of, printable

Cell = tuple[str, str]
"""A table's cell: its HTML, and its class."""
MOST_SAMPLES = 4
"""Samples of one evaluation on the page."""


def render_page(views: Sequence[RunView], pictures: Sequence[tuple[Picture, str]], command: Sequence[str]) -> str:
    """The whole page.

    Args:
        views: the runs.
        pictures: each with its inline SVG.
        command: what wrote the report.
    """
    title = f"Report of {len(views)} runs" if len(views) > 1 else f"Report of {views[0].name}"
    sections = [
        _section("Results", _results(views), note=_results_note(views)),
        _section("Over seeds", _over_seeds(views)),
        _section("Curves, memory and speed", _charts(pictures)),
        _section("Samples", _samples(views)),
        _section("Settings that differ", _settings(views)),
        _section("Environment", _environment(views)),
        _section("Commands", _commands(views, command)),
    ]
    style = (resources.files("velora_pretrain") / "report.css").read_text(encoding="utf-8")
    modes, sizes = (list(dict.fromkeys(each)) for each in zip(*map(_mode_and_size, views), strict=True))
    states = [view.state for view in views]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p>{_text(counted)} · {_plural("mode", modes)} · {_plural("model", sizes)}</p>
</header>
<main>
{"".join(sections)}</main>
<footer>velora-pretrain {_text(__version__)}</footer>
</body>
</html>
"""


def inline_svg(name: str, svg: str) -> str:
    """matplotlib's SVG for a page: fluid, in the page's colours for text and grid, its ids unlike other pictures'.

    Args:
        name: of the picture.
        svg: drawn with nothing behind it; black is the colour of the text, and the grid's grey is the grid's.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    rest = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', rest)
    rest = re.sub(r'(url\(|href=")#', rf"\1#{name}-", rest)
    for colour, variable in {"#000000": "currentColor", "#dddddd": "var(--grid)", "#ffffff": "var(--page)"}.items():
        rest = rest.replace(f": {colour}", f": {variable}")
    return (
        f'<svg {view_box[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
        f' aria-labelledby="{name}-title {name}-description">{rest.strip()}'
    )


def _charts(pictures: Sequence[tuple[Picture, str]]) -> str:
    figures = []
    for picture, svg in pictures:
        head, body = svg.split(">", 1)
        named = (
            f'<title id="{picture.name}-title">{_text(picture.title)}</title>'
            f'<desc id="{picture.name}-description">{_text(picture.description)}</desc>'
        )
        caption = f"<figcaption>{_text(picture.title)}</figcaption>"
        figures.append(f'<figure id="{picture.name}">{caption}{head}>{named}{body}</figure>\n')
    return f'<div class="charts">\n{"".join(figures)}</div>\n'


def _results(views: Sequence[RunView]) -> str:
    peaks = [memory["peak_bytes"] for view in views if (memory := memory_of(view.summary, "predicted"))]
    unit, size = byte_unit(max(peaks, default=0))
    head = ["run", "mode", "state", "steps", "tokens", "time", "training loss", "perplexity"]
    head += ["as papers count", "bits/byte", f"{unit} of a step, predicted", "measured", "peak GiB", "tokens/s"]
    rows, steps_only = [], not are_timed(views)
    for view in views:
        summary, evaluation = view.summary or {}, view.final_evaluation
        last = view.training[-1] if view.training else {}
        measured = summary.get("measured_memory") or {}
        tokens_per_second = summary.get("tokens_per_second") or last.get("tokens_per_second")
        predicted = memory_of(summary, "predicted") or {}
        rows.append(
            [
                (_text(view.name), "name"),
                (_mode(view.run.mode), ""),
                (_state(view), ""),
                _number(last.get("step", 0), ",", end=f" / {view.run.steps:,}"),
                _number(last.get("tokens"), ","),
                (_clock(view, steps_only=steps_only), "number"),
                _number(last.get("loss_nats_per_token"), ".4f"),
                _number(evaluation.get("perplexity"), ".2f"),
                _number(evaluation.get("perplexity_paper"), ".2f"),
                _number(evaluation.get("bits_per_byte"), ".4f"),
                _number(_scaled(predicted.get("peak_bytes"), size), ".3f"),
                _number(_scaled(measured.get("peak_bytes") or measured.get("allocated_peak_bytes"), size), ".3f"),
                _number(_scaled(last.get("peak_memory_bytes"), 2**30), ".2f"),
                _number(tokens_per_second, ",.0f"),
            ]
        )
    return _table(head, rows)


def _results_note(views: Sequence[RunView]) -> str:
    time = "with evaluations and checkpoints, without pauses" if are_timed(views) else "that of training steps"
    notes = [
        f"Time is {time}. Perplexity is exp of nats over targets of the last evaluation; as papers count"
        " is the biased number of the published code, far too low over few tokens. Memory of a step is what training"
        " holds at its peak; peak is the most that the device had allocated, or on a CPU the whole process."
    ]
    notes += [
        f"{view.name}: failed at step {view.failure.get('step')}: {view.failure.get('reason')}."
        for view in views
        if view.failure
    ]
    return "".join(f"<p>{_text(note)}</p>\n" for note in notes)


def _over_seeds(views: Sequence[RunView]) -> str:
    """A row for each configuration that several seeds were trained with; nothing where none was."""
    groups: dict[str, list[RunView]] = {}
    for view in views:
        if view.summary:
            reading = view.run.reading.model_copy(update={"shuffle_seed": None})
            alike = view.run.model_copy(update={"seed": 0, "reading": reading})
            groups.setdefault(alike.sha256, []).append(view)
    rows = []
    for group in (group for group in groups.values() if len(group) > 1):
        speeds = [view.summary["tokens_per_second"] for view in group if view.summary]
        values = [view.final_evaluation.get("perplexity") for view in group]
        known = [value for value in values if value is not None]
        spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
        perplexity = statistics.fmean(known) if len(known) == len(values) else None
        rows.append(
            [
                (_text(", ".join(view.name for view in group)), "name"),
                (_mode(group[0].run.mode), ""),
                _number(len(group), ""),
                _number(perplexity, ".2f", end=spread),
                _number(statistics.median(speeds), ",.0f"),
            ]
        )
    head = ["runs that differ in the seed alone", "mode", "seeds", "perplexity, mean ± sd", "tokens/s, median"]
    return _table(head, rows) if rows else ""


def _samples(views: Sequence[RunView]) -> str:
    """What each model wrote at its first, middle and last evaluation, behind the same beginnings."""
    parts = []
    for view in (view for view in views if view.samples):
        steps = list(dict.fromkeys(each["step"] for each in view.samples))
        rows = []
        for step in dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]):
            for each in [each for each in view.samples if each["step"] == step][:MOST_SAMPLES]:
                rows.append([_number(step, ","), *((_passage(each[key]), "") for key in ("prompt", "continuation"))])
        is_open = " open" if len(views) == 1 else ""
        table = _table(["step", "beginning of a validation document", "what the model wrote next"], rows)
        parts.append(f"<details{is_open}><summary>{_text(view.name)}</summary>\n{table}</details>\n")
    return "".join(parts)


def _settings(views: Sequence[RunView]) -> str:
    if len(views) == 1:
        return "<p>One run: nothing to compare. Its whole configuration is below, under Commands.</p>\n"
    first = views[0].run
    found = [differences(first, view.run) for view in views]
    keys = sorted({key for each in found for key in each})
    if not keys:
        return "<p>None: the runs have the same configuration.</p>\n"
    base = {key: each[key][0] for each in found for key in each}
    rows = [
        [(_text(view.name), "name"), *((_text(_value(each[key][1] if key in each else base[key])), "") for key in keys)]
        for view, each in zip(views, found, strict=True)
    ]
    return _table(["run", *keys], rows)


def _environment(views: Sequence[RunView]) -> str:
    """One column for each environment, with the runs that had it."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for view in views:
        if view.summary:
            groups.setdefault(tuple(_facts(view.summary).items()), []).append(view.name)
    if not groups:
        return "<p>It is recorded at the end of a run, and no run here has ended.</p>\n"
    keys = dict.fromkeys(key for facts in groups for key, _ in facts)
    rows = [[(_text(key), "name"), *((_text(dict(facts).get(key, "")), "") for facts in groups)] for key in keys]
    heads = [", ".join(names) if len(groups) > 1 else "every finished run" for names in groups.values()]
    return _table(["", *heads], rows)


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    keys = ("device", "processes", "platform", "data", "data_sha256", "tokenizer", "tokenizer_sha256")
    versions = summary.get("versions")
    facts = {key: summary.get(key) for key in keys} | (versions if isinstance(versions, dict) else {})
    return {key: str(value) for key, value in facts.items() if value is not None}


def _commands(views: Sequence[RunView], command: Sequence[str]) -> str:
    parts = [f"<p>This report:</p>\n{_code(shlex.join(command))}"]
    for view in views:
        path = str(view.folder.path)
        ways = [
            ("the same run once more", ["train", "--recipe", f"{path}/config.toml"]),
            ("score its last checkpoint", ["eval", "checkpoint", path]),
        ]
        if view.state in ("stopped", "running"):
            ways.insert(1, ("go on with it", ["train", "--resume", "--run-dir", path]))
        lines = "\n".join(f"{shlex.join(['velora-pretrain', *words])}  # {what}" for what, words in ways)
        digest = (view.summary or {}).get("config_sha256")
        hashed = f"<p>Its configuration has the SHA-256 {_text(digest)}.</p>\n" if digest else ""
        config = view.folder.config.read_text(encoding="utf-8")
        parts.append(
            f"<details><summary>{_text(view.name)}</summary>\n{_code(lines)}{hashed}"
            f"<p>Its config.toml:</p>\n{_code(config)}</details>\n"
        )
    return "".join(parts)


def _section(title: str, body: str, *, note: str = "") -> str:
    if not body:
        return ""
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}{note}</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    rows = list(rows)
    kinds = [f' class="{kind}"' if kind == "number" else "" for _, kind in rows[0]]
    heads = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = [f"<tr>{heads}</tr>\n"]
    for row in rows:
        cells = [
            f'<th scope="row">{content}</th>' if kind == "name" else f'<td class="{kind}">{content}</td>'
            for content, kind in row
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f'<div class="table" tabindex="0"><table>\n{"".join(lines)}</table></div>\n'


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _passage(text: str) -> str:
    """Text whose line breaks do not matter."""
    return _text(" ".join(text.split()))


def _code(text: str) -> str:
    lines = "\n".join(printable(line) for line in text.splitlines())
    return f"<pre><code>{html.escape(lines)}</code></pre>\n"


def _number(value: object, form: str, *, end: str = "") -> Cell:
    """A figure, or a dash where there is none: not reached yet, or not finite."""
    is_number = isinstance(value, int | float)
    return (f"{value:{form}}{end}" if is_number else '<span class="none">–</span>'), "number"


def _scaled(value: object, size: int) -> float | None:
    return value / size if isinstance(value, int | float) else None


def _value(value: object) -> str:
    return "default" if value is None else str(value)


def _mode(mode: str) -> str:
    colour = MODE_COLOURS.get(mode, GREY)
    shown = "currentColor" if colour == "#000000" else colour
    return f'<span class="mode"><i style="background: {shown}"></i>{_text(mode)}</span>'


def _mode_and_size(view: RunView) -> tuple[str, str]:
    """The mode, and the model by its size or its own dimensions."""
    model = view.run.llama
    return view.run.mode, view.run.size or f"{model.hidden_size} wide, {model.num_hidden_layers} layers"


def _plural(name: str, values: Sequence[str]) -> str:
    return _text(f"{name}{'s' if len(values) > 1 else ''} {', '.join(values)}")


def _state(view: RunView) -> str:
    return f'<span class="{view.state}">{view.state}</span>'


def _clock(view: RunView, *, steps_only: bool) -> str:
    hours = view.hours(steps_only=steps_only).last
    return str(timedelta(seconds=round(hours * 3600))) if view.training else "–"
