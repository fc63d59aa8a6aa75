"""The SentencePiece files and answers that are read here, without a protobuf library.

Source: sentencepiece/src/sentencepiece_model.proto (the model file) and sentencepiece.proto (`SentencePieceText`, an
encoded text with the byte span of each token). sentencepiece 0.2.1 to 0.2.3 hand out spans under three different
names, two of which need the protobuf package; the serialised message is the one answer common to them all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# SentencePiece.Type
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
MODEL_KINDS: dict[int, Literal["unigram", "bpe"]] = {1: "unigram", 2: "bpe"}

_PIECE, _TRAINER_SPEC, _NORMALIZER_SPEC, _SELF_TEST_DATA = 1, 2, 3, 4
# input, model_prefix, num_threads: where and how the model was made, of no use to who reads it.
_TRAINER_FIELDS_DROPPED = frozenset({1, 2, 16})


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a SentencePiece model file says.

    Attributes:
        pieces: (text, score in nats, SentencePiece.Type) of each piece, by id.
        kind: the segmentation, or None for one that is neither unigram nor BPE.
        byte_fallback: a character without a piece is spelled in byte pieces.
        charsmap: the compiled normalisation table; empty for the identity.
        add_dummy_prefix: a space is put before the text.
        remove_extra_whitespaces: spaces at both ends and repeated spaces are dropped.
        whitespace_as_suffix: a word's space is its last character, not its first.
    """

    pieces: tuple[tuple[str, float, int], ...]
    kind: Literal["unigram", "bpe"] | None
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    whitespace_as_suffix: bool


def read_model(data: bytes) -> SentencePieceModel:
    """Read a model file.

    Raises:
        ValueError: `data` is not a whole SentencePiece model (its two specs come last, so a cut file lacks them).
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] | None = None
    normalizer: dict[int, int | bytes] | None = None
    for number, value, _ in _fields(data):
        if number == _PIECE and isinstance(value, bytes):
            text, score, kind = "", 0.0, 1
            for inner, field, _ in _fields(value):
                if isinstance(field, int):
                    kind = field if inner == 3 else kind
                elif inner == 1:
                    text = field.decode()
                elif inner == 2:
                    (score,) = struct.unpack("<f", field)
            pieces.append((text, score, kind))
        elif number == _TRAINER_SPEC:
            trainer = _as_dict(value)
        elif number == _NORMALIZER_SPEC:
            normalizer = _as_dict(value)
    if not pieces or trainer is None or normalizer is None:
        raise ValueError("the pieces or one of the specs is missing")
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=MODEL_KINDS.get(_int(trainer.get(3, 1))),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
    )


def strip_provenance(data: bytes) -> bytes:
    """Return the model file without paths, thread counts and self-test texts; it segments as before."""
    kept = bytearray()
    for number, value, raw in _fields(data):
        if number == _TRAINER_SPEC:
            inner = _fields(_bytes(value))
            kept += _submessage(number, b"".join(raw for n, _, raw in inner if n not in _TRAINER_FIELDS_DROPPED))
        elif number != _SELF_TEST_DATA:
            kept += raw
    return bytes(kept)


def round_scores(data: bytes, step_nats: float) -> bytes:
    """Return the model file with each piece's score rounded to a multiple of `step_nats`, a power of two.

    SentencePiece adds the scores of a whole text in float32, the `tokenizers` library in float64. With such scores both
    sums are exact up to 2**24 steps, so the two agree on every near-tie, and a word far into a document is cut as it
    is at the start.
    """
    kept = bytearray()
    for number, value, raw in _fields(data):
        if number == _PIECE:
            piece = bytearray()
            for inner, field, inner_raw in _fields(_bytes(value)):
                if inner == 2:
                    (score,) = struct.unpack("<f", _bytes(field))
                    inner_raw = inner_raw[:1] + struct.pack("<f", round(score / step_nats) * step_nats)
                piece += inner_raw
            kept += _submessage(number, bytes(piece))
        else:
            kept += raw
    return bytes(kept)


def read_spans(message: bytes) -> tuple[list[int], list[int]]:
    """Read a serialised `SentencePieceText`: the ids, and where each token ends in the text, in UTF-8 bytes."""
    ids: list[int] = []
    ends_bytes: list[int] = []
    position, stop = 0, len(message)
    # One flat loop over tags, since this runs once per token of an evaluation: entering a piece (field 2) is
    # just going on behind its length. Inside a piece 0x08 | 0x10 and 0x28 are the id and the end.
    while position < stop:
        tag = message[position]
        value = message[position + 1]
        position += 2
        if value > 0x7F:
            value, position = _read_varint(message, position - 1)
        if tag == 0x10:
            ids.append(value)
        elif tag == 0x28:
            ends_bytes.append(value)
        elif tag == 0x0A or tag == 0x1A:  # a text, a piece, a surface
            position += value
        elif tag == 0x1D:  # the text's score, a fixed32 of which `value` was the first byte
            position += 3
    return ids, ends_bytes


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Yield (field number, value, the field's raw bytes) of a protobuf message; fixed-width values as bytes."""
    position = 0
    while position < len(data):
        start = position
        key = data[position]
        position += 1
        if key > 0x7F:
            key, position = _read_varint(data, start)
        value: int | bytes
        match key & 7:
            case 0:
                value, position = _read_varint(data, position)
            case 1 | 2 | 5 as wire_type:
                if wire_type == 2:
                    size_bytes = data[position] if position < len(data) else 0x80
                    position += 1
                    if size_bytes > 0x7F:
                        size_bytes, position = _read_varint(data, position - 1)
                else:
                    size_bytes = 8 if wire_type == 1 else 4
                value = data[position : position + size_bytes]
                position += size_bytes
            case wire_type:
                raise ValueError(f"wire type {wire_type} at byte {start}")
        if position > len(data):
            raise ValueError(f"the field at byte {start} is cut off")
        yield key >> 3, value, data[start:position]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number is cut off")


def _submessage(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _as_dict(value: int | bytes) -> dict[int, int | bytes]:
    return {number: field for number, field, _ in _fields(_bytes(value))}


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text was expected")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("text where a number was expected")
    return value
