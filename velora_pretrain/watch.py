"""Follows a run that another process trains: its new records, until it ends. No torch here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from velora_pretrain.display import Display
from velora_pretrain.records import RunFolder, record_of
from velora_pretrain.run_view import State, evaluation_record, state_of, training_record, view_run

POLL_SECONDS = 0.5
"""Time between looks at the records."""


def watch(folder: RunFolder, display: Display, *, sleep: Callable[[float], object] = time.sleep) -> State:
    """Shows a run's records as they come, and returns once it has ended.

    Args:
        folder: the run.
        display: shows it.
        sleep: waits for so many seconds.

    Returns:
        How it ended.

    Raises:
        UserError: the folder holds no run.
    """
    view = view_run(folder)
    records = _Tail(folder, len(view.training) + len(view.evaluations))
    done = view.training[-1]["step"] if view.training else 0
    display.start(name=str(folder.path), steps=view.run.steps, done_steps=done)
    display.past([training_record(each) for each in view.training])
    for fields in view.evaluations[-1:]:
        display.evaluation(evaluation_record(fields))
    while True:
        # Asked before the last look, so that no record is written in between.
        state = state_of(folder)
        for fields in records.new():
            if "loss_nats_per_token" in fields:
                display.step(training_record(fields))
            elif "perplexity" in fields:
                display.evaluation(evaluation_record(fields))
        if state != "running":
            return state
        sleep(POLL_SECONDS)


class _Tail:
    """The records that are appended to a run's metrics; of a file written anew, as a resumed run does, the last."""

    def __init__(self, folder: RunFolder, known: int) -> None:
        self._path, self._known = folder.metrics, known
        self._place = 0
        self._inode: int | None = None

    def new(self) -> list[dict[str, Any]]:
        """Whole records since the last call."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            stat = os.fstat(file.fileno())
            is_first = self._inode is None
            is_rewritten = not is_first and (stat.st_ino != self._inode or stat.st_size < self._place)
            self._inode, self._place = stat.st_ino, 0 if is_rewritten else self._place
            file.seek(self._place)
            lines = [line for line in file if line.endswith(b"\n")]
            self._place += sum(map(len, lines))
        lines = lines[-1:] if is_rewritten else lines[self._known :] if is_first else lines
        return [record_of(line, str(self._path)) for line in lines]
