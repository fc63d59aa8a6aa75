"""Checkpoints: whole or absent, bitwise, readable by transformers, and told when damaged."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from velora_pretrain import checkpoint, checkpoint_files
from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.llama_folder import read_config
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.records import RunFolder


class Trained:
    """A small model after two steps, with what a checkpoint of it asks for."""

    def __init__(self, run: Any, steps: int = 2) -> None:
        self.run = run
        self.mode, self.model = build_mode(run), Llama(run.llama, seed=run.seed)
        self.mode.adapt(self.model)
        self.model.to(torch.bfloat16 if run.precision == "bf16" else torch.float32)
        self.optimizer = self.mode.build_optimizer(self.model)
        for step in range(steps):
            self.step(step)

    def step(self, number: int) -> None:
        tokens = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            self.mode.before_step(self.model, self.optimizer, number + 1, lambda: self.model(tokens, tokens))
        self.model(tokens, tokens).backward()
        self.optimizer.step()
        self.mode.after_step(self.model, self.optimizer, number + 1)
        self.optimizer.zero_grad()

    def snapshot(self, step: int = 2) -> checkpoint.Snapshot:
        return checkpoint.take_snapshot(
            step=step,
            model=self.model,
            config=self.run.llama,
            optimizer=self.optimizer,
            progress={"tokens": 7, "cursor": {"epoch": 1}},
            token_ids={"pad_token_id": 0, "eos_token_id": 1},
        )

    def save(self, folder: RunFolder, step: int = 2, keep_last: int = 2, keep_every_steps: int = 0) -> Path:
        return checkpoint.write(
            folder,
            self.snapshot(step),
            save_tokenizer=load_tokenizer(self.run.tokenizer).save_pretrained,
            keep_last=keep_last,
            keep_every_steps=keep_every_steps,
        )


def everything(trained: Trained) -> dict[str, Any]:
    tensors: dict[str, Any] = dict(trained.model.state_dict())
    for name, parameter in trained.model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in trained.optimizer.state[parameter].items()}
    return tensors


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"layers": "all"}, {"init": "running_average"}, {"init": "svd"}])
@pytest.mark.parametrize("mode", ["full", "velora"])
def test_restored_is_what_was_saved_and_goes_on_bitwise(
    tiny_run: Callable[..., Any], tmp_path: Path, mode: str, precision: str, settings: dict[str, str]
) -> None:
    if mode == "full" and settings:
        pytest.skip("settings of the other mode")
    changes = {f"modes__velora__{key}": value for key, value in settings.items()}
    run = tiny_run(mode=mode, precision=precision, **changes)
    trained = Trained(run)
    path = trained.save(RunFolder(tmp_path))
    assert checkpoint_files.verified_state(path)["cursor"] == {"epoch": 1}
    again = Trained(run, steps=0)
    checkpoint.restore(path, model=again.model, optimizer=again.optimizer)
    for step in (2, 3):
        before, after = everything(trained), everything(again)
        assert before.keys() == after.keys()
        for name, value in before.items():
            same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
            assert same, name
            assert not isinstance(value, torch.Tensor) or value.dtype == after[name].dtype, name
        trained.step(step)
        again.step(step)


@pytest.mark.parametrize("mode", ["full", "velora"])
def test_transformers_loads_the_folder_and_gives_the_same_logits(
    tiny_run: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    trained = Trained(tiny_run(mode=mode))
    path = trained.save(RunFolder(tmp_path))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert type(theirs) is transformers.LlamaForCausalLM
    assert not any(info.values()), info
    tokens = torch.randint(0, 120, (2, 20))
    assert (theirs(tokens).logits - trained.model.logits(tokens)).abs().max() < 1e-5
    assert (load_llama(path).logits(tokens) - trained.model.logits(tokens)).abs().max() == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(str(path))
    assert tokenizer("balmer cenos.")["input_ids"] == [*ours.encode(["balmer cenos."])[0], ours.eos_id]


def test_random_state_is_restored(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained = Trained(tiny_run())
    path = trained.save(RunFolder(tmp_path))
    expected = torch.rand(3)
    checkpoint.restore(path, model=trained.model, optimizer=trained.optimizer)
    assert torch.equal(torch.rand(3), expected)


def test_old_checkpoints_are_removed_and_newest_come_first(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained, folder = Trained(tiny_run()), RunFolder(tmp_path)
    for step in (2, 10, 9):
        trained.save(folder, step=step, keep_last=2)
    assert [path.name for path in folder.checkpoints_newest_first()] == ["step-00000010", "step-00000009"]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "training_state.safetensors", "training_state.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["cut short", "one byte changed", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    tiny_run: Callable[..., Any], tmp_path: Path, file: str, damage: str
) -> None:
    trained, folder = Trained(tiny_run()), RunFolder(tmp_path)
    older, newer = trained.save(folder, step=2), trained.save(folder, step=3)
    content = (newer / file).read_bytes()
    if damage == "gone":
        (newer / file).unlink()
    else:
        changed = content[: len(content) // 2] if damage == "cut short" else b"#" + content[1:]
        (newer / file).write_bytes(changed)
    warnings: list[str] = []
    found = checkpoint_files.newest_whole(folder, warnings.append)
    assert found is not None
    assert found[0] == older
    assert len(warnings) == 1
    assert str(newer) in warnings[0]
    assert file in warnings[0]


def test_a_save_that_fails_leaves_the_earlier_checkpoint_and_nothing_else(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, folder = Trained(tiny_run()), RunFolder(tmp_path)
    first = trained.save(folder, step=2)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for where in ("velora_pretrain.checkpoint.save_file", "velora_pretrain.checkpoint._to_disk", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full_disk)
            with pytest.raises(
                UserError, match=r"step-00000003: .*No space left on device.*earlier checkpoints are whole"
            ):
                trained.save(folder, step=3)
    assert [path.name for path in folder.checkpoints.iterdir()] == [first.name]
    checkpoint_files.verified_state(first)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_really_fills_up(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained = Trained(tiny_run())
    whole_bytes = sum(file.stat().st_size for file in trained.save(RunFolder(tmp_path / "roomy")).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={int(1.5 * whole_bytes)}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        folder = RunFolder(disk)
        first = trained.save(folder, step=2)
        with pytest.raises(UserError, match="step-00000003: the checkpoint could not be written"):
            trained.save(folder, step=3)
        assert [path.name for path in folder.checkpoints.iterdir()] == [first.name]
        checkpoint_files.verified_state(first)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_every_so_many_steps_one_is_kept_for_good(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained, folder = Trained(tiny_run()), RunFolder(tmp_path)
    for step in (2, 4, 6, 8, 10):
        trained.save(folder, step=step, keep_last=1, keep_every_steps=4)
    assert [path.name[-2:] for path in folder.checkpoints_newest_first()] == ["10", "08", "04"]


def test_what_a_killed_process_has_left_is_removed(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained, folder = Trained(tiny_run()), RunFolder(tmp_path)
    trained.save(folder, step=3)
    for name in (".step-00000001.tmp", ".step-00000000.gone", ".step-00000003.old"):
        (folder.checkpoints / name / "deep").mkdir(parents=True)
    trained.save(folder, step=4)
    assert {path.name for path in folder.checkpoints.iterdir()} == {"step-00000003", "step-00000004"}


def test_a_checkpoint_that_is_replaced_is_never_lost(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames: the one that was to be replaced gets its name back."""
    trained, folder = Trained(tiny_run()), RunFolder(tmp_path)
    path = trained.save(folder)
    rename = Path.rename

    def ends_with(error: BaseException) -> None:
        def ended(self: Path, target: Path) -> Path:
            if self.name.endswith(".tmp"):
                raise error
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", ended)
            with pytest.raises((KeyboardInterrupt, UserError)):
                trained.save(folder)

    ends_with(OSError(5, "Input/output error"))
    checkpoint_files.verified_state(path)
    ends_with(KeyboardInterrupt())
    assert not path.exists()
    checkpoint_files.recover_replaced(folder)
    checkpoint_files.verified_state(path)
    trained.save(folder)
    assert [each.name for each in folder.checkpoints.iterdir()] == [path.name]


def test_a_place_in_the_data_that_was_changed_is_told(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    path = Trained(tiny_run()).save(RunFolder(tmp_path))
    file = path / "training_state.json"
    file.write_text(file.read_text().replace('"epoch": 1', '"epoch": 2'))
    with pytest.raises(checkpoint_files.DamagedCheckpoint, match=r"training_state\.json is not what was written"):
        checkpoint_files.verified_state(path)
    # Older versions wrote no hash of it.
    older = json.loads(file.read_text())
    del older[checkpoint_files.SIGNATURE]
    file.write_text(json.dumps(older))
    assert checkpoint_files.verified_state(path)["cursor"] == {"epoch": 2}


def test_no_part_of_a_checkpoint_stands_under_its_name_while_it_is_removed(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, folder = Trained(tiny_run()), RunFolder(tmp_path)
    trained.save(folder, step=2, keep_last=1)
    removed: list[str] = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: removed.append(Path(path).name))
    trained.save(folder, step=3, keep_last=1)
    assert removed == [".step-00000003.old", ".step-00000002.gone"]
    assert [path.name for path in folder.checkpoints_newest_first()] == ["step-00000003"]


def rewritten(path: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Puts other tensors into a checkpoint, with the hashes that belong to them: what a hostile writer would do."""
    save_file(tensors, path / file)
    state = json.loads((path / "training_state.json").read_text())
    state["sha256"][file] = checkpoint_files.sha256_of(path / file)
    (path / "training_state.json").write_text(json.dumps(checkpoint_files.signed(state)))


@pytest.mark.parametrize(
    ("file", "name", "shape", "message"),
    [
        ("model.safetensors", "lm_head.weight", (128, 33), r"has shape \(128, 33\), the model's is \(128, 32\)"),
        ("model.safetensors", "model.more.weight", (2,), "is no tensor of this model"),
        ("training_state.safetensors", "model.model.norm.weight", (33,), r"has shape \(33,\)"),
        ("training_state.safetensors", "optimizer.lm_head.weight.exp_avg", (3, 128, 1024), "far more than"),
        ("training_state.safetensors", "optimizer.nobody.exp_avg", (2,), "belongs to no parameter"),
        ("training_state.safetensors", "random.cpu", (1 << 17,), "is no random state"),
        ("training_state.safetensors", "other", (2,), "is no tensor of this model"),
        ("model.safetensors", "lm_head.weight", (0, 2**41), "has shape"),
        ("training_state.safetensors", "optimizer.lm_head.weight.exp_avg", (0, 2**41), "is far too large"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_before_it_is_read(
    tiny_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    name: str,
    shape: tuple[int, ...],
    message: str,
) -> None:
    trained = Trained(tiny_run())
    path = trained.save(RunFolder(tmp_path))
    rewritten(path, file, load_file(path / file) | {name: torch.zeros(shape)})
    checkpoint_files.verified_state(path)
    read: list[Path] = []
    read_tensors = checkpoint_files.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda file, names: read.append(file) or read_tensors(file, names))
    with pytest.raises(UserError, match=message):
        checkpoint.restore(path, model=trained.model, optimizer=trained.optimizer)
    assert path / file not in read


def test_random_states_that_are_none_are_told(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained = Trained(tiny_run())
    path = trained.save(RunFolder(tmp_path))
    file = "training_state.safetensors"
    rewritten(path, file, load_file(path / file) | {"random.cpu": torch.zeros(7, dtype=torch.uint8)})
    with pytest.raises(UserError, match="its random states are none"):
        checkpoint.restore(path, model=trained.model, optimizer=trained.optimizer)


def test_formats_of_tensors_that_nothing_writes_are_refused(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained = Trained(tiny_run())
    path = trained.save(RunFolder(tmp_path))
    tensors = load_file(path / "model.safetensors")
    rewritten(path, "model.safetensors", tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e5m2)})
    with pytest.raises(UserError, match=r"lm_head\.weight has the format F8_E5M2"):
        checkpoint.restore(path, model=trained.model, optimizer=trained.optimizer)


@pytest.mark.parametrize("name", ["lm_head.weight", "random.cpu"])
def test_a_tensor_that_is_missing_is_named(tiny_run: Callable[..., Any], tmp_path: Path, name: str) -> None:
    trained = Trained(tiny_run())
    path = trained.save(RunFolder(tmp_path))
    for file in ("model.safetensors", "training_state.safetensors"):
        rewritten(path, file, {key: tensor for key, tensor in load_file(path / file).items() if key != name})
    with pytest.raises(UserError, match=f"holds no {name}"):
        checkpoint.restore(path, model=trained.model, optimizer=trained.optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": {"../../secret": "0"}}, "'../../secret' is no name of a file of this folder"),
        ({"sha256": {"config.json": "0"}}, "does not name model.safetensors"),
        ({"sha256": [1]}, "names no files"),
        ({"step": "many"}, "step is 'many'"),
        ({"step": 3}, "cannot be those of step-00000002"),
        ({"tokens": -1}, "cannot be those of"),
        ({"cursor": [0]}, "cursor is"),
        ({"seconds": "long"}, "seconds is 'long'"),
        ({"rollbacks": -1}, "rollbacks is -1"),
        ({"padding": "x" * (1 << 24)}, "larger than"),
    ],
)
def test_a_state_that_says_what_it_cannot_is_damaged(
    tiny_run: Callable[..., Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = Trained(tiny_run()).save(RunFolder(tmp_path))
    file = path / "training_state.json"
    file.write_text(json.dumps(checkpoint_files.signed(json.loads(file.read_text()) | change)))
    with pytest.raises(checkpoint_files.DamagedCheckpoint, match=message):
        checkpoint_files.verified_state(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff\xfe", b""])
def test_a_state_that_is_no_object_is_damaged(tiny_run: Callable[..., Any], tmp_path: Path, content: bytes) -> None:
    path = Trained(tiny_run()).save(RunFolder(tmp_path))
    (path / "training_state.json").write_bytes(content)
    with pytest.raises(checkpoint_files.DamagedCheckpoint, match=r"training_state\.json cannot be read"):
        checkpoint_files.verified_state(path)


def test_there_is_no_pickle(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    path = Trained(tiny_run(mode="velora")).save(RunFolder(tmp_path))
    assert {file.suffix for file in path.iterdir()} <= {".json", ".safetensors", ".model"}
    names = json.loads((path / "training_state.json").read_text())["sha256"]
    assert set(names) == {file.name for file in path.iterdir()} - {"training_state.json"}


def foreign_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rotary scaling 'llama3' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], not an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
        ({"num_attention_heads": 3}, "3 heads do not split hidden_size 16"),
        ({"head_dim": 4}, "head_dim 4"),
        ({"hidden_size": "wide"}, "hidden_size: input should be a valid integer"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(foreign_config(**changes)))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_what_a_config_leaves_out_is_what_transformers_means(tmp_path: Path) -> None:
    told = foreign_config(num_key_value_heads=None, rope_scaling=None, rope_theta=500.0)
    (tmp_path / "config.json").write_text(json.dumps(told))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta == 500.0
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "head_dim"):
        assert getattr(theirs, key) == getattr(ours, key), key


def test_foreign_folders_sharded_and_tied(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **foreign_config(num_key_value_heads=1, rope_theta=500.0, tie_word_embeddings=True)
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    tokens = torch.randint(0, 50, (2, 9))
    assert (load_llama(tmp_path).logits(tokens) - theirs(tokens).logits).abs().max() < 1e-5
    for files in ({"a": "../elsewhere.safetensors"}, {"a": 3}, {"a": ["b"]}, {}, []):
        index.write_text(json.dumps({"weight_map": files}))
        with pytest.raises(UserError, match="weight_map does not name files of its folder"):
            load_llama(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**foreign_config())).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 51}))
    with pytest.raises(UserError, match=r"embed_tokens\.weight has shape \(50, 16\), config\.json asks for \(51, 16\)"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"the weights hold no model\.layers\.1"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    with pytest.raises(UserError, match=r"the weights hold no model\.layers\.999999999999"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**15}))
    with pytest.raises(UserError, match=r"config\.json asks for \(1000000000000000, 16\)"):
        load_llama(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_llama(tmp_path)
