"""What runs and tables look like, on a terminal and in a log."""

import dataclasses
import io
import math
import re

import pytest
from rich.console import Console

from velora_pretrain import tables
from velora_pretrain.display import Display, LiveDisplay, LogDisplay, make_display
from velora_pretrain.memory_table import print_memory_rows
from velora_pretrain.records import EvaluationRecord, TrainingRecord
from velora_pretrain.sparkline import Course, sparkline

EVALUATION = EvaluationRecord(
    step=20,
    eval_loss_nats_per_token=5.123456,
    perplexity=167.914,
    perplexity_paper=150.5,
    bits_per_byte=1.75,
    eval_tokens=1_234_567,
)
PREDICTED = {
    "weights_bytes": 2**30,
    "gradients_bytes": 2**29,
    "optimizer_state_bytes": 2**31,
    "buffers_bytes": 0,
    "saved_activations_bytes": 2**28,
    "temporaries_bytes": 2**27,
    "peak_bytes": 2**32,
}


def record(step: int) -> TrainingRecord:
    return TrainingRecord(
        step=step,
        tokens=step * 2048,
        loss_nats_per_token=6.54321,
        learning_rate=9.5e-4,
        grad_norm=0.8421,
        tokens_per_second=12_345.6,
        peak_memory_bytes=3 * 2**29,
        data_wait_seconds=0.0,
        batch_digest="0123456789abcdef",
        memory_limit_bytes=80 * 2**30,
    )


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Log:
    """A log display with its output and a clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.out, self.err, self.clock = io.StringIO(), io.StringIO(), Clock()
        self.display = LogDisplay(Console(file=self.out), Console(file=self.err), self.clock)

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


class Terminal:
    """A live display on a terminal that records what is written."""

    def __init__(self, *, errors_on_terminal: bool = True, width: int = 120) -> None:
        self.out, self.err, self.clock = io.StringIO(), io.StringIO(), Clock()
        self.console = Console(file=self.out, force_terminal=True, width=width, color_system=None)
        errors = Console(file=self.err, force_terminal=errors_on_terminal, width=width, color_system=None)
        self.display = LiveDisplay(self.console, errors, self.clock)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.out.getvalue())


def test_a_log_shows_the_first_steps_then_one_in_a_while_and_the_last():
    log = Log()
    log.display.start(name="60m-full", steps=102, done_steps=0)
    for step in range(1, 103):
        log.clock.seconds += 1
        log.display.step(record(step))
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in log.lines[1:]]
    assert shown == [1, 2, 3, 4, 5, *range(10, 101, 5), 102]


def test_a_log_line_has_every_figure_with_its_unit_and_the_time_left():
    log = Log()
    log.display.start(name="60m-full", steps=100, done_steps=90)
    log.clock.seconds += 30
    log.display.step(record(91))
    assert log.lines == [
        "60m-full: 100 steps, 90 of them done before",
        "step 91/100  loss 6.5432  lr 9.50e-04  grad norm 0.842  12,346 tokens/s  data wait 0.00 s"
        "  peak 1.50 of 80.0 GiB  0:04:30 left",
    ]


def test_a_record_of_an_early_version_has_a_line_without_what_it_does_not_know():
    log = Log()
    log.display.start(name="60m-full", steps=91, done_steps=90)
    log.display.step(dataclasses.replace(record(91), data_wait_seconds=math.nan, memory_limit_bytes=None))
    assert log.lines[1:] == ["step 91/91  loss 6.5432  lr 9.50e-04  grad norm 0.842  12,346 tokens/s  peak 1.50 GiB"]


def test_a_log_gives_signs_of_life_within_a_long_step():
    log = Log()
    log.display.start(name="60m-full", steps=100, done_steps=3)
    for place in range(1, 7):
        log.clock.seconds += 20
        log.display.micro_batch(place, 8)
    assert log.lines[1:] == [f"step 4/100  micro-batch {place} of 8" for place in (2, 4, 6)]


def test_a_log_shows_evaluations_notes_and_warnings():
    log = Log()
    log.display.start(name="60m-full", steps=100, done_steps=0)
    log.display.evaluating(10, 1000)
    log.clock.seconds += 31
    log.display.evaluating(20, 1000)
    log.display.evaluation(EVALUATION)
    log.display.note("a note with [brackets] " + "x" * 200)
    log.display.warn("no hub")
    assert log.lines[1:] == [
        "validation: 20 of 1,000 tokens scored",
        "validation at step 20: perplexity 167.91  loss 5.1235  bits/byte 1.7500  (1,234,567 tokens)",
        "a note with [brackets] " + "x" * 200,
    ]
    assert log.err.getvalue() == "WARNING: no hub\n"


def test_a_terminal_shows_progress_figures_and_the_last_perplexity():
    terminal = Terminal()
    with terminal.display as live:
        live.start(name="60m-full", steps=100, done_steps=10)
        live.step(record(11))
        live.evaluating(500, 1000)
        live.step(record(11))  # draws at once; by itself the terminal is drawn four times a second
        live.evaluation(EVALUATION)
        live.step(record(12))
        live.note("a note with [brackets]")
    last_frame = terminal.text[terminal.text.rindex("60m-full") :]
    for part in (
        "12/100 steps",
        "loss 6.5432",
        "lr 9.50e-04",
        "grad norm 0.842",
        "12,346 tokens/s",
        "peak 1.50 of 80.0 GiB",
    ):
        assert part in last_frame
    assert "validation perplexity 167.91" in last_frame
    assert "validation at step 20: perplexity 167.91  loss 5.1235" in terminal.text
    assert "500/1,000 tokens" in terminal.text
    assert "a note with [brackets]" in terminal.text


def test_a_terminal_moves_within_a_step():
    terminal = Terminal()
    with terminal.display as live:
        live.start(name="60m-full", steps=4, done_steps=1)
        live.micro_batch(1, 4)
        assert live._bars.tasks[0].completed == 1.25  # pyright: ignore[reportAttributeAccessIssue]
        live.step(record(2))
        assert live._bars.tasks[0].completed == 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("width", [80, 60, 132])
def test_no_figure_is_broken_at_the_end_of_a_line(width: int):
    terminal = Terminal(width=width)
    name = "runs/350m-galore+velora-20261127-101010"
    with terminal.display as live:
        live.start(name=name, steps=60_000, done_steps=0)
        live.past([record(step) for step in range(1, 101)])
        live.evaluation(EVALUATION)
        live.micro_batch(3, 16)
        live.step(record(101))
    lines = [line.rstrip() for line in terminal.text.replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines[-8:])
    for part in (name, "101/60000 steps", "loss 6.5432 ▁", "lr 9.50e-04", "data wait 0.00 s", "peak 1.50 of 80.0 GiB"):
        assert part in shown
    # The line of the evaluation gives its least part where there is no room.
    assert ("(1,234,567 tokens)" in terminal.text) == (width > 100)


def test_steps_of_which_the_tokens_are_not_known_take_no_time():
    terminal = Terminal()
    with terminal.display as live:
        live.start(name="60m-full", steps=100, done_steps=50)
        records = [record(step) for step in range(1, 51)]
        for each in records:
            object.__setattr__(each, "tokens", math.nan)  # as of a record by hand
        live.past(records)
        assert live._times() == "0:00:00 · 0:00:00 left"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_time_left_follows_the_last_steps_and_what_was_done_before_counts():
    terminal = Terminal()
    with terminal.display as live:
        live.start(name="60m-full", steps=100, done_steps=50)
        live.past([dataclasses.replace(record(step), tokens_per_second=1024.0) for step in range(1, 51)])
        terminal.clock.seconds += 1
        live._redraw()  # pyright: ignore[reportAttributeAccessIssue]
        # 2,048 tokens at 1,024 a second: 2 seconds a step, the last one of them 1 second ago.
        assert live._times() == "0:01:41 · 0:01:39 left"  # pyright: ignore[reportAttributeAccessIssue]
        for step in range(51, 100):
            terminal.clock.seconds += 30
            live.step(record(step))
        assert live._times() == "0:26:11 · 0:00:30 left"  # pyright: ignore[reportAttributeAccessIssue]
        live.step(record(100))
        assert live._times() == "0:26:11"  # pyright: ignore[reportAttributeAccessIssue]


def test_every_step_has_a_line_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]):
    with make_display(every_step=True) as shown:
        shown.start(name="60m-full", steps=100, done_steps=0)
        for step in range(1, 31):
            shown.step(record(step))
    assert capsys.readouterr().out.count("loss 6.5432") == 30


def test_a_sparkline_spans_its_values_but_for_those_of_the_warm_up():
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([100.0, *(10.0 - place for place in range(10)), 0.5], 12) == "██▇▇▆▅▄▄▃▂▁▁"
    assert sparkline([1.0] * 5, 3) == "▁▁▁"
    assert sparkline([], 3) == ""
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2, blocks="ab") == "ab"


def test_a_course_of_any_length_keeps_its_shape_in_little_memory():
    course = Course(most=8)
    for place in range(1000):
        course.add(float(place))
        course.add(math.nan)
    values = course.values
    assert len(values) <= 8
    assert values == sorted(values)
    assert values[0] == pytest.approx(63.5)
    assert values[-1] > 900


def test_a_terminal_is_restored_after_an_error():
    terminal = Terminal()
    with pytest.raises(RuntimeError), terminal.display as live:
        live.start(name="60m-full", steps=4, done_steps=0)
        assert terminal.out.getvalue().count("\x1b[?25l") == 1
        raise RuntimeError
    assert terminal.out.getvalue().count("\x1b[?25h") == 1
    terminal.display.finish()


@pytest.mark.parametrize("errors_on_terminal", [True, False])
@pytest.mark.parametrize("is_started", [True, False])
def test_a_warning_is_on_the_screen_once_and_in_a_redirected_error_log(errors_on_terminal: bool, is_started: bool):
    terminal = Terminal(errors_on_terminal=errors_on_terminal)
    with terminal.display as live:
        if is_started:
            live.start(name="60m-full", steps=4, done_steps=0)
        live.warn("THE HUB DID NOT ANSWER")
    screen = terminal.out.getvalue() + (terminal.err.getvalue() if errors_on_terminal else "")
    assert screen.count("THE HUB DID NOT ANSWER") == screen.count("WARNING") == 1
    if is_started:  # the live part must not be written over
        assert "THE HUB DID NOT ANSWER" in terminal.out.getvalue()
    if not errors_on_terminal:
        assert terminal.err.getvalue() == "WARNING: THE HUB DID NOT ANSWER\n"


def test_only_rank_0_shows_anything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    silent = make_display()
    assert type(silent) is Display
    with silent:
        silent.start(name="60m-full", steps=2, done_steps=0)
        silent.step(record(1))
        silent.warn("x")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert isinstance(make_display(), LogDisplay)


def test_progress_leaves_standard_output_to_data(capsys: pytest.CaptureFixture[str]):
    with make_display(output_is_data=True) as shown:
        shown.note("reading")
        shown.evaluation(EVALUATION)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading" in err
    assert "perplexity 167.91" in err


def rendered(print_table: object, value: object) -> str:
    out = io.StringIO()
    print_table(value, Console(file=out, width=180))  # pyright: ignore[reportCallIssue]
    return out.getvalue()


def test_evaluation_table():
    text = rendered(
        tables.print_evaluation, {**vars(EVALUATION), "checkpoint": "runs/[x]", "tokenizer_sha256": "ab" * 32}
    )
    for part in ("167.91", "loss 5.1235", "150.50", "1.7500", "1,234,567 tokens", "runs/[x]", "ab" * 32):
        assert part in text


def test_summary_table():
    summary = {
        "final_evaluation": vars(EVALUATION),
        "peak_memory_bytes": 3 * 2**29,
        "predicted_memory": PREDICTED,
        "tokens_per_second": 4321.0,
        "steps": 150,
        "tokens": 307_200,
        "seconds": 75.0,
        "data": "sample",
        "run_dir": "runs/9m-full",
    }
    text = rendered(tables.print_summary, summary)
    for part in ("167.91", "1.50 GiB", "optimizer state 2.00", "peak 4.00", "4,321 tokens/s", "307,200", "0:01:15"):
        assert part in text
    assert "buffers" not in text


def test_memory_table_shows_shared_options_once_and_small_sizes_with_more_digits():
    options = {"size": "60m", "precision": "fp32"}
    rows = [
        {"mode": "full", "options": options, "predicted": PREDICTED, "measured": None},
        {"mode": "velora", "options": {**options, "layers": "all"}, "predicted": PREDICTED, "measured": PREDICTED},
    ]
    text = rendered(print_memory_rows, rows)
    assert text.count("60m") == text.count("layers all") + text.count("default") - 2 == 1
    assert (text.count("predicted"), text.count("measured"), text.count("4.00")) == (2, 1, 3)
    small = {key: value // 2**10 for key, value in PREDICTED.items()}
    text = rendered(print_memory_rows, [{**rows[0], "predicted": small}])
    assert "0.0039" in text


def test_a_diverged_run_can_be_shown():
    fields = {**vars(EVALUATION), "perplexity": math.inf}
    assert "inf" in rendered(tables.print_evaluation, fields)
