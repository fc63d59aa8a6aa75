"""Batches for training and for evaluation.

1. blocks     documents in their seeded order                          c4.read_blocks
2. documents  tokens, many documents at a time                         `_tokenised`
3. sequences  of one length                                            packing
4. batches    `sequences` of them, the same whatever the world size    packing.grouped
5. slice      rank r takes the r-th of world_size equal runs of rows   `_batch`

Stages 1 to 4 run on every rank for the whole global batch. That costs each rank the tokenising of the others' rows,
which sentencepiece does at some 5M tokens a second on one core beside the training step, and buys that every rank
knows the target count of the global batch, and the place after it, without communication; a checkpoint made with one
world size goes on with another. Where all ranks together train faster than one core tokenises, `wait_seconds` shows it.

Stages 1 to 5 run ahead in a thread. sentencepiece and zlib release the interpreter's lock, so a process is not needed.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from velora_pretrain.data.c4 import Block, Cursor, Source, read_blocks
from velora_pretrain.data.packing import PACKINGS, Document, Packing, Sequences, grouped, limited
from velora_pretrain.data.prefetch import Prefetcher
from velora_pretrain.data.source import Tokenised
from velora_pretrain.errors import UserError

IGNORE_INDEX = -100
CHUNK_DOCUMENTS = 256
EVALUATION_BLOCK_DOCUMENTS = 256


@runtime_checkable
class DocumentTokenizer(Protocol):
    """What the loader asks of a tokenizer."""

    pad_id: int
    eos_id: int

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without EOS."""
        ...

    def encode_with_bytes(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Tokens of each text, without EOS, and the UTF-8 bytes of it that each stands for."""
        ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch."""

    inputs: Int[Tensor, "sequences length"]
    """int64, padded on the right."""
    labels: Int[Tensor, "sequences length"]
    """int64, shifted: labels[:, t] is inputs[:, t + 1], and IGNORE_INDEX at padding and in the last column."""
    first_row: int
    """Place in the global batch of the first of these rows."""
    num_target_tokens: int
    """Labels that count, in the global batch."""
    num_input_tokens: int
    """Inputs that are not padding, in the global batch."""
    target_bytes: int
    """UTF-8 bytes of text that the global batch's targets stand for; 0 in training, where nobody counts them."""
    cursor: dict[str, Any]
    """The place after this batch, for JSON."""
    digest: str
    """16 hex digits of the global batch's tokens and lengths, the same on every rank and for every world size. Names
    the documents of the batch, so that runs can be shown to have read the same; empty in evaluation."""


def shift_labels(
    inputs: Int[Tensor, "sequences length"], lengths: Int[Tensor, " sequences"]
) -> Int[Tensor, "sequences length"]:
    """The token after each, and IGNORE_INDEX where there is none.

    Args:
        inputs: Padded on the right.
        lengths: Tokens before the padding. They decide, not the padding's id, which may also be a token's.
    """
    labels = torch.full_like(inputs, IGNORE_INDEX)
    is_target = torch.arange(1, inputs.shape[1]) < lengths[:, None]
    labels[:, :-1] = torch.where(is_target, inputs[:, 1:], IGNORE_INDEX)
    return labels


class TrainLoader:
    """Batches for ever, each a fixed set of sequences whatever the world size; iterate, then `close`."""

    def __init__(
        self,
        source: Source,
        tokenizer: DocumentTokenizer,
        *,
        packing: str,
        sequence_length: int,
        sequences: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        shuffle_block_documents: int,
        max_bad_lines: int = 0,
        prefetch_batches: int = 4,
        cursor: dict[str, Any] | None = None,
    ):
        """Start reading.

        Args:
            source: The documents.
            tokenizer: Their tokenizer.
            packing: `pad` or `pack`.
            sequence_length: Tokens of a sequence.
            sequences: Sequences of a global batch.
            rank: Whose rows of it to give.
            world_size: Number of ranks.
            seed: Of the order of the documents.
            shuffle_block_documents: Documents that are held in memory and permuted together.
            max_bad_lines: Bad records that are skipped in one epoch before the next one is an error.
            prefetch_batches: Batches that are made ahead.
            cursor: `Batch.cursor` of the last batch before the first to give; None for the beginning.

        Raises:
            UserError: The ranks cannot share a batch evenly, or the cursor belongs to another order of documents.
        """
        if sequences % world_size:
            raise UserError(
                f"batch.sequences is {sequences}, which {world_size} ranks cannot share evenly; make it a multiple of "
                f"{world_size}"
            )
        order = {
            "data": fingerprint(source),
            "seed": seed,
            "shuffle_block_documents": shuffle_block_documents,
            "packing": packing,
            "batch.sequence_length": sequence_length,
            "tokenizer": getattr(tokenizer, "sha256", None),
        }
        start = Cursor() if cursor is None else _restore(cursor, order)
        blocks = read_blocks(
            source,
            seed=seed,
            shuffle_block_documents=shuffle_block_documents,
            max_bad_lines=max_bad_lines,
            cursor=start,
        )
        _check_tokens(source, tokenizer)
        packer = _packing(packing, sequence_length, tokenizer)
        chunks = _packed(_tokenised(blocks, lambda texts: [(ids, None) for ids in tokenizer.encode(texts)]), packer)
        self._batches = Prefetcher(
            (_batch(group, rank, world_size, order) for group in grouped(chunks, sequences)), prefetch_batches
        )

    @property
    def wait_seconds(self) -> float:
        """How long the caller has waited for batches in all."""
        return self._batches.wait_seconds

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluation_batches(
    source: Source,
    tokenizer: DocumentTokenizer,
    *,
    packing: str,
    sequence_length: int,
    sequences: int,
    max_target_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    max_bad_lines: int = 0,
    prefetch_batches: int = 4,
) -> Generator[Batch, None, None]:
    """The documents once, in their order, up to the sequence that brings the targets to `max_target_tokens`.

    Which sequences are given depends neither on `sequences` nor on the world size. The last batch may have fewer rows,
    and fewer rows than ranks, so that some rank gets none of them; every rank gets the same number of batches.

    Args:
        source: The documents.
        tokenizer: Their tokenizer.
        packing: `pad` or `pack`; the last sequence of `pack` is padded.
        sequence_length: Tokens of a sequence.
        sequences: Sequences of a global batch.
        max_target_tokens: None for all of them.
        rank: Whose rows to give.
        world_size: Number of ranks.
        max_bad_lines: Bad records that are skipped before the next one is an error.
        prefetch_batches: Batches that are made ahead.

    Raises:
        UserError: The documents cannot be read, or there are none.
    """
    blocks = read_blocks(
        source,
        seed=0,
        shuffle_block_documents=EVALUATION_BLOCK_DOCUMENTS,
        max_bad_lines=max_bad_lines,
        shuffle=False,
        repeat=False,
    )
    _check_tokens(source, tokenizer)
    packer = _packing(packing, sequence_length, tokenizer)
    chunks = _packed(_tokenised(blocks, tokenizer.encode_with_bytes), packer)
    if max_target_tokens is not None:
        chunks = limited(chunks, max_target_tokens)
    groups = grouped(chunks, sequences)
    prefetcher = Prefetcher((_batch(group, rank, world_size, {}) for group in groups), prefetch_batches)
    with contextlib.closing(prefetcher):
        yield from prefetcher


def _packing(name: str, sequence_length: int, tokenizer: DocumentTokenizer) -> Packing:
    if name not in PACKINGS:
        raise UserError(f"packing is {name!r}; it must be one of {', '.join(PACKINGS)}")
    if sequence_length < 2:
        raise UserError(f"batch.sequence_length is {sequence_length}; it must be at least 2")
    return PACKINGS[name](sequence_length, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def _tokenised(
    blocks: Iterable[Block], encode: Callable[[list[str]], Iterable[tuple[list[int], list[int] | None]]]
) -> Iterator[list[Document]]:
    """Documents with their tokens, `CHUNK_DOCUMENTS` at a time; those that have none are left out."""
    # Without this, an epoch of such documents alone would be followed by the next for ever.
    has_tokens, begun_epoch = True, None
    for block in blocks:
        if block.start.epoch != begun_epoch:
            if not has_tokens:
                raise UserError("the tokenizer finds no token in any document of the data; give other text")
            is_whole = block.start == Cursor(epoch=block.start.epoch)
            begun_epoch, has_tokens = block.start.epoch, not is_whole
        for first in range(0, len(block.texts), CHUNK_DOCUMENTS):
            encoded = _encoded(block.texts[first : first + CHUNK_DOCUMENTS], encode)
            documents = []
            for place, (tokens, token_bytes) in enumerate(encoded, start=first):
                # Only the very first document can be begun already.
                cursor = block.start if place == 0 else _at(block.start, place)
                if len(tokens):
                    has_tokens = True
                    documents.append(Document(cursor, tokens, token_bytes))
            yield documents


def _encoded(
    texts: Sequence[str | Tokenised], encode: Callable[[list[str]], Iterable[tuple[list[int], list[int] | None]]]
) -> Iterable[tuple[Any, Any]]:
    """Tokens of each document; those of a shard all lie ready, or none."""
    if texts and isinstance(texts[0], Tokenised):
        return texts  # pyright: ignore[reportReturnType]
    return encode(list(texts))  # pyright: ignore[reportArgumentType]


def _check_tokens(source: Source, tokenizer: DocumentTokenizer) -> None:
    """What lies ready is of this tokenizer: whoever found it has seen to that."""
    sha256 = getattr(tokenizer, "sha256", None)
    assert all(tokens.meta.tokenizer_sha256 == sha256 for tokens in source.tokens.values())


def _at(start: Cursor, place: int) -> Cursor:
    return dataclasses.replace(start, document=start.document + place, token=0)


def _packed(chunks: Iterable[list[Document]], packer: Packing) -> Iterator[Sequences]:
    for documents in chunks:
        yield packer.add(documents)
    yield packer.flush()


def _batch(group: Sequences, rank: int, world_size: int, order: dict[str, Any]) -> Batch:
    """One rank's part of a global batch; `order` says what its place in the data depends on, nothing in evaluation."""
    mine = slice(len(group) * rank // world_size, len(group) * (rank + 1) // world_size)
    inputs = torch.tensor(group.tokens[mine])
    return Batch(
        inputs=inputs,
        labels=shift_labels(inputs, torch.tensor(group.lengths[mine])),
        first_row=mine.start,
        num_target_tokens=int(group.num_targets().sum()),
        num_input_tokens=int(group.lengths.sum()),
        target_bytes=int(group.token_bytes[:, 1:].sum()),
        cursor={**dataclasses.asdict(group.after[-1]), "order": order},
        digest=_digest(group) if order else "",
    )


def _digest(group: Sequences) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for numbers in (group.tokens, group.lengths):
        digest.update(numbers.astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def fingerprint(source: Source) -> str:
    """Names the documents and, of local files, their sizes; not where they lie, so that a run can move."""
    names = [
        (PurePath(shard).name, Path(shard).stat().st_size if Path(shard).is_file() else None) for shard in source.shards
    ]
    every = source.holdout_every_documents if source.part != "all" else None
    return hashlib.sha256(repr((names, source.part, every)).encode()).hexdigest()[:16]


def _restore(cursor: dict[str, Any], order: dict[str, Any]) -> Cursor:
    names = {field.name for field in dataclasses.fields(Cursor)}
    place = {name: value for name, value in cursor.items() if name != "order"}
    is_place = place.keys() == names and all(type(value) is int and value >= 0 for value in place.values())
    if not is_place or not isinstance(cursor.get("order"), dict):
        raise UserError("the checkpoint's cursor is no place in the data; resume from another checkpoint")
    for key, now in order.items():
        before = cursor["order"].get(key)
        if before != now:
            raise UserError(
                f"{key} differs from the run that is resumed ({before!r} then, {now!r} now), so its place in the data "
                "is lost; give the same or start a new run"
            )
    return Cursor(**place)
