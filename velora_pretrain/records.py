"""The run folder: its layout, its records and their units. The contract between train, eval, compare and report.

    runs/<name>/
      config.toml                     the resolved run
      metrics.jsonl                   one flat record a line, units in the names
      checkpoints/step-00000100/      see `checkpoint.py`
      samples.jsonl                   continuations at each evaluation, where asked for: step, prompt, continuation
      summary.json                    final figures
      tensorboard/, wandb/            what trackers keep, where they were asked for; tracking.json: the run's id there
      failure.json                    step and reason, where the numbers failed and ended the run
      run.lock                        held by the process that trains here, see `run_lock.py`

No torch here: reports and error messages answer at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from velora_pretrain.config import Run
from velora_pretrain.errors import UserError
from velora_pretrain.files import write_atomically
from velora_pretrain.llama_folder import checkpoints_newest_first
from velora_pretrain.recipe import build_run, read_recipe

GIB = 2**30
"""Bytes in one GiB."""

MAX_RECORD_BYTES = 1 << 20
"""Longest line of metrics.jsonl that is read."""
BLOCK_BYTES = 2**14
"""Read at once from the end of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """One optimizer step."""

    step: int
    """Optimizer steps done, this one included."""
    tokens: int
    """Tokens read since the start of the run, padding left out."""
    loss_nats_per_token: float
    """Mean cross-entropy over the targets of the global batch."""
    learning_rate: float
    """Learning rate of the step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens_per_second: float
    """Tokens read over wall time, over all devices, for this step."""
    peak_memory_bytes: int
    """Largest memory use so far: allocated on the device, or resident on a CPU."""
    data_wait_seconds: float
    """Time for which this step waited for its batch."""
    zero_moments_share: float | None = None
    """Share of the adapters' moments that are zero after this step has started them anew; only in such a step."""
    batch_digest: str = ""
    """Hash of the step's documents as tokens, 16 hex digits: runs that agree in it have read the same."""
    loss_above_median_nats: float | None = None
    """How far the loss stands above the median of the steps before; only where that is a spike."""
    skipped_steps: int | None = None
    """Steps of the run so far that were not taken because their numbers were not finite; only after the first."""
    rollbacks: int | None = None
    """Times that the run has gone back to a checkpoint because numbers were not finite; only after the first."""
    memory_limit_bytes: int | None = None
    """Memory that the device has in all; the machine's, on a CPU."""
    run_seconds: float | None = None
    """Time that the run has gone on for, evaluations and checkpoints included; what lies between a stop and the
    checkpoint that the run went on from, or between that and its going on, is left out."""
    unix_seconds: float | None = None
    """Wall clock: seconds since the beginning of 1970, UTC."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One evaluation."""

    step: int
    """Optimizer steps done."""
    eval_loss_nats_per_token: float
    """Sum of nats over the number of targets."""
    perplexity: float
    """exp of the loss."""
    perplexity_paper: float
    """Perplexity as the published repositories compute it: see `evaluation.py`."""
    bits_per_byte: float
    """Sum of bits over the number of UTF-8 bytes that the targets stand for."""
    eval_tokens: int
    """Targets scored."""
    run_seconds: float | None = None
    """As in a training record; only of evaluations that a run makes."""
    unix_seconds: float | None = None
    """Wall clock, likewise."""


def fields_of(record: TrainingRecord | EvaluationRecord) -> dict[str, Any]:
    """The fields of a record that it has."""
    return {key: value for key, value in asdict(record).items() if value is not None}


def safe_exp(nats: float) -> float:
    """exp, infinite where it overflows: the perplexity of a diverged run."""
    return math.exp(nats) if nats < 700 else math.inf


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for: a diverged model's infinite perplexity."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples.jsonl"
        self.summary = path / "summary.json"
        self.failure = path / "failure.json"

    def holds_run(self) -> bool:
        """Whether a run has done a step here; one that failed before its first step left nothing to lose."""
        return self.config.exists() and (any(True for _ in self.records()) or bool(self.checkpoints_newest_first()))

    def holds_foreign_config(self) -> bool:
        """Whether config.toml is no run of ours but somebody else's file, which must not be replaced."""
        if not self.config.exists():
            return False
        try:
            self.read_run()
        except UserError:
            return True
        return False

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def checkpoints_newest_first(self) -> list[Path]:
        """Every checkpoint folder, whole or not, from the newest step to the oldest."""
        return checkpoints_newest_first(self.checkpoints)

    def read_run(self) -> Run:
        """The run's configuration.

        Raises:
            UserError: config.toml is missing or does not hold a run.
        """
        if not self.config.exists():
            raise UserError(f"{self.path}: holds no run (no config.toml)")
        return build_run(read_recipe(self.config), where=str(self.config))

    def write_run(self, run: Run) -> None:
        """Writes config.toml, whole or not at all; `train --recipe` accepts it back."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.failure.unlink(missing_ok=True)  # of the run that goes on from here
        write_atomically(self.config, tomli_w.dumps(run.model_dump(mode="json", exclude_none=True)).encode())

    def append(self, record: TrainingRecord | EvaluationRecord) -> None:
        """Appends one line to metrics.jsonl, with null for a number that is not finite; what is None is left out."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(fields_of(record)), allow_nan=False) + "\n")

    def sync_metrics(self) -> None:
        """Brings metrics.jsonl to disk."""
        with self.metrics.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def records(self) -> Iterator[dict[str, Any]]:
        """Every whole record of metrics.jsonl, None for numbers that were not finite.

        A last line that a crash cut short is left out.

        Raises:
            UserError: a whole line is no record.
        """
        yield from _whole_lines(self.metrics)

    def logged_samples(self) -> list[dict[str, Any]]:
        """The whole lines of samples.jsonl, oldest first.

        Raises:
            UserError: a whole line is none.
        """
        return list(_whole_lines(self.samples))

    def records_newest_first(self) -> Iterator[dict[str, Any]]:
        """The whole records of metrics.jsonl from its end, reading no more of it than is asked for."""
        if not self.metrics.exists():
            return
        with self.metrics.open("rb") as file:
            end, cut = file.seek(0, os.SEEK_END), b""
            is_last = True
            while end > 0:
                begin = max(0, end - BLOCK_BYTES)
                file.seek(begin)
                first, *lines = (file.read(end - begin) + cut).split(b"\n")
                # What stands before the block's first line end may have begun in the block before.
                lines, cut, end = ([first, *lines] if begin == 0 else lines), first, begin
                if is_last and lines:
                    # Empty, or a line that a crash cut short.
                    lines.pop()
                    is_last = False
                yield from (record_of(line, str(self.metrics)) for line in reversed(lines))

    def forget_after(self, step: int) -> None:
        """Drops the records and samples of steps after `step`, which a resumed run does again."""
        for path in (self.metrics, *([self.samples] if self.samples.exists() else [])):
            write_atomically(path, "".join(lines_up_to(path, step)).encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, whole or not at all, with null for numbers that are not finite."""
        write_atomically(self.summary, (json.dumps(finite(summary), indent=2, allow_nan=False) + "\n").encode())

    def write_failure(self, step: int, reason: str) -> None:
        """Writes failure.json, whole or not at all: the step at which the numbers failed, and what was not finite."""
        write_atomically(self.failure, (json.dumps({"step": step, "reason": reason}, indent=2) + "\n").encode())


def lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of metrics.jsonl or samples.jsonl that are of `step` or before; none of a file that is missing.

    Raises:
        UserError: a whole line is no record.
    """
    return [json.dumps(record, allow_nan=False) + "\n" for record in _whole_lines(path) if record["step"] <= step]


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES), b""), start=1):
            if line.endswith(b"\n"):
                yield record_of(line, f"{path} line {number}")
            elif len(line) == MAX_RECORD_BYTES:
                raise UserError(f"{path} line {number}: longer than a record can be; remove the line")


def record_of(line: bytes, place: str) -> dict[str, Any]:
    """A line of metrics.jsonl as a record, None for numbers that were not finite.

    Args:
        line: the line.
        place: names it in the message.

    Raises:
        UserError: it is none.
    """
    try:
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record["step"], int):
            return finite(record)
    except (ValueError, KeyError, RecursionError):
        pass
    raise UserError(f"{place}: not a record of a run; remove the line, or the file from there on")


def newest_run(runs: Path) -> RunFolder:
    """The run folder under `runs` whose metrics or configuration changed last.

    Raises:
        UserError: there is none.
    """
    folders = [RunFolder(path.parent) for path in runs.glob("*/config.toml")]
    if not folders:
        raise UserError(f"{runs}: holds no run; give a run folder, or train first")

    def changed(folder: RunFolder) -> float:
        return max(path.stat().st_mtime for path in (folder.config, folder.metrics) if path.exists())

    return max(folders, key=changed)
