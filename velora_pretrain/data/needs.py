"""Which shards of C4 a run reads, in its order, and whether they are at hand."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable

from velora_pretrain.config import Run
from velora_pretrain.data.c4 import AUTO_TIMEOUT_SECONDS, Source, hub_fault, permutation
from velora_pretrain.data.manifest import Split, c4_shards
from velora_pretrain.errors import UserError

DOCUMENTS_PER_SHARD: dict[Split, int] = {"train": 364_868_892 // 1024, "validation": 364_608 // 8}
"""Of C4 `en`."""
TOKENS_PER_DOCUMENT = 400
"""Fewer than the 500 or so of C4 with T5's tokenizer, so that packed runs have some shards to spare."""
TARGETS_PER_DOCUMENT = 100
"""Half of what padding to the published 256 tokens leaves of a document on average, for the same reason."""


def shards_needed(run: Run, split: Split, total: int) -> int:
    """How many shards a run reads of a split that has so many.

    With `pad` every sequence is a document, so the number of training shards is known; the others are estimates from
    above.
    """
    length = run.batch.sequence_length
    if split == "validation":
        per_document = min(TARGETS_PER_DOCUMENT, length // 2)
        documents = run.evaluation.tokens / per_document
    else:
        documents = run.steps * run.batch.sequences
        if run.packing == "pack":
            documents *= length / TOKENS_PER_DOCUMENT
    return min(total, math.ceil(documents / DOCUMENTS_PER_SHARD[split]))


def in_order(shards: tuple[str, ...], seed: int) -> list[str]:
    """Training shards as a run with this seed of the data order reads them in its first epoch."""
    return [shards[number] for number in permutation(len(shards), seed, 0)]


def shards_to_fetch(run: Run, *, count: int | None, validation: bool) -> list[str]:
    """The shards of C4 that a run reads: training shards in its order, then validation shards.

    Args:
        run: The run.
        count: Training shards, where the run's need is not asked.
        validation: Whether those for its evaluations are asked for, too.

    Raises:
        UserError: There are not so many.
    """
    train, held_out = c4_shards("train"), c4_shards("validation")
    if count is not None and count > len(train):
        raise UserError(f"--shards {count}: C4 has {len(train)}")
    wanted = in_order(train, run.shuffle_seed)[: count or shards_needed(run, "train", len(train))]
    return wanted + list(held_out[: shards_needed(run, "validation", len(held_out)) if validation else 0])


def check_at_hand(
    run: Run,
    source: Source,
    validation: Source,
    *,
    first_position: int = 0,
    probe: Callable[[float], str | None] = hub_fault,
) -> str | None:
    """Sees at the start that a folder with copies of C4 has what a run reads, or that the hub has the rest.

    Args:
        run: The run.
        source: Its training documents.
        validation: Its validation documents.
        first_position: Place in the order of the first training shard that it still reads.
        probe: Says within so many seconds why the hub cannot be used, or None if it can.

    Returns:
        A line that says what will be read from the hub; None if nothing.

    Raises:
        UserError: Something is missing, and the hub cannot be used. Where the need is only an estimate, a run may go on
            until what is there is used up: it is not lost then. An evaluation that fails would lose what was trained
            since the last checkpoint, so that what it needs is asked for, rather too much than too little.
    """
    lacking: list[str] = []
    remedies: list[str] = []
    folder, is_certain = "", False
    if source.copies is not None:
        count = shards_needed(run, "train", len(source.shards))
        shards = in_order(source.shards, run.shuffle_seed)[first_position:count]
        here = sum(shard in source.copies for shard in shards)
        if here < len(shards):
            lacking.append(f"{here} of the {len(shards)} training shards")
            remedies.append("schedule.steps")
            folder, is_certain = source.name, run.packing == "pad"
    if validation.copies is not None:
        shards = validation.shards[: shards_needed(run, "validation", len(validation.shards))]
        here = sum(shard in validation.copies for shard in shards)
        if here < len(shards):
            lacking.append(f"{here} of the {len(shards)} validation shards")
            remedies.append("evaluation.tokens")
            folder, is_certain = validation.name, True
    if not lacking:
        return None
    held = f"{folder}: holds {' and '.join(lacking)} that this run reads"
    command = fetch_command(run, folder, len(source.shards))
    fault = probe(AUTO_TIMEOUT_SECONDS)
    if fault is None:
        return f"{held}; the others are read from the hub, or fetched by: {command}"
    if not is_certain:
        return f"{held} by estimate, and {fault}; if they do not last, it stops with a checkpoint; to fetch: {command}"
    raise UserError(f"{held}, and {fault}; fetch them: {command}, or lower {' and '.join(remedies)}")


def fetch_command(run: Run, folder: str, total: int) -> str:
    """The command that brings what a run reads of so many training shards."""
    order = f"--seed {run.seed}"
    if run.reading.shuffle_seed is not None:
        order = f"--set reading.shuffle_seed={run.reading.shuffle_seed}"
    return (
        f"`velora-pretrain data fetch --to {shlex.quote(folder)} --shards {shards_needed(run, 'train', total)} {order}"
        f" --set evaluation.tokens={run.evaluation.tokens}`"
    )
