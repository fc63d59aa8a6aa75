"""Which tokens that lie ready a run can use, and why not the others.

Each shard has its own, so that some may be there and others not, and what was made for a folder serves every pattern
that names one of its files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from velora_pretrain.data.c4 import Source
from velora_pretrain.data.remote import is_remote
from velora_pretrain.data.shard_tokens import AGAIN, ShardTokens, Unusable, check_shard, read_meta, tokens_folder


def local_shards(documents: Source) -> dict[str, Path]:
    """The files of a source that are on this machine, by shard."""
    copies = documents.copies or {}
    places = {shard: copies.get(shard, shard) for shard in documents.shards}
    return {shard: Path(where) for shard, where in places.items() if not is_remote(where)}


def with_tokens(
    documents: Source, tokenizer: Any, setting: str, *, for_evaluation: bool = False
) -> tuple[Source, list[str]]:
    """The same documents, read from tokens where these lie ready.

    Args:
        documents: The source.
        tokenizer: The tokenizer that the run would use.
        setting: `reading.token_cache`.
        for_evaluation: Whether the bytes of each token are asked for, without which tokens are of no use.

    Returns:
        The source, and lines for the user: what is used, and what is not and why.
    """
    sha256 = getattr(tokenizer, "sha256", None)
    if setting == "none" or sha256 is None:
        return documents, []
    output = None if setting == "auto" else Path(setting).expanduser()
    if output is not None and not output.is_dir():
        return documents, [f"reading.token_cache: there is no folder {setting}, so the text is tokenised"]
    found: dict[str, ShardTokens] = {}
    others: set[str] = set()
    reasons: list[str] = []
    shards = local_shards(documents)
    for shard, path in shards.items():
        folder = tokens_folder(path, sha256, output)
        if not folder.is_dir():
            others |= {str(other) for other in folder.parent.parent.glob(f"tokens-*/{_escaped(path.name)}")}
            continue
        try:
            meta = read_meta(folder)
            check_shard(meta, path)
            if meta.tokenizer_sha256 != sha256:
                raise Unusable("it is of another tokenizer")
        except Unusable as reason:
            reasons.append(f"{folder}: not used, the text is tokenised: {reason}; {AGAIN}")
            continue
        if meta.has_bytes or not for_evaluation:
            found[shard] = ShardTokens(folder, meta, with_bytes=for_evaluation)
    remarks = reasons[:1] + ([f"({len(reasons) - 1} more of that kind)"] if len(reasons) > 1 else [])
    if found:
        what = "validation shards" if for_evaluation else "shards"
        folder = next(iter(found.values())).folder.parent
        remarks.append(f"{len(found)} of {len(shards)} {what} lie tokenised in {folder}")
    elif others and not reasons:
        remarks.append(f"{min(others)}: not used, the text is tokenised: it is of another tokenizer")
    return dataclasses.replace(documents, tokens=found), remarks


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
