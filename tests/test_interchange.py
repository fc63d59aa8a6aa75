"""A checkpoint is a Hugging Face model, and theirs is one of ours: logits, greedy texts, token ids, losses."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import foreign
import pytest
import runs
import torch
import transformers
from test_evaluation import by_transformers, scored
from test_generation import generated
from test_trainer import Silent

from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.recipe import build_run
from velora_pretrain.records import RunFolder
from velora_pretrain.run_lock import RunLock
from velora_pretrain.trainer import Trainer

PROMPTS = ["bal cemer", "difo  gul", "ki"]
TEXTS = ["balmer cenos.", " leading", *runs.TRICKY_TEXTS]


@pytest.fixture(scope="module", params=["full", "velora", "lora", "lora+velora"])
def trained_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_tokenizer: Path
) -> tuple[Any, Path]:
    """The model that a run has trained, as it trains it, and the folder of its last checkpoint."""
    path = tmp_path_factory.mktemp("run")
    changes = {"schedule__steps": 30, "modes__lora__rank": 8, "modes__velora__layers": "all"}
    run = build_run(runs.values(tiny_data, tiny_tokenizer, mode=request.param, **changes), where="test")
    with RunLock(path) as lock, closing(Trainer(run, RunFolder(path), resume=False, display=Silent(), lock=lock)) as it:
        it.train()
    return it.model.eval(), RunFolder(path).checkpoints_newest_first()[0]


@torch.no_grad()
def test_transformers_has_the_logits_of_the_model_that_was_trained(trained_model: tuple[Any, Path]) -> None:
    ours, folder = trained_model
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(0, 120, (4, 32), generator=torch.Generator().manual_seed(0))
    expected = ours.logits(tokens)
    assert expected.abs().max() > 3
    # fp32 sums of some 50 terms in another order, over two blocks, and of W + BA in one product in place of two.
    torch.testing.assert_close(theirs(tokens).logits, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(load_llama(folder).logits(tokens), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_transformers_writes_the_same_text(trained_model: tuple[Any, Path], prompt: str) -> None:
    _, folder = trained_model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    # Without what its tokenizer puts behind a whole text.
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    (ids,) = model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist()
    ours = load_tokenizer(str(folder))
    assert ids[: inputs["input_ids"].shape[1]] == ours.encode([prompt])[0]
    assert len(ids) > inputs["input_ids"].shape[1] + 5
    assert generated(folder, prompt) == tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_transformers_cuts_texts_alike(trained_model: tuple[Any, Path]) -> None:
    _, folder = trained_model
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    assert theirs(TEXTS)["input_ids"] == [[*ids, ours.eos_id] for ids in ours.encode(TEXTS)]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32, "max_shard_size": "20KB", "tie_word_embeddings": True},
        {"dtype": torch.float32, "num_key_value_heads": 4, "max_position_embeddings": 40},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "tie_word_embeddings": True},
    ],
    ids=["tied and sharded", "short", "bf16", "tied bf16"],
)
def test_a_foreign_model_has_transformers_loss(
    tiny_tokenizer: Path, tmp_path: Path, tiny_data: Path, changes: dict[str, Any]
) -> None:
    folder = foreign.write_llama(tmp_path / "llama", None, **changes)
    is_sharded = changes["dtype"] == torch.bfloat16 or "max_shard_size" in changes
    assert (folder / "model.safetensors.index.json").exists() == is_sharded
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    tokenizer.save_pretrained(folder)
    lines = tiny_data.read_text().splitlines()[:60]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(lines) + "\n")
    texts = [json.loads(line)["text"] for line in lines]
    length = min(256, changes.get("max_position_embeddings", 512))
    result = scored(folder, data=str(data))
    nats, targets = by_transformers(folder, texts, length)
    assert result["eval_tokens"] == targets
    ours, theirs = result["eval_loss_nats_per_token"], nats / targets
    if changes["dtype"] == torch.float32:
        assert ours == pytest.approx(theirs, rel=1e-6)
        return
    # Both round each product to 8 bits, at other places: ours is no further from the exact loss than theirs.
    exact = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, _ = by_transformers(folder, texts, length, model=exact)
    assert abs(ours - nats / targets) <= abs(theirs - nats / targets) + 1e-3 * ours
