"""A run as a reader sees it: its state, its records by kind and the time they took. No torch here.

A run folder may be under way, cut off at any moment, or written by hand: whatever is missing is None or empty.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from velora_pretrain.config import Run
from velora_pretrain.errors import UserError
from velora_pretrain.files import read_json
from velora_pretrain.records import EvaluationRecord, RunFolder, TrainingRecord
from velora_pretrain.run_lock import is_held

State = Literal["running", "finished", "failed", "stopped"]
_NUMBERS = {
    each.name
    for kind in (TrainingRecord, EvaluationRecord)
    for each in dataclasses.fields(kind)
    if not isinstance(each.default, str)
}
"""Fields of records that are numbers."""
YOUNG_SECONDS = 120.0
"""Age of the newest record up to which a run without a lock file counts as running."""


@dataclass(frozen=True)
class Hours:
    """When a run wrote its records, in hours since its beginning."""

    training: list[float]
    """One for each training record."""
    evaluations: list[float | None]
    """One for each evaluation; None where it is not known."""

    @property
    def last(self) -> float:
        """The latest."""
        return max((each for each in (*self.training, *self.evaluations) if each is not None), default=0.0)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What a run folder holds."""

    folder: RunFolder
    name: str
    """The folder's name, made unique and printable among those that are shown together."""
    run: Run
    training: list[dict[str, Any]]
    """Training records, oldest first."""
    evaluations: list[dict[str, Any]]
    """Evaluation records, oldest first."""
    samples: list[dict[str, Any]]
    """What the model wrote at evaluations, oldest first: step, prompt, continuation."""
    summary: dict[str, Any] | None
    """summary.json of a finished run."""
    failure: dict[str, Any] | None
    """failure.json of a run whose numbers failed."""
    state: State

    @property
    def is_timed(self) -> bool:
        """Whether every record says how long the run had gone on for."""
        return all(record.get("run_seconds") is not None for record in (*self.training, *self.evaluations))

    def hours(self, *, steps_only: bool) -> Hours:
        """The hours that the run had taken when it wrote its records.

        Args:
            steps_only: counts training steps alone; else, of a run that is timed, all but pauses.
        """
        if not steps_only:
            training, evaluations = (
                [record["run_seconds"] / 3600 for record in records] for records in (self.training, self.evaluations)
            )
            return Hours(training, evaluations)
        training, seconds, before = [], 0.0, 0
        for record in self.training:
            speed, tokens = record.get("tokens_per_second"), record.get("tokens")
            if tokens is not None:
                seconds += (tokens - before) / speed if speed else 0.0
                before = tokens
            training.append(seconds / 3600)
        at = dict(zip((record["step"] for record in self.training), training, strict=True))
        return Hours(training, [at.get(record["step"]) for record in self.evaluations])

    def last_samples(self) -> list[dict[str, Any]]:
        """Those of the last evaluation that has any."""
        return [each for each in self.samples if each["step"] == self.samples[-1]["step"]]

    @property
    def final_evaluation(self) -> dict[str, Any]:
        """The last evaluation there is; empty where there is none."""
        found = (self.summary or {}).get("final_evaluation")
        return found if isinstance(found, dict) and found else self.evaluations[-1] if self.evaluations else {}


def are_timed(views: Iterable[RunView]) -> bool:
    """Whether all of the runs are timed, so that evaluations and checkpoints can be counted for each."""
    return all(view.is_timed for view in views)


def view_run(folder: RunFolder, *, name: str | None = None) -> RunView:
    """Reads a run folder whole.

    Args:
        folder: the run folder.
        name: what to call it; by default as its folder.

    Raises:
        UserError: it holds no run, or a file of it is not what it should be.
    """
    run, records = folder.read_run(), read_records(folder)
    return RunView(
        folder=folder,
        name=printable(name or folder.path.name or str(folder.path)),
        run=run,
        training=[record for record in records if "loss_nats_per_token" in record],
        evaluations=[record for record in records if "perplexity" in record],
        samples=read_samples(folder),
        summary=read_object(folder.summary),
        failure=read_object(folder.failure),
        state=state_of(folder),
    )


def glance(folder: RunFolder) -> dict[str, Any]:
    """A run in a few figures, without reading all of it; a run that cannot be read is told by its state.

    Args:
        folder: the run folder.

    Returns:
        `run_dir`, `state`, `age_seconds` and, but for an unreadable run, `mode`, `size`, `step`, `steps`,
        `loss_nats_per_token`, `perplexity` and `tokens_per_second`, None where there are none yet.
    """
    facts: dict[str, Any] = {"run_dir": str(folder.path), "age_seconds": age_seconds(folder)}
    try:
        run = folder.read_run()
        last: dict[str, Any] = {}
        evaluation: dict[str, Any] = {}
        for record in folder.records_newest_first():
            if "loss_nats_per_token" in record:
                last = last or record
            else:
                evaluation = evaluation or record
            # Where none is made on the way, the one of the end is the last record.
            if last and (evaluation or not run.evaluation.every_steps):
                break
    except (OSError, ValueError) as error:
        return facts | {"state": "unreadable", "reason": " ".join(str(error).split())}
    return facts | {
        "state": state_of(folder),
        "mode": run.mode,
        "size": run.size,
        "step": last.get("step", 0),
        "steps": run.steps,
        "loss_nats_per_token": last.get("loss_nats_per_token"),
        "perplexity": evaluation.get("perplexity"),
        "tokens_per_second": last.get("tokens_per_second"),
    }


def read_records(folder: RunFolder) -> list[dict[str, Any]]:
    """All records of a run.

    Raises:
        UserError: a line is no record, or has something else for a number; names the file.
    """
    try:
        return [_checked(record, folder.metrics) for record in folder.records()]
    except OSError as error:
        raise UserError(f"{folder.metrics}: cannot be read as records ({error})") from None


def _checked(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record, if what a display or a picture calculates with are numbers."""
    for key, value in record.items():
        if key in _NUMBERS and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{path}: step {record['step']}: {key} is no number ({value!r}); remove the line")
    return record


def read_samples(folder: RunFolder) -> list[dict[str, Any]]:
    """All samples of a run, with text for prompt and continuation.

    Raises:
        UserError: a line is none; names the file.
    """
    try:
        found = folder.logged_samples()
    except OSError as error:
        raise UserError(f"{folder.samples}: cannot be read as samples ({error})") from None
    texts = ("prompt", "continuation")
    return [{"step": each["step"]} | {key: str(each.get(key, "")) for key in texts} for each in found]


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def state_of(folder: RunFolder) -> State:
    """Whether the run goes on, has ended well or by failing numbers, or was stopped."""
    is_locked = is_held(folder.path)
    if is_locked:
        return "running"
    if folder.summary.exists():
        return "finished"
    if folder.failure.exists():
        return "failed"
    return "running" if is_locked is None and age_seconds(folder) < YOUNG_SECONDS else "stopped"


def age_seconds(folder: RunFolder) -> float:
    """Seconds since the run last wrote a record, or its configuration."""
    times = [path.stat().st_mtime for path in (folder.metrics, folder.config) if path.exists()]
    return max(0.0, time.time() - max(times, default=0.0))


def training_record(fields: Mapping[str, Any]) -> TrainingRecord:
    """A training record as a display takes it: NaN for what was not finite."""
    return TrainingRecord(**_numbers(fields, TrainingRecord))


def evaluation_record(fields: Mapping[str, Any]) -> EvaluationRecord:
    """An evaluation as a display takes it: NaN for what was not finite."""
    return EvaluationRecord(**_numbers(fields, EvaluationRecord))


def _numbers(fields: Mapping[str, Any], kind: type[TrainingRecord | EvaluationRecord]) -> dict[str, Any]:
    absent = {each.name: math.nan if each.default is MISSING else each.default for each in dataclasses.fields(kind)}
    return {name: value if fields.get(name) is None else fields[name] for name, value in absent.items()}


def find_runs(paths: Iterable[Path]) -> list[RunFolder]:
    """The run folders that are meant: each path itself, or the run folders in it.

    Raises:
        UserError: a path is neither; or there is none.
    """
    found: dict[Path, RunFolder] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such folder; give a run folder, or a folder of run folders")
        if (path / "config.toml").is_file():
            inside = [path]
        else:
            inside = sorted(config.parent for config in path.glob("*/config.toml"))
        if not inside:
            raise UserError(f"{path}: holds no run (no config.toml); give a run folder, or a folder of run folders")
        found |= {each.resolve(): RunFolder(each) for each in inside}
    return list(found.values())


def run_names(folders: Sequence[RunFolder]) -> list[str]:
    """Short names for runs that are shown together: of their folders, with the folders above where those are alike."""
    paths = [folder.path.resolve() for folder in folders]
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def printable(text: str) -> str:
    """The text, with a mark for each character that no page or terminal can show as it is."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def memory_of(summary: Mapping[str, Any] | None, kind: str) -> dict[str, int] | None:
    """Bytes by category at the peak of a step, predicted or measured; None where no such table was made."""
    use = (summary or {}).get(f"{kind}_memory")
    return use if isinstance(use, dict) and isinstance(use.get("peak_bytes"), int) and use["peak_bytes"] else None
