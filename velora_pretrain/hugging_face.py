"""Reading a Hugging Face LLaMA folder: config.json and safetensors, whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from velora_pretrain.checkpoint import CONFIG, WEIGHTS, read_tensors
from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.nn.llama import Llama

SHARD_INDEX = "model.safetensors.index.json"

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
    tensors = _read_weights(folder)
    if config.tie_word_embeddings and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Llama(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{folder}: the weights hold no {name}")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{folder}: {name} has shape {tuple(tensors[name].shape)}, config.json asks for {shape}")
    model.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    return model


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if not (folder / SHARD_INDEX).is_file():
        raise UserError(f"{folder}: holds neither {WEIGHTS} nor {SHARD_INDEX}")
    shards: dict[str, str] = _read_json(folder / SHARD_INDEX).get("weight_map", {})
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(shards.values())):
        tensors |= read_tensors(folder / Path(name).name)
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give a checkpoint, a run folder or a Hugging Face LLaMA folder"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values
