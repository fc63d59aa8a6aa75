"""Trains the cells of a comparison, each in a process of its own: its peak memory is its own, and so is a crash.

    DIR/<slug>/                   an ordinary run folder
    DIR/recipes/<slug>.toml       the recipe that it was started with
    DIR/logs/<slug>.log           what it printed, over all its starts
    DIR/logs/<slug>.side-by-side  there if it was ever trained beside another, which its speed shows

Children have sessions of their own, so that a terminal's Ctrl-C reaches only the parent; it sends them SIGTERM, at
which they write a checkpoint. Where the parent was killed they go on to their end. A cell's log is locked for as long
as its process lives, so a second start notices them.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import tomli_w
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from velora_pretrain.display import SPEED_WINDOW_SECONDS
from velora_pretrain.errors import UserError
from velora_pretrain.files import write_atomically
from velora_pretrain.records import RunFolder
from velora_pretrain.signals import Interrupted, StopSignals
from velora_pretrain.variants import Cell

POLL_SECONDS = 0.1
"""Time between looks at the children."""


def run_folder(root: Path, cell: Cell) -> RunFolder:
    """The run folder of a cell."""
    return RunFolder(root / cell.slug)


def is_done(folder: RunFolder) -> bool:
    """Whether nothing is left to train: the run has ended, or its numbers failed."""
    return folder.summary.exists() or folder.failure.exists()


def was_side_by_side(root: Path, cell: Cell) -> bool:
    """Whether a cell was ever trained beside another."""
    return _side_by_side(root, cell).exists()


def train_cells(cells: Sequence[Cell], root: Path, *, jobs: int, console: Console) -> None:
    """Trains what is not done yet, and returns when all is.

    Args:
        cells: the cells, in the order in which they start.
        root: the folder of the comparison.
        jobs: how many train side by side.
        console: where progress is shown.

    Raises:
        UserError: a cell failed, and not by numbers that are not finite; or another process is training it.
        Interrupted: a signal came; the cells that were being trained have written checkpoints.
    """
    waiting = deque(cell for cell in cells if not is_done(run_folder(root, cell)))
    for cell in waiting:
        with _locked_log(root, cell):
            pass
    running: list[_Training] = []
    with StopSignals() as signals, _CellProgress(console, cells, root) as progress:
        try:
            while (waiting or running) and not signals.is_set:
                while waiting and len(running) < jobs:
                    running.append(_Training(waiting.popleft(), root, jobs=jobs))
                for training in [each for each in running if each.has_ended]:
                    running.remove(training)
                    training.check()
                    progress.ended(training)
                progress.show(running)
                time.sleep(POLL_SECONDS)
            if waiting or running:
                progress.note("stopping the cells that are being trained; once more to stop at once")
        finally:
            _stop(running)
    if signals.is_set and not all(is_done(run_folder(root, cell)) for cell in cells):
        done = sum(is_done(run_folder(root, cell)) for cell in cells)
        raise Interrupted(f"stopped with {done} of {len(cells)} cells done; the same command goes on in {root}")


class _Training:
    """One cell's process."""

    def __init__(self, cell: Cell, root: Path, *, jobs: int) -> None:
        self.cell, self.folder, self.log = cell, run_folder(root, cell), _log(root, cell)
        recipe = root / "recipes" / f"{cell.slug}.toml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(recipe, tomli_w.dumps(cell.run.model_dump(mode="json", exclude_none=True)).encode())
        command = [sys.executable, "-m", "velora_pretrain", "train", "--recipe", str(recipe)]
        command += ["--run-dir", str(self.folder.path), *(["--resume"] if self.folder.holds_run() else [])]
        environment = dict(os.environ)
        if jobs > 1:
            # Each gets its share of the cores, unless the user has said how many.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
            _side_by_side(root, cell).touch()
        self.began = time.monotonic()
        with _locked_log(root, cell) as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.poll() is not None

    def check(self) -> None:
        """Checks how the process ended.

        Raises:
            UserError: neither with a result nor by numbers that are not finite.
        """
        if is_done(self.folder):
            return
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise UserError(
            f"{self.cell.slug}: ended with status {self.process.returncode}: {last.removeprefix('error: ')}; its log is"
            f" {self.log}. Once this is mended, the same command goes on"
        )


def _stop(running: Sequence[_Training]) -> None:
    """Lets processes write their checkpoints and end; a further Ctrl-C ends them at once."""
    try:
        for training in running:
            training.process.send_signal(signal.SIGTERM)
        for training in running:
            training.process.wait()
    except KeyboardInterrupt:
        for training in running:
            training.process.kill()
            training.process.wait()
        raise


@contextmanager
def _locked_log(root: Path, cell: Cell) -> Iterator[BinaryIO]:
    """The log of a cell, open for appending; the lock on it passes to the process that inherits the file.

    Raises:
        UserError: a process that still lives has it.
    """
    log = _log(root, cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{run_folder(root, cell).path}: is being trained by another process (see {log}); wait for its end"
            ) from None
        yield file


def _log(root: Path, cell: Cell) -> Path:
    return root / "logs" / f"{cell.slug}.log"


def _side_by_side(root: Path, cell: Cell) -> Path:
    return root / "logs" / f"{cell.slug}.side-by-side"


def result_line(folder: RunFolder) -> str:
    """What a finished cell came to, in a few words."""
    if not folder.summary.exists():
        return f"diverged at step {json.loads(folder.failure.read_text())['step']}"
    perplexity = json.loads(folder.summary.read_text())["final_evaluation"]["perplexity"]
    return "perplexity not finite" if perplexity is None else f"perplexity {perplexity:.2f}"


def last_training_record(folder: RunFolder) -> dict[str, Any] | None:
    """The last whole training record of a run that may be being trained, without reading it all."""
    records = folder.records_newest_first()
    return next((record for record in records if "loss_nats_per_token" in record), None)


class _CellProgress:
    """On a terminal bars over all cells and over those being trained; elsewhere a line for each finished cell."""

    def __init__(self, console: Console, cells: Sequence[Cell], root: Path) -> None:
        done = [cell for cell in cells if is_done(run_folder(root, cell))]
        self._console, self._num_cells, self._num_done = console, len(cells), len(done)
        self._ended_steps = sum(cell.run.steps for cell in done)
        self._bars: Progress | None = None
        self._all: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._total_steps = sum(cell.run.steps for cell in cells)
        if console.is_terminal and not console.is_dumb_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[count]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("·"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                expand=True,
                speed_estimate_period=SPEED_WINDOW_SECONDS,
            )

    def __enter__(self) -> _CellProgress:
        done = f", {self._num_done} of them done before" if self._num_done else ""
        self.note(f"{self._num_cells} cells{done}")
        if self._bars and self._num_done < self._num_cells:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Shows one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def ended(self, training: _Training) -> None:
        """Shows what a finished cell came to."""
        self._num_done += 1
        self._ended_steps += training.cell.run.steps
        seconds = timedelta(seconds=round(time.monotonic() - training.began))
        name = training.cell.slug
        self.note(f"{self._num_done}/{self._num_cells}  {name}: {result_line(training.folder)}  ({seconds})")
        task = self._tasks.pop(name, None)
        if self._bars and task is not None:
            self._bars.remove_task(task)

    def show(self, running: Sequence[_Training]) -> None:
        """Moves the bars."""
        if self._bars is None:
            return
        steps_done = self._ended_steps
        for training in running:
            name, steps = training.cell.slug, training.cell.run.steps
            record = last_training_record(training.folder) or {"step": 0, "loss_nats_per_token": None}
            loss = record["loss_nats_per_token"]
            count = f"step {record['step']}/{steps}" + ("" if loss is None else f"  loss {loss:.3f}")
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=steps, count=count, completed=record["step"])
            self._bars.update(self._tasks[name], completed=record["step"], count=count)
            steps_done += record["step"]
        count = f"{self._num_done}/{self._num_cells} cells"
        if self._all is None:
            self._all = self._bars.add_task("all", total=self._total_steps, completed=steps_done, count=count)
        self._bars.update(self._all, completed=steps_done, count=count)


def usable_cores() -> int:
    """Cores that this process may use, which a container or taskset can hold below the machine's."""
    # Not on every system.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
