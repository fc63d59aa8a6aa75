"""kill -9 at random moments, again and again, and at the end the bits of the run that nobody killed.

    python tools/torture.py --kills 100 --jobs 2 --json tools/results/torture/torture.json

Trains a small model in every mode and packing, from local files and from a web server that stands in for the Hugging
Face hub and fails at random. Each run is killed at a place drawn at random (reading, forward, backward, between
micro-batches, optimizer, recording, evaluation, writing and removing checkpoints) or by the clock, resumed, and killed
again. Then final weights, optimizer states, every record with its digest of documents, and the place in the data must
equal those of a run that was left alone, over the same documents from a server that never fails. The exit status is 1
if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faulty_server import FaultyServer
from figures import wide_console, write_json
from rich.table import Table
from run_outcome import outcome
from small_run import RECIPE, ROOT, environment_of_run, shard, write_recipe, write_shards

from velora_pretrain.config import MODES

KILLER = ROOT / "tools" / "killer.py"
STEPS: int = RECIPE["schedule"]["steps"]
PACKINGS = ("pad", "pack")
SOURCES = ("files", "hub")
CLOCK = "by the clock"


class Hub(Mapping[str, bytes]):
    """The files of C4 as the hub names them, each made when it is asked for."""

    def __getitem__(self, path: str) -> bytes:
        folder, _, name = path.rpartition("/")
        if folder != "/datasets/allenai/c4/resolve/main/en" or not name.startswith("c4-"):
            raise KeyError(path)
        split, number = name.removeprefix("c4-").split(".")[:2]
        return shard(int(number.partition("-")[0]) + (10_000 if split == "validation" else 0))

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass
class Case:
    """One mode, packing and source: how it was killed, and what came of it."""

    mode: str
    packing: str
    source: str
    kills: Counter[str] = field(default_factory=Counter)
    """By place."""
    runs: int = 0
    """Killed runs that came to their end."""
    divergences: list[str] = field(default_factory=list)
    """What differed, by run."""


class Torturer:
    """Runs one case in a folder of its own."""

    def __init__(self, case: Case, folder: Path, *, seed: int, endpoints: Mapping[str, str]) -> None:
        self.case, self.folder, self.endpoints = case, folder, endpoints
        self.draw = random.Random(f"{seed}/{case.mode}/{case.packing}/{case.source}")
        folder.mkdir(parents=True)
        data = write_shards(folder / "data", 12) if case.source == "files" else "c4"
        self.recipe = write_recipe(folder / "recipe.toml", mode=case.mode, packing=case.packing, data=data)

    def run(self, kills: int) -> None:
        """Kills so many times, and compares what comes out."""
        counts = self.folder / "counts.json"
        began = time.monotonic()
        straight = self.start("straight", "count", str(counts), is_reliable=True)
        if straight.wait():
            raise SystemExit(f"{self.case}: the run that nobody killed failed:\n{self.log('straight')}")
        self.seconds = time.monotonic() - began
        self.calls: dict[str, int] = json.loads(counts.read_text())
        self.expected = outcome(self.folder / "straight", STEPS)
        left = kills
        while left > 0:
            left -= self.one_run(f"killed-{self.case.runs}", left)

    def one_run(self, name: str, kills: int) -> int:
        """One run to its end, killed up to so many times; gives how many it was."""
        done = 0
        while done < kills:
            place = self.draw.choice([*self.calls, CLOCK])
            if self.is_killed(name, place):
                self.case.kills[place] += 1
                done += 1
            elif self.is_over(name):
                break
        process = None if self.is_over(name) else self.start(name, "count", os.devnull)
        if process is not None and process.wait():
            self.case.divergences.append(f"{name}: could not go on: {self.log(name)[-500:]}")
        elif outcome(self.folder / name, STEPS) != self.expected:
            found = outcome(self.folder / name, STEPS)
            self.case.divergences.append(
                f"{name}: {', '.join(key for key, value in self.expected.items() if found[key] != value)}"
            )
        self.case.runs += 1
        return max(done, 1)

    def is_killed(self, name: str, place: str) -> bool:
        """Starts or resumes a run, and kills it at a place; false if it came to its end, or failed, before."""
        if place == CLOCK:
            process = self.start(name, "count", os.devnull)
            try:
                process.wait(self.draw.uniform(0.1, 1.0) * self.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        else:
            share = 1 - self.done_steps(name) / STEPS
            most = max(1, round(self.calls[place] * share))
            process = self.start(name, place, str(self.draw.randint(1, most)))
        status = process.wait()
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"{self.case}, {name}: ended with {status}:\n{self.log(name)}")
        return status != 0

    def done_steps(self, name: str) -> int:
        """Steps of the newest checkpoint."""
        found = [int(path.name[5:]) for path in (self.folder / name).glob("checkpoints/step-*")]
        return max(found, default=0)

    def is_over(self, name: str) -> bool:
        """Whether a run has come to its end."""
        return (self.folder / name / "summary.json").exists()

    def start(self, name: str, *how: str, is_reliable: bool = False) -> subprocess.Popen[bytes]:
        """Starts a run, or goes on with it."""
        folder = self.folder / name
        what = ["--resume"] if (folder / "config.toml").exists() else ["--recipe", str(self.recipe)]
        command = [sys.executable, str(KILLER), *how, "train", *what, "--run-dir", str(folder)]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, env=self.environment(is_reliable), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def environment(self, is_reliable: bool) -> dict[str, str]:
        """Of its runs: which hub to ask, and without patience."""
        hub = self.endpoints["reliable" if is_reliable else "faulty"]
        return environment_of_run(HF_ENDPOINT=hub, HF_HUB_OFFLINE="", IMPATIENT="", no_proxy="127.0.0.1")

    def log(self, name: str) -> str:
        """What the processes of a run have said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")


def torture(
    cases: Sequence[Case], *, kills: int, jobs: int, seed: int, folder: Path, fault_rate: float
) -> dict[str, Any]:
    """Shares the kills out among the cases and gives what came of it, for JSON."""
    began = time.monotonic()
    faulty = FaultyServer(Hub(), fault_rate=fault_rate, seed=seed, part_bytes=500, stall_seconds=0.5)
    reliable = FaultyServer(Hub(), fault_rate=0.0)
    with faulty.serve(), reliable.serve(), ThreadPoolExecutor(jobs) as pool:
        endpoints = {"faulty": faulty.url, "reliable": reliable.url}
        running = []
        for number, case in enumerate(cases):
            share = kills // len(cases) + (number < kills % len(cases))
            name = f"{case.mode}-{case.packing}-{case.source}"
            torturer = Torturer(case, folder / name, seed=seed, endpoints=endpoints)
            running.append(pool.submit(torturer.run, share))
        for each in running:
            each.result()
    places: Counter[str] = sum((case.kills for case in cases), Counter())
    return {
        "kills": places.total(),
        "runs": sum(case.runs for case in cases),
        "divergences": sum(len(case.divergences) for case in cases),
        "places": dict(places),
        "server_requests": faulty.requests,
        "server_faults": faulty.faults.total(),
        "seconds": round(time.monotonic() - began, 1),
        "cases": [vars(case) | {"kills": dict(case.kills)} for case in cases],
    }


def print_table(figures: Mapping[str, Any]) -> None:
    """One row a mode, then the places."""
    table = Table(title="Killed and resumed; the end held against the run that nobody killed, bit for bit")
    for column in ("mode", "packings", "sources", "kills", "runs", "divergences"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode in dict.fromkeys(case["mode"] for case in figures["cases"]):
        mine = [case for case in figures["cases"] if case["mode"] == mode]
        counts = [sum(case["kills"].values()) for case in mine]
        table.add_row(
            mode,
            ", ".join(dict.fromkeys(case["packing"] for case in mine)),
            ", ".join(dict.fromkeys(case["source"] for case in mine)),
            str(sum(counts)),
            str(sum(case["runs"] for case in mine)),
            str(sum(len(case["divergences"]) for case in mine)),
        )
    console = wide_console()
    console.print(table)
    console.print("  ".join(f"{place} {count}" for place, count in sorted(figures["places"].items())))
    console.print(
        f"{figures['kills']} kills, {figures['runs']} runs, {figures['divergences']} divergences; the hub's stand-in"
        f" answered {figures['server_requests']} requests, {figures['server_faults']} of them badly;"
        f" {figures['seconds']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all, shared out among the cases")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="modes")
    parser.add_argument("--packings", nargs="+", default=PACKINGS, choices=PACKINGS, help="packings")
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES, help="where documents come from")
    parser.add_argument("--fault-rate", type=float, default=0.3, help="share of the server's replies that fail")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args(arguments)
    cases = [
        Case(mode, packing, source)
        for mode in options.modes
        for packing in options.packings
        for source in options.sources
    ]
    with tempfile.TemporaryDirectory() as folder:
        figures = torture(
            cases,
            kills=options.kills,
            jobs=options.jobs,
            seed=options.seed,
            folder=Path(folder),
            fault_rate=options.fault_rate,
        )
    print_table(figures)
    if options.json:
        write_json(options.json, figures)
    for case in figures["cases"]:
        for divergence in case["divergences"]:
            print(f"{case['mode']}, {case['packing']}, {case['source']}: {divergence}", file=sys.stderr)
    sys.exit(1 if figures["divergences"] else 0)


if __name__ == "__main__":
    main()
