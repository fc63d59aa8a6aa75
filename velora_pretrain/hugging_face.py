"""Reading a Hugging Face LLaMA folder: config.json and safetensors, whole or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from velora_pretrain.checkpoint_files import CONFIG, WEIGHTS, read_tensors, tensor_shapes
from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.nn.llama import Llama
from velora_pretrain.records import read_json

SHARD_INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"

_UNSUPPORTED = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
    "quantization_config": (None,),
}
"""Keys of config.json whose other values make a model that ours is not."""


def read_config(folder: Path) -> LlamaConfig:
    """The dimensions in a folder's config.json.

    Raises:
        UserError: it is missing, unreadable, of another architecture or of a kind of LLaMA that is not supported.
    """
    path = folder / CONFIG
    values = _read_json(path)
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; only llama models can be read")
    for key, supported in _UNSUPPORTED.items():
        if values.get(key) not in supported:
            raise UserError(f"{path}: {key} = {values[key]!r} is not supported")
    rope: dict[str, Any] = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path}: rotary scaling {rope.get('rope_type', rope.get('type'))!r} is not supported")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    try:
        config = LlamaConfig.model_validate({k: v for k, v in values.items() if k in LlamaConfig.model_fields})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim {values['head_dim']} is not hidden_size over the heads; not supported")
    return config


def load_llama(folder: Path) -> Llama:
    """The model of a folder, on the CPU, in the format its weights are stored in.

    Raises:
        UserError: as `read_config`; or the weights are missing, cut short or of other shapes.
    """
    config = read_config(folder)
    found = {file: tensor_shapes(file) for file in _weight_files(folder)}
    shapes = {name: shape for each in found.values() for name, shape in each.items()}
    if config.tie_word_embeddings and "lm_head.weight" not in shapes:
        shapes["lm_head.weight"] = shapes.get(EMBEDDING, ())
    # Asked before a model of so many layers is built.
    last = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    if last not in shapes:
        raise UserError(f"{folder}: the weights hold no {last}")
    with torch.device("meta"):
        model = Llama(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise UserError(f"{folder}: the weights hold no {name}")
        if shapes[name] != shape:
            raise UserError(f"{folder}: {name} has shape {shapes[name]}, config.json asks for {shape}")
    tensors: dict[str, torch.Tensor] = {}
    for file, names in found.items():
        tensors |= read_tensors(file, names.keys() & expected.keys())
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors[EMBEDDING])
    model.load_state_dict(tensors, assign=True)
    return model


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / SHARD_INDEX
    if not index.is_file():
        raise UserError(f"{folder}: holds neither {WEIGHTS} nor {SHARD_INDEX}")
    shards = _read_json(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and shards else {None}
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: weight_map does not name files of its folder")
    return [folder / name for name in sorted(map(str, names))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give a checkpoint, a run folder or a Hugging Face LLaMA folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
