"""Continuations: against transformers, drawn fairly, and logged without a trace in the run's numbers."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import transformers
from run_outcome import untimed
from test_trainer import Silent, trained, weights

from velora_pretrain import cli
from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.generation import PROMPT_TOKENS, choose, continue_tokens, generate
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.recipe import build_run, resolve
from velora_pretrain.records import RunFolder
from velora_pretrain.run_lock import RunLock
from velora_pretrain.trainer import Trainer

PROMPTS = ["bal cemer", "difo gul", "ki"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_tokenizer: Path) -> Path:
    """The last checkpoint of a short run."""
    path = tmp_path_factory.mktemp("run")
    run = build_run(runs.values(tiny_data, tiny_tokenizer, mode="velora", schedule__steps=40), where="test")
    trained(run, path)
    return RunFolder(path).checkpoints_newest_first()[0]


def generated(path: Path, prompt: str, **options: Any) -> str:
    defaults: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0, "top_k": 0, "seed": 0, "device": "cpu"}
    return generate(path, prompt, **(defaults | options), display=Silent())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_likeliest_continuation_is_transformers(folder: Path, prompt: str) -> None:
    tokenizer, model = load_tokenizer(str(folder)), load_llama(folder)
    (ids,) = tokenizer.encode([prompt])
    ours = continue_tokens(
        model, ids, max_new_tokens=20, eos_id=tokenizer.eos_id, temperature=0.0, top_k=0, generator=torch.Generator()
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, do_sample=False
    )[0, len(ids) :]
    assert ours == [token for token in theirs.tolist() if token != tokenizer.eos_id]
    assert len(ours) > 5
    assert generated(folder, prompt) == tokenizer.decode([*ids, *ours])
    by_transformers = transformers.AutoTokenizer.from_pretrained(folder).decode([*ids, *ours], skip_special_tokens=True)
    assert generated(folder, prompt) == by_transformers


def test_it_ends_with_the_document_and_with_the_models_positions(folder: Path) -> None:
    tokenizer, model = load_tokenizer(str(folder)), load_llama(folder)
    options: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "generator": torch.Generator(), "max_new_tokens": 100}
    new = continue_tokens(model, [5] * 30, eos_id=-1, **options)
    assert len(new) == 2
    assert continue_tokens(model, [5] * 30, eos_id=new[1], **options) == new[:1]
    modes: list[bool] = []
    model.train().model.register_forward_hook(lambda trunk, *_: modes.append(trunk.training))
    assert continue_tokens(model, [5] * 30, eos_id=tokenizer.eos_id, **(options | {"max_new_tokens": 1})) == new[:1]
    assert (modes, model.training) == ([False], True)


def test_draws_follow_the_softmax_of_the_likeliest() -> None:
    logits, generator = torch.tensor([0.0, 2.0, 1.0, -3.0]), torch.Generator().manual_seed(1)
    for top_k, temperature in ((0, 1.0), (2, 1.0), (3, 2.0), (9, 0.5)):
        draws = [choose(logits, temperature=temperature, top_k=top_k, generator=generator) for _ in range(4000)]
        shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
        kept = logits.topk(min(top_k or 4, 4)).indices
        expected = torch.zeros(4).scatter(0, kept, (logits[kept] / temperature).softmax(0))
        # Four standard deviations of a share over 4,000 draws are at most 0.032.
        assert (shares - expected).abs().max() < 0.032
        assert not shares[expected == 0].any()
    assert choose(logits, temperature=0.0, top_k=0, generator=generator) == 1


def test_a_seed_gives_a_text_and_leaves_the_global_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    for top_k in (0, 20):
        texts = [generated(folder, "bal", temperature=1.0, top_k=top_k, seed=seed) for seed in (3, 3, 4)]
        assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "bal"], "nowhere: no such checkpoint"),
        (["FOLDER", ""], "not one token"),
        (["FOLDER", "bal " * 40], "tokens, and the model 32 positions"),
        (["FOLDER", "bal", "--temperature", "nan"], "--temperature"),
        (["FOLDER", "bal", "--temperature", "inf"], "--temperature inf"),
        (["FOLDER", "bal", "--temperature", "-1"], "--temperature"),
        (["FOLDER", "bal", "--top-k", "-1"], "--top-k"),
        (["FOLDER", "bal", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["FOLDER", "bal", "--device", "tpu"], "device: "),
        (["FOLDER"], "Missing argument"),
        ([".", "bal"], "config.json: no such file"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *(str(folder) if each == "FOLDER" else each for each in arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_command_prints_the_text_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(folder.parent.parent), "bal cemer", "--temperature", "0", "--max-new-tokens", "5"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == generated(folder, "bal cemer", max_new_tokens=5) + "\n"


def samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(path).samples.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["full", "velora", "lora"])
def test_samples_are_logged_at_each_evaluation_and_leave_no_trace(
    tiny_run: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    changes: dict[str, Any] = {"mode": mode, "schedule__steps": 6, "evaluation__every_steps": 2}
    if mode == "lora":
        changes["modes__lora__dropout"] = 0.1
    trained(tiny_run(**changes), tmp_path / "without")
    with_samples = tiny_run(**changes, evaluation__samples=3, evaluation__sample_tokens=4)
    trained(with_samples, tmp_path / "with")
    without, with_them = (
        [untimed(record) for record in RunFolder(path).records()] for path in (tmp_path / "without", tmp_path / "with")
    )
    assert without == with_them
    ours, theirs = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not RunFolder(tmp_path / "without").samples.exists()
    logged = samples(tmp_path / "with")
    assert [each["step"] for each in logged] == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    held_out = [
        json.loads(line)["text"]
        for n, line in enumerate(Path(with_samples.data).read_text().splitlines())
        if n % 10 == 9
    ]
    tokenizer = load_tokenizer(with_samples.tokenizer)
    for each, text in zip(logged[:3], held_out, strict=False):
        assert text.startswith(each["prompt"])
        whole = len(tokenizer.encode([text])[0])
        assert 1 <= len(tokenizer.encode([each["prompt"]])[0]) <= min(PROMPT_TOKENS, whole // 2 + 1)
    assert any(each["continuation"] for each in logged)
    assert [each["prompt"] for each in logged[:3]] == [each["prompt"] for each in logged[3:6]]


def test_a_resumed_run_logs_what_the_straight_one_does(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluation__every_steps": 2, "evaluation__samples": 2, "checkpoint__every_steps": 3}
    run = tiny_run(**changes)
    trained(run, tmp_path / "straight")
    folder = RunFolder(tmp_path / "stopped")
    lock = RunLock(folder.path)
    stopped = Trainer(run, folder, resume=False, display=Silent(), lock=lock)
    step = stopped._step
    stopped._step = lambda loader: step(loader) if stopped.done_steps < 5 else 1 / 0  # pyright: ignore
    with pytest.raises(ZeroDivisionError), lock, closing(stopped):
        stopped.train()
    assert [each["step"] for each in samples(tmp_path / "stopped")] == [2, 2, 4, 4]
    # What a run logs may change when it goes on: its numbers do not.
    trained(tiny_run(**changes | {"evaluation__sample_tokens": 32}), tmp_path / "stopped", resume=True)
    assert samples(tmp_path / "stopped") == samples(tmp_path / "straight")


def test_a_negative_number_of_samples_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.samples"):
        resolve(None, {"size": "9m"}, ["evaluation.samples=-1"])
