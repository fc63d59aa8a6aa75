"""Tokens that lie ready give what the text gives, or are not used."""

import dataclasses
import gzip
import json
import multiprocessing
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import runs
import test_order_properties as order
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from velora_pretrain import cli
from velora_pretrain.data import loader as loader_module
from velora_pretrain.data import source as source_module
from velora_pretrain.data import tokenise as tokenise_module
from velora_pretrain.data.c4 import Source, resolve
from velora_pretrain.data.loader import TrainLoader, evaluation_batches
from velora_pretrain.data.shard_tokens import BYTES_FILE, DOCUMENTS_FILE, META_FILE, TOKENS_FILE, tokens_folder
from velora_pretrain.data.token_cache import local_shards, with_tokens
from velora_pretrain.data.token_jobs import Job, jobs_for
from velora_pretrain.data.tokenise import tokenise, tokenise_shard
from velora_pretrain.data.tokenizer import Tokenizer, load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.run_lock import RunLock

TEXTS = [f"balmer cenos {'dip ' * (n % 9)}fol 日本 ½ {n}" for n in range(40)]
TEXTS[5], TEXTS[6], TEXTS[17] = "", " \u2003\t ", "  gusun   hamer  "
LINES = [json.dumps({"text": text}) for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer))


def write(folder: Path, name: str) -> Path:
    path = folder / name
    # Bad and blank lines, too.
    raw = "\n".join([*LINES[:9], '{"text": 3}', "", *LINES[9:], '{"text": "cut']).encode()
    if name.endswith(".parquet"):
        texts = pyarrow.array([*(text.encode() for text in TEXTS), None, b"\xff"], pyarrow.binary())
        pyarrow.parquet.write_table(pyarrow.table({"text": texts.view(pyarrow.string())}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(raw))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(raw))
    else:
        path.write_bytes(raw)
    return path


def make(source: Source, tokenizer: Tokenizer, *, with_bytes: bool = False, output: Path | None = None) -> int:
    jobs, _ = jobs_for(list(local_shards(source).values()), tokenizer, output=output, with_bytes=with_bytes)
    for job in jobs:
        tokenise_shard(job, tokenizer, lambda *_: None)
    return len(jobs)


def cached(source: Source, tokenizer, setting: str = "auto", **options) -> Source:
    found, _ = with_tokens(source, tokenizer, setting, **options)
    assert found.tokens.keys() == set(source.shards)
    return found


def train(source: Source, tokenizer, count: int = 9, **options):
    common = {"sequence_length": 12, "sequences": 6, "seed": 3, "shuffle_block_documents": 7, "max_bad_lines": 9}
    with TrainLoader(source, tokenizer, **{"packing": "pad", **common, **options}) as loader:
        return [next(loader) for _ in range(count)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.inputs.equal(other.inputs) and batch.labels.equal(other.labels)
        for field in dataclasses.fields(batch)[2:]:
            assert getattr(batch, field.name) == getattr(other, field.name), field.name


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_each_format_gives_the_same_batches(tmp_path, tokenizer, monkeypatch, name, packing):
    write(tmp_path, name)
    for part in ("train", "validation"):
        source = resolve(str(tmp_path / name), split=part, holdout_every_documents=3)
        make(source, tokenizer, with_bytes=part == "validation")
        ready = cached(source, tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(source_module, "read_records", None)  # nothing of the text is read
            with_cache = train(ready, tokenizer, packing=packing)
        assert_same(with_cache, train(source, tokenizer, packing=packing))
    options = {"packing": packing, "sequence_length": 12, "sequences": 5, "max_bad_lines": 9}
    scored = list(evaluation_batches(cached(source, tokenizer, for_evaluation=True), tokenizer, **options))
    assert_same(scored, list(evaluation_batches(source, tokenizer, **options)))
    assert sum(batch.target_bytes for batch in scored) > 0


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_a_resume_goes_from_text_to_tokens_and_back_at_every_step(tmp_path, tokenizer, packing):
    source = resolve(str(write(tmp_path, "a.jsonl")), split="train", separate=True)
    make(source, tokenizer)
    ready = cached(source, tokenizer)
    straight = train(source, tokenizer, 20, packing=packing)
    places = [json.loads(json.dumps(batch.cursor)) for batch in straight]
    assert len({place["record"] for place in places}) > 3
    for step, place in enumerate(places[:-1]):
        documents, packed = (ready, source) if step % 2 else (source, ready)
        (batch,) = train(packed, tokenizer, 1, packing=packing, cursor=place)
        assert_same([batch], [straight[step + 1]])
        assert_same(train(documents, tokenizer, 1, packing=packing, cursor=place), [batch])


def test_bad_records_count_as_in_the_text(tmp_path, tokenizer, caplog):
    source = resolve(str(write(tmp_path, "a.jsonl")), split="train", separate=True)
    make(source, tokenizer)
    said = []
    for documents in (source, cached(source, tokenizer)):
        with pytest.raises(UserError) as caught:
            train(documents, tokenizer, max_bad_lines=1)
        said.append((str(caught.value), [record.getMessage() for record in caplog.records]))
        caplog.clear()
    assert said[0] == said[1] and re.search(r"a\.jsonl line 4\d: not valid JSON", said[0][0])


class NumberTokenizer(order.NumberTokenizer, Tokenizer):
    """As there, with what `tokenise` asks for."""

    sha256, vocab_size, name, pad_id, eos_id = "5" * 64, 70_000, "numbers", 0, order.EOS

    def __init__(self):
        pass


@settings(max_examples=40, deadline=None)
@given(case=order.cases(), has_tokens=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=5, max_size=5))
def test_whoever_reads_and_however_often_it_is_interrupted(case, has_tokens):
    """Each part of a run reads some shards as tokens and the others as text, as they come."""
    tokenizer = NumberTokenizer()
    with tempfile.TemporaryDirectory() as folder:
        source = order.write(case, Path(folder))
        for path in map(Path, source.shards):
            target = str(tokens_folder(path, tokenizer.sha256, None))
            job = Job(shard=str(path), folder=target, tokenizer="", tokenizer_sha256="5" * 64, with_bytes=False)
            tokenise_shard(job, tokenizer, lambda *_: None)
        everything = cached(source, tokenizer)
        chunk, loader_module.CHUNK_DOCUMENTS = loader_module.CHUNK_DOCUMENTS, case.chunk_documents
        try:
            straight = take(source, tokenizer, case, case.batches)
            ends = [int(part * case.batches) for part, _ in case.takeovers[1:]] + [case.batches]
            begin = 0
            for (_, world_size), end, choice in zip(case.takeovers, ends, has_tokens, strict=False):
                cursor = json.loads(json.dumps(straight[begin - 1].cursor)) if begin else None
                for rank in range(world_size):
                    # Not even the processes of one run need the same tokens.
                    chosen = {
                        shard: tokens
                        for at, (shard, tokens) in enumerate(everything.tokens.items())
                        if choice[(at + rank) % 5]
                    }
                    mixed = dataclasses.replace(source, tokens=chosen)
                    options = {"rank": rank, "world_size": world_size, "cursor": cursor}
                    batches = take(mixed, tokenizer, case, end - begin, **options)
                    for batch, whole in zip(batches, straight[begin:end], strict=True):
                        rows = slice(batch.first_row, batch.first_row + case.options["sequences"] // world_size)
                        mine = {"inputs": whole.inputs[rows], "labels": whole.labels[rows], "first_row": rows.start}
                        assert_same([batch], [dataclasses.replace(whole, **mine)])
                begin = end
        finally:
            loader_module.CHUNK_DOCUMENTS = chunk


def take(source, tokenizer, case, count, **options):
    with TrainLoader(source, tokenizer, **case.options, **options) as loader:
        return [next(loader) for _ in range(count)]


# --- when they are not used


@pytest.fixture
def made(tmp_path, tokenizer) -> tuple[Source, Path]:
    """A source with its tokens, and where these lie."""
    path = write(tmp_path, "a.jsonl")
    source = resolve(str(path), split="train", separate=True)
    make(source, tokenizer, with_bytes=True)
    return source, tokens_folder(path, tokenizer.sha256, None)


@pytest.mark.parametrize("file", [TOKENS_FILE, BYTES_FILE, DOCUMENTS_FILE, META_FILE])
def test_a_cut_or_missing_file_is_not_used(made, tokenizer, file):
    source, folder = made
    for content in ((folder / file).read_bytes()[:-1], None):
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        found, remarks = with_tokens(source, tokenizer, "auto")
        assert not found.tokens
        (remark,) = remarks
        assert str(folder) in remark and file in remark and "run `velora-pretrain data tokenise` again" in remark
        assert_same(train(found, tokenizer, 2), train(source, tokenizer, 2))
    assert make(source, tokenizer, with_bytes=True) == 1
    assert cached(source, tokenizer, for_evaluation=True)


@pytest.mark.parametrize("file", [TOKENS_FILE, BYTES_FILE, DOCUMENTS_FILE])
def test_a_flipped_bit_is_refused(made, tokenizer, file):
    source, folder = made
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / file).write_bytes(content)
    options = {"packing": "pad", "sequence_length": 12, "sequences": 50, "max_bad_lines": 9}
    with pytest.raises(UserError, match=rf"{folder / file}: .*damaged; run `velora-pretrain data tokenise` again"):
        list(evaluation_batches(cached(source, tokenizer, for_evaluation=True), tokenizer, **options))
    # Training asks for no bytes, and is not kept by them.
    if file != BYTES_FILE:
        with pytest.raises(UserError, match="damaged"):
            train(cached(source, tokenizer), tokenizer, 9)
    assert make(source, tokenizer, with_bytes=True) == 1
    assert_same(train(cached(source, tokenizer), tokenizer), train(source, tokenizer))


def test_a_shard_that_has_changed_is_read_itself(made, tokenizer):
    source, folder = made
    path = Path(source.shards[0])
    content = path.read_bytes()
    path.write_bytes(content + b"\n" + LINES[0].encode())
    found, (remark,) = with_tokens(source, tokenizer, "auto")
    assert not found.tokens and re.search(r"a\.jsonl had \d+ bytes when it was tokenised, now", remark)
    path.write_bytes(content)
    found, (remark,) = with_tokens(source, tokenizer, "auto")
    assert not found.tokens and "was written to after it was tokenised" in remark
    # The same bytes: seen from the hash, without tokenising.
    before = (folder / TOKENS_FILE).stat().st_mtime_ns
    assert make(source, tokenizer, with_bytes=True) == 0
    assert cached(source, tokenizer) and (folder / TOKENS_FILE).stat().st_mtime_ns == before
    path.write_bytes(content.replace(b"balmer", b"hamerb"))
    assert make(source, tokenizer) == 1
    assert_same(train(cached(source, tokenizer), tokenizer), train(source, tokenizer))


def test_another_tokenizer_is_another_matter(made, tokenizer):
    source, folder = made
    other = load_tokenizer("bundled")
    found, (remark,) = with_tokens(source, other, "auto")
    assert not found.tokens and str(folder) in remark and "of another tokenizer" in remark
    # Even where the folder has its name.
    folder.parent.rename(folder.parent.with_name(f"tokens-{other.sha256[:12]}"))
    found, (remark,) = with_tokens(source, other, "auto")
    assert not found.tokens and "of another tokenizer" in remark
    with pytest.raises(AssertionError):
        train(dataclasses.replace(source, tokens=cached_of(made, tokenizer)), other)


def cached_of(made, tokenizer):
    source, folder = made
    folder.parent.parent.joinpath(f"tokens-{load_tokenizer('bundled').sha256[:12]}").rename(folder.parent)
    return cached(source, tokenizer).tokens


def test_the_setting_says_where_to_look(made, tokenizer, tmp_path):
    source, folder = made
    assert with_tokens(source, tokenizer, "none") == (source, [])
    found, (remark,) = with_tokens(source, tokenizer, str(tmp_path / "none"))
    assert not found.tokens and "there is no folder" in remark
    make(source, tokenizer, output=tmp_path / "elsewhere")
    shutil.rmtree(folder.parent)
    assert with_tokens(source, tokenizer, "auto")[0].tokens == {}
    assert cached(source, tokenizer, str(tmp_path / "elsewhere"))
    # Without bytes they are of no use to an evaluation, which is no fault.
    assert with_tokens(source, tokenizer, str(tmp_path / "elsewhere"), for_evaluation=True)[0].tokens == {}
    with pytest.raises(UserError, match="have the same name; tokenise them apart"):
        jobs_for([tmp_path / "x/a.jsonl", tmp_path / "y/a.jsonl"], tokenizer, output=tmp_path, with_bytes=False)


def test_an_interrupted_shard_leaves_nothing(tmp_path, tokenizer):
    source = resolve(str(write(tmp_path, "a.jsonl")), split="train", separate=True)

    def stop(*_):
        raise KeyboardInterrupt

    (job,), _ = jobs_for([Path(source.shards[0])], tokenizer, output=None, with_bytes=False)
    with pytest.raises(KeyboardInterrupt):
        tokenise_shard(job, tokenizer, stop)
    assert list(Path(job.folder).parent.iterdir()) == []


# --- the command


def command(capfd, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "tokenise", *map(str, arguments)])
    said = capfd.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_several_processes_write_what_one_does(tmp_path, capfd, tiny_tokenizer):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a.json.gz", "b.jsonl", "c.parquet"):
            if folder == "one":
                write(tmp_path / folder, name)
            else:
                shutil.copy2(tmp_path / "one" / name, tmp_path / "two" / name)
    for folder, processes in (("one", 1), ("two", 2)):
        arguments = ("--data", tmp_path / folder, "--tokenizer", tiny_tokenizer, "--processes", processes)
        # In a process of its own, whose end is seen too.
        made = runs.tool("data", "tokenise", *map(str, arguments))
        assert (made.returncode, made.stderr) == (0, "")
        assert "3 shards tokenised in" in made.stdout and "0 were before" in made.stdout and "(3 of 3)" in made.stdout
        assert "0 shards tokenised" in command(capfd, *arguments)[1]
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").glob("tokens-*/*/*")}
    assert len(files) == 9
    assert files == {
        path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").glob("t*/*/*")
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_that_cannot_be_read_is_told_and_the_others_stay(tmp_path, capfd, tiny_tokenizer, processes):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-9])
    arguments = ("--data", tmp_path, "--tokenizer", tiny_tokenizer, "--processes", processes)
    status, _, err = command(capfd, *arguments)
    assert status == 2 and "b.json.gz: the compressed data stops in the middle" in err and err.count("\n") == 1
    (tmp_path / "b.json.gz").unlink()
    status, out, _ = command(capfd, *arguments)
    assert status == 0 and not list(tmp_path.glob("tokens-*/.*"))
    if processes == 1:
        assert "0 shards tokenised" in out and "1 were before" in out


def test_ctrl_c_says_how_to_go_on(tmp_path, capfd, tiny_tokenizer, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path, name)
    real = tokenise_module.tokenise_shard

    def interrupted(job, *others):
        if job.shard.endswith("b.jsonl"):
            raise KeyboardInterrupt
        return real(job, *others)

    monkeypatch.setattr(tokenise_module, "tokenise_shard", interrupted)
    arguments = ("--data", tmp_path, "--tokenizer", tiny_tokenizer, "--processes", 1)
    status, out, _ = command(capfd, *arguments)
    assert status == 130 and "stopped: 1 of 2 shards are tokenised; go on with the same command" in out
    monkeypatch.undo()
    assert "1 shards tokenised" in command(capfd, *arguments)[1]


def test_two_do_not_tokenise_into_one_folder(tmp_path, capfd, tiny_tokenizer, tokenizer):
    path = write(tmp_path, "a.jsonl")
    arguments = ("--data", path, "--tokenizer", tiny_tokenizer, "--processes", 1)
    with RunLock(tokens_folder(path, tokenizer.sha256, None).parent, file="tokenise.lock") as lock:
        lock.take()
        status, _, err = command(capfd, *arguments)
    assert status == 2 and "is tokenising; wait for it; --output names another folder" in err and err.count("\n") == 1
    assert "1 shards tokenised" in command(capfd, *arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "c4"], "--data c4: is read over the network; fetch it first"),
        (["--data", "https://h/a.jsonl"], "is read over the network"),
        (["--data", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--data", "{data}", "--tokenizer", "none.model"], "tokenizer: no file or folder none.model"),
        (["--data", "{data}", "--output", "{data}"], "cannot be written (Not a directory); --output names another"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capfd, arguments, message):
    data = write(tmp_path, "a.jsonl")
    status, _, err = command(capfd, *(each.format(data=data) for each in arguments))
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_killed_process_is_told(tmp_path, tokenizer, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(LINES[0] + "\n" * 1 + f"{LINES[1]}\n" * 200_000)
    jobs, _ = jobs_for(sorted(tmp_path.glob("*.jsonl")), tokenizer, output=None, with_bytes=False)

    def kill() -> None:
        while not list(tmp_path.glob("tokens-*/.*.tmp")):
            time.sleep(0.01)
        for each in multiprocessing.active_children():
            each.kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(UserError, match="a process that tokenised was killed"):
        tokenise(jobs, processes=2, tell=lambda *_: None, done=lambda _: None)
