"""Copies of shards of C4 in a folder: several connections, each file whole or absent, kept in part when interrupted.

The bytes come through `remote.HttpFile`, which goes on where a connection broke and believes the end of a file only
when told twice. What has come lies in a hidden file named after the hub's hash of the whole one; the next attempt, in
this process or a later one, goes on behind it. At the end SHA-256 is held against the hub's, where it gives one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import os
import queue
import re
import shutil
import threading
import time
import urllib.error
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath

from rich.filesize import decimal

from velora_pretrain.bars import Bars
from velora_pretrain.data import remote
from velora_pretrain.data.manifest import FetchedFile, Manifest
from velora_pretrain.errors import UserError
from velora_pretrain.files import sha256_of

ATTEMPTS = 3
"""Times that a file is fetched whose size or hash is not what the hub says."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the hub says of a file."""

    size_bytes: int
    sha256: str | None
    """None where it does not say."""
    revision: str | None
    """Commit of the data set."""
    validators: dict[str, str]

    @property
    def identity(self) -> str:
        """Short name of this content, which another content of the same file does not have."""
        named = self.sha256 or str(self.validators or self.size_bytes)
        return hashlib.sha256(named.encode()).hexdigest()[:12]


def ask(shard: str) -> Facts:
    """Asks for the facts of a file, a few times.

    Raises:
        UserError: The hub refuses it, or knows none of that name.
        ConnectionError: The hub does not answer.
    """
    fault: Exception | None = None
    for delay_seconds in (0.0, *remote.RETRY_DELAYS_SECONDS[:5]):
        time.sleep(delay_seconds)
        try:
            return _ask_once(shard)
        except urllib.error.HTTPError as error:
            error.close()
            if not remote.is_passing(error):
                raise UserError(f"{shard}: {remote.refusal(error.code)}") from error
            fault = error
        except (OSError, http.client.HTTPException) as error:
            fault = error
    reason = getattr(fault, "reason", None) or fault
    raise ConnectionError(f"the Hugging Face hub ({remote.hub_endpoint()}) does not answer ({reason})") from fault


def _ask_once(shard: str) -> Facts:
    redirects = []
    asked = remote.request(shard, last_byte=0)
    with remote.open_url(asked, timeout_seconds=remote.TIMEOUT_SECONDS, redirects=redirects) as response:
        headers = response.headers
        if headers.get_content_type() == "text/html":
            raise ConnectionError("it sends a web page in place of the file")
        is_part = response.status == http.HTTPStatus.PARTIAL_CONTENT
    said = {name.lower(): value for each in (headers, *reversed(redirects)) for name, value in each.items()}
    size = said.get("x-linked-size") or (
        headers.get("Content-Range", "").rpartition("/")[2] if is_part else headers.get("Content-Length", "")
    )
    if not size.isdecimal() or int(size) == 0:
        raise ConnectionError(f"it gives {size or 'nothing'} as the size of {PurePath(shard).name}")
    linked = said.get("x-linked-etag", "").removeprefix("W/").strip('"')
    return Facts(
        size_bytes=int(size),
        sha256=linked if re.fullmatch("[0-9a-f]{64}", linked) else None,
        revision=said.get("x-repo-commit"),
        validators={name: headers[name] for name in remote.VALIDATORS if name in headers},
    )


class _Stopped(Exception):
    """Another file failed, or the user has had enough."""


class Fetch:
    """Brings files into a folder."""

    def __init__(self, folder: Path, manifest: Manifest, *, bars: Bars) -> None:
        self._folder, self._bars = folder, bars
        self.manifest = manifest
        self._lock, self._stop = threading.Lock(), threading.Event()

    def run(self, shards: Sequence[str], *, connections: int) -> None:
        """Fetches shards that are not there whole, the first ones first.

        Raises:
            UserError: No room, a file that the hub does not have, or one that never is what the hub says.
            ConnectionError: The hub stays away.
        """
        missing = [shard for shard in shards if not self.is_whole(shard)]
        with ThreadPoolExecutor(connections) as pool:
            facts = dict(zip(missing, pool.map(ask, missing), strict=True))
        missing = [shard for shard in missing if not self._is_adopted(shard, facts[shard])]
        parts = {shard: self._part(shard, facts[shard]) for shard in missing}
        here = sum(part.stat().st_size for part in parts.values() if part.exists())
        total = sum(facts[shard].size_bytes for shard in missing)
        self._check_room(total - here)
        self._bars.start(files=len(missing), total=total, done=here)
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        outcomes: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        for shard in missing:
            waiting.put(shard)

        def work() -> None:
            while True:
                try:
                    shard = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._fetch(shard, facts[shard])
                    outcomes.put(None)
                except Exception as error:
                    outcomes.put(error)
                    return

        # Daemons, so that Ctrl-C need not wait for one that waits for the hub.
        for _ in range(min(connections, len(missing))):
            threading.Thread(target=work, name="fetch", daemon=True).start()
        try:
            for _ in missing:
                fault = outcomes.get()
                if isinstance(fault, OSError) and not isinstance(fault, ConnectionError):
                    raise UserError(
                        f"{self._folder}: cannot be written ({fault.strerror}); whole files stay: run it again"
                    ) from fault
                if fault is not None:
                    raise fault
        finally:
            self._stop.set()

    def _path(self, shard: str) -> Path:
        return self._folder / PurePath(shard).name

    def _part(self, shard: str, facts: Facts) -> Path:
        return self._folder / f".{PurePath(shard).name}.{facts.identity}.part"

    def is_whole(self, shard: str) -> bool:
        """Whether a file is there."""
        path = self._path(shard)
        known = self.manifest.files.get(path.name)
        return known is not None and path.is_file() and path.stat().st_size == known.size_bytes

    def _is_adopted(self, shard: str, facts: Facts) -> bool:
        """Takes a file that lies there by other means for fetched, if it is what the hub has."""
        path = self._path(shard)
        if not path.is_file() or path.stat().st_size != facts.size_bytes or facts.sha256 is None:
            return False
        sha256 = sha256_of(path)
        if sha256 == facts.sha256:
            self._note(path.name, FetchedFile(size_bytes=facts.size_bytes, sha256=sha256, revision=facts.revision))
        return sha256 == facts.sha256

    def _note(self, name: str, file: FetchedFile) -> None:
        with self._lock:
            self.manifest = dataclasses.replace(self.manifest, files={**self.manifest.files, name: file})
            self.manifest.write(self._folder)

    def _check_room(self, size_bytes: int) -> None:
        free_bytes = shutil.disk_usage(self._folder).free
        if size_bytes > free_bytes:
            raise UserError(
                f"{self._folder}: {decimal(size_bytes)} are to be fetched and {decimal(free_bytes)} are free;"
                " make room, or give fewer --shards or another --to"
            )

    def _fetch(self, shard: str, facts: Facts) -> None:
        path = self._path(shard)
        for attempt in range(ATTEMPTS):
            facts = ask(shard) if attempt else facts
            part = self._part(shard, facts)
            for old in self._folder.glob(f".{path.name}.*.part"):
                if old != part:
                    old.unlink(missing_ok=True)  # of a content that the hub has no more
            try:
                size_bytes, sha256 = self._bring(shard, part, facts)
            except ConnectionError as error:
                if not isinstance(error.__cause__, remote.OtherBytes):
                    raise
                part.unlink()  # its end did not reach the disk before a power cut
                continue
            # The hub's hash decides where there is one; a size alone may have been said wrongly once.
            if sha256 == facts.sha256 or (facts.sha256 is None and size_bytes == facts.size_bytes):
                part.replace(path)
                self._note(path.name, FetchedFile(size_bytes=size_bytes, sha256=sha256, revision=facts.revision))
                self._bars.end(path.name, decimal(size_bytes))
                return
            if facts.sha256 is not None:
                part.unlink()
        raise UserError(
            f"{shard}: what arrives has not the {'hash' if facts.sha256 else 'size'} that the hub gives, {ATTEMPTS}"
            " times running; try again later, or from another network"
        )

    def _bring(self, shard: str, part: Path, facts: Facts) -> tuple[int, str]:
        """Completes a file; gives its size and hash."""
        digest, size_bytes, last = hashlib.sha256(), 0, b""
        with part.open("a+b") as file:
            if file.tell() > facts.size_bytes:
                file.truncate(0)
            file.seek(0)
            while kept := file.read(remote.CHUNK_BYTES):
                digest.update(kept)
                size_bytes += len(kept)
                last = (last + kept)[-remote.OVERLAP_BYTES :]
            self._bars.begin(self._path(shard).name, total=facts.size_bytes, done=size_bytes)
            with remote.HttpFile(shard, remote.Delivered(size_bytes, last, facts.validators)) as arriving:
                while content := arriving.read(remote.CHUNK_BYTES):
                    if self._stop.is_set():
                        raise _Stopped
                    file.write(content)
                    digest.update(content)
                    size_bytes += len(content)
                    self._bars.advance(self._path(shard).name, len(content))
            file.flush()
            os.fsync(file.fileno())
        return size_bytes, digest.hexdigest()
