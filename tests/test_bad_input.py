"""Every mistake that a user can make, through the command: one clear line, exit code 2, nothing lost."""

import gzip
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from safetensors.torch import load

from velora_pretrain import cli
from velora_pretrain.records import RunFolder


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must fail with one line and status 2; gives the line."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        errors = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("WARNING")]
        assert exit_.value.code == 2, errors
        assert len(errors) == 1, errors
        assert errors[0].startswith("error: ")
        return errors[0]

    return run


def lines(*texts: Any) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


SUMMARY = {
    "final_evaluation": {
        "eval_loss_nats_per_token": 1.0,
        "perplexity": 1.0,
        "perplexity_paper": 1.0,
        "bits_per_byte": 1.0,
        "eval_tokens": 1,
    },
    "peak_memory_bytes": 1,
    "tokens_per_second": 1.0,
    "seconds": 1.0,
    "steps": 1,
    "tokens": 1,
    "data": "",
    "run_dir": "",
}
GOOD = lines(*["balmer cenos dip fol gusun hamer"] * 40)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, r"missing\.jsonl.*no such file"),
        ("nothing-*.jsonl", None, r"nothing-\*\.jsonl.*match"),
        ("no-text.jsonl", b'{"body": "x"}\n', r"no-text\.jsonl.*text.*body"),
        ("empty.jsonl", b"", r"empty\.jsonl"),
        ("all-empty.jsonl", lines(*[""] * 40), r"all-empty\.jsonl"),
        ("broken.jsonl", GOOD + b'{"text": "cut of\n' + GOOD, r"broken\.jsonl.* 41\b"),
        ("bytes.jsonl", GOOD + b'{"text": "\xff\xfe"}\n' + GOOD, r"bytes\.jsonl.* 41\b.*UTF-8"),
        ("number.jsonl", GOOD + b'{"text": 3}\n' + GOOD, r"number\.jsonl.* 41\b"),
        ("cut.jsonl.gz", gzip.compress(os.urandom(50) + GOOD * 20, mtime=0)[:200], r"cut\.jsonl\.gz"),
        ("array.json", b'[\n{"text": "x"}\n]\n', r"array\.json"),
        ("format.csv", b"text\nx\n", r"format\.csv"),
    ],
)
def test_data(
    fails: Callable[..., str],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    data = tmp_path / name
    if content is not None:
        data.write_bytes(content)
    run = tmp_path / "run"
    line = fails("train", "--recipe", tiny_recipe(packing="pack"), "--data", data, "--run-dir", run)
    assert re.search(message, line), line


def test_a_failed_start_stands_in_nobodys_way(
    fails: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_bytes(b"{broken\n")
    command = ["train", "--recipe", str(tiny_recipe()), "--data", str(data), "--run-dir", str(run)]
    fails(*command)
    runs.write_documents(data, 60)
    with pytest.raises(SystemExit) as exit_:
        cli.main(command)
    assert exit_.value.code == 0
    assert RunFolder(run).checkpoint(6).is_dir()


def test_bad_lines_up_to_the_limit_are_skipped(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "some-bad.jsonl"
    data.write_bytes(runs.write_documents(tmp_path / "good.jsonl", 60).read_bytes() + b'{"text": "cut\n' * 3)
    recipe = tiny_recipe(data=str(data), reading__max_bad_lines=3, validation_data=str(tmp_path / "good.jsonl"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--recipe", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert exit_.value.code == 0


def test_reading_that_fails_later_saves_what_was_trained(
    fails: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "later.jsonl"
    data.write_bytes(runs.write_documents(data, 80).read_bytes() + b"{broken\n")
    recipe = tiny_recipe(reading__shuffle_block_documents=8, reading__prefetch_batches=1, schedule__steps=40)
    line = fails("train", "--recipe", recipe, "--data", data, "--run-dir", tmp_path / "run")
    match = re.search(r"after step (\d+): .*later\.jsonl.*\b81\b.*wrote (\S+);", line)
    assert match, line
    assert Path(match[2]).name == f"step-{int(match[1]):08d}"
    assert Path(match[2]).is_dir()


def test_the_hub_is_away(
    fails: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    line = fails("train", "--recipe", tiny_recipe(), "--data", "c4", "--run-dir", tmp_path / "run")
    assert time.monotonic() - began < 30
    # The commands it names work as they stand, up to the training itself.
    commands = re.findall(r"`velora-pretrain (train [^`]+)`", line)
    assert [command.split("--data ")[1].split()[0] for command in commands] == ["sample", "PATH"]
    started: list[Any] = []
    monkeypatch.setattr("velora_pretrain.trainer.train", lambda run, *_, **__: started.append(run) or SUMMARY)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            cli.main(command.replace("PATH", str(tmp_path / "own.jsonl")).split())
        assert exit_.value.code == 0
    assert [run.data for run in started] == ["sample", str(tmp_path / "own.jsonl")]
    assert {run.tokenizer for run in started} == {"bundled"}
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    line = fails("train", "--recipe", tiny_recipe(), "--tokenizer", "t5-base", "--run-dir", tmp_path / "run")
    assert "--tokenizer bundled" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 50}, r"tokenizer.*\b120\b.*model\.vocab_size.*50|model\.vocab_size"),
        ({"batch__sequence_length": 64}, r"batch\.sequence_length: 64 is longer than the model's 32"),
        (
            {"mode": "velora", "modes__velora__num_groups": {"v_proj": 5}},
            r"modes\.velora\.num_groups\.v_proj: 5 sub-tokens do not divide the width 32",
        ),
        ({"tokenizer": "nowhere.model"}, r"nowhere\.model"),
        ({"device": "cuda"}, "device: cuda is not available here"),
        ({"batch__micro_batch": 3}, r"batch\.micro_batch: 3 does not divide batch\.sequences 8"),
        (
            {"modes__velora__refresh_every": 5, "modes__velora__init": "running_average"},
            r"modes\.velora\.refresh_every",
        ),
    ],
)
def test_configuration(
    fails: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    line = fails("train", "--recipe", tiny_recipe(**changes), "--run-dir", tmp_path / "run")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_configuration(
    fails: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", str(tiny_recipe()), "--run-dir", str(run)])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "already holds a run" in fails("train", "--recipe", tiny_recipe(), "--run-dir", run)
    line = fails("train", "--resume", "--recipe", tiny_recipe(seed=3), "--run-dir", run)
    assert "seed: 3 was asked for, but the run" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_directory_that_cannot_be(
    fails: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in fails("train", "--recipe", tiny_recipe(), "--run-dir", file)
    assert "holds no run" in fails("train", "--resume", "--run-dir", tmp_path / "nowhere")


def test_a_full_disk_while_saving(
    fails: Callable[..., str], tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from velora_pretrain import checkpoint

    write = checkpoint.save_file

    def fills_up(tensors: Any, path: Path, **options: Any) -> None:
        if "00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    line = fails("train", "--recipe", tiny_recipe(checkpoint__every_steps=2), "--run-dir", tmp_path / "run")
    assert "No space left on device" in line
    (kept,) = RunFolder(tmp_path / "run").checkpoints.iterdir()
    assert kept.name == "step-00000002"
    assert load((kept / "model.safetensors").read_bytes())
