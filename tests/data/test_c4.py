"""What --data means, and the seeded order of documents."""

import gzip
import json
import logging
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from fileserver import serve
from hypothesis import given, settings
from hypothesis import strategies as st

from velora_pretrain.data import c4, remote
from velora_pretrain.data.c4 import Cursor, Source, permutation, read_blocks, resolve
from velora_pretrain.errors import UserError


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "RETRY_DELAYS_SECONDS", (0.0,))


def write(path: Path, texts, raw: bytes = b"") -> str:
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts) + raw
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def documents_of(source: Source, count: int | None = None, **options) -> list[tuple[Cursor, str]]:
    settings_ = {"seed": 1, "shuffle_block_documents": 4, "max_bad_lines": 0, **options}
    found = []
    for block in read_blocks(source, **settings_):
        for place, text in enumerate(block.texts):
            first = block.start
            found.append((Cursor(**{**_fields(first), "document": first.document + place}), text))
            if len(found) == count:
                return found
    return found


def _fields(cursor: Cursor) -> dict[str, int]:
    return {name: getattr(cursor, name) for name in Cursor.__dataclass_fields__}


def texts_of(source: Source, count: int | None = None, **options) -> list[str]:
    return [text for _, text in documents_of(source, count, **options)]


ONCE = {"shuffle": False, "repeat": False}


# --- what --data means


def test_paths_globs_and_folders(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.json.gz", "c.parquet", "note.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "d[1].json").write_bytes(b"")

    def shards(data):
        found = resolve(data, split="train")
        assert found.name == data and found.fallback_reason is None
        return [Path(shard).name for shard in found.shards]

    assert shards(f"{tmp_path}/b.jsonl") == ["b.jsonl"]
    assert shards(f"{tmp_path}/*.json*") == ["a.json.gz", "b.jsonl"]
    assert shards(f"{tmp_path}/**/*.json") == ["d[1].json"]
    assert shards(f"{tmp_path}/in/d[1].json") == ["d[1].json"]
    assert shards(str(tmp_path)) == ["a.json.gz", "b.jsonl", "c.parquet"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shards("~/b.jsonl") == ["b.jsonl"]
    assert resolve("http://h/a.json?x=1", split="train").shards == ("http://h/a.json?x=1",)
    assert resolve("hf://datasets/a/b/c.parquet", split="train").shards == ("hf://datasets/a/b/c.parquet",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file; --data takes auto, c4, sample"),
        ("none*.jsonl", "no file matches the pattern"),
        ("a.txt", "cannot tell its format; the name must end in .json"),
        ("*.txt", "cannot tell its format"),
        ("empty", "the folder holds no file that ends in"),
    ],
)
def test_data_that_means_no_file(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        resolve(data, split="train")
    assert message in str(caught.value) and data in str(caught.value).replace("a.txt", data)
    assert "\n" not in str(caught.value)


def test_a_remote_address_of_no_known_format():
    with pytest.raises(UserError, match="cannot tell its format"):
        resolve("https://h/a.txt?name=b.json", split="train")


def test_c4_names_its_files_on_the_hub():
    train = resolve("c4", split="train", probe=lambda _: None)
    assert (train.name, train.part, len(train.shards)) == ("c4", "all", 1024)
    assert train.shards[7] == "hf://datasets/allenai/c4/en/c4-train.00007-of-01024.json.gz"
    validation = resolve("c4", split="validation", probe=lambda _: None)
    assert (validation.part, len(validation.shards)) == ("all", 8)
    assert validation.shards[7] == "hf://datasets/allenai/c4/en/c4-validation.00007-of-00008.json.gz"
    assert resolve("auto", split="train", probe=lambda _: None) == train


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A stand-in for the module that builds the bundled sample."""
    path = write(tmp_path / "sample.jsonl", ["x"])
    module = type(sys)("velora_pretrain.data.sample")
    module.sample_file = lambda: Path(path)
    monkeypatch.setitem(sys.modules, "velora_pretrain.data.sample", module)
    return path


@pytest.mark.parametrize("split", ["train", "validation"])
def test_auto_falls_back_to_the_sample_and_says_why(sample, split):
    found = resolve("auto", split=split, holdout_every_documents=5, probe=lambda _: "the hub is away")
    assert found == Source(
        name="sample",
        shards=(sample,),
        part=split,
        holdout_every_documents=5,
        fallback_reason="the hub is away",
    )
    assert resolve("sample", split=split, probe=pytest.fail).fallback_reason is None


def test_c4_without_the_hub_names_what_works_offline():
    with pytest.raises(UserError) as caught:
        resolve("c4", split="train", probe=lambda _: "the hub is away")
    message = str(caught.value)
    assert "the hub is away" in message and "\n" not in message
    assert (
        "velora-pretrain train --size 60m --data sample" in message
        and "velora-pretrain train --size 60m --data PATH" in message
    )


def test_the_hub_is_asked_for_a_file_of_c4(monkeypatch):
    with serve(files={"/datasets/allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz": b"xyz"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert c4.hub_fault(5.0) is None
        hub.statuses = [503] * 100
        monkeypatch.setattr(c4, "PROBE_DELAY_SECONDS", 0.1)
        assert f"({hub.url}) does not answer (Service Unavailable" in (c4.hub_fault(0.5) or "")
        hub.statuses = [503, 429]  # a failure that passes
        assert c4.hub_fault(5.0) is None
        assert hub.statuses == []
        hub.files = {}
        assert "(Not Found" in (c4.hub_fault(5.0) or "")
        hub.requests = []
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "HF_HUB_OFFLINE is set" in (c4.hub_fault(5.0) or "")
        assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "refused" in (c4.hub_fault(5.0) or "")
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert "(unknown url type" in (c4.hub_fault(5.0) or "")


def test_a_hub_that_hangs_is_given_up_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert "does not answer" in (c4.hub_fault(0.3) or "")
        assert time.monotonic() - begun < 2
    # A look-up of the name that hangs cannot be timed out, only left behind.
    monkeypatch.setattr(remote, "open_url", lambda *_, **__: threading.Event().wait(20))
    begun = time.monotonic()
    assert "nothing within 0 s" in (c4.hub_fault(0.1) or "")
    assert time.monotonic() - begun < 2
    assert c4.C4_TIMEOUT_SECONDS < 30


def test_c4_is_read_from_the_hub(monkeypatch):
    texts = [f"{n}" for n in range(10)]
    content = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    folder = "/datasets/allenai/c4/resolve/main/en"
    with serve(files={f"{folder}/c4-validation.{n:05d}-of-00008.json.gz": content for n in range(8)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert texts_of(resolve("c4", split="validation"), **ONCE) == texts * 8


# --- which documents belong


@pytest.mark.parametrize("every", [2, 3, 7])
def test_held_out_documents_are_every_nth_and_the_rest_trains(tmp_path, every):
    texts = [str(n) for n in range(20)]
    data = write(tmp_path / "a.jsonl", texts)
    parts = {split: resolve(data, split=split, holdout_every_documents=every) for split in ("train", "validation")}
    assert texts_of(parts["validation"], **ONCE) == [t for n, t in enumerate(texts) if n % every == every - 1]
    assert texts_of(parts["train"], **ONCE) == [t for n, t in enumerate(texts) if n % every != every - 1]
    whole = resolve(data, split="validation", holdout_every_documents=every, separate=True)
    assert texts_of(whole, **ONCE) == texts


def test_too_few_documents_to_hold_one_out(tmp_path):
    source = resolve(write(tmp_path / "a.jsonl", ["x"] * 5), split="validation", holdout_every_documents=6)
    with pytest.raises(
        UserError, match=r"no documents for validation, as every 6th .* lower reading.holdout_every_documents"
    ):
        texts_of(source, **ONCE)
    with pytest.raises(UserError, match="holdout_every_documents is 1; it must be at least 2"):
        resolve(str(tmp_path / "a.jsonl"), split="train", holdout_every_documents=1)


@pytest.mark.parametrize("repeat", [True, False])
def test_files_without_any_document_end_in_an_error_and_not_in_a_loop(tmp_path, repeat):
    source = resolve(write(tmp_path / "a.jsonl", ["", "  \n"]), split="train", separate=True)
    with pytest.raises(UserError, match=r"a\.jsonl: holds no documents; every record is empty or bad"):
        texts_of(source, repeat=repeat)


# --- bad records


def test_bad_lines_are_counted_up_to_the_limit(tmp_path, caplog):
    data = write(tmp_path / "a.jsonl", ["a", "", "b"], b'{"text": 1}\n{"text": "c"}\n{"te\n{"text": "d"}\n')
    source = resolve(data, split="train", separate=True)
    with caplog.at_level(logging.WARNING):
        found = documents_of(source, max_bad_lines=2, shuffle_block_documents=1, **ONCE)
    assert [text for _, text in found] == ["a", "b", "c", "d"]
    assert [(cursor.bad_lines, cursor.empty_documents) for cursor, _ in found] == [(0, 0), (0, 0), (0, 1), (1, 1)]
    assert f"{data} line 4" in caplog.text and f"{data} line 6" in caplog.text
    with pytest.raises(UserError) as caught:
        texts_of(source, max_bad_lines=1, **ONCE)
    assert f"{data} line 6: not valid JSON" in str(caught.value)
    assert "raise max_bad_lines (now 1)" in str(caught.value)
    # Counted anew in each epoch, or long training on a small file would always end in an error.
    assert len(texts_of(source, 40, max_bad_lines=2)) == 40
    # Also where reading goes on in the middle.
    after_one = next(cursor for cursor, text in found if text == "d")
    with pytest.raises(UserError, match="line 6"):
        texts_of(source, max_bad_lines=1, cursor=after_one, **ONCE)


# --- order


def make_source(folder: Path, sizes: list[int], part="all") -> Source:
    shards = [
        write(folder / f"{n}.jsonl{'.gz' if n % 2 else ''}", [f"{n}/{d}" for d in range(size)])
        for n, size in enumerate(sizes)
    ]
    return Source(name="x", shards=tuple(shards), part=part, holdout_every_documents=3)


def test_permutations_are_the_same_everywhere_and_always():
    assert permutation(10, 1, 2, 3) == [1, 3, 9, 2, 7, 6, 8, 5, 0, 4]
    assert permutation(1, 0) == [0] and permutation(0, 0) == []
    firsts = [permutation(8, seed)[0] for seed in range(2000)]
    assert all(190 < firsts.count(value) < 310 for value in range(8))


def test_each_epoch_gives_every_document_once_in_a_new_order(tmp_path):
    source = make_source(tmp_path, [9, 4, 1, 6])
    stream = texts_of(source, 60)
    epochs = [stream[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(dict.fromkeys(text[0] for text in epoch)) for epoch in epochs}) > 1
    assert texts_of(source, 60) == stream
    assert texts_of(source, 60, seed=2) != stream
    for epoch in epochs:  # a block is permuted within itself
        of_0 = [int(text[2:]) for text in epoch if text[0] == "0"]
        assert [set(of_0[:4]), set(of_0[4:8]), set(of_0[8:])] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8}]


def test_two_shards_are_permuted_differently(tmp_path):
    stream = texts_of(make_source(tmp_path, [32, 32]), 64, shuffle_block_documents=32)
    assert [text[2:] for text in stream[:32]] != [text[2:] for text in stream[32:]]


def test_two_blocks_of_a_shard_are_permuted_differently(tmp_path):
    stream = texts_of(make_source(tmp_path, [64]), 64, shuffle_block_documents=32)
    order = [int(text[2:]) for text in stream]
    assert [value + 32 for value in order[:32]] != order[32:]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    seed=st.integers(0, 2**64),
    block=st.integers(1, 7),
    start=st.integers(0, 60),
    shuffle=st.booleans(),
    part=st.sampled_from(["all", "train"]),
)
def test_any_cursor_gives_the_same_rest(tmp_path_factory, sizes, seed, block, start, shuffle, part):
    source = make_source(tmp_path_factory.mktemp("order"), sizes, part)
    options = {"seed": seed, "shuffle_block_documents": block, "shuffle": shuffle}
    whole = documents_of(source, 70, **options)
    cursor = Cursor(**json.loads(json.dumps(_fields(whole[start][0]))))
    assert documents_of(source, 70 - start, cursor=cursor, **options) == whole[start:]


def test_a_resume_parses_nothing_before_its_block(tmp_path, monkeypatch):
    source = make_source(tmp_path, [40])
    cursor, text = documents_of(source, 30)[29]
    parsed = []
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or real(line))
    assert texts_of(source, 1, cursor=cursor) == [text]
    assert len(parsed) == 4


def test_a_shard_that_has_shrunk_is_noticed(tmp_path):
    source = make_source(tmp_path, [9])
    cursor = documents_of(source, 8)[7][0]
    make_source(tmp_path, [5])
    with pytest.raises(UserError, match="fewer documents than when the checkpoint was written"):
        texts_of(source, 1, cursor=cursor)
