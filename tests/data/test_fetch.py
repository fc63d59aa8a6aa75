"""`data fetch`: which shards, whole or absent, in the order that streaming has; and runs over what it brought."""

import hashlib
import json
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_c4 import COUNTS, FOLDER, hub_of, linked_hub, make_files

from velora_pretrain import cli
from velora_pretrain.bars import Bars
from velora_pretrain.config import Run
from velora_pretrain.data import c4, fetch, needs
from velora_pretrain.data.c4 import Source, permutation, read_blocks, resolve
from velora_pretrain.data.fetch import Fetch
from velora_pretrain.data.loader import TrainLoader, evaluation_batches
from velora_pretrain.data.manifest import MANIFEST_FILE, Manifest, c4_shards, read_manifest
from velora_pretrain.data.needs import check_at_hand, in_order, shards_needed
from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.recipe import build_run
from velora_pretrain.run_lock import RunLock

SEED = 7


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    return make_files(tmp_path_factory.mktemp("c4"))


@pytest.fixture
def command(capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs the program in this process; gives status, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def names(split: str, count: int, seed: int = SEED) -> list[str]:
    """Files of the first shards, by their definition."""
    total = COUNTS[split]
    order = permutation(total, seed, 0) if split == "train" else list(range(total))
    return [f"c4-{split}.{number:05d}-of-{total:05d}.json.gz" for number in order[:count]]


def data_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("c4-*")}


def run_of(tiny_run, **changes) -> Run:
    return tiny_run(data="c4", seed=SEED, evaluation__tokens=200, **changes)


# --- which shards


def test_the_published_run_reads_fifteen_shards():
    """10,000 steps of 512 documents, 356,317 of them in a shard."""
    values = {"size": "60m", "packing": "pad"}
    total = {"train": 1024, "validation": 8}
    run = build_run(values, where="test")
    assert 14 < 10_000 * 512 / (364_868_892 / 1024) < 15
    assert shards_needed(run, "train", total["train"]) == 15
    assert shards_needed(run, "validation", total["validation"]) == 3
    assert shards_needed(run, "train", 4) == 4
    packed = build_run({**values, "packing": "pack"}, where="test")
    assert shards_needed(packed, "train", 1024) == 10  # 1.31e9 tokens, 400 of them a document


@pytest.mark.parametrize("linked", [True, False])
def test_the_first_shards_of_the_order_come_whole(files, command, tmp_path, monkeypatch, linked):
    to = tmp_path / "to"
    hub = linked_hub(files, monkeypatch) if linked else hub_of(files, monkeypatch)
    with hub:
        status, out, err = command("data", "fetch", "--to", to, "--shards", 5, "--seed", SEED)
    assert (status, err) == (0, ""), (out, err)
    assert data_files(to) == {*names("train", 5), *names("validation", 2)}
    for name in data_files(to):
        assert (to / name).read_bytes() == files[f"{FOLDER}/{name}"]
    manifest = json.loads((to / MANIFEST_FILE).read_text())
    assert manifest["num_shards"] == COUNTS and set(manifest["files"]) == data_files(to)
    for name, facts in manifest["files"].items():
        content = files[f"{FOLDER}/{name}"]
        assert (facts["size_bytes"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert facts["revision"] == ("c0ffee" if linked else None)
    assert (
        out.count("(") == 7 and "(7 of 7)" in out and f"velora-pretrain train --size SIZE --seed 7 --data {to}" in out
    )
    assert not list(to.glob(".c4-*"))


def test_what_is_there_is_not_fetched_again(files, command, tmp_path, monkeypatch):
    to = tmp_path / "to"
    with linked_hub(files, monkeypatch) as (hub, store):
        assert command("data", "fetch", "--to", to, "--shards", 2, "--seed", SEED, "--no-validation")[0] == 0
        assert data_files(to) == set(names("train", 2))
        hub.requests.clear(), store.requests.clear()
        status, out, _ = command("data", "fetch", "--to", to, "--shards", 2, "--seed", SEED, "--no-validation")
        assert status == 0 and "0 of them fetched now" in out
        assert hub.requests == [] and store.requests == []
        # More of them, and one that lies there by other means.
        third, fourth = names("train", 4)[2:]
        (to / third).write_bytes(files[f"{FOLDER}/{third}"])
        (to / fourth).write_bytes(bytes(len(files[f"{FOLDER}/{fourth}"])))
        status, out, _ = command("data", "fetch", "--to", to, "--shards", 4, "--seed", SEED, "--no-validation")
        assert status == 0 and "1 of them fetched now" in out
        assert (to / fourth).read_bytes() == files[f"{FOLDER}/{fourth}"]
        # A file that was cut since, and a manifest that was.
        (to / third).write_bytes(b"x")
        with pytest.raises(
            UserError, match=rf"{third}: has 1 bytes, \d+ were fetched; run `velora-pretrain data fetch`"
        ):
            resolve(str(to), split="train")
        (to / MANIFEST_FILE).write_text("{")
        with pytest.raises(UserError, match=r"fetched\.manifest: is damaged .*run `velora-pretrain data fetch` again"):
            resolve(str(to), split="train")
        status, out, _ = command("data", "fetch", "--to", to, "--shards", 4, "--seed", SEED, "--no-validation")
        assert (
            status == 0 and "is damaged (" in out and "held against the hub's" in out and "1 of them fetched now" in out
        )
        assert set(read_manifest(to).files) == set(names("train", 4))


def bring(to: Path, shards: list[str], connections: int = 1) -> Fetch:
    to.mkdir(exist_ok=True)
    with Bars(_console(), "bytes") as bars:
        work = Fetch(to, Manifest(), bars=bars)
        work.run(shards, connections=connections)
    return work


def _console():
    import io

    from rich.console import Console

    return Console(file=io.StringIO())


def test_an_interrupted_file_goes_on_where_it_stopped(files, tmp_path, monkeypatch):
    to, shard = tmp_path / "to", "hf://datasets/allenai/c4/en/" + names("train", 1)[0]
    content = files[f"{FOLDER}/{names('train', 1)[0]}"]
    with linked_hub(files, monkeypatch) as (_, store):
        store.cuts = [1, 400, 0, 0, 0]  # of the question, of the file, and of those that would go on
        with pytest.raises(ConnectionError, match="reading failed"):
            bring(to, [shard])
        (part,) = to.glob(".c4-*.part")
        assert part.read_bytes() == content[:400] and data_files(to) == set()
        store.requests.clear()
        bring(to, [shard])
        asked = [headers.get("Range") for _, headers in store.requests]
        assert asked[0] == "bytes=0-0" and asked[1] == f"bytes={400 - 64}-"
        assert (to / names("train", 1)[0]).read_bytes() == content
        assert not part.exists()


@pytest.mark.parametrize("damage", ["end", "middle", "longer", "other"])
def test_a_part_that_is_not_of_this_file_does_no_harm(files, tmp_path, monkeypatch, damage):
    """Its end was lost in a power cut, a byte flipped, it is too long, or of another revision."""
    to, name = tmp_path / "to", names("train", 1)[0]
    shard, content = f"hf://datasets/allenai/c4/en/{name}", files[f"{FOLDER}/{name}"]
    to.mkdir()
    with linked_hub(files, monkeypatch):
        part = to / f".{name}.{fetch.ask(shard).identity}.part"
        parts = {
            "end": content[:300] + bytes(100),
            "middle": content[:100] + bytes(1) + content[101:400],
            "longer": content + b"x" * 1000,
            "other": content[:100],
        }
        (part if damage != "other" else to / f".{name}.0123456789ab.part").write_bytes(parts[damage])
        bring(to, [shard])
    assert (to / name).read_bytes() == content and not list(to.glob(".c4-*"))


def test_a_file_that_is_not_what_the_hub_says_is_never_put_there(files, tmp_path, monkeypatch):
    to, name = tmp_path / "to", names("train", 1)[0]
    with linked_hub(files, monkeypatch) as (hub, _):
        hub.redirect_headers[f"{FOLDER}/{name}"]["X-Linked-Etag"] = f'"{"0" * 64}"'
        with pytest.raises(UserError, match=rf"{name}: what arrives has not the hash that the hub gives, 3 times"):
            bring(to, [f"hf://datasets/allenai/c4/en/{name}"])
    assert list(to.iterdir()) == []


def test_a_server_that_fails_and_lies_gives_whole_files(files, tmp_path, monkeypatch):
    from faulty_server import FaultyServer

    with hub_of({}, monkeypatch):
        monkeypatch.setattr("velora_pretrain.data.remote.RETRY_DELAYS_SECONDS", (0.0,) * 40)
        monkeypatch.setattr("velora_pretrain.data.remote.MAX_RETRY_AFTER_SECONDS", 0.0)
        monkeypatch.setattr("velora_pretrain.data.remote.TIMEOUT_SECONDS", 0.1)
        server = FaultyServer(files, fault_rate=0.6, seed=3, part_bytes=600, stall_seconds=0.2)
        with server.serve():
            monkeypatch.setenv("HF_ENDPOINT", server.url)
            bring(tmp_path / "to", list(c4_shards("train")), connections=3)
    assert server.faults.total() > 10
    for name in data_files(tmp_path / "to"):
        assert (tmp_path / "to" / name).read_bytes() == files[f"{FOLDER}/{name}"]
    assert len(data_files(tmp_path / "to")) == 12


def test_room_is_looked_at_before_a_byte_is_fetched(files, command, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with linked_hub(files, monkeypatch) as (_, store):
        status, _, err = command("data", "fetch", "--to", tmp_path / "to", "--shards", 12)
    assert status == 2 and re.search(r"to: [\d.]+ kB are to be fetched and 1\.0 kB are free; make room", err)
    assert err.count("\n") == 1
    assert all(headers["Range"] == "bytes=0-0" for _, headers in store.requests)


def test_ctrl_c_leaves_what_is_whole_and_says_how_to_go_on(files, command, tmp_path, monkeypatch):
    real, main, is_over = Bars.end, threading.main_thread().ident, threading.Event()

    def end(self: Bars, name: str, note: str) -> None:
        real(self, name, note)
        if self.ended_files == 2:
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
            is_over.wait(60)  # the rest would be there before a busy machine has woken the main thread

    monkeypatch.setattr(Bars, "end", end)
    to = tmp_path / "to"
    with hub_of(files, monkeypatch):
        status, out, _ = command("data", "fetch", "--to", to, "--shards", 12, "--connections", 1)
        assert status == 130
        whole = re.search(rf"stopped: (\d+) of 14 files are whole in {to}.*go on with the same command", out)
        assert whole and 2 <= int(whole[1]) < 14
        for name in read_manifest(to).files:
            assert (to / name).read_bytes() == files[f"{FOLDER}/{name}"]
        monkeypatch.setattr(Bars, "end", real)
        assert command("data", "fetch", "--to", to, "--shards", 12)[0] == 0
        is_over.set()
    assert len(data_files(to)) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "{to}"], "how many shards? Give --recipe or --size"),
        (["--to", "{to}", "--shards", "13"], "--shards 13: C4 has 12"),
        (["--to", "c4", "--shards", "1"], "--to c4: train would take --data c4 for the word"),
        (["--to", "{to}", "--recipe", "quickstart"], "quickstart: reads sample, of which nothing is fetched"),
        (["--to", "{file}", "--shards", "1"], "the folder cannot be written"),
        (["--to", "{to}", "--size", "60"], "did you mean '60m'"),
    ],
)
def test_mistakes_are_told_in_one_line(files, command, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file").write_bytes(b"")
    with hub_of(files, monkeypatch):
        filled = [each.format(to=tmp_path / "to", file=tmp_path / "file") for each in arguments]
        status, _, err = command("data", "fetch", *filled)
    assert status == 2 and message in err and err.count("\n") == 1


def test_a_hub_that_is_away_or_has_no_such_file(files, command, tmp_path, monkeypatch):
    to = tmp_path / "to"
    with hub_of({}, monkeypatch):
        status, _, err = command("data", "fetch", "--to", to, "--shards", 1)
        assert status == 2 and "no such file (HTTP 404)" in err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, _, err = command("data", "fetch", "--to", to, "--shards", 1)
    assert status == 1 and re.search(
        r"the Hugging Face hub \(http://127\.0\.0\.1:9\) does not answer \(.*refused\)", err
    )
    assert "go on with the same command" in err and err.count("\n") == 1


def test_two_do_not_fetch_into_one_folder(files, command, tmp_path, monkeypatch):
    with hub_of(files, monkeypatch), RunLock(tmp_path, file="fetch.lock") as lock:
        lock.take()
        status, _, err = command("data", "fetch", "--to", tmp_path, "--shards", 1)
    assert status == 2 and "is fetching into this folder" in err


# --- reading them


def order_of(source: Source, count: int, seed: int = SEED) -> list[object]:
    found = []
    for block in read_blocks(source, seed=seed, shuffle_block_documents=8, max_bad_lines=0):
        found += [(block.start, text) for text in block.texts]
        if len(found) >= count:
            break
    return found[:count]


def test_a_folder_gives_the_documents_of_streaming_in_its_order(files, command, tmp_path, monkeypatch, tiny_tokenizer):
    to = tmp_path / "to"
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    with hub_of(files, monkeypatch) as hub:
        assert command("data", "fetch", "--to", to, "--shards", 3, "--seed", SEED)[0] == 0
        streamed, fetched = resolve("c4", split="train"), resolve(str(to), split="train")
        expected = order_of(streamed, 12 * 20 + 100)
        hub.requests.clear()
        assert order_of(fetched, 60) == expected[:60]
        assert hub.requests == []
        # The fourth shard and those after it come from the hub; into the second epoch.
        assert order_of(fetched, len(expected)) == expected
        assert {path.rpartition("/")[2] for path, _ in hub.requests} == set(names("train", 12)[3:])
        assert resolve(str(to), split="validation").shards == resolve("c4", split="validation").shards
        options = {"packing": "pack", "sequence_length": 16, "sequences": 8}
        hub.requests.clear()
        scored = list(evaluation_batches(resolve(str(to), split="validation"), tokenizer, **options))
        assert hub.requests == []
        for mine, other in zip(
            scored, evaluation_batches(resolve("c4", split="validation"), tokenizer, **options), strict=True
        ):
            assert mine.inputs.equal(other.inputs) and mine.target_bytes == other.target_bytes
        # A cursor goes from one to the other and back.
        more = {**options, "seed": SEED, "shuffle_block_documents": 8}
        straight = _take(streamed, tokenizer, 9, **more)
        cursor = None
        for start, source in ((0, streamed), (3, fetched), (6, streamed)):
            batches = _take(source, tokenizer, 3, cursor=cursor, **more)
            assert [batch.digest for batch in batches] == [batch.digest for batch in straight[start : start + 3]]
            cursor = json.loads(json.dumps(batches[-1].cursor))
            assert cursor == straight[start + 2].cursor


def _take(source, tokenizer, count, **options):
    with TrainLoader(source, tokenizer, **options) as loader:
        return [next(loader) for _ in range(count)]


def test_a_missing_shard_is_told_with_what_to_fetch(files, command, tmp_path, monkeypatch):
    to = tmp_path / "to"
    with hub_of(files, monkeypatch):
        command("data", "fetch", "--to", to, "--shards", 3, "--seed", SEED)
    source = resolve(str(to), split="train")
    missing = names("train", 4)[3]
    expected = (
        rf"{to}: holds no copy of .*{missing}, and .*: `velora-pretrain data fetch --to {to}` with --shards above 3"
    )
    with pytest.raises(UserError, match=expected):
        order_of(source, 61)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        order_of(source, 61)
    assert len(order_of(source, 60)) == 60


def test_the_start_of_a_run_says_what_is_not_at_hand(files, command, tmp_path, monkeypatch, tiny_run):
    to = tmp_path / "to"
    with hub_of(files, monkeypatch):
        command("data", "fetch", "--to", to, "--shards", 3, "--seed", SEED)
        source, held_out = resolve(str(to), split="train"), resolve(str(to), split="validation")

        def check(steps: int, reason: str | None = None, **options) -> str | None:
            run = run_of(tiny_run, schedule__steps=steps)
            return check_at_hand(run, source, held_out, probe=lambda _: reason, **options)

        assert check(7, "away") is None  # 56 documents
        assert check(8) and "holds 3 of the 4 training shards" in check(8)
        assert "`velora-pretrain data fetch --to" in check(8) and "--shards 4 --seed 7" in check(8)
        with pytest.raises(
            UserError, match=r"holds 3 of the 4 training shards that this run reads, and away; fetch them"
        ):
            check(8, "away")
        # Packed, it is an estimate: 8 steps of 8 sequences of 32 tokens, 10 of them a document.
        monkeypatch.setattr(needs, "TOKENS_PER_DOCUMENT", 10)
        packed = run_of(tiny_run, schedule__steps=8, packing="pack")
        remark = check_at_hand(packed, source, held_out, probe=lambda _: "away")
        assert (
            remark and "holds 3 of the 11 training shards that this run reads by estimate, and away; if they" in remark
        )
        # A run that goes on behind the third does not need the first three.
        (to / names("train", 1)[0]).unlink()
        source = resolve(str(to), split="train")
        assert check(7, first_position=1) is None
        assert "holds 2 of the 3" in (check(7) or "")
        for path in to.glob("c4-validation*"):
            path.unlink()
        held_out = resolve(str(to), split="validation")
        with pytest.raises(UserError, match=r"holds 0 of the 1 validation shards"):
            check(7, "away", first_position=1)
        assert in_order(source.shards, SEED)[0].endswith(names("train", 1)[0])


def metrics(run: Path) -> list[tuple]:
    keys = ("step", "loss_nats_per_token", "batch_digest", "perplexity", "bits_per_byte")
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple(record.get(key) for key in keys) for record in records]


def weights(run: Path, step: int) -> bytes:
    return (run / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes()


def test_training_on_a_folder_is_bitwise_training_on_the_stream(
    files, command, tmp_path, monkeypatch, tiny_recipe, tiny_tokenizer
):
    """Also where it goes on from a streaming run, and from tokens."""
    to, recipe = tmp_path / "to", tiny_recipe(data="c4", seed=SEED, evaluation__tokens=200)
    train = ("train", "--recipe", recipe, "--steps", 12, "--run-dir")
    with hub_of(files, monkeypatch) as hub:
        assert command(*train, tmp_path / "stream", "--set", "checkpoint.every_steps=6")[0] == 0
        status, out, err = command("data", "fetch", "--to", to, "--recipe", recipe, "--steps", 12)
        assert (status, err) == (0, "") and "12 steps read 5 of the 12 training shards" in out
        hub.requests.clear()
        status, _, err = command(*train, tmp_path / "folder", "--data", to)
        assert status == 0, err
        # Reading ahead may come by shards after the last that is trained on.
        assert data_files(to).isdisjoint(path.rpartition("/")[2] for path, _ in hub.requests)
        # What a run with that folder reads is C4, too.
        status, out, err = command("data", "fetch", "--to", to, "--recipe", tmp_path / "folder/config.toml")
        assert status == 0 and "0 of them fetched now" in out, err
    expected = metrics(tmp_path / "stream")
    assert len(expected) == 13 and metrics(tmp_path / "folder") == expected
    assert weights(tmp_path / "folder", 12) == weights(tmp_path / "stream", 12)
    # Half of it streamed, the other half from the folder, without the hub, and then from tokens.
    shutil.rmtree(tmp_path / "stream/checkpoints/step-00000012")
    shutil.copytree(tmp_path / "stream", tmp_path / "tokens")
    status, out, err = command("train", "--resume", "--run-dir", tmp_path / "stream", "--data", to)
    assert status == 0 and "going on from" in out, err
    assert command("data", "tokenise", "--data", to, "--tokenizer", tiny_tokenizer, "--processes", 1)[0] == 0
    status, out, err = command("train", "--resume", "--run-dir", tmp_path / "tokens", "--data", to)
    assert status == 0 and "5 of 5 shards lie tokenised" in out and "1 of 1 validation shards" in out, (out, err)
    for name in ("stream", "tokens"):
        assert metrics(tmp_path / name) == expected
        assert weights(tmp_path / name, 12) == weights(tmp_path / "folder", 12)
    # The folder moved away, and then it was given up.
    moved = to.rename(tmp_path / "moved")
    for name, data in {"stream": moved, "tokens": "c4"}.items():
        shutil.rmtree(tmp_path / name / "checkpoints/step-00000012")
        with hub_of(files, monkeypatch):
            status, out, err = command("train", "--resume", "--run-dir", tmp_path / name, "--data", data)
        assert status == 0 and "going on from" in out, err
        assert metrics(tmp_path / name) == expected
        assert weights(tmp_path / name, 12) == weights(tmp_path / "folder", 12)
    # Another folder of files is other data, and nothing is written down of it.
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "balmer"}\n' * 100)
    status, _, err = command("train", "--resume", "--run-dir", tmp_path / "stream", "--data", other)
    assert status == 2 and f"data: '{other}' was asked for, but the run in" in err
    assert f'data = "{moved}"' in (tmp_path / "stream/config.toml").read_text()


def test_a_run_that_outgrows_its_folder_saves_what_it_has(files, command, tmp_path, monkeypatch, tiny_recipe):
    to, recipe = tmp_path / "to", tiny_recipe(data="c4", seed=SEED, evaluation__tokens=200)
    with hub_of(files, monkeypatch):
        command("data", "fetch", "--to", to, "--shards", 2, "--seed", SEED)
    train = ("train", "--recipe", recipe, "--data", to, "--run-dir")
    status, _, err = command(*train, tmp_path / "early", "--steps", 12)
    assert status == 2 and "holds 2 of the 5 training shards" in err and "data fetch" in err and err.count("\n") == 1
    # Nor does the first validation document, which is looked at, go before what the whole run asks for.
    held_out = to / names("validation", 1)[0]
    held_out.rename(tmp_path / "away")
    status, _, err = command(*train, tmp_path / "early", "--steps", 4)
    assert status == 2 and "of the 1 validation shards" in err and "data fetch --to" in err and "--seed 7" in err, err
    (tmp_path / "away").rename(held_out)
    # Where the estimate was wrong.
    monkeypatch.setitem(needs.DOCUMENTS_PER_SHARD, "train", 1000)
    status, _, err = command(*train, tmp_path / "late", "--steps", 12)
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(last) == 1 and "--shards above 2" in last[0] and "wrote" in last[0], err
    assert (tmp_path / "late/checkpoints/step-00000005").is_dir()
    assert c4.is_c4(str(to)) and not c4.is_c4(str(tmp_path))
