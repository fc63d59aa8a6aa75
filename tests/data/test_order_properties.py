"""Whatever the shards, batches, ranks and interruptions: each document once per epoch, in one order."""

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from velora_pretrain.data import loader as loader_module
from velora_pretrain.data.c4 import Source
from velora_pretrain.data.loader import Batch, TrainLoader

EOS = 1
EPOCHS = 2.4


class NumberTokenizer:
    """A text is a document's number, which becomes its one token, repeated as often as the number decides."""

    pad_id, eos_id = 0, EOS

    def encode(self, texts):
        return [[int(text) + 2] * _length(int(text)) for text in texts]

    def encode_with_bytes(self, texts):
        raise NotImplementedError


def _length(number: int) -> int:
    return 1 + number * 7 % 9


@dataclass
class Case:
    """Shards of documents, a batch shape, and where which number of ranks takes over."""

    shards: list[list[int | None]]
    """Numbers of the documents; None for one without text."""
    is_held_out: bool
    options: dict
    chunk_documents: int
    takeovers: list[tuple[float, int]]
    """Part of the batches after which a number of ranks takes over."""

    @property
    def documents(self) -> list[int]:
        """Numbers of those that train."""
        every = 3 if self.is_held_out else 10**9
        return [n for shard in self.shards for at, n in enumerate(shard, start=1) if n is not None and at % every]

    @property
    def batches(self) -> int:
        """As many as it takes to be in the third epoch."""
        options, documents = self.options, self.documents
        tokens = sum(_length(number) + 1 for number in documents)
        rows = len(documents) if options["packing"] == "pad" else tokens / options["sequence_length"]
        return int(EPOCHS * rows / options["sequences"]) + 1


@st.composite
def cases(draw) -> Case:
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    numbers = itertools.count()
    empty = draw(st.lists(st.booleans(), min_size=50, max_size=50))
    shards = [[None if empty[n] and at else n for at, n in enumerate(itertools.islice(numbers, k))] for k in counts]
    sequences = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    worlds = st.sampled_from([world for world in range(1, sequences + 1) if sequences % world == 0])
    options = {
        "packing": draw(st.sampled_from(["pad", "pack"])),
        "sequence_length": draw(st.integers(2, 12)),
        "sequences": sequences,
        "seed": draw(st.integers(0, 2**63)),
        "shuffle_block_documents": draw(st.integers(1, 12)),
        "prefetch_batches": draw(st.integers(1, 4)),
    }
    takeovers = draw(st.lists(st.tuples(st.floats(0, 1), worlds), max_size=4))
    first = (0.0, draw(worlds))
    return Case(
        shards=shards,
        is_held_out=draw(st.booleans()),
        options=options,
        chunk_documents=draw(st.integers(1, 5)),
        takeovers=[first, *sorted(takeovers)],
    )


def write(case: Case, folder: Path) -> Source:
    paths = [folder / f"{number}.jsonl" for number in range(len(case.shards))]
    for path, numbers in zip(paths, case.shards, strict=True):
        lines = (json.dumps({"text": "" if number is None else str(number)}) for number in numbers)
        path.write_text("".join(f"{line}\n" for line in lines))
    return Source(
        name="numbers",
        shards=tuple(map(str, paths)),
        part="train" if case.is_held_out else "all",
        holdout_every_documents=3,
    )


def take(source: Source, case: Case, count: int, **options) -> list[Batch]:
    with TrainLoader(source, NumberTokenizer(), **case.options, **options) as loader:
        return [next(loader) for _ in range(count)]


def read_order(case: Case, batches: list[Batch]) -> list[int]:
    """The numbers of the documents that the batches used up, in order; each must be whole."""
    rows = torch.cat([batch.inputs for batch in batches])
    if case.options["packing"] == "pad":
        return (rows[:, 0] - 2).tolist()
    order, run = [], []
    for token in rows.flatten().tolist():
        if token != EOS:
            run.append(token - 2)
            continue
        assert run == [run[0]] * _length(run[0])
        order.append(run[0])
        run = []
    return order


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_each_document_once_per_epoch_whoever_reads_and_however_often_it_is_interrupted(case):
    with tempfile.TemporaryDirectory() as folder:
        source = write(case, Path(folder))
        chunk, loader_module.CHUNK_DOCUMENTS = loader_module.CHUNK_DOCUMENTS, case.chunk_documents
        try:
            check(source, case)
        finally:
            loader_module.CHUNK_DOCUMENTS = chunk


def check(source: Source, case: Case) -> None:
    straight = take(source, case, case.batches)
    order, documents = read_order(case, straight), sorted(case.documents)
    for first in range(0, len(order), len(documents)):
        epoch = order[first : first + len(documents)]
        assert sorted(epoch) == documents or (len(epoch) < len(documents) and len(set(epoch)) == len(epoch))
        assert set(epoch) <= set(documents)
    assert len(order) >= 2 * len(documents)

    ends = [int(part * case.batches) for part, _ in case.takeovers[1:]] + [case.batches]
    begin = 0
    for (_, world_size), end in zip(case.takeovers, ends, strict=True):
        cursor = json.loads(json.dumps(straight[begin - 1].cursor)) if begin else None
        ranks = [
            take(source, case, end - begin, rank=rank, world_size=world_size, cursor=cursor)
            for rank in range(world_size)
        ]
        rows = case.options["sequences"] // world_size
        for expected, parts in zip(straight[begin:end], zip(*ranks, strict=True), strict=True):
            assert [part.first_row for part in parts] == [rank * rows for rank in range(world_size)]
            assert torch.equal(torch.cat([part.inputs for part in parts]), expected.inputs)
            assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
            for part in parts:
                assert (part.cursor, part.digest) == (expected.cursor, expected.digest)
                assert part.num_target_tokens == expected.num_target_tokens
        begin = end
