"""Speed of a training step, side by side: transformers, the tool's modes, and VeLoRA written in the obvious way.

contenders.py says what they are. A step is what a trainer does between two batches (forward pass and loss, backward
pass, optimizer, gradients dropped) on random tokens without padding, from the same weights. They take turns, one step
each per round, in an order that rotates, so that a machine whose speed drifts treats them alike. A ratio is the
baseline's time over the contender's, taken in each round; shown are its median and quartiles. Beside it stands what the
matrix products alone would give: the operations of the baseline over those of the contender.

Forward and backward are to be read together: the tool's loss makes its gradient in the forward pass.

All contenders live at once. Where memory does not hold them, --one-at-a-time runs them in alternating blocks: weaker,
because the two sides of a ratio then lie minutes apart.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from contenders import CONTENDERS, Contender, Work, build, matmul_operations
from figures import MIB, environment, environment_line, spread, wide_console, with_quartiles, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from velora_pretrain.config import Precision
from velora_pretrain.nn.llama import Llama
from velora_pretrain.step_memory import peak_of_step

TRACKED_STEPS = 2
"""Steps that `peak_of_step` takes; they warm up as well as others."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step. The parts add up to the wall time but for the waiting for the device."""

    wall_seconds: float
    cpu_seconds: float
    """Of the process, all threads."""
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class _Marks:
    """Moments of a step on the device's own clock, each ending a named part."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._moments: list[tuple[str, Any]] = []
        self.note("")

    def note(self, part: str) -> None:
        moment: Any = time.perf_counter()
        if self._device == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append((part, moment))

    def seconds(self, part: str) -> float:
        pairs = zip(self._moments, self._moments[1:], strict=False)
        if self._device == "cuda":
            return sum(begin.elapsed_time(end) for (_, begin), (name, end) in pairs if name == part) / 1e3
        return sum(end - begin for (_, begin), (name, end) in pairs if name == part)


def take_step(contender: Contender, work: Work, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> StepTimes:
    """One training step, timed."""
    synchronise(work.device)
    began_wall, began_cpu = time.perf_counter(), time.process_time()
    marks = _Marks(work.device)
    for micro_batch in micro_batches:
        loss = contender.loss(*micro_batch)
        marks.note("forward")
        loss.backward()
        marks.note("backward")
    if work.grad_norm:
        nn.utils.get_total_norm([p.grad for p in contender.model.parameters() if p.grad is not None])
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    marks.note("optimizer")
    synchronise(work.device)
    return StepTimes(
        wall_seconds=time.perf_counter() - began_wall,
        cpu_seconds=time.process_time() - began_cpu,
        forward_seconds=marks.seconds("forward"),
        backward_seconds=marks.seconds("backward"),
        optimizer_seconds=marks.seconds("optimizer"),
    )


class AnyOptimizer:
    """An optimizer of PyTorch's kind as memory accounting asks for it: dense gradients, stepped together."""

    accumulates = False

    def __init__(self, optimizer: Optimizer) -> None:
        self.state, self.step = optimizer.state, optimizer.step

    def accumulate(self, parameter: Tensor) -> None:
        """Leaves the gradient where it is."""

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The dense one."""
        return parameter.grad

    def step_parameter(self, parameter: Tensor) -> None:
        """Is not asked for: nothing is stepped in the backward pass."""
        raise NotImplementedError


def prepare(name: str, work: Work, initial: Llama, warmup_steps: int) -> Contender:
    """Builds a contender, takes its first loss, warms it up and measures the peak memory of its step.

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
    with torch.no_grad():
        first = [contender.loss(*micro_batch).double() for micro_batch in micro_batches]
    contender.first_loss_nats_per_token = torch.stack(first).sum().item()
    if work.device == "cuda":
        for _ in range(max(1, warmup_steps)):
            take_step(contender, work, micro_batches)
        torch.cuda.reset_peak_memory_stats()
        take_step(contender, work, micro_batches)
        contender.peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
        return contender
    losses = [lambda micro_batch=micro_batch: contender.loss(*micro_batch) for micro_batch in micro_batches]
    contender.peak_bytes = peak_of_step(contender.model, AnyOptimizer(contender.optimizer), losses).peak_bytes
    for _ in range(warmup_steps - TRACKED_STEPS):
        take_step(contender, work, micro_batches)
    return contender


def _allocate_workspaces() -> None:
    """Makes the GEMM library take the work space that it then keeps, so that no contender is charged with it."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(256, 256, device="cuda", dtype=dtype)
        F.linear(square, square)
    torch.cuda.synchronize()


@dataclass(kw_only=True)
class Measurement:
    """What was seen of one contender."""

    name: str
    steps: list[StepTimes]
    first_loss_nats_per_token: float = 0.0
    peak_bytes: int = 0


def measure(
    work: Work, names: Sequence[str], *, rounds: int, warmup_steps: int = 2, blocks: int = 0
) -> list[Measurement]:
    """Steps of all contenders in turn.

    Args:
        work: of a step.
        names: the contenders.
        rounds: steps of each.
        warmup_steps: untimed steps of each, before.
        blocks: 0 keeps all contenders at once and alternates steps; else each is built anew for each of so many blocks
            of rounds.
    """
    measured = {name: Measurement(name=name, steps=[]) for name in names}
    initial = Llama(work.run_of(names[0]).llama, seed=0)

    def ready(name: str) -> Contender:
        contender = prepare(name, work, initial, warmup_steps)
        measured[name].first_loss_nats_per_token = contender.first_loss_nats_per_token
        measured[name].peak_bytes = contender.peak_bytes
        return contender

    def time_round(contenders: Mapping[str, Contender], index: int) -> None:
        micro_batches = work.micro_batches(initial.config.vocab_size, seed=1 + index)
        for name in _rotated([name for name in names if name in contenders], index):
            measured[name].steps.append(take_step(contenders[name], work, micro_batches))

    if not blocks:
        contenders = {name: ready(name) for name in names}
        for index in range(rounds):
            time_round(contenders, index)
    for block in range(blocks):
        for name in _rotated(names, block):
            contenders = {name: ready(name)}
            for index in range(block * rounds // blocks, (block + 1) * rounds // blocks):
                time_round(contenders, index)
            del contenders
            gc.collect()
    return list(measured.values())


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def rows_of(measured: Sequence[Measurement], work: Work, baseline: str) -> list[dict[str, Any]]:
    """One row per contender: times, speed, memory, and its ratios to the baseline."""
    reference = next(m for m in measured if m.name == baseline)
    reference_operations = matmul_operations(baseline, work)
    rows = []
    for one in measured:
        columns = {key: [getattr(step, key) for step in one.steps] for key in StepTimes.__dataclass_fields__}
        ratios = {
            key: [
                getattr(base, key) / getattr(step, key) for base, step in zip(reference.steps, one.steps, strict=True)
            ]
            for key in ("wall_seconds", "cpu_seconds")
        }
        operations = matmul_operations(one.name, work)
        rates = [work.step_tokens / seconds for seconds in columns["wall_seconds"]]
        rows.append(
            {
                "contender": one.name,
                "tokens_per_second": statistics.median(rates),
                "tokens_per_second_samples": rates,
                **{key: spread(values) for key, values in columns.items()},
                "wall_speed_ratio": spread(ratios["wall_seconds"]),
                "cpu_speed_ratio": spread(ratios["cpu_seconds"]),
                "matmul_limit_ratio": reference_operations / operations,
                "matmul_operations": operations,
                "peak_bytes": one.peak_bytes,
                "first_loss_nats_per_token": one.first_loss_nats_per_token,
            }
        )
    return rows


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
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)[:4], metavar="NAME"
    )
    parser.add_argument("--baseline", choices=list(CONTENDERS), help="by default the first contender", metavar="NAME")
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
    rows, facts = rows_of(measured, work, options.baseline), environment(options.device)
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
