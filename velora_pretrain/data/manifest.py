"""What `data fetch` leaves in a folder beside the files: which shards of C4 they are copies of, and what is whole.

A shard's place in the order follows from its number among all shards of the split, so a folder that holds a few of
them is read like the whole data set: those from here, the others from the hub. The name has no ending of a data file,
so that a pattern like `FOLDER/*.json*` does not take it for one.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from velora_pretrain.errors import UserError
from velora_pretrain.files import read_json, write_atomically

Split = Literal["train", "validation"]
C4_FOLDER = "hf://datasets/allenai/c4/en"
C4_NUM_SHARDS: dict[Split, int] = {"train": 1024, "validation": 8}
MANIFEST_FILE = "fetched.manifest"
FORMAT = 1


def c4_shards(split: Split, count: int | None = None) -> tuple[str, ...]:
    """The files of C4 `en` on the hub.

    Args:
        split: Of which part.
        count: How many there are, where it is not C4's own number.
    """
    count = count or C4_NUM_SHARDS[split]
    return tuple(f"{C4_FOLDER}/c4-{split}.{n:05d}-of-{count:05d}.json.gz" for n in range(count))


@dataclass(frozen=True, kw_only=True)
class FetchedFile:
    """A file that was fetched whole."""

    size_bytes: int
    sha256: str
    """Of its bytes as they lie here."""
    revision: str | None = None
    """Commit of the data set that it was fetched at, if the hub said so."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of the file."""

    source: str = C4_FOLDER
    """Where the shards are, on the hub."""
    num_shards: dict[Split, int] = field(default_factory=C4_NUM_SHARDS.copy)
    """Shards of each split in all, here or not."""
    files: dict[str, FetchedFile] = field(default_factory=dict)
    """By name, those that are here."""

    def shards(self, split: Split) -> tuple[str, ...]:
        """All shards of a split, in the order that numbers them."""
        return c4_shards(split, self.num_shards[split])

    def copies(self, folder: Path, split: Split) -> dict[str, str]:
        """The files of a split that are in the folder, by shard.

        Raises:
            UserError: One has not the size with which it was fetched.
        """
        found = {}
        for shard in self.shards(split):
            name = PurePath(shard).name
            path = folder / name
            if name not in self.files or not path.is_file():
                continue
            size_bytes, fetched = path.stat().st_size, self.files[name].size_bytes
            if size_bytes != fetched:
                raise UserError(
                    f"{path}: has {size_bytes} bytes, {fetched} were fetched; run `velora-pretrain data fetch` again"
                )
            found[shard] = str(path)
        return found

    def write(self, folder: Path) -> None:
        """Puts it there, whole or not at all."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_atomically(folder / MANIFEST_FILE, (json.dumps(content, indent=1) + "\n").encode())


def is_fetched(folder: Path) -> bool:
    """Whether `data fetch` has put C4 there."""
    return (folder / MANIFEST_FILE).is_file()


def take_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a folder that more will be put into, an empty one to begin with.

    Returns:
        The manifest, which is written there, and a line for the user if one was damaged.
    """
    manifest, remark = Manifest(), ""
    if is_fetched(folder):
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            remark = f"{error.args[0].rpartition(';')[0]}; what lies there is held against the hub's"
    manifest.write(folder)
    return manifest, remark


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        UserError: It is damaged, or of another version of this program.
    """
    path = folder / MANIFEST_FILE
    try:
        return _manifest(read_json(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"missing: {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: is damaged ({reason}); run `velora-pretrain data fetch` again") from None


def _manifest(value: dict[str, Any]) -> Manifest:
    if value["format"] != FORMAT or value["source"] != C4_FOLDER:
        raise ValueError(f"format {value['format']} of {value['source']}")
    counts: dict[Split, int] = {split: value["num_shards"][split] for split in C4_NUM_SHARDS}
    if not all(type(count) is int and 0 < count < 100_000 for count in counts.values()):
        raise ValueError(f"num_shards {counts}")
    files = {name: FetchedFile(**facts) for name, facts in value["files"].items()}
    if not all(type(facts.size_bytes) is int and isinstance(facts.sha256, str) for facts in files.values()):
        raise ValueError("files without size or hash")
    return Manifest(num_shards=counts, files=files)
