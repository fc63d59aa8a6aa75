"""Several files on their way at once: bars on a terminal, elsewhere a line for each that is done. No torch here."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

ALL = "all"


class _TokensColumn(ProgressColumn):
    """How many tokens there are, and how fast they come."""

    def render(self, task: Task) -> Text:
        """The text."""
        speed = task.finished_speed or task.speed
        return Text(short_count(task.completed) + (f"  {short_count(speed)}/s" if speed else ""))


class Bars:
    """A context manager; its methods may be called from any thread.

    Args:
        console: where to show.
        what: what is counted. Of bytes it is known how many will come, of tokens it is not.
    """

    def __init__(self, console: Console, what: Literal["bytes", "tokens"]) -> None:
        self._console, self._what = console, what
        name = TextColumn("{task.description}", markup=False)
        columns: list[ProgressColumn] = [name, SpinnerColumn(), _TokensColumn(), TimeElapsedColumn()]
        if what == "bytes":
            columns = [
                *(name, BarColumn(), DownloadColumn(), TransferSpeedColumn()),
                TimeRemainingColumn(),
            ]
        self._progress = Progress(*columns, console=console)
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._counts: dict[str, int] = {}
        self._files, self._ended = 0, 0

    @property
    def ended_files(self) -> int:
        """Files that are done."""
        return self._ended

    @property
    def count(self) -> int:
        """What has been counted, over all files."""
        return sum(self._counts.values())

    def start(self, *, files: int, total: int | None = None, done: int = 0) -> None:
        """Says how much there will be."""
        self._files = files
        if files and self._is_live:
            self._counts[""] = 0
            self._tasks[ALL] = self._progress.add_task(self._head(), total=total, completed=done)
            self._progress.start()

    def begin(self, name: str, *, total: int | None = None, done: int = 0) -> None:
        """A file is on its way, `done` of it from before."""
        with self._lock:
            self._counts[name] = done
            if self._is_live:
                if name not in self._tasks:
                    self._tasks[name] = self._progress.add_task(name, total=total)
                self._progress.update(self._tasks[name], completed=done)
                self._progress.update(self._tasks[ALL], completed=self.count)

    def advance(self, name: str, count: int) -> None:
        """So much more of a file has come."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + count
            if self._is_live:
                if name not in self._tasks:
                    self._tasks[name] = self._progress.add_task(name, total=None)
                self._progress.advance(self._tasks[name], count)
                self._progress.advance(self._tasks[ALL], count)

    def end(self, name: str, note: str) -> None:
        """A file is done."""
        with self._lock:
            self._ended += 1
            if self._is_live:
                if name in self._tasks:
                    self._progress.remove_task(self._tasks.pop(name))
                self._progress.update(self._tasks[ALL], description=self._head())
            else:
                line = f"{name}  {note}  ({self._ended} of {self._files})"
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _head(self) -> str:
        return f"{self._ended} of {self._files} files"

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:  # elsewhere it would leave an empty line
            self._progress.stop()


def short_count(count: int | float) -> str:
    """A number of tokens in three digits: 1.23B, 45.6M, 789."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:,.0f}{unit}"
    return f"{count:.0f}"
