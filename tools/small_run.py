"""A run small enough to be killed and repeated many times: its documents and its recipe."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import tomli_w

ROOT = Path(__file__).parents[1]
SHARD_DOCUMENTS = 30
WORDS = ("the", "one", "old", "new", "red", "train", "river", "house", "dog", "reads", "sees", "makes", "under", "and")
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "tokenizer": "bundled",
    "model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "batch": {"sequences": 8, "micro_batch": 4, "sequence_length": 32},
    "schedule": {"steps": 12},
    "optimizer": {"lr": 0.01},
    "evaluation": {"every_steps": 5, "tokens": 300},
    "checkpoint": {"every_steps": 2, "keep_last": 2},
    "reading": {"holdout_every_documents": 10, "shuffle_block_documents": 8},
    "modes": {
        "galore": {"rank": 4, "update_gap": 3},
        "lora": {"rank": 4, "restart_every": 5},
        "flora": {"rank": 4, "kappa": 3},
        "velora": {"layers": "all", "refresh_every": 3},
    },
}
"""Every mode has an event of its own (a refresh, a restart, a new projection) between two checkpoints."""


def shard(number: int) -> bytes:
    """Documents of random words, another shard for each number."""
    draw = random.Random(number)
    texts = (" ".join(draw.choices(WORDS, k=draw.randrange(10, 80))) for _ in range(SHARD_DOCUMENTS))
    return gzip.compress("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for text in texts).encode(), mtime=0)


def write_shards(folder: Path, count: int) -> str:
    """Writes shards; gives the glob that names them."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02d}.json.gz").write_bytes(shard(number))
    return str(folder / "*.json.gz")


def write_recipe(path: Path, *, mode: str, packing: str, data: str, **tables: dict[str, Any]) -> Path:
    """Writes the recipe, some of its tables with other values."""
    changed = {name: {**RECIPE[name], **values} for name, values in tables.items()}
    path.write_text(tomli_w.dumps({"mode": mode, "packing": packing, "data": data, **RECIPE, **changed}))
    return path


def environment_of_run(**changes: str) -> dict[str, str]:
    """Of a started tool: it finds this package, and uses one thread, so that its sums are the same."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
