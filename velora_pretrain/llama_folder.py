"""A Hugging Face LLaMA folder as its config.json tells it, and a recipe that starts from its weights. No torch here.

What a LLaMA may have that the model here has not (biases, rotary scaling, heads of another width) is refused by the
key that says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from velora_pretrain.dimensions import SIZES, LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.files import read_json

CONFIG = "config.json"
TOKENIZER_FILES = ("spiece.model", "tokenizer.model")
"""T5's name for a SentencePiece model and LLaMA's, in the order tried."""

_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
}
"""Keys of config.json whose other values make a model that ours is not."""
_TRANSFORMERS_DEFAULTS = {"max_position_embeddings": 2048}
"""What a key means where config.json leaves it out, where it is not what our own recipes mean by that."""
_FREE = ("max_position_embeddings", "initializer_range")
"""Dimensions that a run may change: the function is the same."""


def read_config(folder: Path) -> LlamaConfig:
    """The dimensions in a folder's config.json.

    Raises:
        UserError: it is missing, unreadable, of another architecture or of a kind of LLaMA that is not supported.
    """
    path = folder / CONFIG
    values = _TRANSFORMERS_DEFAULTS | read_description(path)
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; only llama models can be read")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}, not an object")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path}: rotary scaling {rope.get('rope_type', rope.get('type'))!r} is not supported")
    values |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    for key, supported in _UNSUPPORTED.items():
        if values.get(key) not in supported:
            raise UserError(f"{path}: {key} = {values[key]!r} is not supported")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    try:
        config = LlamaConfig.model_validate({k: v for k, v in values.items() if k in LlamaConfig.model_fields})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {key + ': ' if key else ''}{message[0].lower()}{message[1:]}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim {values['head_dim']} is not hidden_size over the heads; not supported")
    return config


def read_description(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder.

    Raises:
        UserError: it is missing or no JSON object.
    """
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; give a checkpoint, a run folder or a Hugging Face LLaMA folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: not readable JSON ({error})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a SentencePiece model."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def follow_init_from(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with what its `init_from` says: where the weights lie, their dimensions and their tokenizer.

    What the recipe says itself of dimensions has to agree; a tokenizer that it names goes before the folder's.

    Args:
        values: nested, as TOML gives them; returned as they are where they have no `init_from`.

    Raises:
        UserError: no such folder, or one that cannot be read; dimensions that do not agree; no tokenizer.
    """
    given = values.get("init_from")
    if not isinstance(given, str) or not given:
        return values
    folder = _folder_with_weights(Path(given).expanduser())
    # Head and embedding that are one matrix are trained apart from there on.
    theirs = read_config(folder).model_dump(exclude={"tie_word_embeddings"})
    table = values.get("model", {})
    if not isinstance(table, dict):
        return values
    size = values.get("size")
    named = SIZES[size].model_dump() if isinstance(size, str) and size in SIZES else {}
    for key, value in {**named, **table}.items():
        if key in theirs and key not in _FREE and value != theirs[key]:
            if key in table:
                where, asked = f"model.{key}", f"{value!r} was asked for"
            else:
                where, asked = "size", f"{size} has {key} {value!r}"
            raise UserError(f"{where}: {asked}, but {folder / CONFIG} has {theirs[key]!r}; leave {where} out")
    if "tokenizer" not in values and not has_tokenizer(folder):
        raise UserError(
            f"init_from: {folder} holds no SentencePiece model ({' or '.join(TOKENIZER_FILES)}); name the tokenizer"
            " that its model was trained with by --tokenizer"
        )
    return {"tokenizer": str(folder)} | values | {"init_from": str(folder), "model": theirs | table}


def _folder_with_weights(path: Path) -> Path:
    """A folder itself or, of a run's folder, its newest checkpoint."""
    if not path.is_dir():
        raise UserError(f"init_from: no folder {path}; give a Hugging Face LLaMA folder, a run folder or a checkpoint")
    if (path / CONFIG).exists() or not (path / "config.toml").exists():
        return path
    newest = next(iter(checkpoints_newest_first(path / "checkpoints")), None)
    if newest is None:
        raise UserError(f"init_from: the run in {path} has no checkpoint yet")
    return newest


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """Every checkpoint below a run's folder of them, whole or not, from the newest step to the oldest."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _CHECKPOINT_NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])
