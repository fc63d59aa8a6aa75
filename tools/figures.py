"""What the measuring tools share in what they show: environment, median and quartiles, console, JSON."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

MIB = 2**20
"""Bytes in one MiB."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "lower_quartile", "upper_quartile"), values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    import transformers

    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def cpu_model() -> str:
    """The processor by its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
