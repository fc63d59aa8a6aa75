"""One call on a CUDA machine: is it right, is the memory as predicted, how fast is it. One table, one JSON file.

Correct    logits and gradients against transformers; VeLoRA's gradient against the dense formula dyᵀ x̂ in float64, in
           bf16 no worse than that formula in bf16; 20 training steps against the same steps on the CPU; the loss under
           bf16 against float64.
Memory     predicted peak of a step (no device used) against the allocator's after warm-up.
Speed      the steps of `bench_step.py`, full rank as the baseline.
Rate       model FLOP/s over the highest rate of matrix products of the model's shapes, eager and compiled; what full
           rank needs is counted, in every mode.

Matrix products in fp32 run without TF32, as PyTorch has it by default. Exit status 1 where a check fails. What does not
fit into --deadline-seconds is left out and named. `--device cpu --quick` tries the whole at toy size.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_step import measure, prepare, rows_of
from contenders import Work
from device_checks import ALL, MODES, Checks
from figures import MIB, environment, environment_line, wide_console, with_quartiles, write_json
from rich.console import Console
from rich.table import Table

from velora_pretrain.config import Precision
from velora_pretrain.gemm_rate import GemmRate
from velora_pretrain.nn.llama import Llama
from velora_pretrain.prediction import USABLE_SHARE, predict_memory
from velora_pretrain.speed import gemm_shapes, product_dtype, utilisation


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is done."""

    device: str
    memory_sizes: tuple[str, ...]
    memory_precisions: tuple[Precision, ...]
    memory_micro_batch_sequences: int
    speed_sizes: tuple[str, ...]
    speed_contenders: tuple[str, ...]
    speed_precision: Precision
    speed_micro_batch_sequences: int
    rate_sizes: tuple[str, ...]
    rate_contenders: tuple[str, ...]
    rate_precision: Precision
    rate_micro_batch_sequences: int
    sequence_length: int
    rounds: int
    trajectory_steps: int


def plan_of(device: str, *, quick: bool) -> Plan:
    """Everything, or a try at toy size."""
    if quick:
        return Plan(
            device=device,
            memory_sizes=("9m",),
            memory_precisions=("fp32",),
            memory_micro_batch_sequences=2,
            speed_sizes=("9m",),
            speed_contenders=("transformers", "full", "velora-all"),
            speed_precision="fp32",
            speed_micro_batch_sequences=1,
            rate_sizes=("9m",),
            rate_contenders=("full", "velora-all"),
            rate_precision="fp32",
            rate_micro_batch_sequences=1,
            sequence_length=32,
            rounds=1,
            trajectory_steps=5,
        )
    return Plan(
        device=device,
        memory_sizes=("60m", "130m"),
        memory_precisions=("bf16-mixed", "fp32"),
        memory_micro_batch_sequences=32,
        speed_sizes=("60m", "130m", "350m"),
        speed_contenders=("transformers", *MODES, "straightforward-velora", "straightforward-velora-all"),
        speed_precision="bf16-mixed",
        speed_micro_batch_sequences=64,
        rate_sizes=("350m", "1b"),
        rate_contenders=("full", "full:compiled", "velora-all", "velora-all:compiled"),
        rate_precision="bf16",
        rate_micro_batch_sequences=32,
        sequence_length=256,
        rounds=15,
        trajectory_steps=20,
    )


@dataclass
class Report:
    """What was found."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    rate: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Whether every check that was made holds."""
        return all(row["ok"] for row in (*self.checks, *self.memory))


def work_of(plan: Plan, size: str, precision: Precision, micro_batch_sequences: int) -> Work:
    """A step of one micro-batch."""
    return Work(
        size=size,
        micro_batch_sequences=micro_batch_sequences,
        sequence_length=plan.sequence_length,
        precision=precision,
        device=plan.device,
    )


def shape_of(work: Work) -> dict[str, Any]:
    """What every row of a step says of it."""
    return {
        "size": work.size,
        "precision": work.precision,
        "micro_batch_sequences": work.micro_batch_sequences,
        "sequence_length": work.sequence_length,
    }


def measure_memory(report: Report, plan: Plan, size: str, precision: Precision) -> None:
    """Peak of a step, predicted and measured, of each mode."""
    work = work_of(plan, size, precision, plan.memory_micro_batch_sequences)
    initial = Llama(work.run_of("full").llama, seed=0)
    for name in MODES:
        predicted = predict_memory(work.run_of(name), work.micro_batch_sequences, accumulates=False)
        contender = prepare(name, work, initial, warmup_steps=2)
        ratio = contender.peak_bytes / predicted.peak_bytes
        report.memory.append(
            {
                **shape_of(work),
                "mode": name,
                "predicted_peak_bytes": predicted.peak_bytes,
                "measured_peak_bytes": contender.peak_bytes,
                "measured_over_predicted": ratio,
                # What a chosen micro-batch may miss by before it fails.
                "ok": USABLE_SHARE <= ratio <= 1 / USABLE_SHARE,
            }
        )
        del contender
        gc.collect()


def measure_speed(report: Report, plan: Plan, size: str) -> None:
    """Rows of `bench_step.py` for one size."""
    work = work_of(plan, size, plan.speed_precision, plan.speed_micro_batch_sequences)
    measured = measure(work, plan.speed_contenders, rounds=plan.rounds, warmup_steps=3)
    report.speed.extend({**shape_of(work), "baseline": "full", **row} for row in rows_of(measured, "full"))
    gc.collect()


def measure_rate(report: Report, plan: Plan, size: str) -> None:
    """The same one at a time, for memory does not hold all of 1b, against the rate of matrix products meanwhile."""
    work = work_of(plan, size, plan.rate_precision, plan.rate_micro_batch_sequences)
    run = work.run_of("full")
    gemm = GemmRate(gemm_shapes(run), dtype=product_dtype(run), device=torch.device(plan.device))
    measured = measure(
        work, plan.rate_contenders, rounds=plan.rounds, warmup_steps=3, blocks=1, beside=lambda index: gemm.sample()
    )
    rate = gemm.operations_per_second
    needed = next(one.times.operations for one in measured if one.times.name == "full")
    report.rate.extend(
        {
            **shape_of(work),
            **row,
            **utilisation(one.times, needed, rate),
            "gemm_operations_per_second": rate,
        }
        for one, row in zip(measured, rows_of(measured, "full"), strict=True)
    )
    gc.collect()


def stages(report: Report, plan: Plan) -> list[tuple[str, Callable[[], None]]]:
    """Everything that is to be done, in order."""
    checks = Checks(device=plan.device, trajectory_steps=plan.trajectory_steps, rows=report.checks)
    work: list[tuple[str, Callable[[], None]]] = [
        (check.__name__.replace("_", " "), lambda check=check: check(checks)) for check in ALL
    ]
    for size in plan.memory_sizes:
        for precision in plan.memory_precisions:
            name = f"memory of {size} in {precision}"
            work.append((name, lambda size=size, precision=precision: measure_memory(report, plan, size, precision)))
    work.extend((f"speed of {size}", lambda size=size: measure_speed(report, plan, size)) for size in plan.speed_sizes)
    work.extend((f"rate of {size}", lambda size=size: measure_rate(report, plan, size)) for size in plan.rate_sizes)
    return work


def print_report(report: Report, console: Console) -> None:
    """Everything in one table."""
    table = Table(title_justify="left")
    for heading in ("check", "setting"):
        table.add_column(heading)
    for heading in ("figure", "held against", "verdict"):
        table.add_column(heading, justify="right")
    for row in report.checks:
        figures = (f"{row['value']:.2e}", f"≤ {row['limit']:.2e}")
        table.add_row(row["check"], row["setting"], *figures, _verdict(row["ok"]))
    for row in report.memory:
        table.add_row(
            f"peak memory, {row['size']} {row['mode']}",
            _setting(row),
            f"{row['measured_peak_bytes'] / MIB:,.0f} MiB",
            f"predicted {row['predicted_peak_bytes'] / MIB:,.0f} MiB",
            f"× {row['measured_over_predicted']:.3f} {_verdict(row['ok'])}",
        )
    for row in report.speed:
        table.add_row(
            f"speed, {row['size']} {row['contender']}",
            f"{_setting(row)}, {row['peak_bytes'] / MIB:,.0f} MiB",
            f"{row['tokens_per_second']:,.0f} tokens/s",
            f"matmul limit × {row['matmul_limit_ratio']:.3f}",
            f"× {with_quartiles(row['wall_speed_ratio'], 3)} of {row['baseline']}",
        )
    for row in report.rate:
        table.add_row(
            f"rate, {row['size']} {row['contender']}",
            f"{_setting(row)}, {row['peak_bytes'] / MIB:,.0f} MiB",
            f"{row['model_flops_per_second'] / 1e12:,.3f} TFLOP/s",
            f"products {row['gemm_operations_per_second'] / 1e12:,.3f}",
            f"{row['model_flops_utilisation']:.0%}",
        )
    console.print(table)
    for name in report.left_out:
        console.print(f"left out: {name}")


def _setting(row: Mapping[str, Any]) -> str:
    return f"{row['precision']}, {row['micro_batch_sequences']} × {row['sequence_length']} tokens"


def _verdict(is_ok: bool) -> str:
    return "ok" if is_ok else "FAILED"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--output", metavar="FILE", help="write the figures here too; - for standard output")
    parser.add_argument("--deadline-seconds", type=float, default=420.0, help="no new stage is begun after this")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    report, facts, seconds = Report(), environment(options.device), {}
    plan = plan_of(options.device, quick=options.quick)
    for name, stage in stages(report, plan):
        begun = time.monotonic() - began
        if begun > options.deadline_seconds:
            report.left_out.append(f"{name}: the deadline has passed")
            continue
        try:
            stage()
        # One stage that breaks must not take the figures of the others with it.
        except Exception as error:
            report.checks.append({"check": name, "setting": repr(error), "value": 1.0, "limit": 0.0, "ok": False})
        if options.device == "cuda":
            torch.cuda.empty_cache()
        seconds[name] = time.monotonic() - began - begun
        print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)
        if options.output and options.output != "-":
            write_json(options.output, _content(report, facts, seconds))
    console = wide_console(stderr=options.output == "-")
    print_report(report, console)
    console.print(environment_line(facts))
    if options.output == "-":
        write_json("-", _content(report, facts, seconds))
    return 0 if report.is_ok else 1


def _content(report: Report, facts: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    return {"ok": report.is_ok, "environment": facts, "stage_seconds": seconds, **vars(report)}


if __name__ == "__main__":
    sys.exit(main())
