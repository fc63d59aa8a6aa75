"""Files: JSON of others read within bounds, contents written whole, and their hashes. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 24
"""Largest JSON file that is read."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or no JSON object; says so.
    """
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("not readable JSON (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, on disk whole or not at all: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
