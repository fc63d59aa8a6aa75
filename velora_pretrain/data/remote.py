"""The bytes of a shard that lies on the Hugging Face hub or at a web address.

`HttpFile` is one GET per shard. It goes on at the byte where a connection broke, and never takes a short body for the
end of the file. Only the standard library is used: which http client `datasets` brings changes between its releases.
"""

import contextlib
import http.client
import io
import logging
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from velora_pretrain.errors import UserError

logger = logging.getLogger(__name__)

RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 1 << 20
_HUB = "hf://datasets/"
_RETRIED_STATUS = {408, 425, 429}


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


def open_url(asked: urllib.request.Request, *, timeout_seconds: float) -> http.client.HTTPResponse:
    """Send a request; proxies and certificates as the environment sets them."""
    context = ssl.create_default_context()
    # Some Python installers bring no system certificates; the usual bundle serves where it is installed.
    with contextlib.suppress(ImportError):
        import certifi  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

        context.load_verify_locations(certifi.where())
    return urllib.request.urlopen(asked, timeout=timeout_seconds, context=context)


class HttpFile(io.RawIOBase):
    """The bytes of a remote shard from first to last, through broken connections.

    A read that fails is tried again after `RETRY_DELAYS_SECONDS`, from the byte where it broke: by a range request, or
    where the server knows no ranges by reading and dropping what was already delivered. The server's count of bytes
    decides where the file ends, so a connection closed early is a failure and not an end.
    """

    def __init__(self, shard: str):
        self._shard = shard
        self._position_bytes = 0
        self._size_bytes: int | None = None
        self._etag: str | None = None
        self._response: http.client.HTTPResponse | None = None

    def readable(self) -> bool:
        """True, as `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes; 0 at the end of the file.

        Raises:
            UserError: The server refuses the file or knows none of that name.
            ConnectionError: Every attempt failed.
        """
        if self._position_bytes == self._size_bytes:
            return 0
        fault: Exception | None = None
        for delay_seconds in (0.0, *RETRY_DELAYS_SECONDS):
            if fault is not None:
                logger.warning(
                    "%s: %s; trying again from byte %d in %.1f s",
                    *(self._shard, fault, self._position_bytes, delay_seconds),
                )
                time.sleep(delay_seconds)
            try:
                return self._read_once(buffer)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in _RETRIED_STATUS:
                    raise UserError(f"{self._shard}: {_refusal(error.code)}") from error
                fault = error
            except (OSError, http.client.HTTPException) as error:
                fault = error
            self._disconnect()
        raise ConnectionError(
            f"{self._shard}: reading failed {len(RETRY_DELAYS_SECONDS) + 1} times at byte {self._position_bytes}: "
            f"{fault}"
        )

    def close(self) -> None:
        """Drop the connection."""
        self._disconnect()
        super().close()

    def _read_once(self, buffer: Any) -> int:
        if self._response is None:
            self._connect()
        assert self._response is not None
        # `readinto` would wait for a full buffer, and lose it where a chunked reply breaks.
        content = self._response.read1(len(buffer))
        if not content and self._size_bytes is not None:
            raise ConnectionError(f"the connection closed at byte {self._position_bytes} of {self._size_bytes}")
        buffer[: len(content)] = content
        self._position_bytes += len(content)
        return len(content)

    def _connect(self) -> None:
        response = open_url(request(self._shard, first_byte=self._position_bytes), timeout_seconds=TIMEOUT_SECONDS)
        self._response = response
        size_bytes, start_byte = self._measure(response)
        etag = response.headers.get("ETag")
        for before, now in ((self._size_bytes, size_bytes), (self._etag, etag)):
            if None not in (before, now) and before != now:
                raise UserError(f"{self._shard}: the file changed on the server while it was being read; start again")
        self._size_bytes, self._etag = size_bytes, etag
        if size_bytes == self._position_bytes == 0:
            raise UserError(f"{self._shard}: the file is empty")
        while start_byte < self._position_bytes:
            dropped = len(response.read1(min(CHUNK_BYTES, self._position_bytes - start_byte)))
            if not dropped:
                raise ConnectionError(f"the connection closed at byte {start_byte} of {size_bytes}")
            start_byte += dropped

    def _measure(self, response: http.client.HTTPResponse) -> tuple[int | None, int]:
        """The size of the whole file (None in a chunked reply, which marks its own end) and the first byte sent."""
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            start = span.partition("-")[0]
            if start != str(self._position_bytes):
                raise ConnectionError(f"asked for byte {self._position_bytes} on, got bytes {span or 'unnamed'}")
            return int(total) if total.isdigit() else self._size_bytes, self._position_bytes
        length = response.headers.get("Content-Length", "")
        if not length.isdigit() and not response.chunked:
            raise UserError(
                f"{self._shard}: the server does not say how long the file is, so a cut one could pass for whole; "
                "download it and give its path"
            )
        return int(length) if length.isdigit() else None, 0

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _refusal(status: int) -> str:
    if status in (404, 410):
        return f"no such file (HTTP {status}); check the address"
    return f"the server refuses it (HTTP {status}); check the address and your access to it"
