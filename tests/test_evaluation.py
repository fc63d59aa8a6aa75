"""Evaluation: against transformers, by hand, in whatever pieces, and from every kind of folder."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_outcome import untimed
from test_trainer import Silent, trained

from velora_pretrain.data.loader import IGNORE_INDEX, evaluation_batches
from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import EVALUATION_SEQUENCES, Score, evaluate, evaluate_checkpoint, validation_source
from velora_pretrain.nn.llama import Llama
from velora_pretrain.records import RunFolder

CPU = torch.device("cpu")


def scored(path: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"data": None, "tokens": None, "device": "cpu", "display": Silent()}
    return evaluate_checkpoint(path, **(defaults | options))


def by_transformers(folder: Path, texts: list[str], length: int, model: Any = None) -> tuple[float, int]:
    """Nats and targets of texts by transformers' model and tokenizer: one text, EOS, truncated, nothing shared."""
    model = model or transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    nats, targets = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=length)["input_ids"]])
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= log_p.gather(1, ids[0, 1:, None]).sum().item()
        targets += ids.shape[1] - 1
    return nats, targets


@pytest.mark.parametrize("mode", ["full", "velora"])
def test_the_perplexity_is_transformers(tiny_run: Callable[..., Any], tmp_path: Path, mode: str) -> None:
    run = tiny_run(mode=mode, schedule__steps=10)
    summary = trained(run, tmp_path)
    result = scored(tmp_path)
    held_out = [
        json.loads(line)["text"] for n, line in enumerate(Path(run.data).read_text().splitlines()) if n % 10 == 9
    ]
    nats, targets = by_transformers(Path(result["checkpoint"]), held_out, length=32)
    assert result["eval_tokens"] == targets
    assert result["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-5)
    final = untimed(summary["final_evaluation"])
    assert {key: result[key] for key in final} == pytest.approx(final, rel=1e-6)
    assert "run_seconds" not in result
    assert result["tokenizer_sha256"] == load_tokenizer(run.tokenizer).sha256


def test_bits_per_byte_by_hand(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    """Short documents, none cut: the bytes are the texts' own, less the first token of each, which nobody predicts."""
    trained(tiny_run(model__max_position_embeddings=256, batch__sequence_length=256), tmp_path)
    texts = ["balmer cenos", "fol gusun hap ki"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = scored(tmp_path, data=str(data))
    tokenizer = load_tokenizer(str(result["checkpoint"]))
    first_bytes = sum(token_bytes[0] for _, token_bytes in tokenizer.encode_with_bytes(texts))
    bits = result["eval_loss_nats_per_token"] * result["eval_tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / (sum(map(len, texts)) - first_bytes))


class Constant(torch.nn.Module):
    """A 'model' whose loss at a target is its label in nats: sums that can be checked by hand."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return labels[labels != IGNORE_INDEX].float().sum()


def batches(tiny_run: Callable[..., Any], *, rank: int = 0, world_size: int = 1) -> Any:
    run = tiny_run()
    return evaluation_batches(
        validation_source(run, run.data),
        load_tokenizer(run.tokenizer),
        packing="pad",
        sequence_length=16,
        sequences=EVALUATION_SEQUENCES,
        rank=rank,
        world_size=world_size,
    )


def test_sums_and_the_papers_average_by_hand(tiny_run: Callable[..., Any]) -> None:
    score = evaluate(Constant(), batches(tiny_run), precision="fp32", device=CPU, micro_batch=7)
    (batch,) = batches(tiny_run)
    real = batch.labels != IGNORE_INDEX
    assert score.targets == int(real.sum())
    assert score.nats == pytest.approx(float(batch.labels[real].sum()))
    # 300 documents: the published ranks hold 128, 128 and 44 sequences, and the fourth none.
    means = [float(rows[rows != IGNORE_INDEX].float().mean()) for rows in batch.labels.split(128)]
    assert len(means) == 3
    record = score.record(step=5)
    assert record.eval_loss_nats_per_token == pytest.approx(score.nats / score.targets)
    assert record.perplexity_paper == pytest.approx(math.exp(sum(means) / 3 / (1 + 1)), rel=1e-6)


def test_n_batches_are_divided_by_n_plus_one() -> None:
    score = Score()
    for _ in range(9):
        score.add(torch.full((4,), 30.0, dtype=torch.float64), torch.full((4,), 10), target_bytes=80)
    record = score.record(step=1)
    assert record.eval_loss_nats_per_token == pytest.approx(3.0)
    assert record.perplexity == pytest.approx(math.exp(3.0))
    assert record.perplexity_paper == pytest.approx(math.exp(3.0 * 9 / 10))
    assert record.bits_per_byte == pytest.approx(9 * 120 / math.log(2) / 720)


def test_nothing_depends_on_how_it_is_cut(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run()
    model = Llama(run.llama, seed=1)
    results = []
    for world_size, micro_batch in ((1, 512), (1, 5), (2, 32), (3, 8)):
        # Every rank's part in turn, and the sum of all as the processes would make it.
        parts: list[list[torch.Tensor]] = []
        for rank in range(world_size):
            own: list[torch.Tensor] = []
            evaluate(
                model,
                batches(tiny_run, rank=rank, world_size=world_size),
                precision="fp32",
                device=CPU,
                micro_batch=micro_batch,
                all_reduce=lambda sums, own=own: own.append(sums.clone()) or sums + 1,
            )
            parts.append(own)
        whole = [sum(ranks, torch.zeros(2, 4, dtype=torch.float64)) for ranks in zip(*parts, strict=True)]
        results.append(torch.stack(whole))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=0)


def test_run_folder_checkpoint_and_foreign_folder(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    run = tiny_run()
    trained(run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    by_run, by_checkpoint = scored(folder.path), scored(folder.checkpoint(6))
    assert by_run == by_checkpoint
    # Alone, the folder knows its own tokenizer and length but no run: it is scored on what it is given.
    foreign = tmp_path / "foreign"
    shutil.copytree(folder.checkpoint(6), foreign, ignore=shutil.ignore_patterns("training_state*"))
    alone = scored(foreign, data=run.data)
    assert alone["eval_tokens"] > 5 * by_run["eval_tokens"]
    assert scored(folder.path, data=run.data)["perplexity"] == pytest.approx(alone["perplexity"])


def test_a_folder_without_a_tokenizer_takes_one_by_name(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    """The barest Hugging Face folder: config.json and model.safetensors."""
    run = tiny_run()
    trained(run, tmp_path / "run")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(RunFolder(tmp_path / "run").checkpoint(6) / name, bare)
    with pytest.raises(UserError, match="--tokenizer"):
        scored(bare, data=run.data)
    expected = scored(tmp_path / "run", data=run.data)
    assert scored(bare, data=run.data, tokenizer_name=run.tokenizer)["perplexity"] == expected["perplexity"]


def test_a_limit_on_tokens(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained(tiny_run(), tmp_path)
    result = scored(tmp_path, tokens=100)
    assert 100 <= result["eval_tokens"] < 140


def test_the_model_is_left_in_the_mode_it_was_in(tiny_run: Callable[..., Any]) -> None:
    for training in (True, False):
        model = Llama(tiny_run().llama, seed=1).train(training)
        evaluate(model, batches(tiny_run), precision="fp32", device=CPU, micro_batch=64)
        assert model.training is training


def test_folders_that_cannot_be_scored(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no such folder; give a checkpoint, a run folder or a Hugging Face LLaMA folder"
    ):
        scored(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        scored(tmp_path)
    run_path = tmp_path / "run"
    trained(tiny_run(), run_path)
    weights = RunFolder(run_path).checkpoint(6) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"step-00000006: the checkpoint is damaged \(model\.safetensors is not what"):
        scored(weights.parent)
    with pytest.raises(UserError, match="has no whole checkpoint"):
        scored(run_path)


def test_no_target_at_all_is_said(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one target token"):
        Score().record(step=1)
