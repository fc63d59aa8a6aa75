"""`show` and `watch`: what they say of runs in any state, and of one that is being trained meanwhile."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import run_folders
import runs
from rich.console import Console

from velora_pretrain import cli
from velora_pretrain.display import LiveDisplay, LogDisplay
from velora_pretrain.records import RunFolder
from velora_pretrain.run_view import find_runs, glance, state_of
from velora_pretrain.watch import watch


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def age(folder: RunFolder, seconds: float) -> RunFolder:
    for path in (folder.config, folder.metrics):
        if path.exists():
            os.utime(path, (time.time() - seconds,) * 2)
    return folder


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four runs in runs/, each in another state."""
    monkeypatch.chdir(tmp_path)
    age(run_folders.write(tmp_path / "runs" / "done", mode="velora"), 7200)
    age(run_folders.write(tmp_path / "runs" / "young", done=7), 5)
    age(run_folders.write(tmp_path / "runs" / "old", done=3), 90_000)
    age(run_folders.write(tmp_path / "runs" / "broke", done=2, failure="the loss is nan"), 600)
    return tmp_path / "runs"


def test_the_list_of_runs(several: Path, capsys: pytest.CaptureFixture[str]):
    assert status("show") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    perplexity = {step: f"{run_folders.evaluation_record(step).perplexity:.2f}" for step in (5, 20)}
    assert [line[:5] for line in lines[1:]] == [
        ["young", "full", "custom", "running", "7/20"],
        ["broke", "full", "custom", "failed", "2/20"],
        ["done", "velora", "custom", "finished", "20/20"],
        ["old", "full", "custom", "stopped", "3/20"],
    ]
    assert lines[1][5:] == ["3.8750", perplexity[5], "1,000", "5", "s"]
    assert lines[3][5:] == ["3.3333", perplexity[20], "1,000", "2", "h"]
    assert lines[4][5:] == ["4.7500", "1,000", "1", "d"]


def test_the_list_as_json(several: Path, capsys: pytest.CaptureFixture[str]):
    assert status("show", "--json", "-") == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [each["state"] for each in listed] == ["running", "failed", "finished", "stopped"]
    assert listed[0] | {"age_seconds": 0} == {
        "run_dir": "runs/young",
        "age_seconds": 0,
        "state": "running",
        "mode": "full",
        "size": None,
        "step": 7,
        "steps": 20,
        "loss_nats_per_token": 3.875,
        "perplexity": run_folders.evaluation_record(5).perplexity,
        "tokens_per_second": 1000.0,
    }


def test_a_run_that_cannot_be_read_does_not_hide_the_others(several: Path, capsys: pytest.CaptureFixture[str]):
    (several / "done" / "config.toml").write_text("stepps = [")
    (several / "old" / "metrics.jsonl").write_text("nothing\n")
    assert status("show") == 0
    out = capsys.readouterr().out
    assert out.count("unreadable") == 2
    assert "runs/done/config.toml: not a TOML recipe" in out
    assert "young" in out


def test_one_run(several: Path, capsys: pytest.CaptureFixture[str]):
    folder = RunFolder(several / "done")
    (folder.checkpoint(20) / "sub").mkdir(parents=True)
    (folder.checkpoint(20) / "weights").write_bytes(bytes(3 * 2**20))
    assert status("show", "runs/done") == 0
    out = capsys.readouterr().out
    for part in (
        "runs/done  finished, step 20 of 20, last written 2 h ago",
        "  mode = velora",
        "  schedule.steps = 20",
        "  step 20  loss 3.3333  lr 2.00e-02  grad norm 1.05  1,000 tokens/s  data wait 0.25 s  peak 1.50 of 80.0 GiB",
        "  validation at step 20: perplexity",
        "  step-00000020  3.0 MiB",
        "predicted 2.1875 GiB",
    ):
        assert part in out
    assert "step 15  " not in out
    assert "seed" not in out
    assert "samples" not in out
    assert status("show", "runs/broke") == 0
    assert "step 3: the loss is nan" in capsys.readouterr().out


def write_samples(folder: RunFolder, *samples: tuple[int, str, str]) -> None:
    lines = [dict(zip(("step", "prompt", "continuation"), each, strict=True)) for each in samples]
    folder.samples.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_the_last_samples_are_shown(several: Path, capsys: pytest.CaptureFixture[str]):
    folder = RunFolder(several / "done")
    last = [(20, "The [b]", " sun\n rises"), (20, "No", "\x1b[31m red")]
    write_samples(folder, (5, "The", " early"), *last)
    with folder.samples.open("a") as file:
        file.write('{"step": 25, "prom')  # cut short by a crash
    assert status("show", "runs/done") == 0
    out = capsys.readouterr().out
    assert "samples at step 20\n  The [b] → sun rises\n  No → \ufffd[31m red\n" in out
    assert "early" not in out
    assert status("show", "runs/done", "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)["samples"]
    assert [tuple(each.values()) for each in shown] == [(5, "The", " early"), *last]
    folder.samples.write_text("nothing\n")
    assert status("show", "runs/done") == 2
    assert "samples.jsonl line 1: not a record" in capsys.readouterr().err


def test_one_run_as_json(several: Path, capsys: pytest.CaptureFixture[str]):
    assert status("show", "runs/broke", "--json", "-") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == "failed"
    assert facts["failure"] == {"step": 3, "reason": "the loss is nan"}
    assert [record["step"] for record in facts["last_records"]] == [1, 2]
    assert facts["settings"]["evaluation.every_steps"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show", "runs: holds no run; give a run folder, or train first"),
        ("show nowhere", "nowhere: no such folder"),
        ("show .", ".: holds no run"),
        ("watch", "runs: holds no run"),
        ("watch nowhere", "nowhere: holds no run"),
        ("report nowhere", "nowhere: no such folder"),
        ("report", "RUN"),
    ],
)
def test_mistakes(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert status(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_records_are_read_from_the_end_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = run_folders.write(tmp_path / "run", done=20)
    expected = list(folder.records())[::-1]
    for block_bytes in (7, 64, 300, 2**20):
        monkeypatch.setattr("velora_pretrain.records.BLOCK_BYTES", block_bytes)
        assert list(folder.records_newest_first()) == expected
    folder.metrics.write_text(folder.metrics.read_text() + '{"step": 21, "los')
    assert list(folder.records_newest_first()) == expected
    folder.metrics.write_text("")
    assert list(folder.records_newest_first()) == []
    folder.metrics.write_text('{"step": 1')
    assert list(folder.records_newest_first()) == []


def test_a_glance_reads_little(tmp_path: Path):
    folder = run_folders.write(tmp_path / "run", done=20)
    # At the beginning, where nothing is read.
    folder.metrics.write_text("no record\n" + " " * 2**16 + "\n" + folder.metrics.read_text())
    assert glance(folder)["step"] == 20


def test_a_held_lock_is_a_running_run_and_a_free_one_is_not(tmp_path: Path):
    folder = age(run_folders.write(tmp_path / "run", done=3), 90_000)
    assert state_of(folder) == "stopped"
    with (folder.path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state_of(folder) == "running"
    assert state_of(folder) == "stopped"
    # Its records are young, but nobody holds the lock.
    age(folder, 1)
    assert state_of(folder) == "stopped"
    (folder.path / "run.lock").unlink()
    assert state_of(folder) == "running"


def test_a_path_given_twice_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_folders.write(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert len(find_runs([Path(), Path(".."), tmp_path / "runs"])) == 1


class Follower:
    """Stands for time that passes: at each wait, the next thing happens to the run."""

    def __init__(self, *happenings: Any) -> None:
        self.happenings = list(happenings)

    def __call__(self, seconds: float) -> None:
        self.happenings.pop(0)()


def watched(folder: RunFolder, *happenings: Any) -> tuple[str, list[str]]:
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115, PTH123
    display = LogDisplay(console, console, seconds_between_lines=0.0)
    state = watch(folder, display, sleep=Follower(*happenings))
    return state, [line.split("  ")[0] for line in console.export_text().splitlines()]


def test_watching_shows_each_new_record_once_and_ends_with_the_run(tmp_path: Path):
    folder = run_folders.write(tmp_path / "run", done=3)

    def append(*records: Any) -> Any:
        return lambda: [folder.append(each) for each in records]

    def end() -> None:
        folder.append(run_folders.training_record(6))
        folder.write_summary({"steps": 6})

    def half() -> None:
        with folder.metrics.open("a") as file:
            file.write('{"step": 5, "tokens"')

    def rest() -> None:
        text = folder.metrics.read_text()
        folder.metrics.write_text(text[: text.rindex('{"step": 5')])
        folder.append(run_folders.training_record(5))

    state, lines = watched(
        folder,
        append(run_folders.training_record(4), run_folders.evaluation_record(4)),
        lambda: None,
        half,
        rest,
        end,
    )
    assert state == "finished"
    perplexity = run_folders.evaluation_record(4).perplexity
    assert lines == [
        f"{folder.path}: 20 steps, 3 of them done before",
        "step 4/20",
        f"validation at step 4: perplexity {perplexity:.2f}",
        "step 5/20",
        "step 6/20",
    ]


def test_watching_shows_how_long_a_step_waited_and_what_memory_the_device_has(tmp_path: Path):
    folder = run_folders.write(tmp_path / "run", done=3)
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115, PTH123
    live = LiveDisplay(console, console)
    for display in (LogDisplay(console, console, seconds_between_lines=0.0), live):
        happenings = Follower(
            lambda: folder.append(run_folders.training_record(4)), lambda: folder.write_failure(5, "the loss is nan")
        )
        watch(folder, display, sleep=happenings)
        console.print(live._rendering())  # pyright: ignore[reportAttributeAccessIssue]
        shown = console.export_text()
        assert "data wait 0.25 s" in shown
        assert "peak 1.50 of 80.0 GiB" in shown
        folder.forget_after(3)
        folder.failure.unlink()


def test_watching_goes_on_when_a_resumed_run_writes_its_records_anew(tmp_path: Path):
    folder = run_folders.write(tmp_path / "run", done=9)

    def resume() -> None:
        folder.forget_after(6)
        folder.append(run_folders.training_record(7))

    state, lines = watched(
        folder,
        resume,
        lambda: folder.append(run_folders.training_record(8)),
        lambda: folder.write_failure(9, "nan"),
    )
    assert state == "failed"
    assert [line for line in lines if line.startswith("step")] == ["step 7/20", "step 8/20"]


def test_watching_a_run_that_is_trained_meanwhile(tiny_recipe: Any, tmp_path: Path):
    recipe = tiny_recipe(schedule__steps=30, evaluation__every_steps=10)
    training = runs.start("train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "run"))
    try:
        while not (tmp_path / "run" / "config.toml").exists():
            assert training.poll() is None
            time.sleep(0.05)
        done = runs.tool("watch", str(tmp_path / "run"))
    finally:
        assert training.wait() == 0
        training.communicate()
    assert done.returncode == 0, done.stderr
    assert "step 30/30" in done.stdout
    assert "validation at step 30" in done.stdout
    assert done.stdout.endswith("run: finished\n")


@pytest.mark.parametrize("arguments", [["show"], ["watch", "runs/done"], ["show", "runs/done"], ["report", "--help"]])
def test_no_torch_is_needed(arguments: list[str], several: Path):
    missing = "import sys; sys.modules.update(torch=None, numpy=None, datasets=None)"
    code = f"{missing}\nfrom velora_pretrain.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=runs.environment(), check=False)
    assert done.returncode == 0, done.stderr
