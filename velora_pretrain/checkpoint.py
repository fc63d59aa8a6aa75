"""Checkpoints: a Hugging Face model folder, and beside it all that a bitwise resume needs.

    config.json, model.safetensors            the plain LLaMA; from_pretrained(folder) loads it
    tokenizer files                           likewise
    training_state.safetensors                the mode's own tensors, the optimizer's state, random states
    training_state.json                       step, tokens, place in the data, SHA-256 of all other files

A `Snapshot` is what a checkpoint holds, as plain tensors. It is written to a temporary folder, brought to disk, and
renamed: a checkpoint is there whole or not at all, also while it is replaced or removed. One that was damaged later is
told by its hashes. Tensors are only ever in safetensors; nothing is unpickled, and what a file says about names, shapes
and sizes is held against the model before anything is read by it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from velora_pretrain.checkpoint_files import (
    STATE_FILE,
    STATE_TENSORS,
    WEIGHTS,
    read_tensors,
    reason_of,
    recover_replaced,
    signed,
    tensor_shapes,
)
from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.files import sha256_of
from velora_pretrain.llama_folder import CONFIG, step_of
from velora_pretrain.nn.llama import Llama
from velora_pretrain.records import RunFolder

Shape = tuple[int, ...]
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MAX_ELEMENTS = 1 << 40
"""Elements that no tensor of a model has."""
MAX_RANDOM_STATE_ELEMENTS = 1 << 16
"""Largest random state that is read; PyTorch's are some thousand bytes."""
MAX_STATE_OVERHEAD_ELEMENTS = 1 << 16
"""What an optimizer's state of a parameter may hold beyond twice its elements: scales and tables of 8-bit moments."""


class WeightsNotFinite(UserError):
    """A model whose numbers failed is not saved."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step
        """Optimizer steps after which it should have been."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds, on the CPU."""

    step: int
    """Optimizer steps done."""
    weights: dict[str, Tensor]
    """The plain LLaMA's, by their Hugging Face names."""
    state: dict[str, Tensor]
    """Everything else: `model.*`, `optimizer.*`, `random.*`."""
    config: dict[str, Any]
    """Content of config.json."""
    progress: dict[str, Any]
    """What else to resume from, for JSON: tokens, cursor."""


Cut = Callable[[str, Tensor], Tensor]
"""Of a tensor that is or belongs to a named parameter or buffer: from a part to the whole, or back."""


def uncut(name: str, tensor: Tensor) -> Tensor:
    """Where a process holds the whole of every tensor."""
    return tensor


Keep = Callable[[str, Tensor], Tensor]
"""Where a tensor of a snapshot is kept: takes its name in the checkpoint's files, gives it on the CPU, contiguous."""


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    """Keeps a tensor where it is, if that is the CPU: a snapshot for which nothing may move until it is written."""
    return tensor.cpu().contiguous()


def take_snapshot(
    *,
    step: int,
    model: nn.Module,
    config: LlamaConfig,
    optimizer: Optimizer,
    progress: dict[str, Any],
    token_ids: dict[str, int],
    keep: Keep = as_it_is,
    whole: Cut = uncut,
) -> Snapshot:
    """What a checkpoint of this moment holds.

    All tensors are asked for in an order that follows from the model: where processes hold parts, each calls this.

    Args:
        step: optimizer steps done.
        model: the adapted model, unwrapped.
        config: its dimensions.
        optimizer: over its parameters.
        progress: what else to resume from, for JSON: tokens, cursor.
        token_ids: `pad_token_id`, `eos_token_id` and so on, for config.json.
        keep: where its tensors are kept.
        whole: where the model holds parts of its tensors, gives the whole of one.
    """
    weights, own = split_state(model, config, keep, whole)
    state = own | _optimizer_tensors(model, optimizer, keep, whole) | _random_states()
    dtype = DTYPE_NAMES[next(iter(weights.values())).dtype]
    described = hugging_face_config(config, dtype, token_ids)
    return Snapshot(step=step, weights=weights, state=state, config=described, progress=progress)


def write(
    folder: RunFolder,
    snapshot: Snapshot,
    *,
    save_tokenizer: Callable[[Path], None],
    keep_last: int,
    keep_every_steps: int = 0,
) -> Path:
    """Writes a checkpoint, and removes those that are kept no longer.

    Args:
        folder: the run.
        snapshot: what it holds.
        save_tokenizer: writes the tokenizer's files into a folder.
        keep_last: newest checkpoints to keep, this one included.
        keep_every_steps: checkpoints of steps that are a multiple of this are kept too; 0 keeps none.

    Raises:
        WeightsNotFinite: what its name says.
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    step, target = snapshot.step, folder.checkpoint(snapshot.step)
    temporary = target.with_name(f".{target.name}.tmp")
    bad = next((name for name, tensor in snapshot.weights.items() if not tensor.isfinite().all()), None)
    if bad:
        message = f"step {step}: {bad} is not finite, so no checkpoint is written; earlier ones are whole"
        raise WeightsNotFinite(message, step=step)
    try:
        _remove_leftovers(folder)
        temporary.mkdir(parents=True)
        save_file(snapshot.weights, temporary / WEIGHTS, metadata={"format": "pt"})
        save_file(snapshot.state, temporary / STATE_TENSORS)
        (temporary / CONFIG).write_text(json.dumps(snapshot.config, indent=2) + "\n")
        save_tokenizer(temporary)
        hashes = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        state = signed({"step": step, **snapshot.progress, "sha256": hashes})
        (temporary / STATE_FILE).write_text(json.dumps(state) + "\n")
        for path in temporary.iterdir():
            _to_disk(path)
        _to_disk(temporary)
        # The records up to this step are to outlive a power cut as surely as the checkpoint does.
        folder.sync_metrics()
        replaced = target.with_name(f".{target.name}.old")
        with contextlib.suppress(FileNotFoundError):
            target.rename(replaced)
        temporary.rename(target)
        _to_disk(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        recover_replaced(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{target}: the checkpoint could not be written ({reason_of(error)}); earlier checkpoints are whole:"
            f" free some space and go on with --resume --run-dir {folder.path}"
        ) from error
    others = [path for path in folder.checkpoints_newest_first() if path != target]
    for old in others[keep_last - 1 :]:
        if not (keep_every_steps and step_of(old) % keep_every_steps == 0):
            # The checkpoint is whole; one that cannot be removed is no reason to end a run.
            with contextlib.suppress(OSError):
                _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; at no moment does a part of it stand under its name."""
    leftover = checkpoint.with_name(f".{checkpoint.name}.gone")
    checkpoint.rename(leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def _remove_leftovers(folder: RunFolder) -> None:
    """Removes what a process that was killed while writing or removing has left."""
    for pattern in (".step-*.tmp", ".step-*.old", ".step-*.gone"):
        for path in folder.checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def restore(path: Path, *, model: nn.Module, optimizer: Optimizer, part: Cut = uncut) -> None:
    """Puts weights, the mode's tensors, optimizer and random states back, bitwise.

    Args:
        path: a checkpoint that `verified_state` has passed.
        model: adapted as when it was saved, on its device.
        optimizer: built over it.
        part: of a whole tensor, what the model holds.

    Raises:
        UserError: a file holds something else than what this model and optimizer keep.
    """
    parameters, expected = dict(model.named_parameters()), model.state_dict()

    def part_shape(name: str, shape: Shape) -> Shape:
        is_far_too_large = math.prod(max(1, size) for size in shape) > MAX_ELEMENTS
        return shape if is_far_too_large or not shape else tuple(part(name, torch.empty(shape, device="meta")).shape)

    def part_fault(name: str, shape: Shape) -> str | None:
        return shape_fault(expected, name, part_shape(name, shape))

    def fault(name: str, shape: Shape) -> str | None:
        kind, _, rest = name.partition(".")
        if kind == "random":
            is_small = math.prod(shape) <= MAX_RANDOM_STATE_ELEMENTS
            return None if rest in ("cpu", "cuda") and is_small else "is no random state"
        if kind == "optimizer":
            owner = rest.rpartition(".")[0]
            return _optimizer_fault(parameters.get(owner), part_shape(owner, shape))
        return part_fault(rest, shape)

    tensors = _read_checked(path / STATE_TENSORS, fault)
    weights = _read_checked(path / WEIGHTS, part_fault)
    own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    missing = expected.keys() - own.keys() - weights.keys()
    if missing or "random.cpu" not in tensors:
        raise UserError(f"{path}: holds no {min(missing, default='random.cpu')}")
    model.load_state_dict({name: part(name, tensor) for name, tensor in (weights | own).items()}, strict=True)
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
    try:
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path / STATE_TENSORS}: its random states are none ({reason_of(error)})") from None


def shape_fault(expected: Mapping[str, Tensor], name: str, shape: Shape) -> str | None:
    """Why a tensor of a file does not belong to a model, if it does not."""
    if name not in expected:
        return "is no tensor of this model"
    wanted = tuple(expected[name].shape)
    return None if shape == wanted else f"has shape {shape}, the model's is {wanted}"


def _read_checked(path: Path, fault: Callable[[str, Shape], str | None]) -> dict[str, Tensor]:
    """All tensors of a file, none of which is read before `fault` has passed all of them."""
    shapes = tensor_shapes(path)
    for name, shape in shapes.items():
        found = fault(name, shape)
        if found:
            raise UserError(f"{path}: {name} {found}")
    return read_tensors(path, shapes)


def _optimizer_fault(parameter: Tensor | None, shape: Shape) -> str | None:
    """Why a tensor of a file cannot be an optimizer's state of a parameter; no state is larger than twice that."""
    if parameter is None:
        return "belongs to no parameter of this model"
    bound = 2 * parameter.numel() + MAX_STATE_OVERHEAD_ELEMENTS
    if math.prod(max(1, size) for size in shape) > MAX_ELEMENTS:
        return f"has shape {shape}, which is far too large"
    return None if math.prod(shape) <= bound else f"has shape {shape}, far more than its parameter"


def split_state(
    model: nn.Module, config: LlamaConfig, keep: Keep = as_it_is, whole: Cut = uncut
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The plain LLaMA's tensors by their names, and the mode's own under `model.`; on the CPU."""
    with torch.device("meta"):
        plain = Llama(config).state_dict().keys()
    weights: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        here = whole(name, tensor.detach())
        if name in plain:
            weights[name] = keep(name, here)
        else:
            kept = keep(f"model.{name}", here)
            # Layers share tensors of the mode's own, which safetensors would refuse.
            own[f"model.{name}"] = kept.clone() if kept.data_ptr() == here.data_ptr() else kept
    return {name: weights[name] for name in plain}, own


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer, keep: Keep, whole: Cut) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
            # Read back it will be: products of another layout could have other bits.
            assert tensor.is_contiguous(), (name, key)
            file_name = f"optimizer.{name}.{key}"
            tensors[file_name] = keep(file_name, whole(name, tensor))
    return tensors


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


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


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
