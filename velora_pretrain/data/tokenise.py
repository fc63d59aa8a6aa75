"""Shards to tokens that lie ready: one shard after the other, or several at a time in processes of their own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from velora_pretrain.data.shard_tokens import (
    BAD,
    BYTES_FILE,
    DOCUMENTS_FILE,
    EMPTY,
    GOOD,
    META_FILE,
    TOKENS_FILE,
    Meta,
)
from velora_pretrain.data.source import Record, place, read_records
from velora_pretrain.data.token_jobs import Job
from velora_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.files import sha256_of, write_atomically

CHUNK_RECORDS = 256
MAX_BAD_RECORDS = 10_000
"""Above this a file is not worth tokenising, nor its faults worth keeping."""
POLL_SECONDS = 0.2

Tell = Callable[[str, int], None]
"""Is told a shard's name and how many tokens more it has."""


def tokenise(jobs: Sequence[Job], *, processes: int, tell: Tell, done: Callable[[Meta], None]) -> None:
    """Tokenises shards, several at a time.

    Args:
        jobs: The shards.
        processes: How many at a time; one works in this process.
        tell: Is told of tokens as they come.
        done: Is told of each shard that is whole.

    Raises:
        UserError: A shard cannot be read, or its tokens not be written.
    """
    if processes == 1 or len(jobs) < 2:
        tokenizer: Tokenizer | None = None
        for job in jobs:
            tokenizer = tokenizer or load_tokenizer(job.tokenizer)
            done(tokenise_shard(job, tokenizer, tell))
        return
    context = multiprocessing.get_context("spawn")
    news, stop = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)), context, initializer=_begin_work, initargs=(jobs[0].tokenizer, news, stop)
    )
    try:
        waiting: set[Future[Meta]] = {pool.submit(_work, job) for job in jobs}
        while waiting:
            finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            while not news.empty():
                tell(*news.get())
            for each in finished:
                done(each.result())
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenised was killed, perhaps for want of memory; what is whole stays: run the same"
            " command again, with a smaller --processes"
        ) from error
    finally:
        stop.set()
        while not news.empty():
            news.get()
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another process failed, or the user has had enough."""


_in_process: dict[str, Any] = {}


def _begin_work(tokenizer: str, news: Any, stop: Any) -> None:
    # Ctrl-C reaches every process of the terminal; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _in_process.update(tokenizer=load_tokenizer(tokenizer), news=news, stop=stop)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(job: Job) -> Meta:
    def tell(name: str, tokens: int) -> None:
        if _in_process["stop"].is_set():
            raise _Stopped
        _in_process["news"].put((name, tokens))

    return tokenise_shard(job, _in_process["tokenizer"], tell)


def tokenise_shard(job: Job, tokenizer: Tokenizer, tell: Tell) -> Meta:
    """Writes a shard's tokens, whole or not at all.

    Raises:
        UserError: The shard cannot be read, or changed meanwhile; the folder cannot be written.
    """
    assert tokenizer.sha256 == job.tokenizer_sha256
    shard, folder = Path(job.shard), Path(job.folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        meta = _write(job, shard, temporary, tokenizer, tell)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); whole shards stay: run it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def _write(job: Job, shard: Path, folder: Path, tokenizer: Tokenizer, tell: Tell) -> Meta:
    before = shard.stat()
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    documents = hashlib.sha256()
    faults: dict[str, str] = {}
    num_records = num_tokens = 0
    with (
        (folder / TOKENS_FILE).open("wb") as tokens_file,
        (folder / BYTES_FILE).open("wb") as bytes_file,
        (folder / DOCUMENTS_FILE).open("wb") as documents_file,
    ):
        for chunk in _chunks(read_records(job.shard, wanted=lambda _: True)):
            faults |= {str(record.number): record.fault for record in chunk if record.fault is not None}
            if len(faults) > MAX_BAD_RECORDS:
                raise UserError(
                    f"{place(job.shard, chunk[-1].number)}: the {len(faults)}th bad record; mend or drop the file"
                )
            rows, values, counts = _tokens_of(chunk, tokenizer, dtype, job.with_bytes, num_tokens)
            num_records, num_tokens = num_records + len(rows), num_tokens + len(values)
            documents.update(rows)
            for file, numbers in ((documents_file, rows), (tokens_file, values), (bytes_file, counts)):
                file.write(numbers.tobytes())
            tell(shard.name, len(values))
        for file in (documents_file, tokens_file, bytes_file):
            _sync(file)
    if not job.with_bytes:
        (folder / BYTES_FILE).unlink()
    meta = Meta(
        tokenizer_sha256=tokenizer.sha256,
        shard=shard.name,
        shard_size_bytes=before.st_size,
        shard_mtime_ns=before.st_mtime_ns,
        shard_sha256=sha256_of(shard),
        dtype=dtype,
        num_records=num_records,
        num_tokens=num_tokens,
        has_bytes=job.with_bytes,
        documents_sha256=documents.hexdigest(),
        faults=faults,
    )
    after = shard.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{shard}: changed while it was tokenised; run it again")
    write_atomically(folder / META_FILE, json.dumps(dataclasses.asdict(meta)).encode())
    return meta


def _tokens_of(
    chunk: Sequence[Record], tokenizer: Tokenizer, dtype: str, with_bytes: bool, before: int
) -> tuple[Any, Any, Any]:
    """Rows of documents.bin, tokens, and the bytes of each token, of some records."""
    texts = [record.text for record in chunk if isinstance(record.text, str) and not record.is_empty]
    if with_bytes:
        encoded = tokenizer.encode_with_bytes(texts)
        ids, sizes = [each for each, _ in encoded], [each for _, each in encoded]
    else:
        ids, sizes = tokenizer.encode(texts), []
    values = np.fromiter(itertools.chain.from_iterable(ids), dtype)
    counts = np.fromiter(itertools.chain.from_iterable(sizes), "<u4")
    lengths, start, rows = iter(map(len, ids)), 0, []
    for record in chunk:
        kind = BAD if record.text is None else EMPTY if record.is_empty else GOOD
        end = start + (next(lengths) if kind == GOOD else 0)
        checksums = (zlib.crc32(numbers[start:end].data) for numbers in (values, counts))
        rows.append([record.number, before + end, kind, *checksums])
        start = end
    return np.array(rows, "<i8"), values, counts


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
        yield chunk


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
