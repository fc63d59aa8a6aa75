"""What the measuring tools share in what they show: environment, median and quartiles, console, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from velora_pretrain import devices
from velora_pretrain.timing import spread

__all__ = ["MIB", "environment", "environment_line", "spread", "wide_console", "with_quartiles", "write_json"]

MIB = 2**20
"""Bytes in one MiB."""


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    import transformers

    return {**devices.environment(torch.device(device)), "transformers": transformers.__version__}


def environment_line(facts: Mapping[str, Any]) -> str:
    """The environment in one line."""
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def with_quartiles(values: Mapping[str, float], decimals: int, factor: float = 1.0) -> str:
    """Median and quartiles as a table shows them."""
    low, mid, high = (values[key] * factor for key in ("lower_quartile", "median", "upper_quartile"))
    return f"{mid:.{decimals}f} ({low:.{decimals}f}–{high:.{decimals}f})"


def wide_console(*, stderr: bool = False) -> Console:
    """A console that keeps tables in one piece where it is no terminal."""
    console = Console(highlight=False, markup=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, markup=False, stderr=stderr, width=190)


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes figures to a file, or to standard output for `-`."""
    text = json.dumps(content, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")
