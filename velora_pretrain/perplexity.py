"""Which training mode reaches which perplexity: each tuned over as many learning rates, over the same seeds and text.

    1. decide   what the recipe leaves to the machine (`auto`) is decided once for all cells
    2. check    folders that already hold runs hold those that are asked for
    3. train    every cell that is not done, see `cells.py`
    4. check    what was recorded differs only in what is compared
    5. result   each variant at the learning rate of its lowest mean validation perplexity over the seeds

A cell whose numbers failed has an infinite perplexity: its learning rate never wins, and is told.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from velora_pretrain.cells import is_done, run_folder, train_cells, was_side_by_side
from velora_pretrain.config import BASELINE, Run
from velora_pretrain.data.c4 import is_same_data, resolve
from velora_pretrain.devices import pick_device
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import has_separate_validation
from velora_pretrain.modes import build_mode
from velora_pretrain.prediction import USABLE_SHARE, choose_micro_batch, free_memory_bytes
from velora_pretrain.recipe import differences
from velora_pretrain.records import RunFolder
from velora_pretrain.setup import MAY_CHANGE
from velora_pretrain.variants import Cell

COMPARED = ("mode", "optimizer.lr", "seed")
"""Keys in which the cells of a comparison may differ, beside those of `modes.`."""
DATA = ("data", "validation_data")
"""Keys that may have other words where the documents are the same."""
SAME_TEXT = ("tokenizer_sha256", "data_sha256", "tokens")
"""Fields of summary.json that are the same where the same text was read in the same order."""


def compare_perplexity(
    cells: Sequence[Cell], root: Path, *, jobs: int, display: Display, console: Console
) -> dict[str, Any]:
    """Trains every cell that is not done, and compares the variants.

    Args:
        cells: as `variants.plan_cells` gives them.
        root: the folder of the comparison.
        jobs: how many cells train side by side.
        display: takes warnings.
        console: where progress is shown.

    Returns:
        `rows`, one per variant; `recipe_differences`, dotted keys with each variant's value; `settings`, what all
        share; `curves`, see `training_curves`.

    Raises:
        UserError: a folder holds another run, or a cell failed.
        Interrupted: a signal came; the same call goes on.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is a file, not a folder; give another --run-dir")
    cells = _decided(cells, root, jobs=jobs, display=display)
    _check_folders(cells, root)
    try:
        train_cells(cells, root, jobs=jobs, console=console)
    except OSError as error:
        raise UserError(f"{root}: cannot be written: {error.strerror}") from None
    recorded = {cell.slug: run_folder(root, cell).read_run() for cell in cells}
    check_comparable(recorded)
    results = {cell.slug: _result(cell, root) for cell in cells}
    summaries = {slug: result["summary"] for slug, result in results.items() if result["summary"]}
    _check_same_text(summaries)
    rows = result_rows(cells, results)
    return {
        "rows": rows,
        "recipe_differences": _recipe_differences(cells, recorded),
        "settings": _settings(cells, list(summaries.values()), jobs=jobs),
        "curves": {row["variant"]: training_curve(row) for row in rows},
    }


def _decided(cells: Sequence[Cell], root: Path, *, jobs: int, display: Display) -> list[Cell]:
    """The cells with every `auto` of the recipe decided, as the first one that was ever trained has it recorded."""
    recorded = next((folder.read_run() for folder in _folders_to_keep(cells, root)), None)
    data, micro_batch = cells[0].run.data, cells[0].run.batch.micro_batch
    if data == "auto":
        data = recorded.data if recorded else _found_data(cells[0].run, display)
    if micro_batch == "auto":
        micro_batch = recorded.batch.micro_batch if recorded else _fitting_micro_batch(cells, jobs)
    decided = []
    for cell in cells:
        batch = cell.run.batch.model_copy(update={"micro_batch": micro_batch})
        decided.append(dataclasses.replace(cell, run=cell.run.model_copy(update={"data": data, "batch": batch})))
    return decided


def _folders_to_keep(cells: Sequence[Cell], root: Path) -> dict[RunFolder, Cell]:
    """Folders in which a cell has done a step, or failed at its first; others may be begun anew."""
    folders = {run_folder(root, cell): cell for cell in cells}
    return {folder: cell for folder, cell in folders.items() if folder.holds_run() or is_done(folder)}


def _found_data(run: Run, display: Display) -> str:
    every = run.reading.holdout_every_documents
    source = resolve("auto", split="train", holdout_every_documents=every, separate=has_separate_validation(run))
    if source.fallback_reason:
        display.warn(
            f"{source.fallback_reason}. EVERY CELL TRAINS ON THE BUNDLED SAMPLE, some 2 MB of Python documentation, NOT"
            " ON C4: fit for trying things out, not for a result. Give --data c4 to insist on C4, or --data PATH."
        )
    return source.name


def _fitting_micro_batch(cells: Sequence[Cell], jobs: int) -> int:
    """Sequences per forward pass that fit every variant, with `jobs` of them on this device."""
    runs = {cell.variant.label: cell.run for cell in cells}.values()
    device = pick_device(cells[0].run.device)
    budget = int(USABLE_SHARE * free_memory_bytes(device) / jobs)
    return min(
        choose_micro_batch(run, local_sequences=run.batch.sequences, device_type=device.type, budget_bytes=budget)
        for run in runs
    )


def _check_folders(cells: Sequence[Cell], root: Path) -> None:
    """Refuses a folder that holds something else than is asked for, before anything is trained."""
    for folder, cell in _folders_to_keep(cells, root).items():
        for key, (asked, has) in differences(cell.run, folder.read_run()).items():
            is_same = key in DATA and is_same_data(asked, has)
            if not (key.startswith(MAY_CHANGE) or is_same):
                raise UserError(
                    f"{folder.path}: {key} is {has!r} in the run that it holds, and {asked!r} is asked for; ask for the"
                    " same, or give another --run-dir"
                )


def check_comparable(runs: Mapping[str, Run]) -> None:
    """Checks that runs differ only in what is compared, or in what leaves the numbers as they are.

    Args:
        runs: configurations by the names of their runs.

    Raises:
        UserError: two differ in something else; names the key and the runs.
    """
    (first, first_run), *others = runs.items()
    for name, run in others:
        for key, (left, right) in differences(first_run, run).items():
            is_same = key in DATA and is_same_data(left, right)
            if key not in COMPARED and not (key.startswith(("modes.", *MAY_CHANGE)) or is_same):
                raise UserError(
                    f"{key}: {left!r} in {first} but {right!r} in {name}; the two cannot be compared, train one anew"
                )


def _check_same_text(summaries: Mapping[str, Mapping[str, Any]]) -> None:
    for key in SAME_TEXT:
        of_value = {summary[key]: slug for slug, summary in summaries.items()}
        if len(of_value) > 1:
            (left, first), (right, second), *_ = of_value.items()
            raise UserError(
                f"{key}: {left} in {first} but {right} in {second}; they did not read the same text, train one anew"
            )


def _result(cell: Cell, root: Path) -> dict[str, Any]:
    """What a cell came to: the fields of its place in the JSON, and its whole summary, None where it diverged."""
    folder = run_folder(root, cell)
    summary = json.loads(folder.summary.read_text()) if folder.summary.exists() else None
    evaluation = summary["final_evaluation"] if summary else {}
    fields = {
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        **{
            key: math.inf if evaluation.get(key) is None else evaluation[key]
            for key in ("perplexity", "perplexity_paper", "eval_loss_nats_per_token")
        },
        "eval_tokens": evaluation.get("eval_tokens"),
        "tokens": summary and summary["tokens"],
        "tokens_per_second": summary and summary["tokens_per_second"],
        "peak_memory_bytes": {
            "predicted": summary and summary["predicted_memory"]["peak_bytes"],
            "measured": summary and summary["peak_memory_bytes"],
        },
        "side_by_side": was_side_by_side(root, cell),
        "run_dir": str(folder.path),
        "diverged_at_step": None if summary else json.loads(folder.failure.read_text())["step"],
    }
    return {"cell": fields, "summary": summary}


def result_rows(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant, at the learning rate of its lowest mean perplexity, with its gap to the baseline.

    Args:
        cells: all cells.
        results: by a cell's slug its fields, under "cell".
    """
    rows = []
    for label in dict.fromkeys(cell.variant.label for cell in cells):
        own = [cell for cell in cells if cell.variant.label == label]
        rows.append(_row(own, [results[cell.slug]["cell"] for cell in own]))
    baseline = next((row for row in rows if row["mode"] == BASELINE), None)
    for row in rows:
        row |= _gap(row, baseline)
    return rows


def _row(cells: Sequence[Cell], fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for each in sorted(fields, key=lambda each: (each["learning_rate"], each["seed"])):
        by_rate.setdefault(each["learning_rate"], []).append(each)
    means = {rate: statistics.fmean(each["perplexity"] for each in own) for rate, own in by_rate.items()}
    best = min(means, key=lambda rate: means[rate])
    chosen, is_finite = by_rate[best], math.isfinite(means[best])
    memory = [each["peak_memory_bytes"] for each in chosen]
    return {
        "mode": cells[0].run.mode,
        "variant": cells[0].variant.label,
        "options": build_mode(cells[0].run).options(),
        "learning_rate": best if is_finite else None,
        "perplexity_mean": means[best],
        "perplexity_sd": _sd([each["perplexity"] for each in chosen]) if is_finite else None,
        "perplexity_paper_mean": statistics.fmean(each["perplexity_paper"] for each in chosen),
        "eval_tokens": chosen[0]["eval_tokens"],
        "tokens": chosen[0]["tokens"],
        "peak_memory_bytes": {
            kind: max((each[kind] for each in memory if each[kind] is not None), default=None)
            for kind in ("predicted", "measured")
        },
        "tokens_per_second": _median([each["tokens_per_second"] for each in chosen]),
        "side_by_side": any(each["side_by_side"] for each in chosen),
        "at_edge": is_finite and best in (min(means), max(means)),
        "cells": [dict(each) for own in by_rate.values() for each in own],
    }


def chosen_cells(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells at the row's learning rate, by seed; none where all diverged."""
    return [cell for cell in row["cells"] if cell["learning_rate"] == row["learning_rate"]]


def _gap(row: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """How much higher a row's perplexity is than the baseline's, in %: mean and deviation over pairs of one seed."""
    if baseline is None or row["learning_rate"] is None or baseline["learning_rate"] is None:
        return {"gap_to_full_percent": None, "gap_to_full_percent_sd": None}
    pairs = zip(chosen_cells(row), chosen_cells(baseline), strict=True)
    gaps = [100 * (ours["perplexity"] / theirs["perplexity"] - 1) for ours, theirs in pairs]
    return {
        "gap_to_full_percent": statistics.fmean(gaps),
        "gap_to_full_percent_sd": None if row is baseline else _sd(gaps),
    }


def training_curve(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """Training loss in nats per token against tokens read, at the row's learning rate, a mean over its seeds."""
    losses: dict[int, list[float]] = {}
    for cell in chosen_cells(row):
        for record in RunFolder(Path(cell["run_dir"])).records():
            if record.get("loss_nats_per_token") is not None:
                losses.setdefault(record["tokens"], []).append(record["loss_nats_per_token"])
    places = sorted(losses)
    return {"tokens": [float(place) for place in places], "loss": [statistics.fmean(losses[at]) for at in places]}


def _recipe_differences(cells: Sequence[Cell], recorded: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Dotted keys in which variants differ, with each one's value; rates and seeds, which every one has, left out."""
    runs: dict[str, Run] = {}
    for cell in cells:
        runs.setdefault(cell.variant.label, recorded[cell.slug])
    first = next(iter(runs.values()))
    found: dict[str, dict[str, Any]] = {}
    for label, run in runs.items():
        for key, (base, value) in differences(first, run).items():
            if key not in ("optimizer.lr", "seed"):
                found.setdefault(key, dict.fromkeys(runs, base))[label] = value
    return found


def _settings(cells: Sequence[Cell], summaries: Sequence[Mapping[str, Any]], *, jobs: int) -> dict[str, Any]:
    """What all cells share."""
    run = cells[0].run
    shared = summaries[0] if summaries else {}
    return {
        "size": run.size,
        "steps": run.steps,
        "sequences": run.batch.sequences,
        "micro_batch_sequences": run.batch.micro_batch,
        "sequence_length": run.batch.sequence_length,
        "precision": run.precision,
        "seeds": sorted({cell.seed for cell in cells}),
        "shuffle_seed": run.shuffle_seed,
        "baseline": next((cell.variant.label for cell in cells if cell.run.mode == BASELINE), None),
        "jobs": jobs,
        "data": run.data,
        **{key: shared.get(key) for key in ("data_sha256", "tokenizer", "tokenizer_sha256", "versions", "platform")},
        "devices": sorted({summary["device"] for summary in summaries}),
        "environments": sorted({_environment(summary) for summary in summaries}),
    }


def _environment(summary: Mapping[str, Any]) -> str:
    """Where a cell ran, in a line: its speed and memory, and its last bits, depend on it."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(summary["versions"].items()) if version)
    return f"{summary['platform']}, {versions}"


def _sd(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
