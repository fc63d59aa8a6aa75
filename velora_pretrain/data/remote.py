"""The bytes of a shard that lies on the Hugging Face hub or at a web address.

`HttpFile` is one GET per shard and one more that confirms its end. It goes on where a connection broke, and never takes
a short body for the end of the file. Only the standard library is used: which http client `datasets` brings changes
between its releases.
"""

import contextlib
import functools
import http.client
import io
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import Any, NamedTuple

from velora_pretrain.errors import UserError

logger = logging.getLogger(__name__)

RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0)
"""Waits between attempts that bring nothing, five minutes in all."""
FIRST_CONTACT_RETRIES = 3
"""Attempts after the first at a server that has never answered this process, so that a mistyped name is soon told."""
MAX_RETRY_AFTER_SECONDS = 120.0
"""Longest wait that a server can ask for."""
TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 1 << 20
OVERLAP_BYTES = 64
_HUB = "hf://datasets/"
_RETRIED_STATUS = {408, 416, 425, 429}
VALIDATORS = ("ETag", "Last-Modified")
_answering_servers: set[str] = set()


def is_remote(shard: str) -> bool:
    """Whether a shard is read over the network."""
    return shard.startswith(("http://", "https://", "hf://"))


def hub_endpoint() -> str:
    """Where the Hugging Face hub is: HF_ENDPOINT or its usual address."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def web_address(shard: str) -> str:
    """The http address of a remote shard; `hf://datasets/OWNER/NAME[@REVISION]/PATH` is looked up on the hub.

    Raises:
        UserError: An `hf://` address of another form.
    """
    if not shard.startswith("hf://"):
        return shard
    parts = shard.removeprefix(_HUB).split("/", 2)
    if not shard.startswith(_HUB) or len(parts) < 3 or not all(parts):
        raise UserError(f"{shard}: not of the form hf://datasets/OWNER/NAME/FILE")
    owner, (name, _, revision), path = parts[0], parts[1].partition("@"), parts[2]
    revision = urllib.parse.quote(revision or "main", safe="")
    return f"{hub_endpoint()}/datasets/{owner}/{name}/resolve/{revision}/{urllib.parse.quote(path)}"


def request(shard: str, *, first_byte: int = 0, last_byte: int | None = None) -> urllib.request.Request:
    """The GET for a remote shard from `first_byte` on, with the user's hub token if it goes to the hub."""
    headers = {"User-Agent": "velora-pretrain", "Accept-Encoding": "identity"}
    if first_byte or last_byte is not None:
        headers["Range"] = f"bytes={first_byte}-{'' if last_byte is None else last_byte}"
    built = urllib.request.Request(web_address(shard), headers=headers)
    if shard.startswith("hf://"):
        import huggingface_hub

        token = huggingface_hub.get_token()
        if token:
            # Unredirected: the hub sends us on to another host's signed address, which must not see the token.
            built.add_unredirected_header("Authorization", f"Bearer {token}")
    return built


def open_url(
    asked: urllib.request.Request, *, timeout_seconds: float, redirects: list[Message] | None = None
) -> http.client.HTTPResponse:
    """Send a request; proxies and certificates as the environment sets them.

    Args:
        asked: The request.
        timeout_seconds: Longest silence.
        redirects: Takes the headers of each reply that sent us on.
    """
    server = asked.host  # urllib puts a proxy's name in its place
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=_certificates()), _Redirects([] if redirects is None else redirects)
    )
    try:
        response = opener.open(asked, timeout=timeout_seconds)
    except urllib.error.HTTPError:
        _answering_servers.add(server)
        raise
    _answering_servers.add(server)
    return response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows as ever, and keeps what the replies on the way have said."""

    def __init__(self, seen: list[Message]):
        self._seen = seen

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self._seen.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@functools.cache
def _certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()
    # Some Python installers bring no system certificates; the usual bundle serves where it is installed.
    with contextlib.suppress(ImportError):
        import certifi  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

        context.load_verify_locations(certifi.where())
    return context


class OtherBytes(ConnectionError):
    """What was read before is not what the server has."""


class Delivered(NamedTuple):
    """What another `HttpFile` has read of a file before, perhaps in another process."""

    position_bytes: int = 0
    last_bytes: bytes = b""
    """The `OVERLAP_BYTES` before the position."""
    validators: Mapping[str, str] = {}
    """The file's ETag and Last-Modified, as far as the server sends them."""


NOTHING = Delivered()


class HttpFile(io.RawIOBase):
    """The bytes of a remote shard from first to last, through broken connections and false replies.

    An attempt that fails is made again after `RETRY_DELAYS_SECONDS`, which begin anew with every byte that arrives.
    What is promised, of a server that does not tell the same lie twice running:

    * No byte is lost or doubled. A connection that breaks goes on by a range request from `OVERLAP_BYTES` before the
      break, and what it repeats must be what was delivered. Where the server answers with the whole file, the bytes
      before the break are read and dropped, and the last of them compared.
    * A short body is no end. The file ends where one reply says so and a second one, asked for at that place, says the
      same. Where the server answers with the whole file, the length that it states is the confirmation; where it
      states none, the end mark of a chunked reply is believed, as nothing more can be asked.
    * A size that changes while ETag or Last-Modified stay is a false reply, which the next two correct. Where these
      change, or the server gives neither, the file counts as changed, and reading ends with an error.

    Bytes that are wrong in the middle of a right reply are left to the checksums of the compressed formats.
    """

    def __init__(self, shard: str, before: Delivered = NOTHING):
        self._shard = shard
        self._server = urllib.parse.urlsplit(web_address(shard)).netloc
        self._position_bytes, self._last_bytes = before.position_bytes, before.last_bytes
        self._size_bytes: int | None = None
        self._validators = dict(before.validators)
        self._is_over = False
        self._response: http.client.HTTPResponse | None = None

    def readable(self) -> bool:
        """True, as `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; 0 at the end of the file.

        Raises:
            UserError: The server refuses the file, knows none of that name, or has another one meanwhile.
            ConnectionError: Every attempt failed.
        """
        failed = 0
        while not self._is_over:
            try:
                return self._read_once(buffer)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500 and error.code not in _RETRIED_STATUS:
                    raise UserError(f"{self._shard}: {refusal(error.code)}") from error
                fault: Exception = error
            except (OSError, http.client.HTTPException) as error:
                fault = error
            self._disconnect()
            failed += 1
            delays_seconds = RETRY_DELAYS_SECONDS
            if self._server not in _answering_servers:
                delays_seconds = delays_seconds[:FIRST_CONTACT_RETRIES]
            if failed > len(delays_seconds):
                place = f"{self._position_bytes}{f' of {self._size_bytes}' if self._size_bytes else ''}"
                raise ConnectionError(
                    f"{self._shard}: reading failed {failed} times at byte {place}: {fault}"
                ) from fault
            delay_seconds = max(delays_seconds[failed - 1], _asked_delay_seconds(fault))
            logger.warning(
                "%s: %s; trying again from byte %d in %.1f s",
                *(self._shard, fault, self._position_bytes, delay_seconds),
            )
            time.sleep(delay_seconds)
        return 0

    def close(self) -> None:
        """Drop the connection."""
        self._disconnect()
        super().close()

    def _read_once(self, buffer: Any) -> int:
        while self._response is None or self._position_bytes == self._size_bytes:
            self._connect()
            if self._is_over:
                return 0
        # `readinto` would wait for a full buffer, and lose it where a chunked reply breaks.
        content = self._response.read1(len(buffer))
        if not content:
            if self._size_bytes is not None:
                raise ConnectionError(f"the connection closed at byte {self._position_bytes} of {self._size_bytes}")
            self._size_bytes = self._position_bytes  # a chunked reply's own end, to be confirmed like any other
            return self._read_once(buffer)
        buffer[: len(content)] = content
        self._position_bytes += len(content)
        self._last_bytes = (self._last_bytes + content[-OVERLAP_BYTES:])[-OVERLAP_BYTES:]
        return len(content)

    def _connect(self) -> None:
        """Open a reply that goes on at the position. At the stated end, this is the one that confirms it."""
        self._disconnect()
        is_stated_end = self._position_bytes == self._size_bytes
        # One byte at least is left out and one repeated, so that it is a range and, even at the end, not an empty one.
        first_byte = max(self._position_bytes - OVERLAP_BYTES, min(1, self._position_bytes - 1), 0)
        response = open_url(request(self._shard, first_byte=first_byte), timeout_seconds=TIMEOUT_SECONDS)
        self._response = response
        if not response.peek(1) and response.headers.get("Content-Length") != "0":
            # Headers that are cut off look like whole ones, but no body follows them.
            raise ConnectionError("the connection closed before the first byte of the body")
        is_part = response.status == http.HTTPStatus.PARTIAL_CONTENT
        self._compare(response, self._part(response, first_byte) if is_part else self._length(response))
        is_end = is_stated_end and self._position_bytes == self._size_bytes
        if is_end and self._position_bytes == 0:
            raise UserError(f"{self._shard}: the file is empty")
        # A whole file need not be read again to confirm its length.
        if self._position_bytes and (is_part or not is_end):
            self._drop(response, first_byte if is_part else 0)
        self._is_over = is_end

    def _part(self, response: http.client.HTTPResponse, first_byte: int) -> int:
        """The size of the whole file, from a reply that sends it from `first_byte` on."""
        span = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", span.strip())
        if found is None or int(found[1]) != first_byte:
            raise ConnectionError(f"asked for byte {first_byte} on, got {span or 'no Content-Range'}")
        return int(found[2]) + 1 if found[3] == "*" else int(found[3])

    def _length(self, response: http.client.HTTPResponse) -> int | None:
        """The size of the file, from a reply that sends all of it; None if it is chunked, and so marks its own end."""
        if response.headers.get_content_type() == "text/html" and response.peek(1).lstrip().startswith(b"<"):
            raise ConnectionError("the server sends a web page in place of the file")
        length = response.headers.get("Content-Length", "")
        if not length.isdigit() and not response.chunked:
            raise UserError(
                f"{self._shard}: the server does not say how long the file is, so a cut one could pass for whole; "
                "download it and give its path"
            )
        return int(length) if length.isdigit() else None

    def _compare(self, response: http.client.HTTPResponse, size_bytes: int | None) -> None:
        """Hold what a reply says of the file against what those before it said, once bytes of it are delivered."""
        validators = {name: response.headers[name] for name in VALIDATORS if name in response.headers}
        if not self._position_bytes:
            self._validators, self._size_bytes = validators, size_bytes
            return
        shared = next((name for name in VALIDATORS if name in validators and name in self._validators), None)
        is_changed = shared is not None and validators[shared] != self._validators[shared]
        is_too_small = size_bytes is not None and size_bytes < self._position_bytes
        is_disputed = is_too_small or (None not in (size_bytes, self._size_bytes) and size_bytes != self._size_bytes)
        if is_changed or (is_disputed and not self._validators):
            raise UserError(f"{self._shard}: the file changed on the server while it was being read; start again")
        if is_disputed:
            before = self._size_bytes or "more"
            if shared and not is_too_small:
                self._size_bytes = size_bytes
            raise ConnectionError(f"the file has {size_bytes} bytes by this reply, {before} by those before")
        self._validators = {**self._validators, **validators}
        self._size_bytes = self._size_bytes if size_bytes is None else size_bytes

    def _drop(self, response: http.client.HTTPResponse, start_byte: int) -> None:
        """Read what was delivered before, from `start_byte` on, and see that it is the same."""
        seen = b""
        while start_byte < self._position_bytes:
            dropped = response.read1(min(CHUNK_BYTES, self._position_bytes - start_byte))
            if not dropped:
                raise ConnectionError(f"the connection closed at byte {start_byte}")
            start_byte += len(dropped)
            seen = (seen + dropped)[-OVERLAP_BYTES:]
        if not self._last_bytes.endswith(seen):
            raise OtherBytes(f"the reply has other bytes before byte {self._position_bytes} than were read there")

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def is_passing(error: Exception) -> bool:
    """Whether a request failed at a server that is there, in a way that the next one may not."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in _RETRIED_STATUS
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(cause, ConnectionResetError | ConnectionAbortedError | http.client.HTTPException)


def _asked_delay_seconds(fault: Exception) -> float:
    """How long the server asks to wait, within bounds; 0 if it does not say in seconds."""
    asked = fault.headers.get("Retry-After", "") if isinstance(fault, urllib.error.HTTPError) else ""
    return min(float(asked), MAX_RETRY_AFTER_SECONDS) if asked.isdecimal() else 0.0


def refusal(status: int) -> str:
    """Why a server does not give a file, and what to do."""
    if status in (404, 410):
        return f"no such file (HTTP {status}); check the address"
    return f"the server refuses it (HTTP {status}); check the address and your access to it"
