"""Documents read through a web server that fails and lies at random: none may be lost, doubled or out of order.

    python tools/fault_injection.py --requests 5000 --json tools/results/faults/faults.json

The reader is the one of `velora-pretrain train --data http://...`, shuffling as in training: one pass after the other
over all files, each held against the same pass over the local files, until the server has answered so many requests.
The faults are those of `faulty_server.py`. Only the times differ: waits between attempts are a thousandth as long and
three times as many, as faults drawn at such a rate run in long rows, and a connection is given up after `--timeout`
of silence. The exit status is 1 if any document was lost, doubled or out of order.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import io
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from faulty_server import FaultyServer
from figures import wide_console, write_json
from rich.console import Console
from rich.table import Table

from velora_pretrain.data import remote
from velora_pretrain.data.c4 import Source, read_blocks, resolve

SHUFFLE_BLOCK_DOCUMENTS = 64
DELAY_FACTOR = 1e-3
RETRIES_FACTOR = 3


def random_texts(count: int, seed: int) -> list[str]:
    """Documents of up to a few kilobytes, no two alike."""
    draw = random.Random(seed)
    return [f"{seed}/{n} {draw.randbytes(draw.randrange(4, 1000)).hex()}" for n in range(count)]


def _json_lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _parquet(texts: Sequence[str]) -> bytes:
    stored = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), stored, row_group_size=100)
    return stored.getvalue()


FORMATS: dict[str, Callable[[Sequence[str]], bytes]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": lambda texts: gzip.compress(_json_lines(texts)),
    ".jsonl.zst": lambda texts: zstandard.ZstdCompressor().compress(_json_lines(texts)),
    ".parquet": _parquet,
}
"""How a file of each ending is made."""


def write_files(folder: Path, *, files: int, documents: int) -> Source:
    """Random documents in `files` files of every format, `documents` in each."""
    paths = []
    for number, name_ending in enumerate([*FORMATS] * files):
        path = folder / f"{number:03d}{name_ending}"
        path.write_bytes(FORMATS[name_ending](random_texts(documents, number)))
        paths.append(str(path))
    return Source(name="generated", shards=tuple(paths))


@contextmanager
def shortened_waits(timeout_seconds: float) -> Iterator[None]:
    """Within, the reader's delays are shorter and more, and it gives up a silent connection after so long."""
    before = remote.RETRY_DELAYS_SECONDS, remote.TIMEOUT_SECONDS
    remote.RETRY_DELAYS_SECONDS = tuple(delay * DELAY_FACTOR for delay in before[0]) * RETRIES_FACTOR
    remote.TIMEOUT_SECONDS = timeout_seconds
    try:
        yield
    finally:
        remote.RETRY_DELAYS_SECONDS, remote.TIMEOUT_SECONDS = before


class _Retries(logging.Handler):
    """Counts the retries that the log tells of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Counts one."""
        self.count += "trying again" in record.getMessage()


@contextmanager
def counted_retries() -> Iterator[_Retries]:
    """Within, warnings of the reader are counted and not shown."""
    retries, logger = _Retries(), logging.getLogger(remote.__name__)
    logger.addHandler(retries)
    logger.propagate = False
    try:
        yield retries
    finally:
        logger.propagate = True
        logger.removeHandler(retries)


def read_texts(source: Source, seed: int) -> list[str]:
    """One pass over the documents in the order that the seed draws."""
    options = {"shuffle_block_documents": SHUFFLE_BLOCK_DOCUMENTS, "max_bad_lines": 0, "repeat": False}
    blocks = read_blocks(source, seed=seed, **options)
    return [text for block in blocks for text in block.texts if isinstance(text, str)]


def measure(source: Source, *, requests: int, fault_rate: float, seed: int, timeout_seconds: float) -> dict[str, Any]:
    """Reads passes over the source through the faulty server until it has answered so many requests.

    Args:
        source: Local files with different names.
        requests: At least so many.
        fault_rate: Share of the requests that meet a fault.
        seed: Of the faults and of the order of documents.
        timeout_seconds: Silence after which the reader gives up a connection.
    """
    files = {f"/{Path(shard).name}": Path(shard).read_bytes() for shard in source.shards}
    server = FaultyServer(files, fault_rate=fault_rate, seed=seed, stall_seconds=2 * timeout_seconds)
    counts: Counter[str] = Counter()
    begun = time.perf_counter()
    with server.serve(), shortened_waits(timeout_seconds), counted_retries() as retries:
        served = dataclasses.replace(source, shards=tuple(server.url + path for path in files))
        while server.requests < requests:
            order_seed = seed + counts["passes"]
            expected, found = read_texts(source, order_seed), read_texts(served, order_seed)
            counts["passes"] += 1
            counts["documents"] += len(found)
            counts["lost"] += (Counter(expected) - Counter(found)).total()
            counts["doubled"] += (Counter(found) - Counter(expected)).total()
            counts["passes_out_of_order"] += found != expected
    return {
        "requests": server.requests,
        "faults": server.faults.total(),
        "faults_by_kind": dict(server.faults.most_common()),
        "files": len(files),
        "passes": counts["passes"],
        "documents_read": counts["documents"],
        "documents_lost": counts["lost"],
        "documents_doubled": counts["doubled"],
        "passes_out_of_order": counts["passes_out_of_order"],
        "retries_logged": retries.count,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def print_figures(figures: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(title="Reading through a faulty server", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    for name, value in figures.items():
        if isinstance(value, dict):
            for kind, count in value.items():
                table.add_row(f"  {kind}", f"{count:,}")
        else:
            table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file, folder or glob of documents; by default random ones in every format")
    parser.add_argument("--files", type=int, default=5, help="generated files of each format")
    parser.add_argument("--documents", type=int, default=200, help="generated documents of a file")
    parser.add_argument("--requests", type=int, default=5000, help="read until the server has answered so many")
    parser.add_argument("--fault-rate", type=float, default=0.5, help="share of the requests that meet a fault")
    parser.add_argument("--timeout", type=float, default=0.25, help="seconds of silence that the reader bears")
    parser.add_argument("--seed", type=int, default=0, help="of faults and order")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - for standard output")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.data:
            source = resolve(options.data, split="train", separate=True)
        else:
            source = write_files(Path(folder), files=options.files, documents=options.documents)
        figures = measure(
            source,
            requests=options.requests,
            fault_rate=options.fault_rate,
            seed=options.seed,
            timeout_seconds=options.timeout,
        )
    print_figures(figures, wide_console(stderr=options.json == "-"))
    if options.json:
        settings = {"seed": options.seed, "fault_rate": options.fault_rate, "timeout_seconds": options.timeout}
        write_json(options.json, {"settings": settings, **figures})
    return int(any(figures[key] for key in ("documents_lost", "documents_doubled", "passes_out_of_order")))


if __name__ == "__main__":
    sys.exit(main())
