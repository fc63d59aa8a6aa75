"""How long the training loop stands still for a checkpoint: written beside the training, and at once.

    python tools/bench_saving.py --size 60m --tokens 8192 --rounds 5 --json tools/results/saving/60m.json

Optimizer steps on random tokens, of micro-batches of 8 × 256 tokens. In each round, one step with no checkpoint, then
one that begins with a checkpoint beside the training, whose writing goes on during the step, then a checkpoint that is
written at once. The checkpoints go to a temporary folder (TMPDIR).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figures import MIB, environment, wide_console, write_json
from rich.table import Table

from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.gradients import Gradients
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.placement import Placement
from velora_pretrain.recipe import build_run
from velora_pretrain.records import RunFolder
from velora_pretrain.saving import CheckpointWriter
from velora_pretrain.step_memory import take_step

MICRO_BATCH, SEQUENCE_LENGTH = 8, 256


def measure(*, size: str, mode: str, tokens: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The times of each round, in seconds."""
    run = build_run({"size": size, "mode": mode, "checkpoint": {"keep_last": 1}}, where="bench")
    built, model = build_mode(run), Llama(run.llama, seed=0)
    built.adapt(model)
    optimizer = built.build_optimizer(model)
    gradients = Gradients(model, optimizer)
    sequences, length = min(MICRO_BATCH, max(1, tokens // SEQUENCE_LENGTH)), min(SEQUENCE_LENGTH, tokens)
    batch = torch.randint(run.llama.vocab_size, (sequences, length))
    losses = [lambda: model(batch, batch)] * max(1, tokens // batch.numel())
    tokenizer = load_tokenizer("bundled")
    writer = CheckpointWriter(
        run, RunFolder(folder), Placement(model), optimizer=optimizer, tokenizer=tokenizer, steps=0
    )
    times: dict[str, list[float]] = {"step": [], "stall": [], "step_while_writing": [], "written_at_once": []}

    def timed(name: str, work: Any) -> None:
        began = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - began)

    take_step(gradients, losses)
    writer.prepare()
    writer.wait()
    for number in range(1, rounds + 1):
        progress = {"tokens": 0, "cursor": None}
        timed("step", lambda: take_step(gradients, losses))
        timed("stall", lambda: writer.save(2 * number, progress, beside_training=True))  # noqa: B023
        timed("step_while_writing", lambda: take_step(gradients, losses))
        writer.wait()
        timed("written_at_once", lambda: writer.save(2 * number + 1, progress, beside_training=False))  # noqa: B023
    writer.close()
    newest = RunFolder(folder).checkpoints_newest_first()[0]
    return {
        "size": size,
        "mode": mode,
        "tokens_per_step": batch.numel() * len(losses),
        "checkpoint_mib": sum(file.stat().st_size for file in newest.iterdir()) / MIB,
        "seconds": times,
        "stall_percent_of_step": 100
        * statistics.median(a / b for a, b in zip(times["stall"], times["step"], strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60m", help="model size")
    parser.add_argument("--mode", default="full", help="training mode")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of an optimizer step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(
            size=options.size, mode=options.mode, tokens=options.tokens, rounds=options.rounds, folder=Path(folder)
        )
    table = Table(title=f"{options.size}, {options.mode}: {figures['checkpoint_mib']:,.0f} MiB a checkpoint")
    table.add_column("")
    table.add_column("seconds, median of rounds", justify="right")
    for name, seconds in figures["seconds"].items():
        table.add_row(name.replace("_", " "), f"{statistics.median(seconds):.3f}")
    console = wide_console()
    console.print(table)
    console.print(
        f"a checkpoint beside the training stalls the loop for {figures['stall_percent_of_step']:.1f} % of a step of"
        f" {figures['tokens_per_step']:,} tokens"
    )
    if options.json:
        write_json(options.json, {**figures, "environment": environment("cpu")})


if __name__ == "__main__":
    main()
