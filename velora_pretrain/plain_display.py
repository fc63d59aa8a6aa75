"""What a command reports to, and the plain lines of a log; `display.py` has the live one. No torch here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console

from velora_pretrain.records import GIB, EvaluationRecord, TrainingRecord

FIRST_STEPS_SHOWN = 5
"""Steps of which a plain log shows every one, so that a user sees at once that the run goes."""
SECONDS_BETWEEN_LINES = 5.0
"""Shortest time between the lines of later steps in a plain log."""
SECONDS_BETWEEN_SIGNS_OF_LIFE = 30.0
"""Longest silence of a plain log within one long step or evaluation."""


class Display:
    """What training and evaluation report to; this base shows nothing. A context manager that finishes itself."""

    def note(self, text: str) -> None:
        """Shows one line of information."""

    def warn(self, text: str) -> None:
        """Shows a warning that cannot be missed."""

    def start(self, *, name: str, steps: int, done_steps: int) -> None:
        """Begins to show a run.

        Args:
            name: the run's name.
            steps: optimizer steps at the end of the run.
            done_steps: optimizer steps done before, by the run that is resumed.
        """

    def past(self, records: Sequence[TrainingRecord]) -> None:
        """Takes steps that were done before the run was shown, oldest first; called after `start`."""

    def micro_batch(self, done: int, total: int) -> None:
        """Shows progress within an optimizer step: micro-batches done, and in all."""

    def step(self, record: TrainingRecord) -> None:
        """Shows one optimizer step."""

    def evaluating(self, done_tokens: int, total_tokens: int | None) -> None:
        """Shows progress within an evaluation; the total is None where the data may end before."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """Shows one finished evaluation."""

    def finish(self) -> None:
        """Ends the display and restores the terminal; harmless when repeated."""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()


class LogDisplay(Display):
    """Plain lines: the first steps, then a line every few seconds, every evaluation and the last step."""

    def __init__(
        self,
        console: Console,
        errors: Console,
        clock: Callable[[], float] = time.monotonic,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        """Makes the display.

        Args:
            console: where lines go.
            errors: where warnings go.
            clock: seconds, from any origin.
            seconds_between_lines: shortest time between the lines of later steps; 0 shows every one.
        """
        self._console, self._errors, self._clock = console, errors, clock
        self._seconds_between_lines = seconds_between_lines
        self._steps = self._first_step = self._done_steps = 0
        self._started_seconds = self._last_line_seconds = clock()

    def note(self, text: str) -> None:
        """Prints one line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Prints one line to standard error."""
        self._errors.print(f"WARNING: {text}", markup=False, highlight=False, soft_wrap=True)

    def start(self, *, name: str, steps: int, done_steps: int) -> None:
        """Prints what begins."""
        self._steps, self._first_step, self._done_steps = steps, done_steps, done_steps
        self._started_seconds = self._clock()
        self._print(f"{name}: {steps} steps" + (f", {done_steps} of them done before" if done_steps else ""))

    def micro_batch(self, done: int, total: int) -> None:
        """Prints a line when the log would else be silent for long."""
        if self._silent_seconds() >= SECONDS_BETWEEN_SIGNS_OF_LIFE:
            self._print(f"step {self._done_steps + 1}/{self._steps}  micro-batch {done} of {total}")

    def step(self, record: TrainingRecord) -> None:
        """Prints a line for the first steps, the last one, and between them every few seconds."""
        self._done_steps = record.step
        early = record.step - self._first_step <= FIRST_STEPS_SHOWN
        if early or record.step == self._steps or self._silent_seconds() >= self._seconds_between_lines:
            left = f"  {clock_face(self._left_seconds())} left" if record.step < self._steps else ""
            self._print(f"step {record.step}/{self._steps}  {'  '.join(step_figures(record))}{left}")

    def evaluating(self, done_tokens: int, total_tokens: int | None) -> None:
        """Prints a line when the log would else be silent for long."""
        if self._silent_seconds() >= SECONDS_BETWEEN_SIGNS_OF_LIFE:
            self._print(evaluating_line(done_tokens, total_tokens))

    def evaluation(self, record: EvaluationRecord) -> None:
        """Prints the result."""
        self._print(evaluation_line(record))

    def _left_seconds(self) -> float:
        done = self._done_steps - self._first_step
        return (self._clock() - self._started_seconds) / max(1, done) * (self._steps - self._done_steps)

    def _silent_seconds(self) -> float:
        return self._clock() - self._last_line_seconds

    def _print(self, line: str) -> None:
        self._last_line_seconds = self._clock()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def step_figures(record: TrainingRecord) -> list[str]:
    """The figures of one optimizer step, each with its name or unit; the last is memory, beside what the device has."""
    limit = record.memory_limit_bytes
    of_limit = f" of {limit / GIB:.1f}" if limit else ""
    # Not known of a record by hand, or of an early version.
    is_timed = not math.isnan(record.data_wait_seconds)
    return [
        f"loss {record.loss_nats_per_token:.4f}",
        f"lr {record.learning_rate:.2e}",
        f"grad norm {record.grad_norm:.3g}",
        f"{record.tokens_per_second:,.0f} tokens/s",
        *([f"data wait {record.data_wait_seconds:.2f} s"] if is_timed else []),
        f"peak {record.peak_memory_bytes / GIB:.2f}{of_limit} GiB",
    ]


def evaluation_line(record: EvaluationRecord) -> str:
    """One line for a finished evaluation."""
    return (
        f"validation at step {record.step}: perplexity {record.perplexity:.2f}  loss"
        f" {record.eval_loss_nats_per_token:.4f}  bits/byte {record.bits_per_byte:.4f}  ({record.eval_tokens:,} tokens)"
    )


def evaluating_line(done_tokens: int, total_tokens: int | None) -> str:
    """One line for an evaluation under way."""
    return f"validation: {done_tokens:,}{'' if total_tokens is None else f' of {total_tokens:,}'} tokens scored"


def clock_face(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
