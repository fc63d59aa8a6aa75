"""Checkpoints: a Hugging Face model folder, and beside it all that a bitwise resume needs.

    config.json, model.safetensors            the plain LLaMA; from_pretrained(folder) loads it
    tokenizer files                           likewise
    training_state.safetensors                the mode's own tensors, the optimizer's state, random states
    training_state.json                       step, tokens, place in the data, SHA-256 of all other files

A checkpoint is written to a temporary folder, brought to disk, and renamed: it is there whole or not at all. One that
was damaged later is told by its hashes. Tensors are only ever in safetensors; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.nn.llama import Llama
from velora_pretrain.records import RunFolder

STATE_FILE, STATE_TENSORS, WEIGHTS, CONFIG = (
    "training_state.json",
    "training_state.safetensors",
    "model.safetensors",
    "config.json",
)
Cut = Callable[[str, Tensor], Tensor]
"""Of a tensor that is or belongs to a named parameter or buffer: from a part to the whole, or back."""
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


class WeightsNotFinite(UserError):
    """A model whose numbers failed is not saved."""


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used; the message says what is wrong with it."""


def save(
    folder: RunFolder,
    *,
    step: int,
    model: nn.Module,
    config: LlamaConfig,
    optimizer: Optimizer,
    progress: dict[str, Any],
    token_ids: dict[str, int],
    save_tokenizer: Callable[[Path], None],
    keep_last: int,
    whole: Cut = _as_it_is,
) -> Path:
    """Writes the checkpoint of `step` and removes all but the `keep_last` newest.

    Args:
        folder: the run.
        step: optimizer steps done.
        model: the adapted model, unwrapped.
        config: its dimensions.
        optimizer: over its parameters.
        progress: what else to resume from, for JSON: tokens, cursor.
        token_ids: `pad_token_id`, `eos_token_id` and so on, for config.json.
        save_tokenizer: writes the tokenizer's files into a folder.
        keep_last: whole checkpoints to keep, this one included.
        whole: where the model holds parts of its tensors, gives the whole of one; asked as by `snapshot`.

    Raises:
        WeightsNotFinite: what its name says.
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder.checkpoint(step)
    temporary = target.with_name(f".{target.name}.tmp")
    weights, states = snapshot(model, config, optimizer, whole)
    bad = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if bad:
        raise WeightsNotFinite(f"step {step}: {bad} is not finite, so no checkpoint is written; earlier ones are whole")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        save_file(states | _random_states(), temporary / STATE_TENSORS)
        dtype = DTYPE_NAMES[next(iter(weights.values())).dtype]
        (temporary / CONFIG).write_text(json.dumps(hugging_face_config(config, dtype, token_ids), indent=2) + "\n")
        save_tokenizer(temporary)
        hashes = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        state = {"step": step, **progress, "sha256": hashes}
        (temporary / STATE_FILE).write_text(json.dumps(state) + "\n")
        for path in temporary.iterdir():
            _to_disk(path)
        _to_disk(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{target}: the checkpoint could not be written ({_reason(error)}); earlier checkpoints are whole:"
            f" free some space and go on with --resume --run-dir {folder.path}"
        ) from error
    others = [path for path in folder.checkpoints_newest_first() if path != target]
    for old in others[keep_last - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_whole(folder: RunFolder, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files are all as they were written, and its state; None where there is none.

    Args:
        folder: the run.
        warn: told of each newer checkpoint that is damaged, and why.
    """
    for path in folder.checkpoints_newest_first():
        try:
            return path, verified_state(path)
        except DamagedCheckpoint as damage:
            warn(f"{path} is damaged ({damage}) and is not used")
    return None


def set_aside_newer(folder: RunFolder, than: Path | None) -> None:
    """Renames the checkpoints newer than `than`, which are damaged, so that none of them counts as the newest."""
    for path in folder.checkpoints_newest_first():
        if than is not None and path.name <= than.name:
            return
        shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
        path.rename(path.with_name(f"damaged-{path.name}"))


def verified_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files have the hashes they were written with.

    Raises:
        DamagedCheckpoint: a file is missing or changed.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        expected: dict[str, str] = state["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{STATE_FILE} cannot be read: {_reason(error)}") from None
    for name, sha256 in expected.items():
        file = path / Path(name).name
        if not file.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if _sha256(file) != sha256:
            raise DamagedCheckpoint(f"{name} is not what was written")
    return state


def restore(path: Path, *, model: nn.Module, optimizer: Optimizer, part: Cut = _as_it_is) -> None:
    """Puts weights, the mode's tensors, optimizer and random states back, bitwise.

    Args:
        path: a checkpoint that `verified_state` has passed.
        model: adapted as when it was saved, on its device.
        optimizer: built over it, not yet stepped.
        part: of a whole tensor, what the model holds of it.
    """
    tensors = read_tensors(path / STATE_TENSORS)
    own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    whole = read_tensors(path / WEIGHTS) | own
    model.load_state_dict({name: part(name, tensor) for name, tensor in whole.items()}, strict=True)
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            parameter_name, _, key = rest.rpartition(".")
            parameter = parameters[parameter_name]
            # A Python number was written as a 0-dimensional int64; no optimizer keeps such a tensor.
            is_number = tensor.dtype == torch.int64 and tensor.ndim == 0
            mine = part(parameter_name, tensor)
            optimizer.state[parameter][key] = int(tensor) if is_number else mine.to(parameter.device, copy=True)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def snapshot(
    model: nn.Module, config: LlamaConfig, optimizer: Optimizer, whole: Cut = _as_it_is
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The plain LLaMA's tensors, and those of mode and optimizer by their names in a checkpoint; on the CPU.

    All tensors are asked for in an order that follows from the model: where processes hold parts, each calls this.
    """
    weights, own = split_state(model, config, whole)
    return weights, own | _optimizer_tensors(model, optimizer, whole)


def split_state(
    model: nn.Module, config: LlamaConfig, whole: Cut = _as_it_is
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The plain LLaMA's tensors by their names, and the mode's own under `model.`; on the CPU."""
    with torch.device("meta"):
        plain = Llama(config).state_dict().keys()
    state = {name: whole(name, tensor.detach()).cpu().contiguous() for name, tensor in model.state_dict().items()}
    own = {f"model.{name}": tensor.clone() for name, tensor in state.items() if name not in plain}
    return {name: state[name] for name in plain}, own


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer, whole: Cut) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            # Read back it will be: products of another layout could have other bits.
            assert tensor.is_contiguous(), (name, key)
            tensors[f"optimizer.{name}.{key}"] = whole(name, tensor.detach()).cpu().contiguous()
    return tensors


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: the file is cut short or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({_reason(error)})") from None


def hugging_face_config(config: LlamaConfig, dtype: str, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM; the rotary base under its name before and since transformers 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config.model_dump(),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": None,
        **token_ids,
        "dtype": dtype,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error).splitlines()[0]
