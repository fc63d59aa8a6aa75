"""The command line: how commands end, what they print where, and that mistakes are answered without torch."""

import json
import math
import os
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from velora_pretrain import __version__, cli
from velora_pretrain.config import MODES, Run
from velora_pretrain.errors import UserError
from velora_pretrain.recipe import resolve
from velora_pretrain.records import EvaluationRecord, RunFolder, TrainingRecord

EVALUATION = {
    "step": 2,
    "eval_loss_nats_per_token": 5.0,
    "perplexity": 148.41,
    "perplexity_paper": 140.0,
    "bits_per_byte": 1.5,
    "eval_tokens": 1000,
}
PREDICTED = dict.fromkeys(
    [
        "weights_bytes",
        "gradients_bytes",
        "optimizer_state_bytes",
        "buffers_bytes",
        "saved_activations_bytes",
        "loss_bytes",
        "temporaries_bytes",
        "peak_bytes",
    ],
    2**30,
)


class Interrupted(Exception):
    message = "stopped; go on with: velora-pretrain train --resume"


class Calls:
    """Stands for the modules that need torch, and keeps what they were asked."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Any]] = []
        self.evaluated: list[dict[str, Any]] = []
        self.compared: list[Run] = []
        self.question: dict[str, Any] = {}
        self.error: BaseException | None = None

    def train(self, run: Run, folder: RunFolder, *, resume: bool, display: Any) -> dict[str, Any]:
        display.note("training")
        if self.error:
            raise self.error
        self.trained.append({"run": run, "folder": folder.path, "resume": resume})
        return {
            "final_evaluation": EVALUATION,
            "peak_memory_bytes": 2**31,
            "predicted_memory": PREDICTED,
            "tokens_per_second": 10.0,
            "steps": 2,
            "tokens": 100,
            "seconds": 1.0,
            "data": "sample",
            "run_dir": str(folder.path),
        }

    def evaluate_checkpoint(self, path: Path, *, display: Any, **options: Any) -> dict[str, Any]:
        display.note("evaluating")
        self.evaluated.append({"path": path, **options})
        return {**EVALUATION, "tokenizer_sha256": "ab", "data": "sample", "checkpoint": str(path)}

    def memory_rows(self, runs: list[Run], **question: Any) -> list[dict[str, Any]]:
        self.compared, self.question = runs, question
        return [{"mode": run.mode, "options": {}, "predicted": PREDICTED, "measured": None} for run in runs]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    stub = Calls()
    functions = {
        "trainer": {"train": stub.train, "Interrupted": Interrupted},
        "evaluation": {"evaluate_checkpoint": stub.evaluate_checkpoint},
        "compare": {"memory_rows": stub.memory_rows},
    }
    for name, contents in functions.items():
        module = types.ModuleType(f"velora_pretrain.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"velora_pretrain.{name}", module)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return stub


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a user's mistake, without its beginning."""
    assert status(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("train", ["--size", "--recipe"]),
        ("train --set seed=1", ["--size", "--recipe"]),
        ("train --size 61m", ["size: '61m' is not a size", "did you mean '60m'? "]),
        ("train --size 60m --tracker wandbb", ["tracking.trackers: ", "did you mean 'wandb'? "]),
        ("train --size 60m --tracker wandb --tracker wandb", ["tracking.trackers: a tracker is named twice"]),
        ("train --recipe recipes/quickstrt.toml", ["did you mean 'quickstart'"]),
        ("train --size 60m --mode velra", ["mode: ", "'velora'"]),
        ("train --size 60m --set optimizer.lrr=1", ["optimizer.lrr: no such key"]),
        ("train --size 60m --set schedule.steps=ten", ["schedule.steps: ", "'ten'"]),
        ("train --size 60m --micro-batch many", ["batch.micro_batch: ", "'many'"]),
        ("train --size 60m --sequence-length 4096", ["batch.sequence_length: 4096"]),
        ("train --size 60m --precision fp8", ["precision: ", "'fp8'"]),
        ("train --size 60m --steps ten", ["--steps"]),
        ("train --size 60m --lr fast", ["--lr"]),
        ("train --size 60m --seed 99999999999999999999", ["seed: ", "less than"]),
        ("train --size 60m --lr nan", ["optimizer.lr: ", "finite"]),
        ("eval checkpoint --tokens 0", ["--tokens", "1"]),
        ("eval checkpoint --tokens -5", ["--tokens", "1"]),
        ("train --szie 60m", ["--szie", "--size"]),
        ("train --size", ["--size"]),
        ("train --recipe qickstart", ["--recipe qickstart", "did you mean 'quickstart'"]),
        ("train --resume", ["runs: holds no run"]),
        ("train --resume --run-dir nowhere", ["nowhere: holds no run"]),
        ("trian", ["trian", "train"]),
        ("eval", ["command"]),
        ("eval checkpoint", ["runs: holds no run"]),
        ("eval checkpoint nowhere", ["nowhere: no such"]),
        ("compare", ["command"]),
        ("compare memory --modes full,velra", ["mode: ", "'velra'"]),
        ("compare memory --size 61m", ["size: '61m' is not a size"]),
        ("compare speed --modes full,velra", ["'velra'", "did you mean"]),
        ("compare speed --modes velora[layer=all]", ["modes.velora.layer: no such key"]),
        ("compare speed --steps 0", ["--steps", "1"]),
        ("compare memory --recompute all", ["memory.recompute: ", "'all'"]),
        ("compare memory --update later", ["optimizer.update: ", "'later'"]),
        ("compare memory --budget much", ["--budget much: is no size"]),
        ("compare memory --size any", ["--size any: give --budget"]),
        ("compare memory --sharding thin", ["--sharding thin: choose from"]),
        ("compare memory --sharding shard", ["--sharding shard: did you mean 'sharded'? "]),
        ("compare memory --json no/such/folder.json", ["--json no/such/folder.json: cannot be written"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    calls: Calls, capsys: pytest.CaptureFixture[str], arguments: str, parts: list[str]
):
    message = mistake(capsys, *arguments.split())
    assert not [part for part in parts if part not in message], message
    assert not calls.trained


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "train --help",
        "eval checkpoint --help",
        "compare memory --help",
        "compare speed --help",
        "compare speed --modes full,velra",
        "train --size 61m",
        "train --size 60m --mode velora --set modes.velora.num_groups.v_proj=5",
        "train --recipe none",
        "train --size 60m --set optimizer.lrr=1",
        "compare memory --modes velra",
        "eval checkpoint nowhere",
    ],
)
def test_help_and_mistakes_do_without_torch(arguments: str, tmp_path: Path):
    code = (
        "import sys; from velora_pretrain import cli\n"
        "try: cli.main()\n"
        "except SystemExit as ended: print(ended.code, sorted({'torch', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    expected = 0 if "--" in arguments.split()[-1] else 2
    assert done.stdout.splitlines()[-1] == f"{expected} []"


def test_the_module_is_the_command(tmp_path: Path):
    command = [sys.executable, "-m", "velora_pretrain", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout == f"velora-pretrain {__version__}\n"


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]):
    assert status() == 0
    assert "train" in capsys.readouterr().out


def test_options_reach_the_run(calls: Calls):
    arguments = (
        "--size 9m --mode velora --data sample --tokenizer bundled --steps 7 --batch-size 12 --micro-batch 3"
        " --sequence-length 64 --lr 0.5 --seed 4 --device cpu --precision bf16-mixed --run-dir here"
        " --set optimizer.clip_norm=1.5 --set modes.velora.layers=all --tracker tensorboard"
    )
    assert status("train", *arguments.split()) == 0
    (call,) = calls.trained
    run = call["run"]
    assert (run.size, run.mode, run.data, run.tokenizer, run.steps) == ("9m", "velora", "sample", "bundled", 7)
    assert (run.batch.sequences, run.batch.micro_batch, run.batch.sequence_length) == (12, 3, 64)
    assert (run.lr, run.seed, run.device, run.precision) == (0.5, 4, "cpu", "bf16-mixed")
    assert (run.optimizer.clip_norm, run.modes.velora.layers) == (1.5, "all")
    assert run.tracking.trackers == ("tensorboard",)
    assert (call["folder"], call["resume"]) == (Path("here"), False)


def test_the_options_that_stay_are_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    names = {
        "train": "size mode recipe data tokenizer steps batch-size micro-batch sequence-length lr seed device precision"
        " compile run-dir resume tracker set",
        "eval checkpoint": "data tokens device json",
        "compare memory": "size modes micro-batch sequence-length precision recompute update measure budget set json",
        "compare speed": "size modes micro-batch sequence-length precision recompute steps device compile set json",
    }
    for command, options in names.items():
        assert status(*command.split(), "--help") == 0
        shown = capsys.readouterr().out
        assert not [option for option in options.split() if f"--{option} " not in shown]


def test_dimensions_may_take_the_place_of_a_size(calls: Calls):
    dimensions = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = [part for key, value in dimensions.items() for part in ("--set", f"model.{key}={value}")]
    assert status("train", *settings) == 0
    assert calls.trained[0]["run"].name == "custom-full"


def test_a_new_run_gets_a_folder_of_its_own(calls: Calls):
    for _ in range(2):
        assert status("train", "--size", "9m") == 0
        RunFolder(calls.trained[-1]["folder"]).write_run(calls.trained[-1]["run"])
    first, second = (call["folder"] for call in calls.trained)
    assert first != second
    assert first.parent == second.parent == Path("runs")
    assert first.name.startswith("9m-full-20")


def test_resume_takes_the_newest_run_and_its_configuration(calls: Calls):
    older, newer = RunFolder(Path("runs/a")), RunFolder(Path("runs/b"))
    older.write_run(Run(size="9m", seed=1))
    newer.write_run(Run(size="9m", seed=2))
    os.utime(older.config, (1, 1))
    assert status("train", "--resume", "--lr", "0.5") == 0
    (call,) = calls.trained
    assert (call["folder"], call["resume"], call["run"].seed, call["run"].lr) == (newer.path, True, 2, 0.5)
    assert status("train", "--resume", "--run-dir", "runs/a") == 0
    assert calls.trained[1]["run"] == Run(size="9m", seed=1)


def test_several_processes_share_one_folder(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--run-dir" in mistake(capsys, "train", "--size", "9m")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0123456789abcdef")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert status("train", "--size", "9m") == 0
        assert (capsys.readouterr().out == "") == (rank == "1")
    assert {call["folder"] for call in calls.trained} == {Path("runs/9m-full-01234567")}


def test_the_users_mistake_while_training_is_one_line(calls: Calls, capsys: pytest.CaptureFixture[str]):
    calls.error = UserError("corpus.jsonl: line 3:\nnot JSON")
    assert status("train", "--size", "9m") == 2
    assert capsys.readouterr().err == "error: corpus.jsonl: line 3: not JSON\n"


def test_an_interrupted_run_says_how_to_go_on(calls: Calls, capsys: pytest.CaptureFixture[str]):
    calls.error = Interrupted()
    assert status("train", "--size", "9m") == 130
    assert capsys.readouterr().out.endswith(f"{Interrupted.message}\n")
    calls.error = KeyboardInterrupt()
    assert status("train", "--size", "9m") == 130


def test_our_own_faults_keep_their_traceback(calls: Calls):
    calls.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--size", "9m"])


def test_a_network_that_stays_away_is_one_line_but_no_mistake(calls: Calls, capsys: pytest.CaptureFixture[str]):
    for error, line in [
        (ConnectionError("https://host/a.json.gz:\nno answer"), "https://host/a.json.gz: no answer"),
        (ConnectionResetError(), "ConnectionResetError"),
    ]:
        calls.error = error
        assert status("train", "--size", "9m") == 1
        assert capsys.readouterr().err == f"error: {line}\n"


def test_a_micro_batch_is_a_number_or_a_word(calls: Calls):
    for given, micro_batch in [("8", 8), ("auto", "auto")]:
        assert status("train", "--size", "9m", "--micro-batch", given) == 0
        assert calls.trained[-1]["run"].batch.micro_batch == micro_batch


def test_a_smaller_batch_of_a_recipe_needs_no_micro_batch(calls: Calls):
    assert status("train", "--recipe", "quickstart", "--batch-size", "8") == 0
    assert calls.trained[-1]["run"].batch.micro_batch == "auto"


def test_a_resumed_run_keeps_its_micro_batch(calls: Calls):
    RunFolder(Path("runs/a")).write_run(resolve("quickstart", {"batch.micro_batch": 4}, []))
    assert status("train", "--resume", "--batch-size", "16") == 0
    assert calls.trained[-1]["run"].batch.micro_batch == 4
    assert status("train", "--resume", "--recipe", "quickstart", "--batch-size", "16") == 0
    assert calls.trained[-1]["run"].batch.micro_batch == "auto"


def test_the_help_says_what_a_resumed_run_keeps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert status("train", "--help") == 0
    assert "steps and learning rate stay as recorded" in capsys.readouterr().out


def test_a_diverged_run_prints_its_results(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With the null that stands in its records for what is no finite number."""
    for key in ("eval_loss_nats_per_token", "perplexity", "perplexity_paper", "bits_per_byte"):
        monkeypatch.setitem(EVALUATION, key, None)
    assert status("train", "--size", "9m") == 0
    assert "not finite" in capsys.readouterr().out


def test_training_prints_its_results(calls: Calls, capsys: pytest.CaptureFixture[str]):
    assert status("train", "--size", "9m") == 0
    out = capsys.readouterr().out
    assert out.startswith("training\n")
    assert "148.41" in out
    assert "2.00 GiB" in out


def test_evaluation_prints_a_table_or_json(calls: Calls, capsys: pytest.CaptureFixture[str]):
    RunFolder(Path("runs/a")).write_run(Run(size="9m"))
    assert status("eval", "checkpoint", "--tokens", "50", "--data", "sample", "--device", "cpu") == 0
    assert "148.41" in capsys.readouterr().out
    expected = {"path": Path("runs/a"), "data": "sample", "tokens": 50, "device": "cpu", "tokenizer_name": None}
    assert calls.evaluated == [expected]
    assert status("eval", "checkpoint", "runs/a", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["perplexity"] == 148.41
    assert "evaluating" in err
    assert status("eval", "checkpoint", "runs/a", "--json", "out.json") == 0
    assert json.loads(Path("out.json").read_text())["tokenizer_sha256"] == "ab"
    assert "148.41" in capsys.readouterr().out


def strictly(text: str) -> Any:
    """JSON without the NaN and Infinity that Python's reader takes."""
    return json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]\n", "line 2: not a record of a run"),
        ('{"step": 2\n', "line 2: not a record of a run"),
        ("x" * (1 << 20), "line 2: longer than a record can be"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, message: str):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n' + line)
    with pytest.raises(UserError, match=message):
        list(folder.records())


def test_records_have_null_where_json_has_no_number(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.write_run(Run(size="9m"))
    folder.metrics.write_text('{"step": 1, "grad_norm": NaN}\n')  # as older versions wrote them
    evaluation = {**EVALUATION, "perplexity": math.inf, "bits_per_byte": math.nan}
    folder.append(EvaluationRecord(**evaluation))
    numbers = dict.fromkeys(["loss_nats_per_token", "learning_rate", "grad_norm", "tokens_per_second"], -math.inf)
    others = {"peak_memory_bytes": 1, "data_wait_seconds": 0.5, "batch_digest": ""}
    folder.append(TrainingRecord(step=3, tokens=1, **others, **numbers))
    lines = folder.metrics.read_text().splitlines()
    assert strictly(lines[1]) == EVALUATION | {"perplexity": None, "bits_per_byte": None}
    assert strictly(lines[2])["grad_norm"] is None
    folder.forget_after(2)
    assert [strictly(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]
    assert [record["step"] for record in folder.records()] == [1, 2]
    folder.write_summary({"final_evaluation": evaluation, "steps": 2})
    assert strictly(folder.summary.read_text())["final_evaluation"]["perplexity"] is None


@pytest.mark.parametrize(
    ("content", "is_foreign"),
    [
        (None, False),
        ('size = "9m"\n', False),
        ('[tool]\nname = "someone else\'s"\n', True),
        ('size = "9m"\ncolour = "red"\n', True),
        ("not TOML at all", True),
        ("", True),
    ],
)
def test_a_configuration_that_is_no_run_is_told_apart(tmp_path: Path, content: str | None, is_foreign: bool):
    folder = RunFolder(tmp_path)
    if content is not None:
        folder.config.write_text(content)
    assert folder.holds_foreign_config() is is_foreign
    assert not folder.holds_run()


def test_json_has_null_where_it_has_no_number(calls: Calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(EVALUATION, "perplexity", float("inf"))
    Path("folder").mkdir()
    assert status("eval", "checkpoint", "folder", "--json", "out.json") == 0
    assert json.loads(Path("out.json").read_text())["perplexity"] is None


def test_memory_is_compared_for_every_mode(calls: Calls, capsys: pytest.CaptureFixture[str]):
    assert status("compare", "memory", "--json", "-", "--micro-batch", "16", "--sequence-length", "128") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["mode"] for row in rows} == {mode for mode in MODES if "+" not in mode}
    assert {run.memory.recompute for run in calls.compared} == {"none", "elementwise", "block"}
    assert set(rows[0]) == {"mode", "options", "predicted", "measured"}
    assert [run.size for run in calls.compared] == ["60m"] * len(rows)
    assert {(run.batch.micro_batch, run.batch.sequence_length) for run in calls.compared} == {(16, 128)}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [([], [("v_proj", "down_proj"), "all"]), (["--set", "modes.velora.layers=['q_proj']"], [("q_proj",)])],
)
def test_a_mode_on_chosen_layers_is_shown_on_all_too(calls: Calls, settings: list[str], layers: list[object]):
    assert status("compare", "memory", "--modes", "velora", *settings) == 0
    kept = [run for run in calls.compared if run.memory.recompute == "none"]
    assert [run.modes.velora.layers for run in kept] == layers


def test_what_is_asked_of_a_memory_table_reaches_it(calls: Calls):
    arguments = "--modes full --recompute mlp --update in_backward --devices 4 --budget 24GiB --measure --published"
    assert status("compare", "memory", *arguments.split()) == 0
    (run,) = calls.compared
    assert (run.memory.recompute, run.optimizer.update) == ("mlp", "in_backward")
    question = {"measure": True, "budget_bytes": 24 * 2**30, "any_size": False, "devices": 4, "published": True}
    assert calls.question == {**question, "sharding": "data-parallel"}
    assert status("compare", "memory", "--modes", "full", "--set", "memory.recompute=mlp") == 0
    assert [run.memory.recompute for run in calls.compared] == ["mlp"]
    assert status("compare", "memory", "--size", "any", "--budget", "8GB", "--sharding", "sharded") == 0
    assert (calls.question["any_size"], calls.question["sharding"]) == (True, "sharded")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path, unbuffered: str):
    command = f"{sys.executable} -m velora_pretrain --version | true"
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert done.stderr == ""


def test_speed_is_timed_for_every_mode_and_for_modes_with_settings(monkeypatch: pytest.MonkeyPatch, calls: Calls):
    timed: dict[str, Run] = {}

    def compare(entries: list[Any], *, rounds: int, note: Any) -> dict[str, Any]:
        timed.update({entry.label: entry.run for entry in entries})
        return {"rows": [], "rounds": rounds}

    module = types.ModuleType("velora_pretrain.speed")
    vars(module).update(compare_speed=compare, Entry=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "velora_pretrain.speed", module)
    assert status("compare", "speed", "--steps", "3", "--json", "out.json", "--micro-batch", "12", "--json", "-") == 0
    assert set(MODES) < set(timed)
    assert {label for label in timed if "[" in label} == {
        "velora[layers=all]",
        *(f"{mode}[velora.layers=all]" for mode in MODES if mode.endswith("+velora")),
    }
    assert timed["velora"].modes.velora.layers == ("v_proj", "down_proj")
    assert timed["velora[layers=all]"].modes.velora.layers == "all"
    assert {(run.batch.sequences, run.batch.micro_batch, run.data, run.packing) for run in timed.values()} == {
        (12, 12, "sample", "pack")
    }
    timed.clear()
    modes = "full,galore[rank=8],velora[update=projected]"
    settings = ["--set", "batch.sequences=24", "--set", "packing=pad"]
    assert status("compare", "speed", "--modes", modes, "--micro-batch", "12", "--json", "-", *settings) == 0
    assert list(timed) == ["full", "galore[rank=8]", "velora[update=projected]"]
    assert timed["galore[rank=8]"].modes.galore.rank == 8
    assert (timed["full"].batch.sequences, timed["full"].packing) == (24, "pad")
    timed.clear()
    assert status("compare", "speed", "--modes", "full,flora", "--compile", "--json", "-") == 0
    assert {label: run.compile for label, run in timed.items()} == {
        "full": False,
        "full, compiled": True,
        "flora": False,
        "flora, compiled": True,
    }


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", ["train"]),
        ("train --siz", ["--size"]),
        ("train --size 1", ["100m", "130m", "1b", "13b"]),
        ("train --mode gal", ["galore", "galore+velora"]),
        ("train --recipe qu", ["quickstart"]),
        ("train --precision bf", ["bf16-mixed", "bf16"]),
        ("generate --device c", ["cpu", "cuda"]),
        ("train --tracker t", ["tensorboard", "trackio"]),
    ],
)
def test_the_shell_completes_without_torch(typed: str, offered: list[str]):
    code = "import sys; sys.modules.update(torch=None, numpy=None); from velora_pretrain.cli import main; main()"
    words = f"velora-pretrain {typed}"
    asked = {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "_VELORA_PRETRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **asked}, check=True)
    assert done.stdout.split() == offered


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command by its words."""
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*words, name))
    if not hasattr(command, "commands"):
        yield " ".join(words), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))
UNITS = ("step", "sequence", "token", "document", "example", "rate", "seed", "device", "run", "logits", "shard", "file")
"""What numbers are of."""


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_says_its_unit_and_its_default(words: str):
    types = typing.get_type_hints(COMMANDS[words].callback)
    for param in COMMANDS[words].params:
        if param.required or getattr(param, "is_flag", False):
            assert param.help, param.name
            continue
        # What the help shows of itself is the default that is a value.
        is_shown = param.default is not None and param.show_default is True
        assert is_shown or "by default" in param.help.lower(), param.name
        if {int, float} & {types[param.name], *typing.get_args(types[param.name])}:
            assert any(unit in param.help.lower() for unit in UNITS), param.name


def test_there_are_commands_and_options_to_say_it():
    assert {"train", "eval checkpoint", "compare memory", "report", "show", "watch", "generate"} <= COMMANDS.keys()
    assert sum(len(command.params) for command in COMMANDS.values()) > 50
