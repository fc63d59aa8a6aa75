"""A hub on this machine with a C4 of twelve small shards."""

import gzip
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import runs
from fileserver import FileServer, serve

from velora_pretrain.data import c4, manifest, needs, remote

DOCUMENTS = 20
"""Of a shard."""
FOLDER = "/datasets/allenai/c4/resolve/main/en"
COUNTS = {"train": 12, "validation": 2}


def make_files(folder: Path) -> dict[str, bytes]:
    """The shards, by their path on the hub."""
    files = {}
    for split, count in COUNTS.items():
        for number in range(count):
            path = runs.write_documents(folder / "x.jsonl", DOCUMENTS, seed=number + 100 * (split == "train"))
            name = f"c4-{split}.{number:05d}-of-{count:05d}.json.gz"
            files[f"{FOLDER}/{name}"] = gzip.compress(path.read_bytes(), mtime=0)
    path.unlink()
    return files


@contextmanager
def hub_of(files: dict[str, bytes], monkeypatch, **settings) -> Iterator[FileServer]:
    """Serves the files, and makes the program take this for the hub and these for all of C4."""
    for split, count in COUNTS.items():
        monkeypatch.setitem(manifest.C4_NUM_SHARDS, split, count)
        monkeypatch.setitem(needs.DOCUMENTS_PER_SHARD, split, DOCUMENTS)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "RETRY_DELAYS_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(c4, "PROBE_DELAY_SECONDS", 0.0)
    with serve(files=dict(files), **settings) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@contextmanager
def linked_hub(files: dict[str, bytes], monkeypatch) -> Iterator[tuple[FileServer, FileServer]]:
    """The hub as it is: it sends on to a store, and says size, hash and commit; gives hub and store."""
    with serve(files=dict(files)) as store, hub_of({}, monkeypatch) as hub:
        for path, content in files.items():
            hub.redirects[path] = f"{store.url}{path}"
            hub.redirect_headers[path] = {
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": "c0ffee",
            }
        yield hub, store
