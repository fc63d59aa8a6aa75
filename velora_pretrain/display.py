"""What a command shows: progress of a run, notes, warnings and result tables.

A terminal gets a live display, anything else one plain line per event. Progress, notes and tables go to standard output
and warnings to standard error, so a redirected log keeps the course of the run and warnings stay on the screen. A
command whose standard output carries data (`--json -`) asks for everything on standard error instead. Under a launcher
of several processes only rank 0 shows anything. No torch here: help and errors answer at once.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from velora_pretrain.plain_display import (
    SECONDS_BETWEEN_LINES,
    Display,
    LogDisplay,
    clock_face,
    evaluating_line,
    evaluation_line,
    step_figures,
)
from velora_pretrain.records import EvaluationRecord, TrainingRecord
from velora_pretrain.sparkline import ASCII_BLOCKS, BLOCKS, Course, sparkline

__all__ = ["Display", "LiveDisplay", "LogDisplay", "evaluating_line", "evaluation_line", "make_display", "step_figures"]

SPEED_WINDOW_SECONDS = 600.0
"""Time over which the live display averages speed: a step on a CPU may take a minute."""
SPARKLINE_CHARACTERS = 24
"""Length of the losses' course."""
GAP = "   "
"""Between two figures."""


class LiveDisplay(Display):
    """A progress bar over the steps, and below it the losses' course and the figures of the last step.

    The name has a line to itself where the bar would else be short; figures that do not fit on a line go to the next.
    """

    def __init__(self, console: Console, errors: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the display.

        Args:
            console: the terminal that holds the live part.
            errors: where warnings go; where it is a terminal too, they are shown above the live part.
            clock: seconds, from any origin.
        """
        self._console, self._errors, self._clock = console, errors, clock
        self._live: Live | None = None
        self._begin(name="", steps=0, done_steps=0)

    def _begin(self, *, name: str, steps: int, done_steps: int) -> None:
        self._name, self._steps, self._done_steps = name, steps, done_steps
        self._part_of_step = ""
        self._losses = Course()
        self._last: TrainingRecord | None = None
        self._validation: list[str] = []
        self._seconds_before = 0.0
        self._began_seconds = self._clock()
        self._marks: deque[tuple[float, int]] = deque()
        self._bars = self._new_bars()
        self._run: TaskID | None = None
        self._scoring: TaskID | None = None

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
        self._begin(name=name, steps=steps, done_steps=done_steps)
        self._run = self._bars.add_task("", total=steps, completed=done_steps, count=self._count())
        self._mark(done_steps)
        self._start_live()

    def past(self, records: Sequence[TrainingRecord]) -> None:
        """Takes the course of the losses, the time and the speed from steps that were done before."""
        marks, before = [(0.0, 0)], 0
        for record in records:
            self._losses.add(record.loss_nats_per_token)
            speed, is_counted = record.tokens_per_second, not math.isnan(record.tokens)
            taken = (record.tokens - before) / speed if is_counted and speed > 0 else 0.0
            marks.append((marks[-1][0] + taken, record.step))
            before = record.tokens if is_counted else before
        if not records:
            return
        self._last, self._seconds_before = records[-1], marks[-1][0]
        now = self._clock()
        self._marks.clear()
        self._marks.extend((now + seconds - self._seconds_before, step) for seconds, step in marks)
        self._mark(records[-1].step)
        self._redraw()

    def micro_batch(self, done: int, total: int) -> None:
        """Moves the bar by a part of a step."""
        if self._run is not None:
            self._part_of_step = f", micro-batch {done}/{total}" if 1 < total != done else ""
            self._bars.update(self._run, completed=self._done_steps + done / total, count=self._count())

    def step(self, record: TrainingRecord) -> None:
        """Moves the bar and shows the step's figures."""
        self._done_steps, self._last, self._part_of_step = record.step, record, ""
        self._losses.add(record.loss_nats_per_token)
        self._mark(record.step)
        if self._run is not None:
            self._bars.update(self._run, completed=record.step, count=self._count())
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
        self._validation = [f"validation perplexity {record.perplexity:.2f}"]
        line = evaluation_line(record)
        self.note(line if len(line) <= self._console.width else line.partition("  (")[0])
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
            console=self._console,
            expand=True,
        )

    def _count(self) -> str:
        return f"{self._done_steps}/{self._steps} steps{self._part_of_step}"

    def _mark(self, step: int) -> None:
        """Keeps when a step was done, as far back as the speed is averaged, two marks at the least."""
        now = self._clock()
        self._marks.append((now, step))
        while len(self._marks) > 2 and self._marks[1][0] < now - SPEED_WINDOW_SECONDS:
            self._marks.popleft()

    def _times(self) -> str:
        """Time that the run has taken, and how long it will go on at the speed of its last steps."""
        now = self._clock()
        (first_seconds, first_step), (last_seconds, last_step) = self._marks[0], self._marks[-1]
        elapsed = clock_face(self._seconds_before + now - self._began_seconds)
        if self._done_steps >= self._steps or last_step <= first_step:
            return elapsed
        rate = (last_seconds - first_seconds) / (last_step - first_step)
        return f"{elapsed} · {clock_face(max(0.0, (self._steps - last_step) * rate - (now - last_seconds)))} left"

    def _figures(self) -> list[str]:
        """The last step's, the losses' course behind the loss."""
        if self._last is None:
            return self._validation
        loss, *others = step_figures(self._last)
        blocks = ASCII_BLOCKS if self._console.options.ascii_only else BLOCKS
        loss = f"{loss} {sparkline(self._losses.values, SPARKLINE_CHARACTERS, blocks=blocks)}"
        return [loss, *others, *self._validation]

    def _rendering(self) -> Group:
        lines = [Text(line) for line in in_lines(self._figures(), self._console.width)]
        if self._run is None:
            return Group(self._bars, *lines)
        head = in_lines([self._name, self._times()], self._console.width)
        return Group(*(Text(line, overflow="ellipsis", no_wrap=True) for line in head), self._bars, *lines)

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


def in_lines(parts: Sequence[str], width: int) -> list[str]:
    """The parts side by side on as few lines of that width as hold them; none is broken."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(GAP) + len(part) <= width:
            lines[-1] += GAP + part
        else:
            lines.append(part)
    return lines


def make_display(*, output_is_data: bool = False, every_step: bool = False) -> Display:
    """The display for this process: live on a terminal, plain lines elsewhere, nothing on ranks above 0.

    Args:
        output_is_data: standard output carries data, so progress goes to standard error.
        every_step: plain lines leave no step out.
    """
    if process_rank() > 0:
        return Display()
    errors = Console(stderr=True)
    console = errors if output_is_data else Console()
    live = console.is_terminal and not console.is_dumb_terminal
    if live:
        return LiveDisplay(console, errors)
    seconds = 0.0 if every_step else SECONDS_BETWEEN_LINES
    return LogDisplay(console, errors, seconds_between_lines=seconds)


def process_rank() -> int:
    """Rank of this process under torchrun and the like; 0 without one."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
