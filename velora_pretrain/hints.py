"""What somebody who misspelt a name most likely meant."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable

_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9}
FARTHEST_RATIO = 3.0
"""Of two sizes of which one may be meant by the other."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint with the known name that `word` most likely meant, or nothing.

    Sizes (61m) are near as numbers are; other names by their letters, whatever their case and the order of a+b.
    """
    return hint([found] if (found := closest(word, known)) else [])


def hint(names: Iterable[str]) -> str:
    """The names as a question, which ends with a space; nothing where there are none."""
    listed = " or ".join(map(repr, names))
    return f"did you mean {listed}? " if listed else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest to `word`; None if none is near. See `nearest`."""
    by_form = {_form(name): name for name in known}
    size = _size(word)
    if size is not None:
        distances = {name: abs(math.log(each / size)) for name in by_form.values() if (each := _size(name)) is not None}
        if distances:
            name = min(distances, key=lambda name: distances[name])
            return name if distances[name] <= math.log(FARTHEST_RATIO) else None
    found = difflib.get_close_matches(_form(word), by_form, n=1)
    return by_form[found[0]] if found else None


def _form(name: str) -> str:
    return "+".join(sorted(name.strip().lower().split("+")))


def _size(text: str) -> float | None:
    """The number that a size stands for; None if it is none, or zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb])", text.strip().lower())
    return float(match[1]) * _SCALES[match[2]] or None if match else None
