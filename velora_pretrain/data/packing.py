"""Token lists of documents to sequences of one length T.

`Padder`   one document, one sequence: tokens[:T-1], EOS, then padding on the right. The papers' protocol, and what the
           T5 tokenizer of transformers gives with truncation and padding to `max_length` = T. A document longer than
           T - 1 tokens loses its tail.
`Packer`   documents end to end, an EOS after each, cut every T tokens. Nothing is lost or padded.

Both know for each sequence the `Cursor` after it. For the packer that is the document which holds the next token and
how many of its tokens are used, so that a resume tokenises this document once more and carries no tokens in the state.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from velora_pretrain.data.c4 import Cursor


class Document(NamedTuple):
    """A document's tokens, without EOS."""

    cursor: Cursor
    """Its place; `cursor.token` of its tokens (EOS included) are already in an earlier sequence."""
    tokens: Sequence[int] | NDArray[np.integer]
    token_bytes: Sequence[int] | NDArray[np.integer] | None = None
    """UTF-8 bytes of the text that each token stands for."""


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Some sequences of T tokens, in their order."""

    tokens: NDArray[np.int64]
    """(sequences, T), int64, padded on the right."""
    lengths: NDArray[np.int64]
    """(sequences,), int64: tokens before the padding."""
    token_bytes: NDArray[np.int64]
    """(sequences, T), int64: bytes of text of each token; 0 at EOS, padding and where they were not counted."""
    after: list[Cursor]
    """(sequences,): the place after each."""

    def __len__(self) -> int:
        return len(self.after)

    def __getitem__(self, rows: slice) -> "Sequences":
        return Sequences(self.tokens[rows], self.lengths[rows], self.token_bytes[rows], self.after[rows])

    def num_targets(self) -> NDArray[np.int64]:
        """(sequences,): tokens that have one before them in their sequence to be predicted from."""
        return np.maximum(self.lengths - 1, 0)


def join(parts: Sequence[Sequences]) -> Sequences:
    """Sequences one after the other. There must be at least one part."""
    return Sequences(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.token_bytes for part in parts]),
        [cursor for part in parts for cursor in part.after],
    )


def limited(chunks: Iterable[Sequences], max_target_tokens: int) -> Iterator[Sequences]:
    """Sequences up to and with the one that brings the targets to the limit."""
    targets = 0
    for chunk in chunks:
        reached = targets + np.cumsum(chunk.num_targets())
        enough = int(np.searchsorted(reached, max_target_tokens)) + 1
        yield chunk[:enough]
        if enough <= len(chunk):
            return
        targets += int(chunk.num_targets().sum())


def grouped(chunks: Iterable[Sequences], sequences: int) -> Iterator[Sequences]:
    """Global batches of `sequences` rows; the last one, if there is a last one, may have fewer."""
    waiting: list[Sequences] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(map(len, waiting)) < sequences:
            continue
        rows = join(waiting)
        full = len(rows) - len(rows) % sequences
        for first in range(0, full, sequences):
            yield rows[first : first + sequences]
        waiting = [rows[full:]]
    if sum(map(len, waiting)):
        yield join(waiting)


@runtime_checkable
class Packing(Protocol):
    """Documents in, sequences out."""

    def add(self, documents: Sequence[Document]) -> Sequences:
        """The sequences that these documents complete."""
        ...

    def flush(self) -> Sequences:
        """What is left when no document comes any more."""
        ...


def pad_rows(
    rows: Sequence[Sequence[int] | NDArray[np.integer]], length: int, *, last: int, fill: int
) -> NDArray[np.int64]:
    """Rows cut to `length` - 1 values, `last` after each, `fill` up to `length`.

    Returns:
        (rows, length), int64.
    """
    cut = [row[: length - 1] for row in rows]
    lengths = np.fromiter(map(len, cut), np.int64, len(cut))
    padded = np.full((len(cut), length), fill, np.int64)
    if cut and isinstance(cut[0], np.ndarray):
        values = np.concatenate(cut)
    else:
        values = np.fromiter(itertools.chain.from_iterable(cut), np.int64, int(lengths.sum()))
    padded[np.arange(length) < lengths[:, None]] = values
    padded[np.arange(len(cut)), lengths] = last
    return padded


class Padder:
    """One document, one sequence; no state."""

    def __init__(self, sequence_length: int, *, eos_id: int, pad_id: int):
        self._length, self._eos_id, self._pad_id = sequence_length, eos_id, pad_id

    def add(self, documents: Sequence[Document]) -> Sequences:
        """As many sequences as documents."""
        lengths = [min(len(document.tokens) + 1, self._length) for document in documents]
        return Sequences(
            pad_rows([document.tokens for document in documents], self._length, last=self._eos_id, fill=self._pad_id),
            np.array(lengths, np.int64),
            pad_rows([_bytes_of(document) for document in documents], self._length, last=0, fill=0),
            [_next_document(document.cursor) for document in documents],
        )

    def flush(self) -> Sequences:
        """Nothing."""
        return self.add([])


class Packer:
    """Documents end to end, cut every `sequence_length` tokens; keeps the documents of the cut sequence's rest."""

    def __init__(self, sequence_length: int, *, eos_id: int, pad_id: int):
        self._length, self._eos_id, self._pad_id = sequence_length, eos_id, pad_id
        self._tokens = np.empty(0, np.int64)
        self._bytes = np.empty(0, np.int64)
        # The documents that reach into the kept tokens, each with the place of its own first token among them (below 0
        # if that is used) and its tokens in all.
        self._documents: list[tuple[int, int, Cursor]] = []

    def add(self, documents: Sequence[Document]) -> Sequences:
        """The sequences that are full with these documents."""
        tokens, token_bytes = [self._tokens], [self._bytes]
        position = len(self._tokens)
        for document in documents:
            used, total = document.cursor.token, len(document.tokens) + 1
            ids, counts = np.full(total, self._eos_id, np.int64), np.zeros(total, np.int64)
            ids[:-1] = document.tokens
            if document.token_bytes is not None:
                counts[:-1] = document.token_bytes
            tokens.append(ids[used:])
            token_bytes.append(counts[used:])
            self._documents.append((position - used, total, document.cursor))
            position += total - used
        self._tokens, self._bytes = np.concatenate(tokens), np.concatenate(token_bytes)
        return self._cut(position // self._length)

    def flush(self) -> Sequences:
        """The rest as one padded sequence, if it has a token to predict."""
        count = len(self._tokens)
        if count < 2:
            return self._cut(0)
        missing = (0, self._length - count)
        self._tokens = np.pad(self._tokens, missing, constant_values=self._pad_id)
        self._bytes = np.pad(self._bytes, missing)
        return dataclasses.replace(self._cut(1), lengths=np.array([count], np.int64))

    def _cut(self, count: int) -> Sequences:
        end = count * self._length
        ends = np.arange(1, count + 1) * self._length
        # The document of each sequence's last token.
        holders = np.searchsorted([first for first, _, _ in self._documents], ends - 1, side="right") - 1
        cut = Sequences(
            self._tokens[:end].reshape(count, self._length),
            np.full(count, self._length, np.int64),
            self._bytes[:end].reshape(count, self._length),
            [_place(self._documents[holder], at) for holder, at in zip(holders.tolist(), ends.tolist(), strict=True)],
        )
        if count:
            kept = self._documents[int(holders[-1]) :]
            self._documents = [(first - end, total, cursor) for first, total, cursor in kept]
            self._tokens, self._bytes = self._tokens[end:], self._bytes[end:]
        return cut


def _place(document: tuple[int, int, Cursor], at: int) -> Cursor:
    """The place `at` among the kept tokens, told from the document there; at its end, that of the next document."""
    first, total, cursor = document
    return _next_document(cursor) if at - first >= total else dataclasses.replace(cursor, token=at - first)


def _bytes_of(document: Document) -> Sequence[int] | NDArray[np.integer]:
    return () if document.token_bytes is None else document.token_bytes


def _next_document(cursor: Cursor) -> Cursor:
    return dataclasses.replace(cursor, document=cursor.document + 1, token=0)


PACKINGS: dict[str, type[Padder] | type[Packer]] = {"pad": Padder, "pack": Packer}
