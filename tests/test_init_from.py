"""Runs that start from given weights: the same function in every mode, dimensions and tokenizer that fit."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import foreign
import launches
import pytest
import runs
import tomli_w
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from test_trainer import Silent, trained, weights

from velora_pretrain import cli, setup
from velora_pretrain import trainer as trainer_module
from velora_pretrain.config import MODES
from velora_pretrain.errors import UserError
from velora_pretrain.hugging_face import load_llama, start_llama
from velora_pretrain.recipe import build_run, resolve, set_dotted
from velora_pretrain.records import RunFolder
from velora_pretrain.run_lock import RunLock
from velora_pretrain.trainer import Trainer

TOKENS = torch.arange(2, 34).view(2, 16)
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
"""Of logits of some units: fp32 sums over some 50 elements in another order, through two blocks."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A LLaMA that nothing of ours has written, in bf16 and in shards."""
    return foreign.write_llama(tmp_path_factory.mktemp("given") / "llama", tiny_tokenizer, dtype=torch.bfloat16)


@pytest.fixture
def recipe(tiny_data: Path, tiny_tokenizer: Path) -> Callable[..., dict[str, Any]]:
    """The values of a small run that says nothing of its model and tokenizer."""

    def values(**changes: Any) -> dict[str, Any]:
        told = runs.values(tiny_data, tiny_tokenizer)
        del told["model"], told["tokenizer"]
        for key, value in changes.items():
            set_dotted(told, key.replace("__", "."), value)
        return told

    return values


@pytest.fixture
def run_from(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Any]:
    """The run of a small recipe that starts from a folder."""

    def build(folder: Path, **changes: Any) -> Any:
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(recipe(init_from=str(folder), **changes)))
        return resolve(str(path), {}, [])

    return build


def begun(run: Any, path: Path, display: Silent | None = None) -> Any:
    """A run before its first step."""
    folder = RunFolder(path)
    with RunLock(path) as lock:
        trainer = Trainer(run, folder, resume=False, display=display or Silent(), lock=lock)
        with closing(trainer):
            return trainer


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_starts_from_the_given_logits(
    run_from: Callable[..., Any], given: Path, tmp_path: Path, mode: str
) -> None:
    model = begun(run_from(given, mode=mode, modes__velora__layers="all"), tmp_path / "run").model.eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(given, dtype=torch.float32)
    torch.testing.assert_close(model.logits(TOKENS), theirs(TOKENS).logits, **ROUNDING)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float16, "max_shard_size": "20KB"},
        {"dtype": torch.bfloat16, "tie_word_embeddings": True},
        {"dtype": torch.float32, "num_key_value_heads": 4, "rms_norm_eps": 0.1},
    ],
    ids=["whole", "sharded fp16", "tied bf16", "other numbers"],
)
def test_whatever_the_folder_stores(
    run_from: Callable[..., Any], tiny_tokenizer: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = foreign.write_llama(tmp_path / "llama", tiny_tokenizer, **changes)
    display = Silent()
    trainer = begun(run_from(folder), tmp_path / "run", display)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(trainer.model.logits(TOKENS), theirs(TOKENS).logits, **ROUNDING)
    is_tied = changes.get("tie_word_embeddings", False)
    assert ("one matrix there, are trained apart" in " ".join(display.notes)) == is_tied
    head, embedding = trainer.model.lm_head.weight, trainer.model.model.embed_tokens.weight
    assert head is not embedding
    assert torch.equal(head, embedding) == is_tied


def test_it_begins_in_fp32_and_apart_from_the_files(
    run_from: Callable[..., Any], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """What a mode draws beside the weights is then drawn as for any run; and the files may change while it trains."""
    for dtype in (torch.bfloat16, torch.float32):
        folder = foreign.write_llama(tmp_path / str(dtype), tiny_tokenizer, dtype=dtype, max_shard_size="1GB")
        model = start_llama(folder, run_from(folder).llama, recompute="none")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(8192)
            file.write(bytes(60_000))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bf16_weights_of_bf16_runs_are_the_stored_ones(
    run_from: Callable[..., Any], given: Path, tmp_path: Path
) -> None:
    model = begun(run_from(given, precision="bf16"), tmp_path / "run").model
    stored = load_llama(given).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_its_checkpoint_is_the_same_kind_of_model(run_from: Callable[..., Any], given: Path, tmp_path: Path) -> None:
    """There and back: dimensions and tokenizer are the given ones, and transformers reads what was trained."""
    run = run_from(given, mode="velora")
    trained(run, tmp_path / "run")
    checkpoint = RunFolder(tmp_path / "run").checkpoints_newest_first()[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(theirs(TOKENS).logits, load_llama(checkpoint).logits(TOKENS), **ROUNDING)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (given, checkpoint))
    kept = ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "head_dim")
    assert [after[key] for key in kept] == [before[key] for key in kept]
    assert after["rope_parameters"]["rope_theta"] == foreign.ROPE_THETA
    assert (checkpoint / "spiece.model").read_bytes() == (given / "tokenizer.model").read_bytes()
    # It has learnt: it is no longer the given one.
    assert not torch.allclose(load_llama(checkpoint).logits(TOKENS), load_llama(given).float().logits(TOKENS), atol=0.1)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_a_run_and_a_checkpoint_of_ours(
    tiny_run: Callable[..., Any], run_from: Callable[..., Any], tmp_path: Path, mode: str, what: str
) -> None:
    """Also where the weights are merged: what the next run starts from is the model that was saved."""
    trained(tiny_run(mode=mode, checkpoint__every_steps=4), tmp_path / "first")
    first, last = (RunFolder(tmp_path / "first").checkpoint(step) for step in (4, 6))
    source = first if what == "checkpoint" else tmp_path / "first"
    run = run_from(source)
    expected = load_file((first if what == "checkpoint" else last) / "model.safetensors")
    trainer = begun(run, tmp_path / "second")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.done_steps == 0
    assert not trainer.optimizer.state
    assert RunFolder(tmp_path / "second").read_run().init_from == str(first if what == "checkpoint" else last)


def test_a_damaged_checkpoint_is_not_started_from(
    tiny_run: Callable[..., Any], run_from: Callable[..., Any], tmp_path: Path
) -> None:
    trained(tiny_run(), tmp_path / "first")
    run = run_from(tmp_path / "first")
    file = RunFolder(tmp_path / "first").checkpoint(6) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000006: the checkpoint is damaged \(model\.safetensors is not what"):
        begun(run, tmp_path / "second")


def test_a_run_goes_on_where_the_folder_is_gone(run_from: Callable[..., Any], given: Path, tmp_path: Path) -> None:
    """Neither weights nor dimensions nor tokenizer are read there again; and the numbers are the straight run's."""
    folder = shutil.copytree(given, tmp_path / "given")
    run = run_from(folder, mode="velora", checkpoint__every_steps=3, evaluation__every_steps=3)
    trained(run, tmp_path / "straight")
    launches.cut_back(tmp_path / "straight", tmp_path / "run", 3)
    shutil.rmtree(folder)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--resume", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 0
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("straight", "run")]
    assert summaries[0]["tokenizer"] == summaries[1]["tokenizer"] == str(folder)
    assert summaries[0]["tokenizer_sha256"] == summaries[1]["tokenizer_sha256"]
    # Before its first checkpoint a run needs them.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=f"{folder}: no such folder"):
        trained(run, tmp_path / "run", resume=True)


def test_the_same_command_goes_on(
    tiny_run: Callable[..., Any], run_from: Callable[..., Any], given: Path, tmp_path: Path
) -> None:
    """A run's folder, of which the newest checkpoint was taken, is not another one; another folder is."""
    trained(tiny_run(), tmp_path / "first")
    run = run_from(tmp_path / "first", checkpoint__every_steps=3)
    trained(run, tmp_path / "run")
    same = run.model_copy(update={"init_from": str(tmp_path / "first")})
    trained(same, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"init_from: .* was asked for, but the run in"):
        trained(run.model_copy(update={"init_from": str(given)}), tmp_path / "run", resume=True)


@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_several_processes_start_from_the_same_weights(
    recipe: Callable[..., dict[str, Any]], given: Path, tmp_path: Path, sharding: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe(init_from=str(given), mode="velora", **launches.SETTINGS)))
    trained(resolve(str(path), {}, []), tmp_path / "one")
    launches.train(path, tmp_path / "two", "--set", f"distributed.sharding={sharding}", processes=2)
    launches.assert_same(tmp_path / "one", tmp_path / "two", rel=1e-5)


def test_a_process_that_finds_other_weights_says_so(
    run_from: Callable[..., Any], given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = create_autospec(Accelerator, instance=True, num_processes=2)
    run = run_from(given)
    monkeypatch.setattr(setup, "of_first_process", lambda _, hashes: hashes)
    assert setup._initial_weights(run, processes, Silent()) == given
    monkeypatch.setattr(setup, "of_first_process", lambda _, hashes: hashes[:-1])
    with pytest.raises(UserError, match="holds other weights here than where the first process looks"):
        setup._initial_weights(run, processes, Silent())


# --- what a recipe says of its model ------------------------------------------------------------------------------


def test_dimensions_and_tokenizer_are_the_folders(run_from: Callable[..., Any], given: Path) -> None:
    run = run_from(given)
    told = json.loads((given / "config.json").read_text())
    assert (run.llama.hidden_size, run.llama.num_key_value_heads) == (32, 2)
    assert run.llama.max_position_embeddings == told["max_position_embeddings"]
    assert run.llama.rope_theta == foreign.ROPE_THETA
    assert run.tokenizer == run.init_from == str(given)
    # As recorded: the folder is not asked again.
    values = run.model_dump(mode="json", exclude_none=True)
    assert build_run(values, where="test") == run
    assert all(key in values["model"] for key in told if key in type(run.model).model_fields)


def test_what_does_not_change_the_function_may_differ(run_from: Callable[..., Any], given: Path) -> None:
    run = run_from(given, model__max_position_embeddings=64, model__hidden_size=32)
    assert (run.llama.max_position_embeddings, run.llama.hidden_size) == (64, 32)


def test_a_recipes_tokenizer_goes_where_weights_are_given(
    tiny_recipe: Callable[..., Path], given: Path, tmp_path: Path
) -> None:
    path = tiny_recipe(tokenizer="bundled", model={})
    assert resolve(str(path), {"init_from": str(given)}, []).tokenizer == str(given)
    named = resolve(str(path), {"init_from": str(given), "tokenizer": "t5-base"}, [])
    assert named.tokenizer == "t5-base"
    # In one recipe with the folder it is meant.
    both = tiny_recipe(tokenizer="bundled", model={}, init_from=str(given))
    assert resolve(str(both), {}, []).tokenizer == "bundled"


def test_another_tokenizer_that_fits_is_warned_of(
    run_from: Callable[..., Any], given: Path, tmp_path: Path, tiny_data: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = runs.write_tokenizer(tmp_path / "other", runs.write_documents(tmp_path / "other.jsonl", 100, seed=1))
    display = Silent()
    begun(run_from(given, tokenizer=str(other)), tmp_path / "run", display)
    assert f"tokenizer: {other} is not the one in {given}" in " ".join(display.warnings)
    begun(run_from(given), tmp_path / "same", display := Silent())
    assert not display.warnings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init-from", "nowhere"], "init_from: no folder nowhere; give a Hugging Face LLaMA folder, a run folder or"),
        (["--init-from", "."], "config.json: no such file; give a checkpoint, a run folder or a Hugging Face LLaMA"),
        (["--init-from", "GIVEN", "--size", "9m"], "size: 9m has vocab_size 32000, but GIVEN/config.json has 128"),
        (
            ["--init-from", "GIVEN", "--set", "model.hidden_size=48"],
            "model.hidden_size: 48 was asked for, but GIVEN/config.json has 32; leave model.hidden_size out",
        ),
        (
            ["--init-from", "GIVEN", "--set", "model.rope_theta=10000"],
            "model.rope_theta: 10000 was asked for, but GIVEN/config.json has 50000.0",
        ),
        (["--init-from", "GIVEN", "--set", "model.hiden_size=32"], "model.hiden_size: no such key"),
        (["--init-from", "GIVEN", "--size", "9mm"], "size: '9mm' is not a size"),
        (["--init-from", "GIVEN", "--sequence-length", "8192"], "batch.sequence_length: 8192 is longer than the"),
        (["--set", "init_from="], "init_from: "),
        (["--set", "init_from=3"], "init_from: "),
        (["--init-from", "UNTOLD"], "UNTOLD holds no SentencePiece model (spiece.model or tokenizer.model); name the"),
        (["--init-from", "RUN"], "init_from: the run in RUN has no checkpoint yet"),
    ],
)
def test_mistakes_are_told_at_once(
    arguments: list[str],
    message: str,
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(given, tmp_path / "UNTOLD", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "RUN" / "checkpoints" / "step-00000009-copy").mkdir(parents=True)  # not named as checkpoints are
    (tmp_path / "RUN" / "config.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer_module, "train", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *(str(given) if each == "GIVEN" else each for each in arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert message.replace("GIVEN", str(given)) in err
    assert err.count("\n") == 1


def test_a_vocabulary_that_does_not_fit(run_from: Callable[..., Any], given: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer: bundled has \d+ pieces but model.vocab_size is 128"):
        begun(run_from(given, tokenizer="bundled"), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias, which the model of"),
        (lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight has the format I8"),
        (lambda t: t | {"lm_head.weight": torch.ones(1, 32)}, r"lm_head.weight has shape \(1, 32\), config.json asks"),
        (lambda t: {name: t[name] for name in t if "layers.1.mlp" not in name}, "hold no model.layers.1.mlp.gate_proj"),
        (lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, None),
    ],
    ids=["bias", "integers", "shape", "missing", "derived"],
)
def test_weights_that_are_not_those_of_the_model(
    run_from: Callable[..., Any],
    tiny_tokenizer: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str | None,
) -> None:
    folder = foreign.write_llama(tmp_path / "llama", tiny_tokenizer, dtype=torch.float32)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    run = run_from(folder)
    if message is None:
        begun(run, tmp_path / "run")
        return
    with pytest.raises(UserError, match=message):
        begun(run, tmp_path / "run")
    # Told before anything was written.
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_pickle_is_not_read(run_from: Callable[..., Any], given: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(given, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"holds neither .*; pytorch_model\.bin is a pickle, which is not read"):
        begun(run_from(folder), tmp_path / "run")
