"""Batches: what every rank gets, in which order, after any interruption."""

import gc
import hashlib
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from velora_pretrain.data import loader as loader_module
from velora_pretrain.data.c4 import Cursor, Source, resolve
from velora_pretrain.data.loader import IGNORE_INDEX, TrainLoader, evaluation_batches, shift_labels
from velora_pretrain.data.packing import Document, Padder
from velora_pretrain.data.prefetch import Prefetcher
from velora_pretrain.errors import UserError


class ByteTokenizer:
    """One token a byte. Its padding's id is also a token's, which lengths must tell apart."""

    pad_id, eos_id, vocab_size = 97 + 3, 1, 259

    def encode(self, texts):
        return [[byte + 3 for byte in text.encode()] for text in texts]

    def encode_with_bytes(self, texts):
        return [(ids, [1] * len(ids)) for ids in self.encode(texts)]


TOKENIZER = ByteTokenizer()
COMMON = {"sequence_length": 8, "sequences": 6, "seed": 3, "shuffle_block_documents": 5}


def make_source(folder: Path, count: int = 40, shards: int = 3, part="all") -> Source:
    paths = []
    for shard in range(shards):
        path = folder / f"{shard}.jsonl"
        texts = [f"{shard}{n:02d}{'a' * (7 * n % 11)}" for n in range(count)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(str(path))
    return Source(name="x", shards=tuple(paths), part=part)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return make_source(tmp_path_factory.mktemp("loader"))


def take(source, count, **options):
    with TrainLoader(source, TOKENIZER, **{"packing": "pad", **COMMON, **options}) as loader:
        return [next(loader) for _ in range(count)]


def assert_same(batch, other):
    assert torch.equal(batch.inputs, other.inputs) and torch.equal(batch.labels, other.labels)
    assert (batch.num_target_tokens, batch.num_input_tokens) == (other.num_target_tokens, other.num_input_tokens)
    assert (batch.cursor, batch.digest) == (other.cursor, other.digest)


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_batches_are_what_they_say(source, packing):
    for batch in take(source, 30, packing=packing):
        assert batch.inputs.shape == batch.labels.shape == (6, 8)
        assert batch.inputs.dtype == batch.labels.dtype == torch.int64
        assert (batch.labels[:, -1] == IGNORE_INDEX).all()
        counted = batch.labels != IGNORE_INDEX
        assert batch.num_target_tokens == counted.sum()
        assert torch.equal(batch.labels[:, :-1][counted[:, :-1]], batch.inputs[:, 1:][counted[:, :-1]])
        assert batch.target_bytes == 0
        if packing == "pack":
            assert batch.num_input_tokens == 48 and batch.num_target_tokens == 42
        for row, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
            length = sum(label != IGNORE_INDEX for label in labels) + 1
            if packing == "pad":  # the text's own "a" has the padding's id and is a target all the same
                assert row[length - 1] == TOKENIZER.eos_id and set(row[length:]) <= {TOKENIZER.pad_id}
        json.dumps(batch.cursor)


def test_labels_by_hand():
    inputs = torch.tensor([[5, 6, 7, 1], [5, 1, 0, 0], [1, 0, 0, 0]])
    x = IGNORE_INDEX
    labels = shift_labels(inputs, torch.tensor([4, 2, 1]))
    assert labels.tolist() == [[6, 7, 1, x], [1, x, x, x], [x, x, x, x]]
    assert shift_labels(inputs[:0], torch.tensor([], dtype=torch.int64)).shape == (0, 4)


def test_pad_gives_every_document_of_an_epoch_once(source):
    rows = torch.cat([batch.inputs for batch in take(source, 20)])
    assert len({tuple(row[:3]) for row in rows.tolist()}) == 120


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    packing=st.sampled_from(["pad", "pack"]),
    first_world=st.sampled_from([1, 2, 3, 6]),
    second_world=st.sampled_from([1, 2, 3, 6]),
    stop=st.integers(0, 30),
    block=st.integers(1, 50),
)
def test_ranks_are_disjoint_and_cover_through_an_interruption(
    source, seed, packing, first_world, second_world, stop, block
):
    options = {"seed": seed, "packing": packing, "shuffle_block_documents": block}
    straight = take(source, 33, **options)
    cursor = None
    for world, start, end in ((first_world, 0, stop), (second_world, stop, 33)):
        ranks = [
            take(source, end - start, rank=rank, world_size=world, cursor=cursor, **options) for rank in range(world)
        ]
        for step, batches in enumerate(zip(*ranks, strict=True), start=start):
            assert torch.equal(torch.cat([batch.inputs for batch in batches]), straight[step].inputs)
            assert torch.equal(torch.cat([batch.labels for batch in batches]), straight[step].labels)
            for batch in batches:
                assert batch.num_target_tokens == straight[step].num_target_tokens
                assert batch.num_input_tokens == straight[step].num_input_tokens
                assert (batch.cursor, batch.digest) == (straight[step].cursor, straight[step].digest)
        if stop:
            cursor = json.loads(json.dumps(straight[stop - 1].cursor))


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("chunk_documents", [2, 256])
def test_a_resume_is_bitwise_the_straight_run_at_every_step(source, packing, chunk_documents, monkeypatch):
    monkeypatch.setattr(loader_module, "CHUNK_DOCUMENTS", chunk_documents)
    straight = take(source, 45, packing=packing)
    for step in range(0, 44, 3):
        cursor = json.loads(json.dumps(straight[step].cursor))
        assert len(json.dumps(cursor)) < 400
        for batch, expected in zip(take(source, 2, packing=packing, cursor=cursor), straight[step + 1 :], strict=False):
            assert_same(batch, expected)


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_a_digest_names_the_documents_of_the_global_batch(source, packing):
    options = {"packing": packing, "sequences": 4}
    digests = [batch.digest for batch in take(source, 12, **options)]
    assert len(set(digests)) == 12
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            batches = take(source, 12, rank=rank, world_size=world_size, **options)
            assert [batch.digest for batch in batches] == digests
    (batch,) = take(source, 1, **options)
    lengths = (batch.labels != IGNORE_INDEX).sum(dim=1) + 1
    content = batch.inputs.numpy().astype("<i8").tobytes() + lengths.numpy().astype("<i8").tobytes()
    assert batch.digest == hashlib.blake2b(content, digest_size=8).hexdigest()
    (batch, *_) = evaluation_batches(source, TOKENIZER, packing=packing, sequence_length=8, sequences=4)
    assert batch.digest == ""


def test_a_digest_depends_on_every_token_and_length():
    rows = Padder(6, eos_id=1, pad_id=0).add([Document(Cursor(document=n), [5, 6, 7]) for n in range(3)])
    digests = {loader_module._digest(rows)}
    for numbers in (rows.tokens, rows.lengths):
        for place in range(numbers.size):
            numbers.flat[place] += 1
            digests.add(loader_module._digest(rows))
            numbers.flat[place] -= 1
    assert len(digests) == 1 + rows.tokens.size + rows.lengths.size


def test_prefetching_changes_nothing(source):
    for batch, expected in zip(take(source, 9, prefetch_batches=1), take(source, 9), strict=True):
        assert_same(batch, expected)


def test_a_run_can_move_to_another_folder(source, tmp_path):
    cursor = take(source, 3)[-1].cursor
    assert_same(take(make_source(tmp_path), 1, cursor=cursor)[0], take(source, 4)[3])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 4}, "seed"),
        ({"shuffle_block_documents": 6}, "shuffle_block_documents"),
        ({"packing": "pack"}, "packing"),
        ({"sequence_length": 16}, "batch.sequence_length"),
    ],
)
def test_a_cursor_of_another_order_is_refused(source, change, key):
    cursor = take(source, 1)[0].cursor
    with pytest.raises(UserError, match=f"^{key} differs from the run that is resumed"):
        take(source, 1, cursor=cursor, **change)


def test_a_cursor_of_other_data_is_refused(source, tmp_path):
    cursor = take(source, 1)[0].cursor
    with pytest.raises(UserError, match=r"^data differs"):
        take(make_source(tmp_path, shards=4), 1, cursor=cursor)
    with pytest.raises(UserError, match=r"^data differs"):
        take(make_source(tmp_path, part="train"), 1, cursor=cursor)


def test_mistakes_are_named(source):
    with pytest.raises(UserError, match=r"batch\.sequences is 6, which 4 ranks cannot share evenly"):
        take(source, 1, world_size=4)
    with pytest.raises(UserError, match="packing is 'zip'; it must be one of pad, pack"):
        take(source, 1, packing="zip")
    with pytest.raises(UserError, match=r"batch\.sequence_length is 1"):
        take(source, 1, sequence_length=1)


def test_a_fault_in_the_data_reaches_the_caller_after_the_batches_before_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 20 + '{"text": 1}\n')
    source = resolve(str(path), split="train", separate=True)
    with TrainLoader(source, TOKENIZER, packing="pad", **{**COMMON, "sequences": 5}) as loader:
        for _ in range(4):
            next(loader)
        with pytest.raises(UserError, match=r"a\.jsonl line 21"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_documents_without_tokens_make_no_sequence(source, tmp_path):
    class Deaf(ByteTokenizer):
        def encode(self, texts):
            return [[] if text == "silent" else ids for text, ids in zip(texts, super().encode(texts), strict=True)]

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "silent"}\n{"text": "a"}\n')
    with TrainLoader(resolve(str(path), split="train", separate=True), Deaf(), packing="pad", **COMMON) as loader:
        assert next(loader).num_target_tokens == 6


# --- evaluation


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("limit", [None, 1, 100, 10**9])
def test_evaluation_does_not_depend_on_batches_and_ranks(source, packing, limit):
    def rows(sequences, world):
        ranks = [
            list(
                evaluation_batches(
                    source,
                    TOKENIZER,
                    packing=packing,
                    sequence_length=8,
                    sequences=sequences,
                    max_target_tokens=limit,
                    rank=rank,
                    world_size=world,
                )
            )
            for rank in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        steps = list(zip(*ranks, strict=True))
        for batches in steps:
            counted = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
            assert {batch.num_target_tokens for batch in batches} == {counted}
        return (
            torch.cat([batch.inputs for batches in steps for batch in batches]),
            sum(batches[0].num_target_tokens for batches in steps),
            sum(batches[0].target_bytes for batches in steps),
        )

    inputs, targets, target_bytes = rows(1, 1)
    if limit is not None and limit < 1000:
        assert limit <= targets < limit + 8
    for sequences, world in ((7, 1), (7, 3), (500, 2)):
        other = rows(sequences, world)
        assert torch.equal(other[0], inputs) and other[1:] == (targets, target_bytes)


def test_evaluation_keeps_the_order_of_the_files(source):
    batches = evaluation_batches(source, TOKENIZER, packing="pad", sequence_length=8, sequences=7)
    rows = torch.cat([batch.inputs for batch in batches])[:, :3] - 3
    assert [bytes(row) for row in rows.tolist()] == [b"%d%02d" % (s, n) for s in range(3) for n in range(40)]


def test_target_bytes_are_those_of_the_targets_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcd"}\n{"text": "abcdefghijkl"}\n')
    source = resolve(str(path), split="validation", separate=True)
    options = {"sequence_length": 8, "sequences": 9}
    # pad: bcd + EOS, then bcdefg + EOS. The first token has none before it, and EOS stands for no text.
    (batch,) = evaluation_batches(source, TOKENIZER, packing="pad", **options)
    assert (batch.num_target_tokens, batch.target_bytes, batch.num_input_tokens) == (4 + 7, 3 + 6, 5 + 8)
    # pack: abcd.abc defghijk l.
    (batch,) = evaluation_batches(source, TOKENIZER, packing="pack", **options)
    assert (batch.num_target_tokens, batch.target_bytes, batch.num_input_tokens) == (7 + 7 + 1, 6 + 7, 18)
    assert batch.inputs[2].tolist() == [ord("l") + 3, 1] + [TOKENIZER.pad_id] * 6


def test_evaluation_of_nothing_is_an_error(tmp_path):
    source = make_source(tmp_path, count=3, part="validation")
    with pytest.raises(UserError, match="no documents for validation"):
        list(evaluation_batches(source, TOKENIZER, packing="pad", sequence_length=8, sequences=2))


# --- the thread


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "data"]


def test_close_stops_the_thread_promptly(source):
    loader = TrainLoader(source, TOKENIZER, packing="pad", **COMMON)
    next(loader)
    begun = time.monotonic()
    loader.close()
    assert time.monotonic() - begun < 0.5
    assert not data_threads()
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_a_forgotten_loader_stops_its_thread(source):
    loader = TrainLoader(source, TOKENIZER, packing="pad", **COMMON)
    next(loader)
    assert data_threads()
    del loader
    gc.collect()
    assert not data_threads()


def test_an_evaluation_left_half_way_stops_its_thread(source):
    batches = evaluation_batches(source, TOKENIZER, packing="pad", sequence_length=8, sequences=2)
    next(batches)
    batches.close()
    assert not data_threads()


def test_reading_ahead_is_bounded_and_waiting_is_counted():
    made = []

    def slow():
        for n in range(100):
            if n < 2:
                time.sleep(0.1)
            made.append(n)
            yield n

    ahead = Prefetcher(slow(), 3)
    assert next(ahead) == 0
    assert next(ahead) == 1
    assert ahead.wait_seconds > 0.15
    time.sleep(0.2)
    assert len(made) <= 2 + 3 + 1
    before = ahead.wait_seconds
    assert next(ahead) == 2
    assert ahead.wait_seconds - before < 0.05
    ahead.close()


def test_any_exception_of_the_thread_is_raised_here():
    def broken():
        yield 1
        raise KeyError("x")

    ahead = Prefetcher(broken(), 2)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="x"):
        next(ahead)


def test_documents_without_a_token_are_said_and_not_waited_for(tmp_path):
    class Deaf(ByteTokenizer):
        def encode(self, texts):
            return [[] for _ in texts]

    with (
        TrainLoader(make_source(tmp_path), Deaf(), packing="pad", **COMMON) as loader,
        pytest.raises(UserError, match="no token in any document"),
    ):
        next(loader)


def test_a_file_of_another_size_is_another_order(tmp_path):
    source = make_source(tmp_path)
    cursor = take(source, 2)[-1].cursor
    with Path(source.shards[0]).open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(UserError, match="data differs from the run"):
        take(source, 1, cursor=cursor)
