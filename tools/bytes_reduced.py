"""Bytes of gradients that each process gives to be averaged over all, per optimizer step, by mode: measured.

Trains some steps in several processes on this machine's CPU, through torchrun, and reads what the runs have counted.
The bytes follow from mode, shapes and formats. How the batch is cut matters only where a mode sends sums of its own in
each micro-batch, and under full sharding, which reduces all but compressed gradients in each; the weights that it
gathers for each pass are not counted.

    python tools/bytes_reduced.py --size 60m
    python tools/bytes_reduced.py --size 60m --set distributed.sharding=full --modes full,velora,velora[layers=all]
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

from figures import MIB, environment, environment_line, wide_console, write_json
from rich.console import Console
from rich.table import Table

from velora_pretrain.variants import Variant, parse_variants

MODES = "full,galore,lora,flora,velora,velora[layers=all]"


def reduced_bytes(variant: Variant, options: argparse.Namespace) -> dict[str, int]:
    """What a run of a variant has counted per step, by kind of parameter."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    batch = {
        "batch-size": options.processes * options.micro_batches,
        "micro-batch": 1,
        "sequence-length": options.sequence_length,
    }
    settings = [*options.set, *variant.assignments, "evaluation.tokens=1", "checkpoint.every_minutes=0"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"mode": variant.mode, "data": "sample", "device": "cpu", "steps": options.steps, **batch}
        command = ["train", *(f"--{name}={value}" for name, value in arguments.items()), f"--run-dir={folder}"]
        command += [f"--size={options.size}"] if options.size else []
        command += [f"--set={setting}" for setting in settings]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "-m", "velora_pretrain", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{variant.label}: {done.stderr}")
        return json.loads((Path(folder) / "summary.json").read_text())["reduced_bytes_per_step"]


def print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table, with how many times fewer bytes than the first variant each exchanges."""
    table = Table(title="Gradients that each process gives to be averaged, in MiB per step", title_justify="left")
    table.add_column("variant")
    for name in ("projections", "times fewer", "other", "all", "times fewer"):
        table.add_column(name, justify="right")
    for row in rows:
        mine, first = row["reduced_bytes_per_step"], rows[0]["reduced_bytes_per_step"]
        table.add_row(
            row["variant"],
            f"{mine['projections'] / MIB:,.2f}",
            f"{first['projections'] / mine['projections']:.1f}",
            f"{mine['other'] / MIB:,.2f}",
            f"{sum(mine.values()) / MIB:,.2f}",
            f"{sum(first.values()) / sum(mine.values()):.2f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=MODES, help="as of `compare speed`; the first is the baseline")
    parser.add_argument("--size", default="9m", help="of the model; empty, where --set gives dimensions")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2, help="of one sequence, in each process and step")
    parser.add_argument("--sequence-length", type=int, default=32, help="in tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - for standard output")
    options = parser.parse_args(arguments)
    rows = []
    for variant in parse_variants(options.modes):
        rows.append({"variant": variant.label, "reduced_bytes_per_step": reduced_bytes(variant, options)})
        print(f"{variant.label} done", file=sys.stderr, flush=True)
    facts, console = environment("cpu"), wide_console(stderr=options.json == "-")
    print_rows(rows, console)
    console.print(environment_line(facts))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"environment": facts, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
