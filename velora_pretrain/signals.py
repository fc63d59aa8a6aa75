"""Stopping a run from outside: first the step is finished, or else left; a checkpoint is written either way.

A first Ctrl-C or SIGTERM only asks to stop: the step is finished, unless it still waits for its data. A second leaves
the step at once, where that loses nothing but the step. A third does what it would do without any of this.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_SECONDS = 1.0
"""Time within which a signal of the other kind belongs to the first: launchers pass a Ctrl-C on as a SIGTERM."""


class Interrupted(Exception):
    """A signal ended the run after a checkpoint was written."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        """How to go on."""


class LeaveStep(BaseException):
    """A signal came: the step is left where it stands. No `Exception`, so that nothing takes it for a fault."""


class StopSignals:
    """While it is entered, signals are counted: see the module's docstring."""

    def __init__(self) -> None:
        self.is_set = False
        """Whether a signal came. Nothing is printed from the handler, which may interrupt a print."""
        self._is_urgent = self._may_leave = self._may_leave_at_first = False
        self._first: tuple[int, float] = (0, 0.0)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; elsewhere the program's own stay.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def leavable(self, *, at_first: bool = False) -> Iterator[None]:
        """Around what a second signal may cut short at any point.

        Args:
            at_first: a first signal may, too.

        Raises:
            LeaveStep: it came, within or before.
        """
        self._may_leave, self._may_leave_at_first = True, at_first
        try:
            if self._is_urgent or (at_first and self.is_set):
                raise LeaveStep
            yield
        finally:
            self._may_leave = self._may_leave_at_first = False

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.is_set:
            self.is_set, self._first = True, (number, time.monotonic())
            if self._may_leave_at_first:
                raise LeaveStep
            return
        if number != self._first[0] and time.monotonic() - self._first[1] < SAME_REQUEST_SECONDS:
            return
        self._is_urgent = True
        # From here on the signals do what they did before, so that a third one ends the program.
        self._restore()
        if self._may_leave:
            raise LeaveStep


def ignore_termination() -> None:
    """For a program that is about to end: a SIGTERM no longer ends it at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
