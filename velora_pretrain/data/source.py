"""One shard, from bytes to records, the same way from the hub, a web address and a disk.

1. bytes    a local file, or `remote.HttpFile`
2. lines    gunzipped or unzstded by the ending of the name, cut at the newline byte alone (parquet: rows)
3. records  one `Record` a line or row: its text, or what is wrong with it

Lines are read here and not by the text or json builder of `datasets`: those stop at the first byte that is not UTF-8
or the first broken record, take a carriage return for the end of a line, and tell no line number.
"""

import contextlib
import errno
import gzip
import io
import json
import shutil
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from velora_pretrain.data.remote import CHUNK_BYTES, HttpFile, is_remote
from velora_pretrain.errors import UserError

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")
MAX_LINE_BYTES = 1 << 30
PARQUET_BATCH_ROWS = 256


class Tokenised(NamedTuple):
    """A document whose tokens lie ready, in place of its text."""

    tokens: NDArray[np.integer]
    """Without EOS."""
    token_bytes: NDArray[np.integer] | None
    """UTF-8 bytes of the text that each token stands for; None where nobody asks."""


class Record(NamedTuple):
    """One line or row of a shard."""

    number: int
    """Place in the shard from 0. Every line and row has one, be it good, bad or blank."""
    text: str | Tokenised | None
    """The document; None if the record is bad."""
    fault: str | None
    """What is wrong with it; None if the record is good."""

    @property
    def is_empty(self) -> bool:
        """Whether it is good, and of no text but white space."""
        return isinstance(self.text, str) and (not self.text or self.text.isspace())


def ending(shard: str) -> str:
    """The ending of a shard's name that says its format.

    Raises:
        UserError: It is none that can be read.
    """
    name = urllib.parse.urlsplit(shard).path if is_remote(shard) else shard
    found = [known for known in ENDINGS if name.lower().endswith(known)]
    if not found:
        raise UserError(f"{shard}: cannot tell its format; the name must end in {', '.join(ENDINGS)}")
    return found[0]


def place(shard: str, number: int) -> str:
    """`FILE line 7` or `FILE row 7`, counted from 1, for messages."""
    return f"{shard} {'row' if ending(shard) == '.parquet' else 'line'} {number + 1}"


def read_records(shard: str, *, skip_records: int = 0, wanted: Callable[[int], bool]) -> Generator[Record, None, None]:
    """The records of a shard in their order.

    Args:
        shard: A path, an http(s) URL, or `hf://datasets/OWNER/NAME/FILE`.
        skip_records: Begin after so many lines or rows, without parsing them.
        wanted: Says by its number whether a record is parsed and given.

    Raises:
        UserError: The file cannot be read to its end, its first record has no `text`, or it holds no record at all.
        ConnectionError: The network failed for longer than the retries last.
    """
    read = _parquet_records if ending(shard) == ".parquet" else _line_records
    try:
        yield from read(shard, skip_records, wanted)
    except EOFError as error:
        raise UserError(
            f"{shard}: the compressed data stops in the middle; the copy is cut short, fetch it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{shard}: not valid {ending(shard)} data ({error}); fetch it again") from error


def _line_records(shard: str, skip_records: int, wanted: Callable[[int], bool]) -> Iterator[Record]:
    first = True
    with _open_lines(shard) as lines:
        number = -1
        while line := lines.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise UserError(f"{place(shard, number)}: longer than {MAX_LINE_BYTES} bytes; one JSON record per line")
            if number < skip_records or line.isspace():
                continue
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if first and not skip_records:
                _check_first_line(shard, line)
            first = False
            if wanted(number):
                yield Record(number, *_parse(line.rstrip(b"\r\n")))
    if first and not skip_records:
        raise UserError(f'{shard}: holds no documents; one JSON record with a "text" per line is expected')


def _check_first_line(shard: str, line: bytes) -> None:
    """Refuse a file whose first record shows that it is of another kind, however many bad lines are allowed."""
    if line.lstrip().startswith(b"[") or line.strip() == b"{":
        raise UserError(
            f'{shard}: one JSON array or object over many lines; JSON lines are read, one record with a "text" per '
            "line (for example: jq -c '.[]' FILE > FILE.jsonl)"
        )
    record = None
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line.decode("utf-8"))
    if isinstance(record, dict) and "text" not in record:
        raise UserError(f'{shard}: its records have no "text"; columns found: {", ".join(record) or "none"}')


def _parse(line: bytes) -> tuple[str | None, str | None]:
    """The text of a line, or what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"not valid UTF-8 ({error.reason} at byte {error.start + 1})"
    except RecursionError:
        return None, "not valid JSON (nested too deep)"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg} at character {error.pos + 1})"
    except ValueError as error:  # a number of too many digits
        return None, f"not valid JSON ({error})"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    if "text" not in record:
        return None, 'no "text" in the record'
    text = record["text"]
    if not isinstance(text, str):
        return None, f'"text" is {"null" if text is None else "not a string"}'
    try:
        # JSON can escape half of a surrogate pair, which no tokenizer can take.
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, '"text" holds half of a surrogate pair, which is not valid Unicode'
    return text, None


def _parquet_records(shard: str, skip_records: int, wanted: Callable[[int], bool]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    with _open_seekable(shard) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            columns = table.schema_arrow.names
            if "text" not in columns:
                raise UserError(f'{shard}: no column "text"; columns found: {", ".join(columns) or "none"}')
            if table.metadata.num_rows == 0:
                raise UserError(f"{shard}: holds no documents")
            number = 0
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=["text"]):
                if number + batch.num_rows > skip_records:
                    for offset, value in enumerate(_bytes_of(batch.column(0), shard)):
                        if number + offset >= skip_records and wanted(number + offset):
                            yield Record(number + offset, *_decode(value))
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{shard}: not a readable parquet file ({reason}); fetch it again") from error


def _bytes_of(column: Any, shard: str) -> list[bytes | None]:
    """A column's strings as stored, since one that is not UTF-8 would else fail a whole batch of rows."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise UserError(f'{shard}: its column "text" holds {column.type}, not strings')
    return column.cast(pyarrow.large_binary()).to_pylist()


def _decode(value: bytes | None) -> tuple[str | None, str | None]:
    if value is None:
        return None, '"text" is null'
    try:
        return value.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return None, f"not valid UTF-8 ({error.reason} at byte {error.start + 1})"


@contextlib.contextmanager
def _open_seekable(shard: str) -> Iterator[BinaryIO]:
    """A shard's bytes in a file that can be read from its end, as parquet is: remote ones in a temporary copy."""
    with _open(shard) as file:
        if not is_remote(shard):
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(file, copy, CHUNK_BYTES)
                copy.seek(0)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(
                    f"{shard}: no room for a copy in {tempfile.gettempdir()}; let TMPDIR name a larger folder"
                ) from error
            yield copy  # pyright: ignore[reportReturnType]


class _ZstdFile(io.RawIOBase):
    """Unzstded bytes of all frames. The library's own reader takes a frame that is cut short for a whole one."""

    def __init__(self, compressed: io.BufferedReader | BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise UserError('.zst files need zstandard: pip install "velora-pretrain[zstd]"') from error
        self._library: Any = zstandard
        self._compressed = compressed
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True, as `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; 0 at the end of the last whole frame."""
        while not self._ready:
            unused = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            compressed = unused or self._compressed.read(1 << 16)
            if not compressed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("Compressed file ended before the end of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._library.ZstdError as error:
                raise zlib.error(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextlib.contextmanager
def _open(shard: str) -> Iterator[BinaryIO]:
    """A shard's bytes as stored."""
    if is_remote(shard):
        with io.BufferedReader(HttpFile(shard), CHUNK_BYTES) as file:
            yield file
        return
    try:
        file = Path(shard).open("rb", buffering=CHUNK_BYTES)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{shard}: cannot be opened ({error.strerror}); check the path") from error
    with file:
        yield file


@contextlib.contextmanager
def _open_lines(shard: str) -> Iterator[io.BufferedReader | BinaryIO]:
    """A shard's bytes with the compression taken off."""
    with _open(shard) as file:
        name_ending = ending(shard)
        if name_ending.endswith(".gz"):
            yield io.BufferedReader(gzip.GzipFile(fileobj=file), CHUNK_BYTES)  # pyright: ignore[reportArgumentType]
        elif name_ending.endswith(".zst"):
            yield io.BufferedReader(_ZstdFile(file), CHUNK_BYTES)
        else:
            yield file
