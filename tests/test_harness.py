"""lm-evaluation-harness on checkpoints: what it reports is what can be counted by hand with our own model."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import foreign
import pytest
import runs
import torch
import yaml
from test_trainer import Silent, trained

from velora_pretrain import cli
from velora_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.harness import run_harness
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.nn.llama import Llama
from velora_pretrain.recipe import build_run
from velora_pretrain.records import RunFolder

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
CHOICES = ["mer", "nos", "p sun", "rat"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_tokenizer: Path) -> Path:
    """A short run, whose config.json allows more positions than it has seen."""
    path = tmp_path_factory.mktemp("run")
    changes = {"schedule__steps": 30, "model__max_position_embeddings": 64}
    trained(build_run(runs.values(tiny_data, tiny_tokenizer, **changes), where="test"), path)
    return path


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A choice among four endings, for each of 30 beginnings."""
    path = tmp_path_factory.mktemp("documents") / "choices.jsonl"
    words = runs.WORDS
    lines = [
        {"question": f"{words[n]} {words[(5 * n + 1) % len(words)]}", "choices": CHOICES, "answer": n % 4}
        for n in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def task_path(tmp_path: Path, documents: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks of our own, on local files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    shared = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 3}}
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(line + "\n" for line in tiny_data.read_text().splitlines()[:20]))
    tasks = {
        "tiny_choice": {
            **shared,
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        },
        "tiny_text": {
            **shared,
            "dataset_kwargs": {"data_files": {"test": str(texts)}},
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    return folder


def scored(path: Path, tasks: Sequence[str], task_path: Path | None, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"limit": None, "batch_size": 4, "few_shot": None, "sequence_length": None}
    options = {**defaults, "device": "cpu", "display": Silent(), **options}
    return run_harness(path, tasks=tasks, task_path=task_path, **options)


def figures(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in result["rows"]}


@torch.no_grad()
def nats_of(model: Llama, before: list[int], tokens: list[int]) -> float:
    """What `tokens` after `before` cost, by the plain definition."""
    log_p = model.logits(torch.tensor([before + tokens]))[0].double().log_softmax(-1)
    return -sum(float(log_p[len(before) + place - 1, token]) for place, token in enumerate(tokens))


def parts(folder: Path) -> tuple[Llama, Tokenizer]:
    checkpoint = RunFolder(folder).checkpoints_newest_first()[0]
    return load_llama(checkpoint), load_tokenizer(str(checkpoint))


@needs_harness
@pytest.mark.parametrize("few_shot", [0, 2])
def test_choices_by_hand(run_folder: Path, task_path: Path, documents: Path, few_shot: int) -> None:
    result = scored(run_folder, ["tiny_choice"], task_path, few_shot=few_shot)
    rows = {row["metric"]: row for row in result["rows"]}
    assert rows["acc"]["few_shot"] == few_shot
    assert (rows["acc"]["documents"], rows["acc"]["version"], result["sequence_length"]) == (30, 3, 32)
    if few_shot:
        return  # which examples it draws is the harness's own affair
    model, tokenizer = parts(run_folder)
    right, right_by_length = 0, 0
    for line in documents.read_text().splitlines():
        document = json.loads(line)
        (before,) = tokenizer.encode([document["question"]])
        costs = []
        for choice in document["choices"]:
            (whole,) = tokenizer.encode([f"{document['question']} {choice}"])
            assert whole[: len(before)] == before
            costs.append(nats_of(model, before, whole[len(before) :]))
        right += min(range(4), key=lambda n, costs=costs: costs[n]) == document["answer"]
        by_length = [cost / len(choice) for cost, choice in zip(costs, document["choices"], strict=True)]
        right_by_length += min(range(4), key=lambda n, costs=by_length: costs[n]) == document["answer"]
    assert rows["acc"]["value"] == right / 30
    assert rows["acc_norm"]["value"] == right_by_length / 30
    assert right != right_by_length
    assert rows["acc"]["stderr"] == pytest.approx(math.sqrt(right / 30 * (1 - right / 30) / 29))


@needs_harness
@pytest.mark.parametrize("length", [32, 16])
def test_perplexity_by_hand(run_folder: Path, task_path: Path, tiny_data: Path, length: int) -> None:
    """Windows of the run's length, each with the last token before it in front, the first one with the end of text."""
    result = scored(run_folder, ["tiny_text"], task_path, sequence_length=None if length == 32 else length)
    assert result["sequence_length"] == length
    model, tokenizer = parts(run_folder)
    nats, size_bytes, words, longest = 0.0, 0, 0, 0
    for line in tiny_data.read_text().splitlines()[:20]:
        text = json.loads(line)["text"]
        (tokens,) = tokenizer.encode([text])
        size_bytes, words = size_bytes + len(text.encode()), words + len(text.split())
        longest = max(longest, len(tokens))
        before = [tokenizer.eos_id]
        for begin in range(0, len(tokens), length):
            window = tokens[begin : begin + length]
            # The last window is filled up from the left.
            context = tokens[max(0, begin + len(window) - length - 1) : begin] if begin else before
            nats += nats_of(model, context, window)
    assert longest > 1.5 * length
    found = figures(result)
    assert found["tiny_text", "bits_per_byte"] == pytest.approx(nats / size_bytes / math.log(2), rel=1e-5)
    assert found["tiny_text", "word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    longer = scored(run_folder, ["tiny_text"], task_path, sequence_length=64, limit=3)
    assert (longer["sequence_length"], longer["limit"], longer["rows"][0]["documents"]) == (64, 3, 3)


@needs_harness
def test_the_command_and_the_folders_that_it_takes(
    run_folder: Path,
    task_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--tasks", "tiny_choice,tiny_text", "--task-path", str(task_path), "--limit", "5", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "harness", str(run_folder), *options, "--json", "-"])
    assert ended.value.code == 0
    by_run = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in by_run["rows"]} == {"tiny_choice", "tiny_text"}
    checkpoint = RunFolder(run_folder).checkpoints_newest_first()[0]
    assert scored(checkpoint, ["tiny_choice", "tiny_text"], task_path, limit=5)["rows"] == by_run["rows"]
    # Alone, the folder is a model of its 64 positions.
    alone = shutil.copytree(checkpoint, tmp_path / "alone", ignore=shutil.ignore_patterns("training_state*"))
    assert scored(alone, ["tiny_choice"], task_path, limit=1)["sequence_length"] == 64
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(run_folder, tmp_path / "runs" / "mine")
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "harness", *options])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "runs/mine/checkpoints/step-00000030, first 5 documents of each task" in out
    assert f"{figures(by_run)['tiny_text', 'bits_per_byte']:.4f}" in out


@needs_harness
def test_a_foreign_model_with_a_sentencepiece_file_alone(tiny_tokenizer: Path, task_path: Path, tmp_path: Path) -> None:
    bare = foreign.write_llama(tmp_path / "bare", tiny_tokenizer, dtype=torch.float32)
    told = foreign.write_llama(tmp_path / "told", None, dtype=torch.float32)
    load_tokenizer(str(tiny_tokenizer)).save_pretrained(told)
    results = [scored(folder, ["tiny_text"], task_path) for folder in (bare, told)]
    assert results[0]["rows"] == results[1]["rows"]
    assert results[0]["tokenizer_sha256"] == results[1]["tokenizer_sha256"]


@needs_harness
def test_a_run_in_mixed_precision_is_scored_in_it(
    tiny_run: Callable[..., Any], task_path: Path, tmp_path: Path
) -> None:
    trained(tiny_run(precision="bf16-mixed"), tmp_path / "run")
    mixed = scored(tmp_path / "run", ["tiny_text"], task_path)
    checkpoint = RunFolder(tmp_path / "run").checkpoints_newest_first()[0]
    alone = shutil.copytree(checkpoint, tmp_path / "alone", ignore=shutil.ignore_patterns("training_state*"))
    exact = scored(alone, ["tiny_text"], task_path)
    assert (mixed["precision"], exact["precision"]) == ("bf16-mixed", "float32")
    bits, exact_bits = (figures(result)["tiny_text", "bits_per_byte"] for result in (mixed, exact))
    assert bits != exact_bits
    assert bits == pytest.approx(exact_bits, rel=0.01)


@needs_harness
def test_names_and_what_it_cannot_do(run_folder: Path, task_path: Path, tmp_path: Path) -> None:
    assert {row["task"] for row in scored(run_folder, ["tiny_te*"], task_path, limit=1)["rows"]} == {"tiny_text"}
    with pytest.raises(UserError, match=r"--tasks tiny_chioce: no such task in .*; did you mean tiny_choice"):
        scored(run_folder, ["tiny_chioce"], task_path)
    checkpoint = RunFolder(run_folder).checkpoints_newest_first()[0]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, bare)
    with pytest.raises(UserError, match="holds no tokenizer"):
        scored(bare, ["tiny_choice"], task_path)
    with pytest.raises(UserError, match="--sequence-length 65: is longer than the model's 64 positions"):
        scored(run_folder, ["tiny_choice"], task_path, sequence_length=65)
    broken = yaml.safe_load((task_path / "tiny_choice.yaml").read_text())
    broken |= {"task": "broken", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}}
    (task_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(UserError, match=r"--tasks broken: cannot be loaded \(.*nowhere"):
        scored(run_folder, ["broken"], task_path)
    long = {key: value for key, value in broken.items() if key != "doc_to_choice"} | {
        "task": "long",
        "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "metric_list": [{"metric": "exact_match"}],
    }
    (task_path / "long.yaml").write_text(yaml.safe_dump(long))
    with pytest.raises(UserError, match=r"--tasks: .*\(256\) must be less than model's maximum sequence length \(32\)"):
        scored(run_folder, ["long"], task_path, limit=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which tasks? Give --tasks"),
        (["--tasks", " , "], "which tasks? Give --tasks"),
        (["--tasks", "a", "--task-path", "nowhere"], "--task-path nowhere: no such folder"),
        (
            ["--tasks", "a"],
            'eval harness needs lm-evaluation-harness: pip install "velora-pretrain[harness]"',
        ),
        (["--tasks", "a", "--limit", "0"], "--limit"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "harness", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main(["eval", "harness", "--tasks", "a"])
    assert "start it without torchrun" in capsys.readouterr().err
