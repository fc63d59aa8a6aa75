"""Options that several commands share, and what is done with them. No torch here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from velora_pretrain.errors import UserError

RUNS = Path("runs")
"""Where runs lie unless a folder is given."""

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit status of a network that stays away, of a user's mistake, and of Ctrl-C or SIGTERM."""


def completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Shell completion among names, which are looked up only when a shell asks."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _sizes() -> Iterable[str]:
    from velora_pretrain.dimensions import SIZES

    return SIZES


def _modes() -> Iterable[str]:
    from velora_pretrain.config import MODES

    return MODES


def _recipes() -> Iterable[str]:
    from velora_pretrain.recipe import bundled_recipes

    return sorted(bundled_recipes())


def _trackers() -> Iterable[str]:
    from velora_pretrain.sections import TRACKERS

    return TRACKERS


DEVICES = ("auto", "cpu", "cuda", "mps")
Size = Annotated[
    str | None,
    typer.Option(
        help="Model size, from 9m to 13b parameters; by default the recipe's.",
        metavar="SIZE",
        autocompletion=completing(_sizes),
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        help="Training mode, of those that the recipes list; by default the recipe's, else full.",
        autocompletion=completing(_modes),
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A TOML recipe, or a bundled one by name (quickstart); by default none, and --size says what to train.",
        autocompletion=completing(_recipes),
    ),
]
ToldRecipe = Annotated[
    str,
    typer.Option(
        help="A TOML recipe, or a bundled one by name: its memory and time are told, and sizes are in its precision.",
        autocompletion=completing(_recipes),
    ),
]
MicroBatch = Annotated[
    str | None,
    typer.Option(
        help="Sequences per forward pass, or auto; by default the recipe's, else auto.",
        metavar="N|auto",
        autocompletion=completing(lambda: ["auto"]),
    ),
]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per sequence; by default the recipe's, else 256.")]
Precision = Annotated[
    str | None,
    typer.Option(
        help="fp32, bf16-mixed or bf16; by default the recipe's, else fp32.",
        metavar="FORMAT",
        autocompletion=completing(lambda: ["fp32", "bf16-mixed", "bf16"]),
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any recipe key; repeatable. By default none.", metavar="DOTTED.KEY=VALUE"),
]
Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        help="tensorboard, wandb or trackio, beside metrics.jsonl; repeatable. By default the recipe's, else none.",
        metavar="NAME",
        autocompletion=completing(_trackers),
    ),
]
Json = Annotated[
    str | None,
    typer.Option("--json", help="File to write the result to; - is standard output. By default none.", metavar="FILE"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=completing(lambda: DEVICES))]
_TOKENIZERS = "bundled, a SentencePiece model's path, or a hub name"
FolderTokenizer = Annotated[str | None, typer.Option(help=f"{_TOKENIZERS}; by default the folder's own.")]
RunTokenizer = Annotated[str | None, typer.Option(help=f"{_TOKENIZERS}; by default the recipe's, else bundled.")]
DATA_HELP = "auto, c4, sample, or a path, folder, glob or URL of .json, .jsonl (.gz, .zst) or .parquet files."


def names_model(assignment: str) -> bool:
    """Whether a `--set` says which model is meant."""
    key = assignment.partition("=")[0].strip()
    return key in ("size", "init_from") or key.startswith("model.")


def number_or_word(text: str | None) -> int | str | None:
    """A number if the text is one; what is neither a number nor a known word is refused with the configuration."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{letter}I": 1024**power for power, letter in enumerate("KMGT", start=1)}


def parse_bytes(where: str, text: str) -> int:
    """A number of bytes from 24GiB, 512 MB, 1.5g; i stands for powers of 1024.

    Args:
        where: the option, for the message.
        text: as the user wrote it.

    Raises:
        UserError: it is no size, or none above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{where} {text}: is no size; write it as 24GiB, 512MiB or 80GB")
    return int(float(match[1]) * _UNITS[match[2]])


def write_json(target: str | None, value: object) -> None:
    """Writes `value` as JSON to a file, or to standard output for `-`; nothing for None."""
    if target is None:
        return
    from velora_pretrain.records import finite

    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {target}: cannot be written: {error.strerror}") from None
