"""The tokens of one shard, in files that are mapped into memory: what is stored, and how it is read back.

    tokens-<tokenizer>/<shard's name>/
        tokens.bin      the tokens of all documents end to end, without EOS: uint16, or uint32 for large vocabularies
        bytes.bin       uint32, UTF-8 bytes that each stands for; only where evaluations will read it
        documents.bin   one row of int64 a record: its number in the shard, the end of its tokens, its kind, checksums
        tokens.meta     JSON: which tokenizer, which file, sizes

It holds all that a reader of the shard would come by, bad and empty records included, so that it gives the same records
with the same numbers, tokens in place of texts, and whatever is drawn, counted or skipped after that is the same. The
folder appears whole or not at all. A document's tokens are held against their CRC-32 when they are read.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from velora_pretrain.data.source import Record, Tokenised
from velora_pretrain.errors import UserError
from velora_pretrain.files import read_json

TOKENS_FILE, BYTES_FILE, DOCUMENTS_FILE, META_FILE = "tokens.bin", "bytes.bin", "documents.bin", "tokens.meta"
FORMAT = 1
GOOD, EMPTY, BAD = 0, 1, 2
"""Kinds of records."""
COLUMNS = 5
"""Number, end, kind, CRC-32 of the tokens, CRC-32 of their bytes."""
ROWS_AT_ONCE = 4096
AGAIN = "run `velora-pretrain data tokenise` again"


class Unusable(Exception):
    """Why tokens are left alone and the text is read."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What the files are and what they were made from."""

    format: int = FORMAT
    tokenizer_sha256: str
    shard: str
    """The file's name."""
    shard_size_bytes: int
    shard_mtime_ns: int
    shard_sha256: str
    dtype: str
    """Of tokens."""
    num_records: int
    num_tokens: int
    has_bytes: bool
    """Whether it is known how many bytes each token stands for."""
    documents_sha256: str
    """Of documents.bin."""
    faults: dict[str, str]
    """What is wrong with bad records, by number."""

    def sizes_bytes(self) -> dict[str, int]:
        """How large each file must be."""
        sizes = {
            TOKENS_FILE: self.num_tokens * np.dtype(self.dtype).itemsize,
            DOCUMENTS_FILE: self.num_records * COLUMNS * 8,
        }
        return sizes | ({BYTES_FILE: self.num_tokens * 4} if self.has_bytes else {})


def tokens_folder(shard: Path, tokenizer_sha256: str, output: Path | None) -> Path:
    """Where a shard's tokens lie: beside it, or in a folder for all."""
    return (output or shard.parent) / f"tokens-{tokenizer_sha256[:12]}" / shard.name


def read_meta(folder: Path) -> Meta:
    """What a folder of tokens says of itself, its files being there whole.

    Raises:
        Unusable: It is damaged or of another format.
    """
    try:
        value = read_json(folder / META_FILE)
        if value.get("format") != FORMAT:
            raise Unusable("it was written by another version of velora-pretrain")
        meta = Meta(**value)
        counts = (meta.num_records, meta.num_tokens, meta.shard_size_bytes, meta.shard_mtime_ns)
        if meta.dtype not in ("<u2", "<u4") or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("wrong types")
        for name, size_bytes in meta.sizes_bytes().items():
            found = (folder / name).stat().st_size
            if found != size_bytes:
                raise Unusable(f"{name} has {found} bytes in place of {size_bytes}")
    except OSError as error:
        raise Unusable(f"{Path(error.filename).name} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise Unusable(f"{META_FILE} is damaged ({error})") from None
    return meta


def check_shard(meta: Meta, shard: Path) -> None:
    """Sees that tokens are of the file as it lies there.

    Raises:
        Unusable: They are not, or may not be.
    """
    try:
        now = shard.stat()
    except OSError as error:
        raise Unusable(f"{shard} cannot be read ({error.strerror})") from None
    if meta.shard != shard.name or meta.shard_size_bytes != now.st_size:
        raise Unusable(f"{shard.name} had {meta.shard_size_bytes} bytes when it was tokenised, now {now.st_size}")
    if meta.shard_mtime_ns != now.st_mtime_ns:
        raise Unusable(f"{shard.name} was written to after it was tokenised")


@dataclass(frozen=True)
class ShardTokens:
    """The tokens of a shard."""

    folder: Path
    meta: Meta
    with_bytes: bool = False
    """Give also the bytes that each token stands for."""

    def records(self, *, skip_records: int, wanted: Callable[[int], bool]) -> Generator[Record, None, None]:
        """As `source.read_records` of the shard itself, with tokens in the place of texts.

        Raises:
            UserError: The files are damaged or gone.
        """
        try:
            documents = np.fromfile(self.folder / DOCUMENTS_FILE, "<i8")
            tokens = _mapped(self.folder / TOKENS_FILE, self.meta.dtype)
            counts = _mapped(self.folder / BYTES_FILE, "<u4") if self.with_bytes else None
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}); {AGAIN}") from error
        if hashlib.sha256(documents.data).hexdigest() != self.meta.documents_sha256:
            raise UserError(f"{self.folder / DOCUMENTS_FILE}: is damaged; {AGAIN}")
        documents = documents.reshape(-1, COLUMNS)
        first = int(np.searchsorted(documents[:, 0], skip_records))
        start = int(documents[first - 1, 1]) if first else 0
        for begin in range(first, len(documents), ROWS_AT_ONCE):
            for number, end, kind, *checksums in documents[begin : begin + ROWS_AT_ONCE].tolist():
                if wanted(number):
                    yield self._record(number, kind, slice(start, end), checksums, tokens, counts)
                start = end

    def _record(
        self, number: int, kind: int, span: slice, checksums: list[int], tokens: NDArray[Any], counts: Any
    ) -> Record:
        if kind == BAD:
            return Record(number, None, self.meta.faults[str(number)])
        if kind == EMPTY:
            return Record(number, "", None)
        found = [tokens[span]] if counts is None else [tokens[span], counts[span]]
        for name, values, checksum in zip((TOKENS_FILE, BYTES_FILE), found, checksums, strict=False):
            if zlib.crc32(values.data) != checksum:
                raise UserError(f"{self.folder / name}: the tokens of record {number + 1} are damaged; {AGAIN}")
        return Record(number, Tokenised(found[0], None if counts is None else found[1]), None)


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    """A file's numbers, read when they are looked at; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    # A plain view: the subclass would make every slice dear.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
