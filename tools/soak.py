"""Many steps of a small run, watched from outside: memory, step time, open files, threads and processes stay flat.

    python tools/soak.py --steps 20000 --json tools/results/soak/soak.json

A real `train` process with evaluations, checkpoints written beside the training, and old ones removed. The second tenth
of the steps, when everything has happened once, is held against the last; the most files, threads and processes of the
last tenth against the most of the first half. The exit status is 1 if memory grew by more than 1 %, or these by any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from figures import MIB, environment, wide_console, write_json
from rich.table import Table
from small_run import environment_of_run, write_recipe, write_shards

SAMPLE_SECONDS = 0.25
LARGEST_GROWTH_PERCENT = 1.0
COUNTED = ("files", "threads", "processes")


def watch(process: psutil.Process, metrics: Path) -> list[dict[str, float]]:
    """Samples of a training process until it ends, each with the step it was at."""
    samples: list[dict[str, float]] = []
    place, step = 0, 0
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(SAMPLE_SECONDS)
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(place)
                lines = file.read().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            place += sum(map(len, whole))
            step = json.loads(whole[-1])["step"] if whole else step
        try:
            with process.oneshot():
                samples.append(
                    {
                        "step": step,
                        "cpu_seconds": sum(process.cpu_times()[:2]),
                        "resident_bytes": process.memory_info().rss,
                        "files": process.num_fds(),
                        "threads": process.num_threads(),
                        "processes": len(process.children(recursive=True)),
                    }
                )
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            break
    return samples


def tenths(
    samples: Sequence[dict[str, float]], records: Sequence[dict[str, Any]], steps: int
) -> list[dict[str, float]]:
    """Medians over each tenth of the steps, and of what is counted the most."""
    found = []
    for tenth in range(10):
        first, last = steps * tenth // 10, steps * (tenth + 1) // 10
        mine = [sample for sample in samples if first < sample["step"] <= last]
        times = [
            (record["tokens"] - before["tokens"]) / record["tokens_per_second"]
            for before, record in itertools.pairwise(records)
            if first < record["step"] <= last
        ]
        found.append(
            {
                "last_step": last,
                "resident_mib": statistics.median(sample["resident_bytes"] for sample in mine) / MIB,
                "step_ms": 1000 * statistics.median(times),
                "cpu_ms": 1000 * _slope([(sample["step"], sample["cpu_seconds"]) for sample in mine]),
                **{name: max(sample[name] for sample in mine) for name in COUNTED},
            }
        )
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """From the first point to the last."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    return (y1 - y0) / max(1.0, x1 - x0)


def soak(*, steps: int, mode: str, folder: Path) -> dict[str, Any]:
    """Runs and watches; gives the figures, for JSON."""
    every = max(1, steps // 100)
    recipe = write_recipe(
        folder / "recipe.toml",
        mode=mode,
        packing="pack",
        data=write_shards(folder / "data", 12),
        batch={"sequences": 4, "micro_batch": 2, "sequence_length": 16},
        schedule={"steps": steps},
        evaluation={"every_steps": every},
        checkpoint={"every_steps": every, "keep_every_steps": 10 * every},
    )
    run = folder / "run"
    command = [sys.executable, "-m", "velora_pretrain", "train", "--recipe", str(recipe), "--run-dir", str(run)]
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment_of_run(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    samples = watch(psutil.Process(process.pid), run / "metrics.jsonl")
    if process.wait():
        raise SystemExit(f"the run failed:\n{(folder / 'log').read_text()}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = tenths(samples, [record for record in records if "loss_nats_per_token" in record], steps)
    early, late = table[1], table[-1]
    return {
        "mode": mode,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "evaluations": sum("perplexity" in record for record in records),
        "checkpoints_left": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "tenths": table,
        "memory_growth_percent": 100 * (late["resident_mib"] / early["resident_mib"] - 1),
        "step_time_ratio": late["step_ms"] / early["step_ms"],
        "cpu_time_ratio": late["cpu_ms"] / early["cpu_ms"],
        "more": {name: late[name] - max(row[name] for row in table[:5]) for name in COUNTED},
        "environment": environment("cpu"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps")
    parser.add_argument("--mode", default="velora", help="training mode")
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(steps=options.steps, mode=options.mode, folder=Path(folder))
    table = Table(title=f"{figures['steps']:,} steps of a small run, {figures['mode']}")
    for name in figures["tenths"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in figures["tenths"]:
        table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    console = wide_console()
    console.print(table)
    more = ", ".join(f"{count:+d} {name}" for name, count in figures["more"].items())
    console.print(
        f"to the last tenth: memory {figures['memory_growth_percent']:+.2f} %, step time ×"
        f" {figures['step_time_ratio']:.3f}, CPU time a step × {figures['cpu_time_ratio']:.3f}, {more};"
        f" {figures['seconds']:.0f} s"
    )
    if options.json:
        write_json(options.json, figures)
    is_flat = figures["memory_growth_percent"] <= LARGEST_GROWTH_PERCENT and max(figures["more"].values()) <= 0
    sys.exit(0 if is_flat else 1)


if __name__ == "__main__":
    main()
