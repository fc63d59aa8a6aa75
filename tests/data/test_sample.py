import json
import os
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from velora_pretrain.data import sample
from velora_pretrain.data.sample import sample_file, sample_sha256
from velora_pretrain.errors import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(cache: Path) -> Path:
    return sample_file(cache)


@pytest.fixture
def no_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> bytes:
        raise AssertionError("built again")

    monkeypatch.setattr(sample, "_build", build)


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_size_and_documents(built: Path) -> None:
    assert 1_400_000 < built.stat().st_size < 2_400_000
    texts = [record["text"] for record in records(built)]
    assert len(texts) > 300
    assert len(set(texts)) == len(texts)
    assert all(len(text.strip()) > 150 for text in texts)
    # A paragraph is never cut, so a few documents exceed the limit by one long table.
    assert sum(len(text) > sample.MAX_DOCUMENT_CHARACTERS for text in texts) < 0.02 * len(texts)


def test_records_hold_prose_of_the_library_and_no_path(built: Path) -> None:
    content = built.read_text(encoding="utf-8")
    assert sysconfig.get_path("stdlib") not in content
    assert sys.prefix not in content
    sources = {record["source"] for record in records(built)}
    assert {"json/__init__.py", "pydoc/assert"} <= sources
    assert not any(part in source.split("/") for source in sources for part in ("test", "site-packages", "idlelib"))


def test_name_tells_version_and_format(built: Path) -> None:
    assert "{}.{}.{}".format(*sys.version_info[:3]) in built.name
    assert built.name.endswith(f"-v{sample.FORMAT_VERSION}.jsonl")


def test_another_process_builds_the_same(built: Path, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; from velora_pretrain.data import sample; sample.sample_file(pathlib.Path(sys.argv[1]))"
    )
    # Another order of sets and dictionaries by hash, if any were used.
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
    assert (tmp_path / built.name).read_bytes() == built.read_bytes()


def test_two_at_once_leave_one_whole_file(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = built.read_bytes()
    together = threading.Barrier(2)

    def build() -> bytes:
        together.wait(timeout=30)
        return content

    monkeypatch.setattr(sample, "_build", build)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(sample_file, [tmp_path, tmp_path])
    assert first == second
    assert first.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {first.name, first.name + ".sha256"}


@pytest.mark.usefixtures("no_rebuild")
def test_a_whole_file_is_used_as_it_is(built: Path, cache: Path) -> None:
    assert sample_file(cache) == built


@pytest.mark.parametrize("damage", ["truncated", "changed", "no hash"])
def test_a_damaged_file_is_built_again(built: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    content, digest = built.read_bytes(), sample_sha256(built)
    monkeypatch.setattr(sample, "_build", lambda: content)
    if damage == "truncated":
        built.write_bytes(content[:-1000])
    elif damage == "changed":
        built.write_bytes(content.replace(b"the", b"teh", 1))
    else:
        built.with_name(built.name + ".sha256").unlink()
    assert sample_sha256(sample_file(cache)) == digest
    assert built.with_name(built.name + ".sha256").read_text() == digest


@pytest.mark.usefixtures("no_rebuild")
def test_the_cache_folder_follows_the_environment(built: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VELORA_PRETRAIN_CACHE", str(cache))
    assert sample_file() == built


def test_a_python_without_sources_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.setattr(sample, "_topics", lambda: iter(()))
    with pytest.raises(UserError, match="--data PATH"):
        sample_file(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_build", lambda: b"x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="VELORA_PRETRAIN_CACHE"):
        sample_file(tmp_path / "file" / "folder")
