"""Several processes against one: the same documents, and how far losses, gradient norms and perplexities are apart.

    python tools/processes.py --json tools/results/processes.json

Trains a small model over gloo on the CPU in one process, in several by DistributedDataParallel and, where the mode
allows it, with `distributed.sharding = "full"`: the same global batch, clipping, two micro-batches a step, refreshes
and restarts on the way. The exit status is 1 if any step read other documents than in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import environment, wide_console, write_json
from rich.table import Table
from small_run import environment_of_run, write_recipe, write_shards

from velora_pretrain.config import MODES

COMPARED = ("loss_nats_per_token", "grad_norm", "perplexity")
ROWS = [
    *((mode, processes, "none") for mode in MODES for processes in (2, 4)),
    ("full", 2, "full"),
    ("velora", 2, "full"),
]


def train(recipe: Path, folder: Path, processes: int, sharding: str) -> list[dict[str, Any]]:
    """Records of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "velora_pretrain", "train"]
    command += ["--recipe", str(recipe), "--run-dir", str(folder), "--set", f"distributed.sharding={sharding}"]
    done = subprocess.run(command, env=environment_of_run(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(one: Sequence[dict[str, Any]], several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far two runs are apart, each number relative to that of the first."""
    pairs = list(zip(one, several, strict=True))
    apart = [abs(a[key] - b[key]) / abs(a[key]) for a, b in pairs for key in COMPARED if key in a]
    return {
        "largest_relative_difference": max(apart),
        "same_documents": all(a.get("batch_digest") == b.get("batch_digest") for a, b in pairs),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="modes")
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    singles: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_shards(folder / "data", 12)
        for mode, processes, sharding in (row for row in ROWS if row[0] in options.modes):
            recipe = write_recipe(
                folder / f"{mode}.toml",
                mode=mode,
                packing="pack",
                data=data,
                batch={"micro_batch": 1},
                optimizer={"clip_norm": 1.0},
                modes={"lora": {"rank": 4, "restart_every": 5, "dropout": 0.0}},
            )
            if mode not in singles:
                singles[mode] = train(recipe, folder / mode, 1, "none")
            records = train(recipe, folder / f"{mode}-{processes}-{sharding}", processes, sharding)
            found = difference(singles[mode], records)
            rows.append({"mode": mode, "processes": processes, "sharding": sharding, **found})
    table = Table(title="Several processes against one")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()))
    wide_console().print(table)
    if options.json:
        write_json(options.json, {"rows": rows, "environment": environment("cpu")})
    sys.exit(0 if all(row["same_documents"] for row in rows) else 1)


if __name__ == "__main__":
    main()
