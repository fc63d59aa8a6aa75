"""Reading the weights of a Hugging Face LLaMA folder: safetensors, whole or in shards.

Names, shapes and formats are held against config.json before anything is allocated by them: a folder may come from
somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from velora_pretrain.checkpoint_files import WEIGHTS, read_tensors, tensor_shapes
from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.llama_folder import read_config, read_description
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.recompute import Recompute

SHARD_INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FORMATS = {"F64", "F32", "F16", "BF16"}
"""Formats of weights that are read."""
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""What older folders hold beside the weights, and what follows from config.json."""

Shape = tuple[int, ...]


def load_llama(folder: Path) -> Llama:
    """The model of a folder, on the CPU, in the format its weights are stored in.

    Raises:
        UserError: as `read_config` and `weight_files`.
    """
    config = read_config(folder)
    tensors = _read_weights(folder, config)
    with torch.device("meta"):
        model = Llama(config)
    model.load_state_dict(tensors, assign=True)
    return model


def start_llama(folder: Path, config: LlamaConfig, *, recompute: Recompute) -> Llama:
    """A model to train that starts from a folder's weights, in fp32, on the CPU.

    Head and embedding that are one matrix there become two of the same values. Nothing is shared with the files.

    Args:
        folder: with the weights.
        config: dimensions that agree with the folder's.
        recompute: as of `Llama`.

    Raises:
        UserError: as `read_config` and `weight_files`.
    """
    tensors = _read_weights(folder, read_config(folder))
    with torch.device("meta"):
        model = Llama(config, recompute=recompute)
    model.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model


def _read_weights(folder: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """All weights, the head's too where it is the embedding."""
    tensors: dict[str, Tensor] = {}
    for file, names in weight_files(folder, config).items():
        tensors |= read_tensors(file, names)
    if config.tie_word_embeddings:
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    return tensors


def weight_files(folder: Path, config: LlamaConfig) -> dict[Path, list[str]]:
    """The files of a folder's weights, each with the names that are read from it; by their headers alone.

    Args:
        folder: with the weights.
        config: its dimensions.

    Raises:
        UserError: files are missing or cut short; a tensor is missing, of another shape or format, or one of no LLaMA.
    """
    found = {file: tensor_shapes(file, formats=FORMATS) for file in _files(folder)}
    shapes = {name: shape for each in found.values() for name, shape in each.items() if not _DERIVED.fullmatch(name)}
    if config.tie_word_embeddings:
        shapes.setdefault(HEAD, shapes.get(EMBEDDING, ()))
    # Asked before a model of so many layers, and of such widths, is built.
    last = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    gate = "model.layers.0.mlp.gate_proj.weight"
    widths = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        last: (config.hidden_size,),
        gate: (config.intermediate_size, config.hidden_size),
    }
    _check_shapes(folder, shapes, widths)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Llama(config).state_dict().items()}
    _check_shapes(folder, shapes, expected)
    others = shapes.keys() - expected.keys()
    if others:
        raise UserError(f"{folder}: the weights hold {min(others)}, which the model of config.json has not")
    return {file: sorted(names.keys() & expected.keys()) for file, names in found.items()}


def _check_shapes(folder: Path, shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    for name, shape in expected.items():
        if name not in shapes:
            raise UserError(f"{folder}: the weights hold no {name}")
        if shapes[name] != shape:
            raise UserError(f"{folder}: {name} has shape {shapes[name]}, config.json asks for {shape}")


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / SHARD_INDEX
    if not index.is_file():
        pickled = next(folder.glob("pytorch_model*.bin"), None)
        hint = f"; {pickled.name} is a pickle, which is not read: save the model as safetensors" if pickled else ""
        raise UserError(f"{folder}: holds neither {WEIGHTS} nor {SHARD_INDEX}{hint}")
    shards = read_description(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: weight_map does not name files of its folder")
    return [folder / name for name in sorted(set(names))]
