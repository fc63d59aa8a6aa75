"""A web server on this machine that serves bytes and misbehaves as told."""

import http.server
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from faulty_server import running


@dataclass
class FileServer:
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    """Honour Range headers."""
    framing: str = "length"
    """How a reply says where it ends: "length", "chunked", or "close" for not at all."""
    cuts: list[int] = field(default_factory=list)
    """The n-th reply with a body closes the connection after so many bytes of it."""
    excesses: list[int] = field(default_factory=list)
    """The n-th reply with a body states a length, and a size of the file, so many bytes above the truth."""
    statuses: list[int] = field(default_factory=list)
    """The n-th request is answered with this status."""
    headers: dict[str, str] = field(default_factory=dict)
    """Also sent with `statuses`."""
    content_type: str = "application/octet-stream"
    redirects: dict[str, str] = field(default_factory=dict)
    redirect_headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """By path, sent with `redirects`."""
    etags: list[str] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""


def _handler(server: FileServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            server.requests.append((self.path, dict(self.headers)))
            self.close_connection = True
            path = self.path.partition("?")[0]
            if server.statuses:
                return self._plain(server.statuses.pop(0), **server.headers)
            if path in server.redirects:
                headers = server.redirect_headers.get(path, {})
                return self._plain(302, Location=server.redirects[path], **headers)
            if path not in server.files:
                return self._plain(404)
            return self._file(server.files[path])

        def _plain(self, status, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def _file(self, whole):
            body, asked = whole, self.headers.get("Range")
            excess = server.excesses.pop(0) if server.excesses else 0
            if asked and server.ranges:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                body = whole[int(first) : int(last) + 1 if last else None]
                self.send_response(206)
                end = int(first) + len(body) - 1
                self.send_header("Content-Range", f"bytes {first}-{end}/{len(whole) + excess}")
            else:
                self.send_response(200)
            self.send_header("Content-Type", server.content_type)
            if server.etags:
                self.send_header("ETag", server.etags.pop(0))
            cut = server.cuts.pop(0) if server.cuts else None
            if server.framing == "length":
                self.send_header("Content-Length", str(len(body) + excess))
            if server.framing == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Connection", "close")
            self.end_headers()
            if server.framing != "chunked":
                self.wfile.write(body[:cut])
                return
            for start in range(0, len(body[:cut]), 10_000):
                piece = body[:cut][start : start + 10_000]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if cut is None:
                self.wfile.write(b"0\r\n\r\n")

    return Handler


@contextmanager
def serve(**settings) -> Iterator[FileServer]:
    """A running server; `FileServer.url` is its address."""
    server = FileServer(**settings)
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    listener.daemon_threads = True
    with running(listener) as server.url:
        yield server
