"""Which documents, and in which order.

1. source   what --data names becomes a `Source`: shards, and which of their documents belong
2. epoch    the shards in an order drawn from (seed, epoch)
3. shard    its records in their order, read by `source.read_records`
4. block    `shuffle_block_documents` consecutive documents, permuted by a draw from (seed, epoch, shard, block)

Each draw is recomputed from its numbers, so the place in the data is eight integers, a `Cursor`, however large the
shards are. The order knows nothing of ranks: it is the same for any number of them.
"""

import contextlib
import dataclasses
import glob
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from velora_pretrain.data import remote, source
from velora_pretrain.data.manifest import Split, c4_shards, is_fetched, read_manifest
from velora_pretrain.data.shard_tokens import ShardTokens
from velora_pretrain.errors import UserError
from velora_pretrain.hints import nearest

logger = logging.getLogger(__name__)

AUTO_TIMEOUT_SECONDS = 5.0
C4_TIMEOUT_SECONDS = 15.0
PROBE_DELAY_SECONDS = 0.5
OFFLINE = "HF_HUB_OFFLINE is set, so the Hugging Face hub is not asked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The documents of one split."""

    name: str
    """`c4`, `sample`, or the path, glob or URL as the user gave it: the word for the run's records."""
    shards: tuple[str, ...]
    """Files or URLs, in the order that numbers them."""
    part: Literal["all", "train", "validation"] = "all"
    """Which documents of the shards belong to this source."""
    holdout_every_documents: int = 1000
    """Unless `part` is "all": record n of a shard, counted from 0, is for validation if n + 1 is a multiple of this."""
    copies: Mapping[str, str] | None = None
    """Of a folder with copies of some shards: the files, by shard; they are read in their places, and the others from
    the hub. None of any other data."""
    tokens: Mapping[str, ShardTokens] = dataclasses.field(default_factory=dict)
    """What was tokenised before, by shard; read in place of the text."""
    fallback_reason: str | None = None
    """Why `auto` took the sample and not C4; None if it did not."""

    def holds(self, number: int) -> bool:
        """Whether the record of this number, in any shard, belongs."""
        held_out = (number + 1) % self.holdout_every_documents == 0
        return self.part == "all" or held_out == (self.part == "validation")


def resolve(
    data: str,
    *,
    split: Split,
    holdout_every_documents: int = 1000,
    separate: bool = False,
    probe: Callable[[float], str | None] | None = None,
) -> Source:
    """Find the shards that --data means.

    Args:
        data: `auto`, `c4`, `sample`, or a file, folder, glob, http(s) URL or hf://datasets/OWNER/NAME/FILE.
        split: Which side of the data. C4 has files for each; of other data every n-th document is for validation.
        holdout_every_documents: That n.
        separate: The user named data for this split alone: take every document of it.
        probe: Says within so many seconds why the hub cannot be used, or None if it can; `hub_fault` unless given.

    Raises:
        UserError: No file is meant by `data`, one is of unknown format, or `c4` is asked for and the hub is away.
    """
    probe = probe or hub_fault
    part = "all" if separate else split
    if holdout_every_documents < 2 and part != "all":
        raise UserError(f"holdout_every_documents is {holdout_every_documents}; it must be at least 2")
    if data in ("auto", "c4"):
        reason = probe(AUTO_TIMEOUT_SECONDS if data == "auto" else C4_TIMEOUT_SECONDS)
        if reason is None:
            return Source(name="c4", shards=c4_shards(split))
        if data == "c4":
            raise UserError(
                f"data = c4: {reason}; without the hub these work: `velora-pretrain train --size 60m --data sample`, "
                "`velora-pretrain train --size 60m --data PATH` with files of your own"
            )
        sample = resolve("sample", split=split, holdout_every_documents=holdout_every_documents, separate=separate)
        return dataclasses.replace(sample, fallback_reason=reason)
    if data == "sample":
        from velora_pretrain.data.sample import sample_file

        shards: tuple[str, ...] = (str(sample_file()),)
    elif not remote.is_remote(data) and is_fetched(folder := Path(data).expanduser()):
        manifest = read_manifest(folder)
        return Source(name=data, shards=manifest.shards(split), copies=manifest.copies(folder, split))
    else:
        shards = _named_shards(data)
    return Source(name=data, shards=shards, part=part, holdout_every_documents=holdout_every_documents)


def hub_fault(timeout_seconds: float) -> str | None:
    """Why C4 cannot be read from the hub, found out within `timeout_seconds`; None if it can."""
    if is_offline():
        return OFFLINE
    faults: list[str | None] = []

    deadline = time.monotonic() + timeout_seconds

    def ask() -> None:
        while True:
            try:
                asked = remote.request(c4_shards("validation")[0], last_byte=0)
                remote.open_url(asked, timeout_seconds=timeout_seconds).close()
                faults.append(None)
            except Exception as error:  # whatever it is, the hub cannot be used and this is the reason
                if remote.is_passing(error) and time.monotonic() + PROBE_DELAY_SECONDS < deadline:
                    time.sleep(PROBE_DELAY_SECONDS)
                    continue
                faults.append(" ".join(str(getattr(error, "reason", None) or error).split()))
            return

    # In a thread, because no timeout of ours reaches the look-up of the hub's name.
    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    reason = faults[0] if faults else f"nothing within {timeout_seconds:.0f} s"
    return reason and f"the Hugging Face hub ({remote.hub_endpoint()}) does not answer ({reason})"


def is_c4(data: object) -> bool:
    """Whether --data means C4 in its order, read from the hub or from a folder of copies."""
    return data == "c4" or (isinstance(data, str) and is_fetched(Path(data).expanduser()))


def is_same_data(one: object, other: object) -> bool:
    """Whether two values of --data mean the same documents in the same order, as far as their words tell."""
    return one == other or (is_c4(one) and is_c4(other))


def is_offline() -> bool:
    """Whether the user wants the hub left alone."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def _named_shards(data: str) -> tuple[str, ...]:
    """The files that a path, folder or glob means, in the order of their names; a remote address as it is."""
    if remote.is_remote(data):
        remote.web_address(data)
        source.ending(data)
        return (data,)
    path = Path(data).expanduser()
    if path.is_dir():
        known = sorted(str(file) for file in path.iterdir() if str(file).lower().endswith(source.ENDINGS))
        if not known:
            raise UserError(f"{data}: the folder holds no file that ends in {', '.join(source.ENDINGS)}")
        return tuple(known)
    if path.exists():
        found = [str(path)]
    elif glob.has_magic(data):
        found = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not found:
            raise UserError(f"{data}: no file matches the pattern; quote it, and check the folder")
    else:
        near = nearest(data, ("auto", "c4", "sample"))
        raise UserError(f"{data}: no such file; {near}--data takes auto, c4, sample, a path, a glob or a URL")
    for shard in found:
        source.ending(shard)
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the order: everything before it is used, everything from it on is still to come."""

    epoch: int = 0
    shard_position: int = 0
    """Place in the epoch's order of shards."""
    block: int = 0
    record: int = 0
    """Records of the shard before the block's first, so that a resume need not parse them."""
    document: int = 0
    """Documents of the permuted block that are used up."""
    token: int = 0
    """Tokens of the next document, its EOS included, that are used up."""
    bad_lines: int = 0
    """Skipped in this epoch before the block."""
    empty_documents: int = 0
    """Likewise."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Documents read together, in their final order."""

    start: Cursor
    """Of the first of `texts`."""
    texts: Sequence[str | source.Tokenised]


def permutation(count: int, *key: int) -> list[int]:
    """A permutation drawn from `key`, the same on every platform and with every version of numpy.

    numpy promises the raw words of a bit generator for all time, and of its own `permutation` it does not.
    """
    seed = int.from_bytes(hashlib.sha256(",".join(map(str, key)).encode()).digest(), "little")
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").tolist()


def read_blocks(
    documents: Source,
    *,
    seed: int,
    shuffle_block_documents: int,
    max_bad_lines: int,
    shuffle: bool = True,
    repeat: bool = True,
    cursor: Cursor = Cursor(),
) -> Iterator[Block]:
    """The documents in their order from `cursor` on.

    Args:
        documents: What to read.
        seed: Of the order.
        shuffle_block_documents: Documents that are held in memory and permuted together.
        max_bad_lines: Bad records that are skipped in one epoch before the next one is an error.
        shuffle: Draw the order of shards and documents; else both stay as they are.
        repeat: Begin the next epoch, for ever; else stop after the first.
        cursor: Where to begin.

    Raises:
        UserError: A shard cannot be read, too many records are bad, or an epoch holds no document.
    """
    while repeat or cursor.epoch == 0:
        count = len(documents.shards)
        order = permutation(count, seed, cursor.epoch) if shuffle else list(range(count))
        from_the_start, found = cursor == Cursor(epoch=cursor.epoch), False
        for position in range(cursor.shard_position, count):
            shard = order[position]
            for block, following in _read_shard(documents, shard, cursor, shuffle_block_documents, max_bad_lines):
                cursor = following
                if not block.texts:
                    continue
                found = True
                key = (seed, block.start.epoch, shard, block.start.block)
                draw = permutation(len(block.texts), *key) if shuffle else range(len(block.texts))
                yield Block(block.start, [block.texts[index] for index in draw][block.start.document :])
            cursor = dataclasses.replace(cursor, shard_position=position + 1, block=0, record=0)
        if from_the_start and not found:
            raise UserError(_no_documents(documents))
        cursor = Cursor(epoch=cursor.epoch + 1)


def _read_shard(
    documents: Source, shard: int, cursor: Cursor, shuffle_block_documents: int, max_bad_lines: int
) -> Iterator[tuple[Block, Cursor]]:
    """The blocks of one shard as they stand in it, each with the place after it; the last one is empty."""
    name = documents.shards[shard]
    records = _records(documents, name, cursor)
    name = (documents.copies or {}).get(name, name)
    with contextlib.closing(records):
        while True:
            texts, following = _read_block(records, cursor, name, shuffle_block_documents, max_bad_lines)
            if cursor.document > len(texts):
                raise UserError(
                    f"{name}: holds fewer documents than when the checkpoint was written; give the same data or start "
                    "a new run"
                )
            yield Block(cursor, texts), following
            if not texts:
                return
            cursor = following


def _records(documents: Source, shard: str, cursor: Cursor) -> Generator[source.Record, None, None]:
    """The records of a shard: from its tokens if they lie ready, its copy if there is one, else where it is named."""
    wanted = {"skip_records": cursor.record, "wanted": documents.holds}
    if shard in documents.tokens:
        yield from documents.tokens[shard].records(**wanted)
    elif documents.copies is None or shard in documents.copies:
        yield from source.read_records((documents.copies or {}).get(shard, shard), **wanted)
    else:
        try:
            if is_offline():
                raise ConnectionError(OFFLINE)
            yield from source.read_records(shard, **wanted)
        except ConnectionError as error:
            more = f"--shards above {cursor.shard_position}" if "train." in shard else "a larger evaluation.tokens"
            raise UserError(
                f"{documents.name}: holds no copy of {shard}, and it cannot be read from the hub ({error}); fetch it:"
                f" `velora-pretrain data fetch --to {documents.name}` with {more}"
            ) from error


def _read_block(
    records: Iterator[source.Record], start: Cursor, shard: str, limit: int, max_bad_lines: int
) -> tuple[list[str | source.Tokenised], Cursor]:
    """Up to `limit` documents as they stand in the shard, and the place after them."""
    texts: list[str | source.Tokenised] = []
    record, bad_lines, empty_documents = start.record, start.bad_lines, start.empty_documents
    while len(texts) < limit and (found := next(records, None)) is not None:
        record = found.number + 1
        if found.text is None:
            bad_lines += 1
            message = f"{source.place(shard, found.number)}: {found.fault}"
            if bad_lines > max_bad_lines:
                raise UserError(f"{message}; mend it or raise max_bad_lines (now {max_bad_lines})")
            logger.warning("%s; skipped (%d of at most %d)", message, bad_lines, max_bad_lines)
        elif found.is_empty:
            empty_documents += 1
        else:
            texts.append(found.text)
    return texts, Cursor(
        epoch=start.epoch,
        shard_position=start.shard_position,
        block=start.block + 1,
        record=record,
        bad_lines=bad_lines,
        empty_documents=empty_documents,
    )


def _no_documents(documents: Source) -> str:
    if documents.part == "all":
        return f"{documents.name}: holds no documents; every record is empty or bad"
    return (
        f"{documents.name}: holds no documents for {documents.part}, as every {documents.holdout_every_documents}th is "
        "for validation; lower reading.holdout_every_documents or give more data"
    )
