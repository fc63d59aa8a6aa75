"""Documents to sequences, against the definitions written out slowly."""

import itertools
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from velora_pretrain.data.c4 import Cursor
from velora_pretrain.data.packing import Document, Packer, Padder, Sequences, grouped, join, limited, pad_rows

EOS, PAD = 1, 0
TOKENS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), max_size=12)


def documents(rows, token=0) -> list[Document]:
    return [
        Document(Cursor(document=n, token=token if n == 0 else 0), row, [10 * value for value in row])
        for n, row in enumerate(rows)
    ]


def split(items, cuts):
    bounds = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


@given(rows=TOKENS, length=st.integers(2, 10))
def test_pad_is_the_published_protocol(rows, length):
    made = Padder(length, eos_id=EOS, pad_id=PAD).add(documents(rows))
    assert made.tokens.dtype == np.int64 and made.tokens.shape == (len(rows), length)
    for n, row in enumerate(rows):
        expected = [*row[: length - 1], EOS]
        assert made.lengths[n] == len(expected)
        assert made.tokens[n].tolist() == expected + [PAD] * (length - len(expected))
        assert made.token_bytes[n].tolist() == (
            [10 * value for value in expected[:-1]] + [0] * (length - len(expected) + 1)
        )
        assert made.after[n] == Cursor(document=n + 1)
    assert len(Padder(length, eos_id=EOS, pad_id=PAD).flush()) == 0


def test_pad_agrees_with_the_t5_tokenizer_of_transformers(shared_data):
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    model = str(shared_data / "tokenizers/t5_spiece.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "tokenizers/t5_spiece.model"))
    # From its pieces, as reading the file itself takes transformers another library.
    pieces = [(model.id_to_piece(n), model.get_score(n)) for n in range(model.vocab_size())]
    theirs = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    texts = ["Short.", "A document of some more words than the sequence has room for, as most have."]
    expected = theirs(texts, truncation=True, max_length=12, padding="max_length")["input_ids"]
    assert Padder(12, eos_id=1, pad_id=0).add(documents(model.encode(texts))).tokens.tolist() == expected


@given(rows=TOKENS, length=st.integers(2, 10), cuts=st.lists(st.integers(0, 12), max_size=3))
def test_pack_loses_and_adds_nothing(rows, length, cuts):
    packer = Packer(length, eos_id=EOS, pad_id=PAD)
    made = join([*(packer.add(chunk) for chunk in split(documents(rows), cuts)), packer.flush()])
    stream = [value for row in rows for value in (*row, EOS)]
    counts = [value for row in rows for value in (*(10 * token for token in row), 0)]
    rest = len(stream) % length
    kept = stream if rest != 1 else stream[:-1]
    flat = [value for row, size in zip(made.tokens, made.lengths, strict=True) for value in row[:size]]
    assert flat == kept
    assert [b for row, size in zip(made.token_bytes, made.lengths, strict=True) for b in row[:size]] == (
        counts[: len(kept)]
    )
    assert (made.lengths[:-1] == length).all()
    for row, size in zip(made.tokens, made.lengths, strict=True):
        assert (row[size:] == PAD).all()


@given(
    rows=TOKENS.filter(bool),
    length=st.integers(2, 10),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    place=st.integers(0, 100),
)
def test_pack_goes_on_from_the_cursor_after_any_sequence(rows, length, cuts, place):
    packer = Packer(length, eos_id=EOS, pad_id=PAD)
    made = join([packer.add(chunk) for chunk in split(documents(rows), cuts)])
    if not len(made):
        return
    place %= len(made)
    after = made.after[place]
    rest = [
        replace_cursor(document, after if document.cursor.document == after.document else None)
        for document in documents(rows)[after.document :]
    ]
    resumed = Packer(length, eos_id=EOS, pad_id=PAD).add(rest)
    np.testing.assert_array_equal(resumed.tokens, made.tokens[place + 1 :])
    np.testing.assert_array_equal(resumed.token_bytes, made.token_bytes[place + 1 :])
    assert resumed.after == made.after[place + 1 :]


def replace_cursor(document: Document, cursor: Cursor | None) -> Document:
    return document if cursor is None else document._replace(cursor=replace(document.cursor, token=cursor.token))


@pytest.mark.parametrize("chunks", [[2], [1, 1]])
def test_a_place_does_not_depend_on_which_documents_came_together(chunks):
    """A sequence that ends with a document leads to the next number in its block, though the next block follows."""
    first = Document(Cursor(block=0, document=4), [5, 6, 7])
    second = Document(Cursor(block=1, record=9), [8, 9])
    packer = Packer(2, eos_id=EOS, pad_id=PAD)
    made = join([packer.add(chunk) for chunk in ([[first, second]] if chunks == [2] else [[first], [second]])])
    assert made.tokens.tolist() == [[5, 6], [7, EOS], [8, 9]]
    assert made.after == [
        Cursor(block=0, document=4, token=2),
        Cursor(block=0, document=5),
        Cursor(block=1, record=9, token=2),
    ]


def test_pack_keeps_little_and_its_place_is_small():
    packer = Packer(8, eos_id=EOS, pad_id=PAD)
    tracemalloc.start()
    for n in range(200):
        made = packer.add([Document(Cursor(document=n), list(range(1000)))])
    kept_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept_bytes < 1_000_000
    assert len(json.dumps(made.after[-1].token)) < 10


def test_rows_of_counts_left_out_are_zero():
    made = Padder(4, eos_id=EOS, pad_id=PAD).add([Document(Cursor(), [5, 6])])
    assert made.token_bytes.tolist() == [[0, 0, 0, 0]]
    packed = Packer(2, eos_id=EOS, pad_id=PAD).add([Document(Cursor(), [5, 6, 7])])
    assert packed.token_bytes.tolist() == [[0, 0], [0, 0]]
    assert pad_rows([], 4, last=1, fill=0).shape == (0, 4)


def made_of(lengths) -> Sequences:
    rows = [Document(Cursor(document=n), [n + 2] * (length - 1)) for n, length in enumerate(lengths)]
    return Padder(16, eos_id=EOS, pad_id=PAD).add(rows)


LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=20)


@given(lengths=LENGTHS, cuts=st.lists(st.integers(0, 20), max_size=3), size=st.integers(1, 7))
def test_groups_do_not_depend_on_how_the_rows_arrive(lengths, cuts, size):
    whole = made_of(lengths)
    bounds = [0, *sorted(cuts), 99]
    groups = list(grouped((whole[a:b] for a, b in itertools.pairwise(bounds)), size))
    assert [len(group) for group in groups[:-1]] == [size] * (len(groups) - 1)
    np.testing.assert_array_equal(join(groups).tokens, whole.tokens)
    assert join(groups).after == whole.after


@given(lengths=LENGTHS, cuts=st.lists(st.integers(0, 20), max_size=3), limit=st.integers(1, 200))
@example(lengths=[5] * 12, cuts=[3, 6, 9], limit=38)
def test_the_limit_stops_at_the_sequence_that_reaches_it(lengths, cuts, limit):
    whole = made_of(lengths)
    bounds = [0, *sorted(cuts), 99]
    kept = join(list(limited((whole[a:b] for a, b in itertools.pairwise(bounds)), limit)))
    targets = [length - 1 for length in lengths]
    expected = next((n for n in range(1, len(targets) + 1) if sum(targets[:n]) >= limit), len(targets))
    assert kept.after == whole.after[:expected]
