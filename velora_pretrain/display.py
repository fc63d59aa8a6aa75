"""What a command shows: progress of a run, notes, warnings and result tables.

A terminal gets a live display, anything else one plain line per event. Progress, notes and tables go to standard output
and warnings to standard error, so a redirected log keeps the course of the run and warnings stay on the screen. A
command whose standard output carries data (`--json -`) asks for everything on standard error instead. Under a launcher
of several processes only rank 0 shows anything. No torch here: help and errors answer at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from velora_pretrain.records import GIB, EvaluationRecord, TrainingRecord

FIRST_STEPS_SHOWN = 5
"""Steps of which a plain log shows every one, so that a user sees at once that the run goes."""
SECONDS_BETWEEN_LINES = 5.0
"""Shortest time between the lines of later steps in a plain log."""
SECONDS_BETWEEN_SIGNS_OF_LIFE = 30.0
"""Longest silence of a plain log within one long step or evaluation."""
SPEED_WINDOW_SECONDS = 600.0
"""Time over which the live display averages speed: a step on a CPU may take a minute."""


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

    def __init__(self, console: Console, errors: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the display.

        Args:
            console: where lines go.
            errors: where warnings go.
            clock: seconds, from any origin.
        """
        self._console, self._errors, self._clock = console, errors, clock
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
        if early or record.step == self._steps or self._silent_seconds() >= SECONDS_BETWEEN_LINES:
            left = f"  {_clock_face(self._left_seconds())} left" if record.step < self._steps else ""
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


class LiveDisplay(Display):
    """A progress bar over the steps with the figures of the last one, below the notes and warnings."""

    def __init__(self, console: Console, errors: Console) -> None:
        """Makes the display.

        Args:
            console: the terminal that holds the live part.
            errors: where warnings go; where it is a terminal too, they are shown above the live part.
        """
        self._console, self._errors = console, errors
        self._live: Live | None = None
        self._bars = self._new_bars()
        self._run: TaskID | None = None
        self._scoring: TaskID | None = None
        self._done_steps = 0
        self._figures: list[str] = []
        self._validation = ""

    def note(self, text: str) -> None:
        """Prints one line above the live part."""
        self._console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """Shows a panel."""
        panel = Panel(Text(text), title="WARNING", border_style="bold yellow", style="bold")
        # One screen: only the console that draws the live part may write to it while that is up.
        if self._errors.is_terminal and self._live is None:
            self._errors.print(panel)
            return
        self._console.print(panel)
        if not self._errors.is_terminal:
            self._errors.print(f"WARNING: {text}", markup=False, highlight=False, soft_wrap=True)

    def start(self, *, name: str, steps: int, done_steps: int) -> None:
        """Begins the live part."""
        self._stop_live()
        self._bars = self._new_bars()
        self._done_steps, self._figures, self._validation = done_steps, [], ""
        self._run = self._bars.add_task(name, total=steps, completed=done_steps, count=f"{done_steps}/{steps} steps")
        self._start_live()

    def micro_batch(self, done: int, total: int) -> None:
        """Moves the bar by a part of a step."""
        if self._run is not None:
            part = f", micro-batch {done}/{total}" if 1 < total != done else ""
            steps = int(self._bars.tasks[0].total or 0)
            count = f"{self._done_steps}/{steps} steps{part}"
            self._bars.update(self._run, completed=self._done_steps + done / total, count=count)

    def step(self, record: TrainingRecord) -> None:
        """Moves the bar and shows the step's figures."""
        self._done_steps = record.step
        self._figures = step_figures(record)
        if self._run is not None:
            steps = int(self._bars.tasks[0].total or 0)
            self._bars.update(self._run, completed=record.step, count=f"{record.step}/{steps} steps")
        self._redraw()

    def evaluating(self, done_tokens: int, total_tokens: int | None) -> None:
        """Shows a second bar while validation text is scored."""
        if self._scoring is None:
            self._scoring = self._bars.add_task("validation", total=total_tokens, count="")
        count = f"{done_tokens:,} tokens" if total_tokens is None else f"{done_tokens:,}/{total_tokens:,} tokens"
        self._bars.update(self._scoring, completed=done_tokens, total=total_tokens, count=count)
        self._start_live()

    def evaluation(self, record: EvaluationRecord) -> None:
        """Keeps the result as a line above, and the perplexity among the figures."""
        if self._scoring is not None:
            self._bars.remove_task(self._scoring)
            self._scoring = None
        self._validation = f"validation perplexity {record.perplexity:.2f}"
        self.note(evaluation_line(record))
        self._redraw()

    def finish(self) -> None:
        """Ends the live part; its last state stays on the screen."""
        if self._scoring is not None:
            self._bars.remove_task(self._scoring)
            self._scoring = None
        self._stop_live()

    def _new_bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            expand=True,
            speed_estimate_period=SPEED_WINDOW_SECONDS,
        )

    def _rendering(self) -> Group:
        figures = "   ".join([*self._figures, self._validation] if self._validation else self._figures)
        return Group(self._bars, *([Text(figures, overflow="fold")] if figures else []))

    def _start_live(self) -> None:
        if self._live is None:
            self._live = Live(get_renderable=self._rendering, console=self._console, refresh_per_second=4)
            self._live.start()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _redraw(self) -> None:
        if self._live is not None:
            self._live.refresh()


def make_display(*, output_is_data: bool = False) -> Display:
    """The display for this process: live on a terminal, plain lines elsewhere, nothing on ranks above 0.

    Args:
        output_is_data: standard output carries data, so progress goes to standard error.
    """
    if process_rank() > 0:
        return Display()
    errors = Console(stderr=True)
    console = errors if output_is_data else Console()
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(console, errors) if live else LogDisplay(console, errors)


def process_rank() -> int:
    """Rank of this process under torchrun and the like; 0 without one."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def step_figures(record: TrainingRecord) -> list[str]:
    """The figures of one optimizer step, each with its name or unit."""
    return [
        f"loss {record.loss_nats_per_token:.4f}",
        f"lr {record.learning_rate:.2e}",
        f"grad norm {record.grad_norm:.3g}",
        f"{record.tokens_per_second:,.0f} tokens/s",
        f"peak {record.peak_memory_bytes / GIB:.2f} GiB",
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


def _clock_face(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
