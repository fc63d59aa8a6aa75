"""JSON files of others: read within bounds. No torch here."""

from __future__ import annotations

import json
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
