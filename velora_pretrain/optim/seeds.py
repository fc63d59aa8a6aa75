"""Seeds of what an optimizer draws: from names and numbers alone, so that nothing random is kept or resumed."""

from __future__ import annotations

import hashlib


def mixed_seed(*parts: int | str) -> int:
    """A seed of 64 bits, another one where any of `parts` is."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest)
