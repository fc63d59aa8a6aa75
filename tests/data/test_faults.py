"""Documents through a server that fails and lies at random: all of them, once, in order, and the same run."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs

from velora_pretrain import cli
from velora_pretrain.data.source import read_records

FORMATS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]
KINDS = [
    *("reset", "headers_reset", "headers_cut", "body_reset", "body_cut", "silent", "stall"),
    *("status_429", "status_500", "status_502", "status_503"),
    *("length_small", "length_large", "range_wrong", "bytes_wrong", "whole", "page"),
]
OF_RANGES = ("range_wrong", "bytes_wrong", "whole")
TIMEOUT_SECONDS = 0.1


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool that injects faults, its waits shortened for the reader's sake."""
    monkeypatch.syspath_prepend(str(runs.ROOT / "tools"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    import fault_injection

    with fault_injection.shortened_waits(TIMEOUT_SECONDS):
        yield fault_injection


def texts_of(shard: str) -> list[str | None]:
    return [record.text for record in read_records(shard, wanted=lambda _: True)]


@pytest.mark.parametrize("fault_rate", [0.3, 0.6])
def test_thousands_of_requests_lose_and_double_nothing(tools: Any, tmp_path: Path, fault_rate: float) -> None:
    source = tools.write_files(tmp_path, files=4, documents=60)
    figures = tools.measure(source, requests=1500, fault_rate=fault_rate, seed=7, timeout_seconds=TIMEOUT_SECONDS)
    assert figures["requests"] >= 1500
    assert set(figures["faults_by_kind"]) == set(KINDS)
    assert figures["documents_read"] == figures["passes"] * 16 * 60
    assert (figures["documents_lost"], figures["documents_doubled"], figures["passes_out_of_order"]) == (0, 0, 0)
    # Each is told in the log: a false size by two lines, and a fault may fall on a reply that needs no retry.
    assert figures["retries_logged"] > 0.8 * figures["faults"]


@pytest.mark.parametrize("name_ending", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_alone(tools: Any, kind: str, name_ending: str, caplog: pytest.LogCaptureFixture) -> None:
    """At the first request, at a later one, and at the one that confirms the end of the file."""
    texts = tools.random_texts(50, seed=1)
    places = [["body_cut", kind, kind], [None, kind]]
    for place in places if kind in OF_RANGES else [[kind], *places]:
        server = tools.FaultyServer({f"/a{name_ending}": tools.FORMATS[name_ending](texts)}, script=place, fault_rate=0)
        with server.serve(), caplog.at_level(logging.WARNING):
            caplog.clear()
            assert texts_of(f"{server.url}/a{name_ending}") == texts
        assert not server.script
        if kind != "whole":  # which is dealt with at once
            assert "trying again from byte" in caplog.text


@pytest.mark.parametrize("name_ending", FORMATS)
def test_a_server_that_stays_down_ends_reading_after_what_had_arrived(tools: Any, name_ending: str) -> None:
    texts = tools.random_texts(400, seed=2)
    content = tools.FORMATS[name_ending](texts)
    server = tools.FaultyServer({f"/a{name_ending}": content}, fault_rate=0.3, down_after_bytes=len(content) // 2)
    given: list[str | None] = []
    with (
        server.serve(),
        pytest.raises(ConnectionError, match=r"reading failed 34 times at byte \d+ of \d+: ") as caught,
    ):
        given.extend(record.text for record in read_records(f"{server.url}/a{name_ending}", wanted=lambda _: True))
    assert f"/a{name_ending}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert given == texts[: len(given)]
    assert len(given) < 250
    if name_ending == ".jsonl":
        assert len(given) == content[: len(content) // 2].count(b"\n")


# --- training


def train(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *map(str, arguments)])
    return exit_.value.code


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The last weights, and every record but its times."""
    weights = max((run / "checkpoints").iterdir()) / "model.safetensors"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("_per_second", "_seconds", "memory_bytes")
    timeless = [{key: value for key, value in record.items() if not key.endswith(timed)} for record in records]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), timeless


@pytest.fixture
def recipe_of(tiny_recipe: Callable[..., Path]) -> Callable[..., Path]:
    def write(data: str, **changes: Any) -> Path:
        return tiny_recipe(
            **changes,
            data=data,
            packing="pack",
            schedule__steps=24,
            evaluation__every_steps=10,
            reading__prefetch_batches=1,
            reading__shuffle_block_documents=8,
        )

    return write


def test_a_run_over_the_faulty_server_is_the_run_over_the_file(
    tools: Any, tiny_data: Path, recipe_of: Callable[..., Path], tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in tiny_data.read_text().splitlines()]
    local = tmp_path / "tiny.jsonl.gz"
    local.write_bytes(tools.FORMATS[".jsonl.gz"](texts))
    # Small parts, so that a file this small breaks many times.
    server = tools.FaultyServer({f"/{local.name}": local.read_bytes()}, fault_rate=0.85, seed=3, part_bytes=2000)
    assert train("--recipe", recipe_of(str(local)), "--run-dir", tmp_path / "local") == 0
    with server.serve():
        assert train("--recipe", recipe_of(f"{server.url}/{local.name}"), "--run-dir", tmp_path / "remote") == 0
    assert server.faults.total() > 10
    assert outcome(tmp_path / "remote") == outcome(tmp_path / "local")


def test_a_run_whose_server_goes_down_saves_and_goes_on_when_it_is_back(
    tools: Any,
    tiny_data: Path,
    recipe_of: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = tiny_data.read_bytes()
    server = tools.FaultyServer({"/tiny.jsonl": content}, fault_rate=0.2, down_after_bytes=len(content) // 3)
    # Validation text from the disk, or the server would go down before the first step.
    validation = {"validation_data": str(runs.write_documents(tmp_path / "validation.jsonl", 40, seed=1))}
    assert train("--recipe", recipe_of(str(tiny_data), **validation), "--run-dir", tmp_path / "straight") == 0
    run = tmp_path / "run"
    with server.serve():
        capfd.readouterr()
        assert train("--recipe", recipe_of(f"{server.url}/tiny.jsonl", **validation), "--run-dir", run) not in (0, None)
        (line,) = [each for each in capfd.readouterr().err.splitlines() if "trying again" not in each]
        told = re.fullmatch(
            r"error: after step (\d+): \S+/tiny\.jsonl: reading failed 34 times at byte \d+ of \d+: .*; "
            r"wrote (\S+); go on with: velora-pretrain train --resume --run-dir (\S+)",
            line,
        )
        assert told, line
        assert 0 < int(told[1]) < 24
        assert (Path(told[2]).name, told[3]) == (f"step-{int(told[1]):08d}", str(run))
        server.restore()
        assert train("--resume", "--run-dir", run) == 0
    assert outcome(run) == outcome(tmp_path / "straight")


def test_retries_are_shown_to_the_user(tools: Any, tiny_data: Path, recipe_of: Callable[..., Path]) -> None:
    server = tools.FaultyServer({"/tiny.jsonl": tiny_data.read_bytes()}, fault_rate=0, script=["status_503"])
    with server.serve():
        recipe = recipe_of(f"{server.url}/tiny.jsonl")
        done = runs.tool(
            *("train", "--recipe", str(recipe), "--steps", "1", "--run-dir", str(recipe.parent / "run")),
            no_proxy="127.0.0.1",
        )
    assert done.returncode == 0, done.stderr
    retry = rf"{server.url}/tiny\.jsonl: HTTP Error 503: .*; trying again from byte 0 in 0\.5 s"
    assert len(re.findall(retry, done.stderr)) == 1, done.stderr
