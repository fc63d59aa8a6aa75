"""A SentencePiece model as the files that transformers' `AutoTokenizer` loads.

The conversion is our own because transformers' loses what this tool must keep: its fast converters collapse runs of
spaces, strip newlines, or prepend the first space only where the text has none. `tokenizer.json` spells out
SentencePiece's own steps instead:

    charsmap -> strip and collapse spaces (if the model does) -> one space in front -> "▁" for " " -> segmentation

There is no pre-tokeniser: SentencePiece too segments the text whole, and only so can a piece span two spaces.
`</s>` is appended, as T5's tokenizer does and as training does.

Two texts that SentencePiece takes as plain characters read otherwise there: a special token's name (`</s>`) and a byte
piece's (`<0x0A>`) each become that token.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from velora_pretrain.data.tokenizer_proto import BYTE, CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel
from velora_pretrain.errors import UserError
from velora_pretrain.llama_folder import TOKENIZER_FILES

SPACE = "▁"
MODEL_FILE = TOKENIZER_FILES[0]


def write_pretrained(
    folder: Path, model_file: bytes, model: SentencePieceModel, *, unk_id: int, eos_id: int, pad_id: int | None
) -> None:
    """Write `spiece.model`, `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    Args:
        folder: where to; created if missing.
        model_file: the SentencePiece file's bytes.
        model: what it says.
        unk_id: id of the unknown piece.
        eos_id: id of the piece that ends a document.
        pad_id: id of the padding piece, None if the model has none.

    Raises:
        UserError: the model is neither unigram nor BPE, or puts spaces behind words.
    """
    pieces = [piece for piece, _, _ in model.pieces]
    special = {"eos_token": pieces[eos_id], "unk_token": pieces[unk_id]}
    if pad_id is not None:
        special["pad_token"] = pieces[pad_id]
    config = special | {
        # The one class that takes tokenizer.json as it stands, whatever model type config.json names.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # LLaMA takes no token_type_ids, which this class would send by default.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    tokenizer = tokenizer_json(model, unk_id=unk_id, eos_id=eos_id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model_file)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def tokenizer_json(model: SentencePieceModel, *, unk_id: int, eos_id: int) -> dict[str, Any]:
    """Return the content of `tokenizer.json` (the format of the `tokenizers` library, version 1.0)."""
    if model.whitespace_as_suffix:
        raise UserError("tokenizer: a SentencePiece model with treat_whitespace_as_suffix cannot be saved; use another")
    eos = model.pieces[eos_id][0]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for index, (piece, _, kind) in enumerate(model.pieces)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_sequence("A"), {"SpecialToken": {"id": eos, "type_id": 0}}],
            "pair": [
                _sequence("A"),
                {"SpecialToken": {"id": eos, "type_id": 0}},
                _sequence("B"),
                {"SpecialToken": {"id": eos, "type_id": 0}},
            ],
            "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}},
        },
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _segmentation(model, unk_id),
    }


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _segmentation(model: SentencePieceModel, unk_id: int) -> dict[str, Any]:
    if model.kind == "unigram":
        vocab = [[piece, score] for piece, score, _ in model.pieces]
        return {"type": "Unigram", "unk_id": unk_id, "vocab": vocab, "byte_fallback": model.byte_fallback}
    if model.kind == "bpe":
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[unk_id][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: index for index, (piece, _, _) in enumerate(model.pieces)},
            "merges": _merges(model),
        }
    raise UserError("tokenizer: only unigram and BPE SentencePiece models can be saved; use another tokenizer")


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best first: SentencePiece ranks a merge by its result's score."""
    ids = {
        piece: index
        for index, (piece, _, kind) in enumerate(model.pieces)
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    }
    ranked: list[tuple[float, int, int, list[str]]] = []
    for piece, index in ids.items():
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-model.pieces[index][1], left, right, [piece[:cut], piece[cut:]]))
    ranked.sort(key=lambda entry: entry[:3])
    return [pair for *_, pair in ranked]


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}
