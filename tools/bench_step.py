"""Speed of a training step, side by side: transformers, the tool's modes, and VeLoRA written in the obvious way.

contenders.py says what they are. A step is what a trainer does between two batches (forward pass and loss, backward
pass, optimizer, gradients dropped) on random tokens without padding, from the same weights; velora_pretrain/timing.py
says how it is timed, as `compare speed` does. A ratio is the baseline's time over the contender's, taken in each round;
shown are its median and quartiles. Work that is done once in many steps is in it by its share. Beside it stands what
the matrix products alone would give: the operations of the baseline over those of the contender.

Forward and backward are to be read together: the tool's loss makes its gradient in the forward pass.

All contenders live at once. Where memory does not hold them, --one-at-a-time runs them in alternating blocks: weaker,
because the two sides of a ratio then lie minutes apart.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from contenders import CONTENDERS, AnyOptimizer, Work, build, settings_of
from figures import MIB, environment, environment_line, wide_console, with_quartiles, write_json
from rich.console import Console
from rich.table import Table

from velora_pretrain import timing
from velora_pretrain.config import Precision
from velora_pretrain.nn.llama import Llama
from velora_pretrain.step_memory import peak_of_step
from velora_pretrain.timing import Contender


@dataclass(kw_only=True)
class Prepared:
    """A contender that is warmed up, and what was seen of it meanwhile."""

    contender: Contender
    first_loss_nats_per_token: float
    peak_bytes: int


def prepare(
    name: str, work: Work, initial: Llama, warmup_steps: int, measured: timing.Measured | None = None
) -> Prepared:
    """Builds a contender, takes its first loss, measures the peak memory of its step and warms it up.

    The peak is of this contender alone: on CUDA the allocator's, less what others held before it was built; on a CPU
    that of `velora_pretrain.memory`.
    """
    micro_batches = work.micro_batches(initial.config.vocab_size, seed=0)
    before_bytes = 0
    if work.device == "cuda":
        _allocate_workspaces()
        gc.collect()
        before_bytes = torch.cuda.memory_allocated()
    contender = build(name, work, initial, micro_batches)
    losses = [partial(contender.loss, *micro_batch, work.num_targets) for micro_batch in micro_batches]
    with torch.no_grad():
        first_loss = torch.stack([loss().double() for loss in losses]).sum().item()
    if work.device == "cuda":
        for _ in range(2):
            timing.take_step(contender)
        torch.cuda.reset_peak_memory_stats()
        timing.take_step(contender)
        peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
    else:
        peak_bytes = peak_of_step(contender.model, AnyOptimizer(contender.pace.optimizer), losses).peak_bytes
    timing.warm_up(contender, measured or timing.Measured(name=name), warmup_steps)
    return Prepared(contender=contender, first_loss_nats_per_token=first_loss, peak_bytes=peak_bytes)


def _allocate_workspaces() -> None:
    """Makes the GEMM library take the work space that it then keeps, so that no contender is charged with it."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(256, 256, device="cuda", dtype=dtype)
        F.linear(square, square)
    torch.cuda.synchronize()


@dataclass(kw_only=True)
class Measurement:
    """What was seen of one contender."""

    times: timing.Measured
    first_loss_nats_per_token: float = 0.0
    peak_bytes: int = 0


def measure(
    work: Work,
    names: Sequence[str],
    *,
    rounds: int,
    warmup_steps: int = 2,
    blocks: int = 0,
    beside: Callable[[int], object] = lambda index: None,
) -> list[Measurement]:
    """Steps of all contenders in turn.

    Args:
        work: of a step.
        names: the contenders.
        rounds: steps of each.
        warmup_steps: untimed steps of each, before.
        blocks: 0 keeps all contenders at once and alternates steps; else each is built anew for each of so many blocks
            of rounds.
        beside: called after each round, with its number from 0.
    """
    initial, prepared = Llama(work.run_of(names[0]).llama, seed=0), {}

    def ready(name: str, measured: timing.Measured) -> Contender:
        done = prepare(name, work, initial, warmup_steps, measured)
        prepared[name] = {"first_loss_nats_per_token": done.first_loss_nats_per_token, "peak_bytes": done.peak_bytes}
        return done.contender

    measured = timing.measure(names, ready, rounds=rounds, blocks=blocks, beside=beside)
    return [Measurement(times=measured[name], **prepared[name]) for name in names]


def rows_of(measured: Sequence[Measurement], baseline: str) -> list[dict[str, Any]]:
    """One row per contender: times, speed, memory, and its ratios to the baseline."""
    reference = next(one.times for one in measured if one.times.name == baseline)
    return [
        {
            "contender": one.times.name,
            **timing.figures_of(one.times, reference),
            "peak_bytes": one.peak_bytes,
            "first_loss_nats_per_token": one.first_loss_nats_per_token,
        }
        for one in measured
    ]


def print_rows(rows: Sequence[Mapping[str, Any]], title: str, baseline: str, console: Console) -> None:
    """The table of `rows_of`."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        f"× {baseline}: its time over the contender's, round by round; median (quartiles). Matmul limit: the same ratio"
        " if only matrix products took time."
    )
    headings = ["tokens/s", "step, ms", "forward", "backward", "optimizer", "CPU, ms", "peak, MiB"]
    headings += [f"× {baseline}, wall", "CPU", "matmul limit", "first loss"]
    table.add_column("contender")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['tokens_per_second']:,.0f}",
            with_quartiles(row["wall_seconds"], 1, 1e3),
            *(f"{row[f'{part}_seconds']['median'] * 1e3:.1f}" for part in ("forward", "backward", "optimizer")),
            f"{row['cpu_seconds']['median'] * 1e3:.1f}",
            f"{row['peak_bytes'] / MIB:,.1f}",
            with_quartiles(row["wall_speed_ratio"], 3),
            f"{row['cpu_speed_ratio']['median']:.3f}",
            f"{row['matmul_limit_ratio']:.3f}",
            f"{row['first_loss_nats_per_token']:.4f}",
        )
    console.print(table)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60m", help="as of `velora-pretrain train`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every contender's recipe")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per forward pass")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(CONTENDERS)[:4],
        metavar="NAME[:HOW]",
        help=f"of {', '.join(CONTENDERS)}; HOW is elementwise, mlp or block, which is recomputed, or compiled",
    )
    parser.add_argument("--baseline", help="by default the first contender", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before; on a CPU at least 2")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--dtype", choices=list(get_args(Precision)), default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--grad-norm", action="store_true", help="take the global gradient norm too, as `train` does")
    parser.add_argument("--one-at-a-time", action="store_true", help="alternate blocks, one contender in memory")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of --one-at-a-time")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - for standard output")
    options = parser.parse_args(arguments)
    options.contenders = list(dict.fromkeys(options.contenders))
    options.baseline = options.baseline or options.contenders[0]
    if options.baseline not in options.contenders:
        parser.error(f"--baseline {options.baseline} is not among the contenders")
    try:
        for name in options.contenders:
            settings_of(name)
    except ValueError as error:
        parser.error(f"--contenders {error}")
    if options.rounds < (options.blocks if options.one_at_a_time else 1):
        parser.error("--rounds: at least one, and one for each block")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    work = Work(
        size=options.size,
        micro_batch_sequences=options.micro_batch,
        sequence_length=options.sequence_length,
        accumulation=options.accumulation,
        precision=options.dtype,
        device=options.device,
        grad_norm=options.grad_norm,
        assignments=tuple(options.set),
    )
    blocks = options.blocks if options.one_at_a_time else 0
    measured = measure(work, options.contenders, rounds=options.rounds, warmup_steps=options.warmup, blocks=blocks)
    rows, facts = rows_of(measured, options.baseline), environment(options.device)
    console = wide_console(stderr=options.json == "-")
    shape = f"{work.accumulation} × {work.micro_batch_sequences} × {work.sequence_length} tokens"
    order = f"{blocks} blocks, one at a time" if blocks else "interleaved"
    title = f"{work.size}, {shape}, {work.precision}, {work.device}; {options.rounds} rounds, {order}"
    print_rows(rows, title, options.baseline, console)
    console.print(environment_line(facts))
    if options.json:
        settings = {**asdict(work), "baseline": options.baseline, "rounds": options.rounds, "blocks": blocks}
        write_json(options.json, {"environment": facts, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
