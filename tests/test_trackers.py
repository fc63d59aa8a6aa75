"""Trackers: what they are given is what metrics.jsonl has, and nothing of theirs changes or ends a run."""

import json
import math
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launches
import pytest
import run_folders
import runs
from accelerate.tracking import TensorBoardTracker
from run_outcome import outcome
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import Silent, failing_in, trained

from velora_pretrain import cli
from velora_pretrain.distributed import start_processes
from velora_pretrain.errors import UserError
from velora_pretrain.recipe import build_run, differences, flat_settings
from velora_pretrain.records import RunFolder
from velora_pretrain.trackers import LEFT_OUT, Trackers, check_installed, hyperparameters
from velora_pretrain.trainer import train

STEPS = 6
BOARD = {"tracking__trackers": ["tensorboard"]}


@pytest.fixture(autouse=True, scope="module")
def _processes() -> None:
    """What accelerate's trackers ask for, whichever test is the first."""
    start_processes("cpu")


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader has of a run."""
    board = EventAccumulator(str(path / "tensorboard"))
    board.Reload()
    return {tag: [(each.step, each.value) for each in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def texts(path: Path) -> dict[str, list[tuple[int, str]]]:
    board = EventAccumulator(str(path / "tensorboard"))
    board.Reload()
    return {
        tag.removesuffix("/text_summary"): [
            (each.step, each.tensor_proto.string_val[0].decode()) for each in board.Tensors(tag)
        ]
        for tag in board.Tags()["tensors"]
    }


def recorded(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers of metrics.jsonl by the names that trackers give them."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in RunFolder(path).records():
        kind = "evaluation" if "perplexity" in record else "training"
        for key, value in record.items():
            if key not in LEFT_OUT and not isinstance(value, str):
                found.setdefault(f"{kind}/{key}", []).append((record["step"], value))
    return found


def assert_same(path: Path, logged: dict[str, list[tuple[int, float]]]) -> None:
    """Scalars are those of the records, in 32 bits."""
    expected = recorded(path)
    assert logged.keys() == expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in logged[name]] == [step for step, _ in values], name
        assert [value for _, value in logged[name]] == pytest.approx([value for _, value in values], rel=1e-6), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_tokenizer: Path) -> tuple[Any, Path]:
    """A run that TensorBoard tracks, with samples; its configuration and folder."""
    changes = {"evaluation__every_steps": 3, "checkpoint__every_steps": 3, "checkpoint__keep_last": 9}
    changes |= {"evaluation__samples": 2, "evaluation__sample_tokens": 4, **BOARD}
    run = build_run(runs.values(tiny_data, tiny_tokenizer, mode="velora", **changes), where="test")
    path = tmp_path_factory.mktemp("runs") / "straight"
    trained(run, path)
    return run, path


def without_trackers(run: Any) -> Any:
    return run.model_copy(update={"tracking": type(run.tracking)()})


def test_tensorboard_has_every_number_the_samples_and_the_settings(straight: tuple[Any, Path]) -> None:
    _, path = straight
    assert_same(path, scalars(path))
    assert len(recorded(path)["training/loss_nats_per_token"]) == STEPS
    samples = RunFolder(path).logged_samples()
    assert texts(path) == {
        f"samples/{place + 1}": [
            (each["step"], f"{each['prompt']} → {each['continuation']}") for each in samples[place::2]
        ]
        for place in range(2)
    }
    (settings,) = path.glob("tensorboard/*/hparams.yml")
    for key, value in {"mode": "velora", "optimizer.lr": 0.01, "modes.velora.layers": "v_proj", "seed": 0}.items():
        assert f"{key}: " in settings.read_text()
        assert str(value) in settings.read_text()
    assert not (path / "tracking.json").exists()


def test_a_tracked_run_has_the_numbers_of_one_that_is_not(straight: tuple[Any, Path], tmp_path: Path) -> None:
    run, path = straight
    trained(without_trackers(run), tmp_path / "plain")
    assert not (tmp_path / "plain" / "tensorboard").exists()
    assert outcome(tmp_path / "plain", STEPS) == outcome(path, STEPS)


def test_a_resumed_run_goes_on_where_it_was(straight: tuple[Any, Path], tmp_path: Path) -> None:
    """As after kill -9: the tracker has steps behind the checkpoint, which are done again."""
    run, path = straight
    again = launches.cut_back(path, tmp_path / "again")
    (again / "summary.json").unlink()
    trained(run, again, resume=True)
    assert outcome(again, STEPS) == outcome(path, STEPS)
    assert len(list((again / "tensorboard").glob("events*"))) == 2
    assert len(list(again.glob("tensorboard/*/hparams.yml"))) == 1
    assert_same(again, scalars(again))
    # Of the steps that are done again the reader drops numbers alone.
    assert {*texts(again)["samples/1"]} == {*texts(path)["samples/1"]}


def test_trackers_may_change_when_a_run_goes_on_and_its_time_leaves_the_pause_out(
    straight: tuple[Any, Path], tmp_path: Path
) -> None:
    run, path = straight
    again = launches.cut_back(path, tmp_path / "again")
    pause_seconds = 0.2
    time.sleep(pause_seconds)
    summary = trained(without_trackers(run), again, resume=True)
    assert len(list((again / "tensorboard").glob("events*"))) == 1
    assert RunFolder(again).read_run().tracking.trackers == ()
    assert {*differences(run, without_trackers(run))} == {"tracking.trackers"}
    for folder in (path, again):
        records = list(RunFolder(folder).records())
        for key in ("run_seconds", "unix_seconds"):
            assert [record[key] for record in records] == sorted(record[key] for record in records)
    before, after = (next(r for r in records if r["step"] == step) for step in (3, 4))
    idle_seconds = after["unix_seconds"] - before["unix_seconds"] - (after["run_seconds"] - before["run_seconds"])
    assert idle_seconds > pause_seconds
    # All of it is counted, evaluations too, and not the steps alone.
    steps_seconds = sum(
        (record["tokens"] - last) / record["tokens_per_second"]
        for record, last in zip(records, [0, *(r.get("tokens", 0) for r in records)], strict=False)
        if "tokens" in record and last
    )
    assert steps_seconds < records[-1]["run_seconds"] <= summary["seconds"]


def board(path: Path, tiny_run: Callable[..., Any], step: int = 0) -> tuple[Trackers, list[str]]:
    warnings: list[str] = []
    return Trackers(["tensorboard"], tiny_run(), RunFolder(path), step=step, warn=warnings.append), warnings


def test_steps_that_were_gone_back_on_are_replaced(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trackers, warnings = board(tmp_path, tiny_run)
    for step in range(1, 6):
        trackers.log(run_folders.training_record(step, loss=1.0))
    trackers.go_back(3)
    for step in (4, 5, 6):
        trackers.log(run_folders.training_record(step, loss=2.0))
    trackers.close()
    losses = scalars(tmp_path)["training/loss_nats_per_token"]
    assert losses == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert not warnings


def test_a_run_that_goes_back_takes_its_trackers_along(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(optimizer__not_finite="rollback", checkpoint__every_steps=2, **BOARD)
    with monkeypatch.context() as patch:
        failing_in({4}, patch)
        summary = trained(run, tmp_path)
    assert summary["rollbacks"] == 1
    assert_same(tmp_path, scalars(tmp_path))


def test_a_number_that_is_not_finite_is_passed_on(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trackers, warnings = board(tmp_path, tiny_run)
    trackers.log(run_folders.training_record(1, loss=math.inf))
    trackers.log(run_folders.training_record(2, loss=math.nan))
    trackers.close()
    (_, first), (_, second) = scalars(tmp_path)["training/loss_nats_per_token"]
    assert (first, math.isnan(second)) == (math.inf, True)
    assert not warnings


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log of messages, cut to fit its blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        left = 2**15 - place % 2**15
        if left < 7 or kind == 0:
            place += left
            continue
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(message)
            message = b""


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a .wandb file."""
    rows = [record.history.item for record in wandb_records(path) if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def test_wandb_has_every_number_and_one_run_goes_on(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, run, warnings = RunFolder(tmp_path), tiny_run(tracking__project="mine"), []
    sample = {"step": 2, "prompt": "The", "continuation": " end"}
    for first in (1, 3):
        trackers = Trackers(["wandb"], run, folder, step=first - 1, warn=warnings.append)
        for step in (first, first + 1):
            trackers.log(run_folders.training_record(step))
        trackers.log(run_folders.evaluation_record(first + 1), [sample])
        trackers.close()
    assert not warnings
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    run_id = json.loads((tmp_path / "tracking.json").read_text())["run_id"]
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    rows = [
        {key: row[key] for key in row if key[0] != "_" or key == "_step"}
        for file in files
        for row in wandb_history(file)
    ]
    expected: dict[int, dict[str, Any]] = {step: {"_step": step} for step in range(1, 5)}
    for step, row in expected.items():
        row |= {f"training/{key}": value for key, value in vars(run_folders.training_record(step)).items()}
        if step % 2 == 0:
            row |= {f"evaluation/{key}": value for key, value in vars(run_folders.evaluation_record(step)).items()}
            row["samples/1"] = "The →  end"
    left_out = {"training/step", "evaluation/step", "training/batch_digest"}
    assert rows == [
        {key: value for key, value in row.items() if value is not None and key not in left_out}
        for row in expected.values()
    ]
    kinds = {record.WhichOneof("record_type"): record for record in wandb_records(files[0])}
    assert (kinds["run"].run.project, kinds["run"].run.display_name) == ("mine", tmp_path.name)
    settings = {each.key or ".".join(each.nested_key): each.value_json for each in kinds["config"].config.update}
    assert settings.keys() >= hyperparameters(run).keys()


def test_wandb_is_given_no_step_that_it_would_refuse_in_the_terminal(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    trackers = Trackers(["wandb"], tiny_run(), RunFolder(tmp_path), step=0, warn=warnings.append)
    for step in (1, 2, 3):
        trackers.log(run_folders.training_record(step))
    trackers.go_back(1)
    for step in (2, 3, 4):
        trackers.log(run_folders.training_record(step))
    trackers.close()
    assert not warnings
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [row["_step"] for row in wandb_history(file)] == [1, 2, 3, 4]
    assert "ignoring" not in (file.parent / "logs" / "debug-internal.log").read_text()


def test_trackio_has_every_number_and_one_run_goes_on(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    folder, warnings = RunFolder(tmp_path), []
    for step in (1, 2):
        trackers = Trackers(["trackio"], tiny_run(), folder, step=step - 1, warn=warnings.append)
        trackers.log(run_folders.training_record(step))
        trackers.close()
    assert not warnings
    (name,) = storage.get_runs("velora-pretrain")
    assert name.startswith(f"{tmp_path.name}-")
    rows = storage.get_logs("velora-pretrain", name)
    losses = [(row["step"], row["training/loss_nats_per_token"]) for row in rows]
    assert losses == [(step, run_folders.training_record(step).loss_nats_per_token) for step in (1, 2)]
    assert storage.get_run_config("velora-pretrain", name)["mode"] == "full"


class Broken(TensorBoardTracker):
    """Fails at one of the things that it is asked."""

    at = ""

    def start(self) -> None:
        self.fail("start")
        super().start()

    def store_init_configuration(self, values: dict) -> None:
        self.fail("store_init_configuration")
        super().store_init_configuration(values)

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        if step is not None and step >= 3:
            self.fail("log")
        super().log(values, step, **kwargs)

    def finish(self) -> None:
        self.fail("finish")
        super().finish()

    def fail(self, what: str) -> None:
        if self.at == what:
            raise ConnectionError(f"{what}: the network is down\nand more")


@pytest.mark.parametrize("at", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", Broken)
    monkeypatch.setattr(Broken, "at", at)
    trackers, warnings = board(tmp_path, tiny_run)
    for step in range(1, 5):
        trackers.log(run_folders.training_record(step))
    trackers.go_back(3)
    trackers.log(run_folders.training_record(4))
    trackers.close()
    assert warnings == [
        f"tracker tensorboard: ConnectionError: {at}: the network is down; it is left out, and"
        f" {tmp_path / 'metrics.jsonl'} has every record"
    ]


def test_a_tracker_that_would_exit_is_left_out(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorBoardTracker, "log", lambda *_, **__: sys.exit(1))
    trackers, warnings = board(tmp_path, tiny_run)
    trackers.log(run_folders.training_record(1))
    trackers.close()
    assert len(warnings) == 1
    assert "SystemExit" in warnings[0]


def test_ctrl_c_ends_the_wait_for_a_tracker_and_the_summary_is_there(
    straight: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(self: TensorBoardTracker) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorBoardTracker, "finish", finish)
    display = Silent()
    summary = train(straight[0], RunFolder(tmp_path / "run"), resume=False, display=display)
    assert summary["steps"] == STEPS
    assert display.warnings == ["tracker tensorboard: its last records were not waited for"]


def test_a_run_goes_on_without_a_tracker_that_fails(
    straight: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = straight
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", Broken)
    monkeypatch.setattr(Broken, "at", "log")
    display = Silent()
    train(run, RunFolder(tmp_path / "run"), resume=False, display=display)
    assert outcome(tmp_path / "run", STEPS) == outcome(path, STEPS)
    assert len(display.warnings) == 1
    assert [step for step, _ in scalars(tmp_path / "run")["training/loss_nats_per_token"]] == [1, 2]


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "--recipe", "quickstart", "--tracker", name, "--run-dir", "run"])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        expected = f'{name} is not installed; install it with: pip install "velora-pretrain[{name}]"'
        assert err == f"error: tracking.trackers: {expected}\n"
    assert not (tmp_path / "run").exists()
    check_installed([])
    with pytest.raises(UserError):
        check_installed(["wandb"])


def test_settings_are_in_a_form_that_every_tracker_takes(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run(mode="velora", modes__velora__num_groups={"v_proj": 4}, **BOARD)
    settings = hyperparameters(run)
    assert settings["modes.velora.num_groups.v_proj"] == 4
    assert json.loads(str(settings["tracking.trackers"])) == ["tensorboard"]
    assert settings["compile"] is False
    unset = {key for key, value in flat_settings(run).items() if value is None}
    assert "size" in unset
    assert settings.keys() == flat_settings(run).keys() - unset
