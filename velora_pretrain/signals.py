"""Stopping a run from outside: the step is finished, a checkpoint written, and the way on is said."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal ended the run after a checkpoint was written."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        """How to go on."""


class StopSignals:
    """While it is entered, a first Ctrl-C or SIGTERM only asks to stop; a second ends the program at once."""

    def __init__(self) -> None:
        self.is_set = False
        """Whether a signal came. Nothing is printed from the handler, which may interrupt a print."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; elsewhere the program's own stay.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        # From here on the signals do what they did before, so that a second one ends the program.
        self._restore()


def ignore_termination() -> None:
    """For a program that is about to end: a SIGTERM no longer ends it at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
