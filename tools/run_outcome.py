"""What two runs must agree in to have been the same run, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMED = ("_per_second", "_seconds", "memory_bytes", "memory_limit_bytes")
"""Ends of the names of what depends on the machine and the hour."""


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what depends on the machine and the hour."""
    return {key: value for key, value in record.items() if not key.endswith(TIMED)}


def outcome(run: Path, step: int) -> dict[str, Any]:
    """Weights and states after `step` as hashes, every record but its times, and the place in the data.

    The records hold a digest of every step's documents, so the sequence of documents is in it.
    """
    last = run / "checkpoints" / f"step-{step:08d}"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((last / "training_state.json").read_text())
    return {
        "weights": hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest(),
        "states": {
            name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in load_file(last / "training_state.safetensors").items()
        },
        "records": [untimed(record) for record in records],
        "cursor": state["cursor"],
        "tokens": state["tokens"],
    }
