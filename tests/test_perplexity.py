"""compare perplexity: what it trains, how it goes on, and that its figures are those of the runs it names."""

import fcntl
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs
import tomli_w
from rich.console import Console

from velora_pretrain import cells as cells_module
from velora_pretrain import cli
from velora_pretrain.cells import Interrupted, _Training, last_training_record, run_folder, train_cells
from velora_pretrain.config import Run
from velora_pretrain.data.manifest import Manifest
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError
from velora_pretrain.perplexity import (
    _check_folders,
    _check_same_text,
    check_comparable,
    compare_perplexity,
    result_rows,
)
from velora_pretrain.records import RunFolder
from velora_pretrain.tables import print_perplexity
from velora_pretrain.variants import Cell, plan_cells

STEPS = 40
ALL = "velora[layers=all]"
RATES = (0.01, 0.03)


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "perplexity", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def changed_at(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Comparison:
    """A comparison of 2 variants × 2 rates × 2 seeds that was interrupted once and then went on to its end."""

    root: Path
    arguments: list[str]
    told: str
    """What the interrupted start printed."""
    finished: dict[str, dict[str, int]]
    """Times of the files of each cell that was finished then."""
    cut: dict[str, int]
    """Steps of each cell that was being trained then."""
    result: dict[str, Any]

    def cell(self, row: int, rate: float, seed: int) -> dict[str, Any]:
        found = self.result["rows"][row]["cells"]
        return next(cell for cell in found if (cell["learning_rate"], cell["seed"]) == (rate, seed))

    @property
    def cells(self) -> list[dict[str, Any]]:
        return [cell for row in self.result["rows"] for cell in row["cells"]]


def await_cut(root: Path) -> None:
    """Waits until a cell is finished and another one has taken a few of its steps."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        folders = [RunFolder(path.parent) for path in root.glob("*/config.toml")]
        running = [folder for folder in folders if not folder.summary.exists()]
        steps = [(last_training_record(folder) or {"step": 0})["step"] for folder in running]
        if len(folders) > len(running) and any(2 <= step <= STEPS // 4 for step in steps):
            return
        time.sleep(0.02)
    pytest.fail("no cell was finished")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_tokenizer: Path) -> Iterator[Comparison]:
    base = tmp_path_factory.mktemp("comparison")
    root, recipe, json_file = base / "compared", base / "recipe.toml", base / "result.json"
    # A seed that is none of those compared: the text is read in its order.
    recipe.write_text(tomli_w.dumps(runs.values(tiny_data, tiny_tokenizer, seed=7)))
    arguments = ["--recipe", str(recipe), "--modes", f"full,{ALL}", "--learning-rates", "1e-2,3e-2"]
    arguments += ["--seeds", "0,1", "--steps", str(STEPS), "--run-dir", str(root), "--jobs", "2"]
    process = runs.start("compare", "perplexity", *arguments)
    try:
        await_cut(root)
        process.send_signal(signal.SIGINT)
        told, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    folders = [RunFolder(path.parent) for path in root.glob("*/config.toml")]
    finished = {each.path.name: changed_at(each.path) for each in folders if each.summary.exists()}
    cut = {
        each.path.name: (last_training_record(each) or {"step": 0})["step"]
        for each in folders
        if each.path.name not in finished
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in runs.environment().items():
            patch.setenv(key, value)
        assert status(*arguments, "--json", str(json_file)) == 0
        yield Comparison(
            root=root,
            arguments=arguments,
            told=told,
            finished=finished,
            cut=cut,
            result=json.loads(json_file.read_text()),
        )


def test_an_interrupted_comparison_goes_on_and_repeats_nothing(comparison: Comparison):
    assert "the same command goes on" in comparison.told
    assert f"stopped with {len(comparison.finished)} of 8 cells done" in comparison.told
    assert comparison.finished
    assert any(0 < steps < STEPS for steps in comparison.cut.values())
    for name, times in comparison.finished.items():
        assert changed_at(comparison.root / name) == times
    for name, steps in comparison.cut.items():
        records = list(RunFolder(comparison.root / name).records())
        assert [record["step"] for record in records if "loss_nats_per_token" in record] == list(range(1, STEPS + 1))
        log = (comparison.root / "logs" / f"{name}.log").read_text()
        if steps:
            assert f"wrote {comparison.root / name}/checkpoints/step-{steps:08d}" in log
            assert f"{steps} of them done before" not in log.split("going on from")[0]
            assert f"{STEPS} steps, {steps} of them done before" in log


def test_all_cells_read_the_same_documents_in_the_same_order(comparison: Comparison):
    folders = [Path(cell["run_dir"]) for cell in comparison.cells]
    assert len(folders) == 8
    states = [json.loads((each / f"checkpoints/step-{STEPS:08d}/training_state.json").read_text()) for each in folders]
    assert all(state["cursor"] == states[0]["cursor"] for state in states)
    tokens = [[record["tokens"] for record in RunFolder(each).records() if "tokens" in record] for each in folders]
    assert len(set(tokens[0])) == STEPS
    assert all(each == tokens[0] for each in tokens)
    assert {RunFolder(each).read_run().reading.shuffle_seed for each in folders} == {7}
    # The weights start from the cell's own seed.
    first = {
        (cell["seed"], next(RunFolder(each).records())["loss_nats_per_token"])
        for cell, each in zip(comparison.cells, folders, strict=True)
    }
    assert len({seed for seed, _ in first}) == 2
    assert len({loss for _, loss in first}) >= 2


def test_the_figures_are_those_of_the_runs(comparison: Comparison):
    rows = comparison.result["rows"]
    assert [(row["mode"], row["variant"], row["options"]) for row in rows] == [
        ("full", "full", {}),
        ("velora", ALL, {"layers": "all"}),
    ]
    for cell in comparison.cells:
        summary = json.loads((Path(cell["run_dir"]) / "summary.json").read_text())
        assert cell["perplexity"] == summary["final_evaluation"]["perplexity"]
        assert cell["eval_loss_nats_per_token"] == summary["final_evaluation"]["eval_loss_nats_per_token"]
        assert math.exp(cell["eval_loss_nats_per_token"]) == pytest.approx(cell["perplexity"], rel=1e-12)
        assert cell["tokens"] == summary["tokens"]
        assert cell["tokens_per_second"] == summary["tokens_per_second"]
        assert cell["peak_memory_bytes"] == {
            "predicted": summary["predicted_memory"]["peak_bytes"],
            "measured": summary["peak_memory_bytes"],
        }
        run = RunFolder(Path(cell["run_dir"])).read_run()
        assert (run.lr, run.seed, run.steps) == (cell["learning_rate"], cell["seed"], STEPS)
        assert cell["side_by_side"]
        assert cell["diverged_at_step"] is None
    for place, row in enumerate(rows):
        means = {
            rate: (comparison.cell(place, rate, 0)["perplexity"] + comparison.cell(place, rate, 1)["perplexity"]) / 2
            for rate in RATES
        }
        best = min(means, key=lambda rate: means[rate])
        assert row["learning_rate"] == best
        assert row["perplexity_mean"] == pytest.approx(means[best], rel=1e-12)
        pair = [comparison.cell(place, best, seed)["perplexity"] for seed in (0, 1)]
        assert row["perplexity_sd"] == pytest.approx(abs(pair[0] - pair[1]) / math.sqrt(2), rel=1e-9)
        assert row["at_edge"]  # there are no rates between two
    assert set(comparison.result["recipe_differences"]) == {"mode", "modes.velora.layers"}
    assert comparison.result["settings"]["shuffle_seed"] == 7


def test_eval_checkpoint_scores_the_same(comparison: Comparison, tmp_path: Path):
    for cell in comparison.cells[::3]:
        target = tmp_path / "evaluation.json"
        with pytest.raises(SystemExit) as ended:
            cli.main(["eval", "checkpoint", cell["run_dir"], "--device", "cpu", "--json", str(target)])
        assert ended.value.code == 0
        scored = json.loads(target.read_text())
        assert scored["eval_tokens"] == cell["eval_tokens"]
        assert scored["perplexity"] == pytest.approx(cell["perplexity"], rel=1e-6)


def test_a_finished_comparison_is_only_read(comparison: Comparison, capsys: pytest.CaptureFixture[str]):
    before = {path.name: changed_at(path) for path in comparison.root.iterdir() if path.name != "plots"}
    assert status(*comparison.arguments, "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == comparison.result["rows"]
    assert "8 cells, 8 of them done before" in err
    assert {path.name: changed_at(path) for path in comparison.root.iterdir() if path.name != "plots"} == before
    # Fewer of them are a comparison too.
    assert status(*comparison.arguments, "--modes", "full", "--seeds", "1") == 0
    out = capsys.readouterr().out
    assert "one seed" in out
    assert "best at the edge of the rates tried" in out
    assert "side by side" in out


def test_plots_are_drawn_where_matplotlib_is(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert (comparison.root / "plots" / "loss.png").exists()
    assert status(*comparison.arguments, "--plot", str(tmp_path / "here")) == 0
    capsys.readouterr()
    loss = (tmp_path / "here" / "loss.svg").read_text()
    assert all(f'id="loss of {label}"' in loss for label in ("full", ALL))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = tmp_path / "there"
    assert status(*comparison.arguments, "--plot", str(target)) == 2
    assert capsys.readouterr().err == (
        f'error: --plot {target}: plots need matplotlib: pip install "velora-pretrain[plot]"\n'
    )
    assert status(*comparison.arguments) == 0
    assert capsys.readouterr().out.endswith('plots need matplotlib: pip install "velora-pretrain[plot]"\n')


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--steps", "41"], ["full-lr0.01-seed0: schedule.steps is 40", "41 is asked for"]),
        (["--set", "optimizer.clip_norm=1.0"], ["full-lr0.01-seed0: optimizer.clip_norm is 0.0", "1.0 is asked for"]),
        (["--set", "modes.velora.scale=2.0"], ["modes.velora.scale is 1.0"]),
        (["--set", "reading.shuffle_seed=3"], ["reading.shuffle_seed is 7"]),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(
    comparison: Comparison, capsys: pytest.CaptureFixture[str], change: list[str], parts: list[str]
):
    assert status(*comparison.arguments, *change) == 2
    error = capsys.readouterr().err
    assert not [part for part in parts if part not in error], error
    assert error.count("\n") == 1


def test_what_leaves_the_numbers_as_they_are_may_change(comparison: Comparison):
    assert status(*comparison.arguments, "--set", "checkpoint.keep_last=1") == 0


def test_a_cell_that_diverges_is_told_and_never_wins(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("PYTHONPATH", str(runs.ROOT))
    root = tmp_path / "compared"
    arguments = ["--recipe", str(tiny_recipe()), "--modes", "full", "--learning-rates", "1e9,1e-2"]
    arguments += ["--run-dir", str(root), "--jobs", "2", "--json", str(tmp_path / "result.json")]
    for _ in range(2):  # the second time, nothing is trained
        assert status(*arguments) == 0
        out = capsys.readouterr().out
        assert "full: diverged at step 2 (learning rate 1e+09, seed 0)" in out
    assert "2 cells, 2 of them done before" in out
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (row["learning_rate"], row["at_edge"], row["perplexity_sd"]) == (0.01, True, None)
    diverged = row["cells"][1]
    assert (diverged["perplexity"], diverged["diverged_at_step"], diverged["tokens"]) == (None, 2, None)
    failure = RunFolder(root / "full-lr1e+09-seed0").failure
    assert json.loads(failure.read_text())["step"] == 2
    # A run that goes on has not failed yet.
    folder = RunFolder(failure.parent)
    folder.write_run(folder.read_run())
    assert not failure.exists()


def grid(modes: str = f"full,{ALL}", rates: str = "1,2,3", seeds: str = "0,1", **options: Any) -> list[Cell]:
    return plan_cells("quickstart", options, [], modes=modes, learning_rates=[rates], seeds=seeds)


def rows_of(cells: list[Cell], perplexities: list[float]) -> list[dict[str, Any]]:
    """The rows of cells that came to these perplexities."""
    results = {
        cell.slug: {
            "cell": {
                "learning_rate": cell.learning_rate,
                "seed": cell.seed,
                "perplexity": perplexity,
                "perplexity_paper": perplexity / 2,
                "eval_tokens": 10,
                "tokens": 20,
                "tokens_per_second": 100.0 * cell.learning_rate + cell.seed,
                "peak_memory_bytes": {"predicted": 5, "measured": 6 + cell.seed},
                "side_by_side": False,
                "run_dir": cell.slug,
                "diverged_at_step": 3 if math.isinf(perplexity) else None,
            }
        }
        for cell, perplexity in zip(cells, map(float, perplexities), strict=True)
    }
    return result_rows(cells, results)


def test_the_best_rate_has_the_lowest_mean_over_seeds():
    # In the order of training: seed 0 (full 1, 2, 3; all 1, 2, 3), then seed 1. Rate 3 has the lowest single figure
    # of full, and rate 1 the lowest of seed 0 of all; neither has the lowest mean.
    full, other = rows_of(grid(), [30, 20, 10, 21, 22, 50, 30, 22, 90, 60, 24.2, 50])
    assert (full["learning_rate"], full["perplexity_mean"], full["at_edge"]) == (2.0, 21.0, False)
    assert full["perplexity_sd"] == pytest.approx(math.sqrt(2))
    assert full["perplexity_paper_mean"] == 10.5
    assert full["tokens_per_second"] == 200.5
    assert full["peak_memory_bytes"] == {"predicted": 5, "measured": 7}
    assert (full["gap_to_full_percent"], full["gap_to_full_percent_sd"]) == (0.0, None)
    assert (other["learning_rate"], other["perplexity_mean"]) == (2.0, 23.1)
    # Both seeds are 10 % above full rank's: the pairs show it, however far the seeds lie apart.
    assert other["gap_to_full_percent"] == pytest.approx(10.0)
    assert other["gap_to_full_percent_sd"] == pytest.approx(0.0, abs=1e-9)
    assert [cell["learning_rate"] for cell in full["cells"]] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def test_one_seed_has_no_deviation_and_one_rate_is_at_the_edge(capsys: pytest.CaptureFixture[str]):
    cells = grid(rates="2", seeds="4")
    rows = rows_of(cells, [20, 25])
    assert [row["perplexity_sd"] for row in rows] == [None, None]
    assert rows[1]["gap_to_full_percent"] == pytest.approx(25.0)
    assert shown(rows, seeds=[4]).count("only one learning rate tried: try a smaller and a larger one") == 2


def test_a_rate_at_which_one_seed_diverged_never_wins():
    full, other = rows_of(grid(), [10, 20, 30, math.inf, 5, 40, math.inf, 20, 30, math.inf, math.inf, 40])
    assert (full["learning_rate"], full["perplexity_mean"], full["at_edge"]) == (2.0, 20.0, False)
    assert (other["learning_rate"], other["at_edge"]) == (3.0, True)
    text = shown([full, other], seeds=[0, 1])
    assert f"{ALL}: best at the edge of the rates tried: try a larger one" in text
    assert f"{ALL}: diverged at step 3 (learning rate 2, seed 1)" in text


def test_where_every_rate_diverged_there_is_no_best():
    rows = rows_of(grid(rates="1,2"), [math.inf, math.inf, 3, 4] * 2)
    assert (rows[0]["learning_rate"], rows[0]["perplexity_mean"], rows[0]["at_edge"]) == (None, math.inf, False)
    assert [row["gap_to_full_percent"] for row in rows] == [None, None]
    assert "not finite" in shown(rows, seeds=[0, 1])


def test_without_full_rank_there_is_no_gap():
    rows = rows_of(grid(modes=ALL, seeds="0"), [1, 2, 3])
    assert rows[0]["gap_to_full_percent"] is None
    assert "try a smaller one" in shown(rows, seeds=[0], baseline=None)


def shown(rows: list[dict[str, Any]], *, seeds: list[int], baseline: str | None = "full") -> str:
    console = Console(width=180, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    shared = {"seeds": seeds, "steps": 5, "baseline": baseline, "devices": ["cpu", "cuda"]}
    shared["environments"] = ["Linux, torch 2.11", "Linux, torch 2.13"]
    print_perplexity({"rows": rows, "settings": shared}, console)
    text = console.export_text()
    assert "Cells ran on cpu, cuda" in text
    return text


def test_settings_that_stand_in_no_label_are_shown():
    rows = rows_of(grid(seeds="0", rates="1"), [1, 2])
    assert "other settings" not in shown(rows, seeds=[0])
    rows[1]["options"]["scale"] = 2.0
    text = shown(rows, seeds=[0])
    assert "other settings" in text
    assert "scale 2.0" in text
    assert "layers all" not in text


def test_runs_that_differ_in_something_else_cannot_be_compared():
    base = {"size": "9m", "mode": "full"}
    check_comparable(
        {
            "a": Run.model_validate(base),
            "b": Run.model_validate({"size": "9m", "mode": "velora", "seed": 3, "optimizer": {"lr": 1.0}}),
            "c": Run.model_validate({**base, "modes": {"velora": {"scale": 2.0}}, "checkpoint": {"keep_last": 1}}),
        }
    )
    with pytest.raises(UserError, match=r"batch\.sequences: 512 in a but 256 in b"):
        check_comparable(
            {"a": Run.model_validate(base), "b": Run.model_validate({**base, "batch": {"sequences": 256}})}
        )
    with pytest.raises(UserError, match=r"model\.rope_theta: None in a but 5\.0 in b"):
        check_comparable(
            {"a": Run.model_validate(base), "b": Run.model_validate({**base, "model": {"rope_theta": 5.0}})}
        )
    with pytest.raises(UserError, match=r"reading\.shuffle_seed: None in a but 1 in b"):
        check_comparable(
            {"a": Run.model_validate(base), "b": Run.model_validate({**base, "reading": {"shuffle_seed": 1}})}
        )


def test_c4_from_the_hub_and_from_a_folder_is_one_text(tmp_path: Path):
    """So a comparison that was begun on the hub's files goes on with a folder."""
    root, fetched = tmp_path / "compared", tmp_path / "c4-en"
    fetched.mkdir()
    (cell,) = grid(modes="full", rates="1", seeds="0", data=str(fetched))
    streamed = cell.run.model_copy(update={"data": "c4"})
    folder = run_folder(root, cell)
    folder.path.mkdir(parents=True)
    folder.write_run(streamed)
    folder.summary.write_text("{}")
    for check in (lambda: _check_folders([cell], root), lambda: check_comparable({"a": streamed, "b": cell.run})):
        with pytest.raises(UserError, match=r"data\b.*'c4'"):
            check()
    Manifest().write(fetched)
    _check_folders([cell], root)
    check_comparable({"a": streamed, "b": cell.run})


@pytest.mark.parametrize("key", ["tokenizer_sha256", "data_sha256", "tokens"])
def test_runs_on_other_text_cannot_be_compared(key: str):
    summary = {"tokenizer_sha256": "x", "data_sha256": None, "tokens": 5}
    _check_same_text({"a": summary, "b": dict(summary)})
    with pytest.raises(UserError, match=f"{key}: .* in a but other in b"):
        _check_same_text({"a": summary, "b": {**summary, key: "other"}})


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a shell script in the place of Python, so that cells are trained by it. $5 is the run folder."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\nshift 3; folder=$4; recipe=$2\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(cells_module.sys, "executable", str(path))

    return replace


QUIET = Console(quiet=True)
FINISH = 'mkdir -p $folder; echo \'{"final_evaluation": {"perplexity": 5.0}}\' > $folder/summary.json'


def test_a_cell_that_fails_stops_the_comparison(command: Callable[[str], None], tmp_path: Path):
    """And the one beside it may write its checkpoint."""
    command(
        'case "$folder" in *lr1-seed0) sleep 0.5; echo fine; echo "error: the disk is on fire"; echo bye; exit 2;;'
        f" *) trap 'echo saved; kill $!; exit 130' TERM; sleep 60 & wait;; esac; {FINISH}"
    )
    cells = grid(modes="full", seeds="0")
    with pytest.raises(UserError) as raised:
        train_cells(cells, tmp_path / "out", jobs=2, console=QUIET)
    log = tmp_path / "out/logs/full-lr1-seed0.log"
    assert f"full-lr1-seed0: ended with status 2: the disk is on fire; its log is {log}." in str(raised.value)
    assert (tmp_path / "out/logs/full-lr2-seed0.log").read_text() == "saved\n"
    assert not (tmp_path / "out/recipes/full-lr3-seed0.toml").exists()


def test_only_cells_that_are_not_done_are_started(command: Callable[[str], None], tmp_path: Path):
    command(f"echo started; {FINISH}")
    cells = grid(modes="full", seeds="0")
    for folder in (RunFolder(tmp_path / cell.slug) for cell in cells[:2]):
        folder.path.mkdir()
    RunFolder(tmp_path / cells[0].slug).write_summary({})
    RunFolder(tmp_path / cells[1].slug).write_failure(3, "the loss is nan")
    for _ in range(2):
        train_cells(cells, tmp_path, jobs=1, console=QUIET)
    logs = [tmp_path / "logs" / f"{cell.slug}.log" for cell in cells]
    assert [log.read_text() if log.exists() else "" for log in logs] == ["", "", "started\n"]


def test_jobs_share_the_cores(command: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command(f'echo "threads=$OMP_NUM_THREADS"; {FINISH}')
    monkeypatch.setattr("velora_pretrain.cells.usable_cores", lambda: 12)
    (cell,) = grid(modes="full", rates="1", seeds="0")
    for jobs, given, threads in [(1, None, ""), (3, None, "4"), (24, None, "1"), (3, "2", "2")]:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        root = tmp_path / f"{jobs}-{given}"
        train_cells([cell], root, jobs=jobs, console=QUIET)
        assert (root / "logs" / f"{cell.slug}.log").read_text() == f"threads={threads}\n"


def test_a_cell_that_is_still_being_trained_is_left_alone(command: Callable[[str], None], tmp_path: Path):
    command("exec sleep 60")
    (cell,) = grid(modes="full", rates="1", seeds="0")
    orphan = _Training(cell, tmp_path, jobs=1)
    try:
        with pytest.raises(UserError, match="is being trained by another process"):
            train_cells([cell], tmp_path, jobs=1, console=QUIET)
    finally:
        orphan.process.kill()
        orphan.process.wait()
    command(FINISH)
    train_cells([cell], tmp_path, jobs=1, console=QUIET)
    with (tmp_path / "logs" / f"{cell.slug}.log").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_sigterm_interrupts_too(command: Callable[[str], None], tmp_path: Path):
    command(f"kill -TERM {os.getpid()}; trap 'kill $!; exit 130' TERM; sleep 60 & wait")
    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped with 0 of 3 cells done"):
        train_cells(grid(modes="full", seeds="0"), tmp_path, jobs=1, console=QUIET)
    assert time.monotonic() - began < 30


def test_a_terminal_sees_bars(command: Callable[[str], None], tmp_path: Path):
    command(
        'mkdir -p $folder; printf \'{"step": 30, "loss_nats_per_token": 2.5}\\n{"step"\' > $folder/metrics.jsonl;'
        f" sleep 0.6; {FINISH}"
    )
    with (tmp_path / "screen").open("w+") as file:
        console = Console(file=file, force_terminal=True, width=100, _environ={"TERM": "xterm"})
        train_cells(grid(modes="full", seeds="0", rates="1,2"), tmp_path / "out", jobs=1, console=console)
        file.seek(0)
        screen = file.read()
    for text in ("step 30/100  loss 2.500", "1/2 cells", "2/2  full-lr2-seed0: perplexity 5.00", "left"):
        assert text in screen


def test_what_is_left_to_the_machine_is_decided_once(
    command: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And stays, whatever the machine would say later."""

    class Warnings(Display):
        texts: list[str] = []  # noqa: RUF012

        def warn(self, text: str) -> None:
            self.texts.append(text)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = {"full": 8, "velora": 4}
    chosen: list[dict[str, Any]] = []

    def choose(run: Run, **given: Any) -> int:
        chosen.append(given)
        return sizes[run.mode]

    monkeypatch.setattr("velora_pretrain.perplexity.choose_micro_batch", choose)
    command("cp $recipe $folder.toml; echo told; exit 1")
    cells = plan_cells(None, {"size": "9m", "device": "cpu"}, [], modes=f"full,{ALL}")
    display = Warnings()
    with pytest.raises(UserError, match="told"):
        compare_perplexity(cells, tmp_path / "out", jobs=1, display=display, console=QUIET)
    (recipe,) = (tmp_path / "out").glob("*.toml")
    text = recipe.read_text()
    assert 'data = "sample"' in text
    assert "micro_batch = 4" in text
    assert "EVERY CELL TRAINS ON THE BUNDLED SAMPLE" in display.texts[0]
    assert len(chosen) == 2
    # A run with a step stands there, from a day with less memory and the hub at hand.
    folder = RunFolder(tmp_path / "out" / cells[1].slug)
    batch = cells[1].run.batch.model_copy(update={"micro_batch": 2})
    folder.write_run(cells[1].run.model_copy(update={"data": "c4", "batch": batch}))
    folder.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="told"):
        compare_perplexity(cells, tmp_path / "out", jobs=1, display=display, console=QUIET)
    text = recipe.read_text()
    assert 'data = "c4"' in text
    assert "micro_batch = 2" in text


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert status("--recipe", "quickstart", "--modes", "full", "--run-dir", str(tmp_path / "file")) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
