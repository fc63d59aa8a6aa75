"""Which shards are still to be tokenised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from velora_pretrain.data.c4 import resolve
from velora_pretrain.data.remote import is_remote
from velora_pretrain.data.shard_tokens import META_FILE, ShardTokens, Unusable, check_shard, read_meta, tokens_folder
from velora_pretrain.data.token_cache import local_shards
from velora_pretrain.data.tokenizer import Tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.files import sha256_of, write_atomically


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to tokenise."""

    shard: str
    """A file."""
    folder: str
    """Where its tokens go."""
    tokenizer: str
    tokenizer_sha256: str
    with_bytes: bool


def jobs_of(data: str, tokenizer: Tokenizer, *, output: Path | None, for_evaluation: bool) -> tuple[list[Job], int]:
    """What is to be made for --data, and how many of its shards have their tokens already.

    Args:
        data: As of a run, but on this machine.
        tokenizer: The tokenizer.
        output: Where the tokens go, if not beside the data.
        for_evaluation: Whether to keep what evaluations ask for; validation shards that were fetched have it always.

    Raises:
        UserError: There is no such file, or it is elsewhere.
    """
    if data in ("auto", "c4") or is_remote(data):
        raise UserError(
            f"--data {data}: is read over the network; fetch it first, for C4 by `velora-pretrain data fetch`, and give"
            " the folder"
        )
    source = resolve(data, split="train", separate=True)
    jobs, ready = jobs_for(list(local_shards(source).values()), tokenizer, output=output, with_bytes=for_evaluation)
    if source.copies is not None:
        held_out = local_shards(resolve(data, split="validation"))
        more, ready_too = jobs_for(list(held_out.values()), tokenizer, output=output, with_bytes=True)
        jobs, ready = jobs + more, ready + ready_too
        if not jobs and not ready:
            raise UserError(f"{data}: holds no shard yet; bring some by `velora-pretrain data fetch --to {data}`")
    return jobs, ready


def jobs_for(
    paths: Sequence[Path], tokenizer: Tokenizer, *, output: Path | None, with_bytes: bool
) -> tuple[list[Job], int]:
    """What is to be made, and how many shards have theirs already.

    Raises:
        UserError: Two shards would share a folder.
    """
    jobs, ready, taken = [], 0, dict[Path, Path]()
    for path in paths:
        folder = tokens_folder(path, tokenizer.sha256, output)
        if folder in taken:
            raise UserError(f"--output {output}: {taken[folder]} and {path} have the same name; tokenise them apart")
        taken[folder] = path
        if _is_ready(path, folder, tokenizer, with_bytes):
            ready += 1
            continue
        jobs.append(
            Job(
                shard=str(path),
                folder=str(folder),
                tokenizer=tokenizer.name,
                tokenizer_sha256=tokenizer.sha256,
                with_bytes=with_bytes,
            )
        )
    return jobs, ready


def _is_ready(path: Path, folder: Path, tokenizer: Tokenizer, with_bytes: bool) -> bool:
    """Whether a shard has its tokens; where only its time of change is another, that is put right."""
    try:
        meta = read_meta(folder)
        if meta.tokenizer_sha256 != tokenizer.sha256 or (with_bytes and not meta.has_bytes):
            return False
        try:
            check_shard(meta, path)
        except Unusable:
            if meta.shard_size_bytes != path.stat().st_size or meta.shard_sha256 != sha256_of(path):
                return False
            meta = dataclasses.replace(meta, shard_mtime_ns=path.stat().st_mtime_ns)
            write_atomically(folder / META_FILE, json.dumps(dataclasses.asdict(meta)).encode())
        # Read through, so that this command mends whatever a run has refused.
        for _ in ShardTokens(folder, meta, meta.has_bytes).records(skip_records=0, wanted=lambda _: True):
            pass
        return True
    except (Unusable, UserError, OSError):
        return False
