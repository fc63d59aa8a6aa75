"""A web server on this machine that fails and lies at random, drawn from a seed; it tells how often it did which.

A fault is drawn for every request:

    reset                no byte of a reply, the connection reset
    headers_reset        reset in the middle of the headers
    headers_cut          closed in the middle of the headers, as if these were all
    body_reset           reset somewhere in the body
    body_cut             closed somewhere in the body
    status_429 and so on that status, with or without Retry-After
    silent               nothing is sent, for longer than the client waits
    stall                a part of the body, then the same
    length_small         Content-Length, and Content-Range with it, below the truth; the body is cut to fit
    length_large         both above the truth
    range_wrong          Content-Range names another place than was asked for
    bytes_wrong          the body is from another place than Content-Range says
    whole                the whole file with 200, though a range was asked for
    page                 a web page with 200 in place of the file
"""

from __future__ import annotations

import http.server
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

FAULTS: dict[str, int] = {
    "reset": 3,
    "headers_reset": 2,
    "headers_cut": 3,
    "body_reset": 6,
    "body_cut": 6,
    "status_429": 1,
    "status_500": 1,
    "status_502": 1,
    "status_503": 1,
    "silent": 1,
    "stall": 1,
    "length_small": 3,
    "length_large": 3,
    "range_wrong": 2,
    "bytes_wrong": 2,
    "whole": 2,
    "page": 2,
}
"""Kinds of fault, and how often each is drawn beside the others."""
OF_RANGES = ("range_wrong", "bytes_wrong", "whole")
"""Faults that only a request for a range can meet."""
PAGE = b"<!DOCTYPE html>\n<html><body>Please sign in to this network.</body></html>\n"


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        """Closes without the orderly end that would come before a reset."""
        self.close_request(request)


@contextmanager
def running(listener: http.server.HTTPServer) -> Iterator[str]:
    """Runs a listener in a thread; gives its address."""
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_address[1]}"
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


@dataclass
class FaultyServer:
    """What is served and how it fails; running inside `serve`."""

    files: Mapping[str, bytes]
    """By path."""
    script: list[str | None] = field(default_factory=list)
    """Faults of the first requests; the others' are drawn."""
    fault_rate: float = 0.5
    """Share of the other requests that meet a fault."""
    seed: int = 0
    stall_seconds: float = 1.0
    """How long a connection stays silent; beyond the client's patience."""
    part_bytes: int = 20_000
    """Longest part of a body before it breaks, so that a file takes many requests."""
    down_after_bytes: int | None = None
    """From this byte of a file on nothing is served, and no request is answered."""
    url: str = ""
    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """How often each kind was met."""

    def __post_init__(self) -> None:
        self._random, self._lock, self._stopped = random.Random(self.seed), threading.Lock(), threading.Event()
        self._is_down = False

    @contextmanager
    def serve(self) -> Iterator[FaultyServer]:
        """Runs the server; `url` is its address."""
        with running(_Listener(("127.0.0.1", 0), self._handler())) as self.url:
            try:
                yield self
            finally:
                self._stopped.set()

    def restore(self) -> None:
        """Ends the time that `down_after_bytes` began."""
        self._is_down, self.down_after_bytes = False, None

    def _draw(self, has_range: bool) -> tuple[str | None, random.Random]:
        """The next request's fault, and what its details are drawn from."""
        with self._lock:
            self.requests += 1
            details = random.Random(self._random.random())
            kinds = [kind for kind in FAULTS if has_range or kind not in OF_RANGES]
            (drawn,) = self._random.choices(kinds, [FAULTS[kind] for kind in kinds])
            kind = drawn if self._random.random() < self.fault_rate else None
            if self.script:
                kind = self.script.pop(0)
            if kind is not None:
                self.faults[kind] += 1
            return kind, details

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Says nothing."""

            def do_GET(self) -> None:
                """Answers, well or badly."""
                self.close_connection = True
                # The client goes away from what it need not read to the end.
                with suppress(OSError):
                    server._answer(self)

        return Handler

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        if self._is_down:
            return _reset(handler)
        content = self.files.get(handler.path.partition("?")[0])
        if content is None:
            return handler.send_error(404)
        asked = handler.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        fault, details = self._draw(bool(asked))
        if fault in ("reset", "silent"):
            if fault == "silent":
                self._stopped.wait(self.stall_seconds)
            return _reset(handler)
        if fault is not None and fault.startswith("status"):
            after = details.choice(("", "Retry-After: 0\r\n"))
            status = fault.removeprefix("status_")
            return _send(handler, f"HTTP/1.0 {status} Out of order\r\n{after}Content-Length: 0\r\n\r\n".encode())
        head, body = _reply(content, int(asked) if asked else None, fault, details)
        if fault in ("headers_reset", "headers_cut"):
            _send(handler, head[: details.randrange(1, len(head) - 2)])
            return _reset(handler) if fault == "headers_reset" else None
        is_broken = fault in ("body_reset", "body_cut", "stall")
        body = body[: details.randrange(min(len(body), self.part_bytes) + 1)] if is_broken else body
        if self.down_after_bytes is not None:
            self._is_down = int(asked or 0) + len(body) > self.down_after_bytes
            body = body[: max(0, self.down_after_bytes - int(asked or 0))]
        _send(handler, head + body)
        if fault == "stall":
            self._stopped.wait(self.stall_seconds)
        return _reset(handler) if fault == "body_reset" else None


def _reply(content: bytes, first_byte: int | None, fault: str | None, details: random.Random) -> tuple[bytes, bytes]:
    """Headers and body of a reply."""
    if fault == "page":
        return _head("200 OK", "text/html; charset=utf-8", len(PAGE)), PAGE
    size = len(content)
    if fault == "length_small":
        size = details.randrange((first_byte or 0) + 1, max(size, (first_byte or 0) + 2))
    elif fault == "length_large":
        size += details.randrange(1, 1000)
    file = 'application/octet-stream\r\nAccept-Ranges: bytes\r\nETag: "first"'
    if first_byte is None or fault == "whole":
        return _head("200 OK", file, size), content[:size]
    sent_from = named_from = first_byte
    if fault == "range_wrong":
        named_from = details.randrange(len(content))
    elif fault == "bytes_wrong":
        sent_from = details.randrange(len(content))
    span = f"{file}\r\nContent-Range: bytes {named_from}-{size - 1}/{size}"
    return _head("206 Partial Content", span, size - first_byte), content[sent_from:size]


def _head(status: str, kind_and_more: str, length: int) -> bytes:
    return f"HTTP/1.0 {status}\r\nContent-Type: {kind_and_more}\r\nContent-Length: {length}\r\n\r\n".encode()


def _send(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.wfile.write(content)
    handler.wfile.flush()


def _reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Makes the closing of the connection a reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
