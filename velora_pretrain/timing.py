"""Training steps of several contenders side by side, each timed by part. What contends is the caller's.

A step is what `train` does between two batches: the next batch, what the mode does before, forward pass and loss,
backward pass, gradient norm, the optimizer, what the mode does after. Contenders take turns, one step each per round,
in an order that rotates, so that a machine whose speed drifts treats them alike; a ratio is taken within a round.

Work that is done only once in T steps (a subspace that is found anew) is in few of the timed steps or in none, by
chance. So it is kept out of them: a contender steps at a pace without it, and beside some of these steps it takes one
at a pace that does all of it every time. Their difference is what T steps have to bear, and each bears a T-th.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from velora_pretrain.gemm_rate import synchronise
from velora_pretrain.gradients import Gradients, SteppingOptimizer
from velora_pretrain.matrix_products import counted_operations

RARE_EVERY_ROUNDS = 3
"""Rounds from one sample of the rare work to the next."""

Losses = list[tuple[Tensor, Tensor]]
"""Inputs and labels of each micro-batch of a step."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step. The parts add up to the wall time but for the waiting for the device."""

    wall_seconds: float
    cpu_seconds: float
    """Of the process, all threads."""
    data_seconds: float
    """Until the batch is there, on the device."""
    forward_seconds: float
    backward_seconds: float
    """With the optimizer's, where parameters move in the backward pass."""
    optimizer_seconds: float
    """With the gradient norm, and with what a mode does before and after."""

    def plus(self, other: StepTimes, share: float = 1.0) -> StepTimes:
        """These times and a share of others, part by part."""
        names = self.__dataclass_fields__
        return StepTimes(
            **{name: a + share * b for name, a, b in zip(names, astuple(self), astuple(other), strict=True)}
        )


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one step reads, on the device."""

    micro_batches: Losses
    num_targets: int
    """Labels that count."""
    num_tokens: int
    """Inputs that are not padding."""


@dataclass(kw_only=True)
class Pace:
    """An optimizer over a contender's parameters, and what is done around its steps, which are counted from 1."""

    optimizer: SteppingOptimizer
    before_step: Callable[[int, Callable[[], None]], object] = lambda step, run_forward: None
    after_step: Callable[[int], object] = lambda step: None
    period_steps: int = 0
    """T of the rare work that is done in each of its steps; 0 where there is none."""
    done_steps: int = 0


class _Current:
    """The optimizer of the pace that a contender goes at: to its gradients, one optimizer."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        return self.pace.optimizer.state

    @property
    def accumulates(self) -> bool:
        return self.pace.optimizer.accumulates

    def accumulate(self, parameter: Tensor) -> None:
        self.pace.optimizer.accumulate(parameter)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        return self.pace.optimizer.gradient(parameter)

    def step_parameter(self, parameter: Tensor) -> None:
        self.pace.optimizer.step_parameter(parameter)

    def step(self) -> None:
        self.pace.optimizer.step()


@dataclass(kw_only=True)
class Contender:
    """A model that is ready to train."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor, int], Tensor]
    """Of inputs, labels and the targets of the whole step: nats per target, this micro-batch's part of them."""
    batches: Iterator[StepBatch]
    pace: Pace
    """Without rare work."""
    device: torch.device
    rare: Sequence[Pace] = ()
    in_backward: bool = False
    takes_norm: bool = True
    """Whether the global gradient norm is taken before the optimizer's step."""
    compile: Callable[[], None] | None = None
    """Compiles the model; called once v is there and the operations are counted."""
    close: Callable[[], None] = lambda: None
    """Stops reading."""

    def __post_init__(self) -> None:
        self._current = _Current(self.pace)
        self.gradients = Gradients(self.model, self._current, in_backward=self.in_backward)

    def at(self, pace: Pace) -> Pace:
        """Goes on at this pace."""
        self._current.pace = pace
        return pace


class _Marks:
    """Moments of a step on the device's own clock, each ending a named part."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._moments: list[tuple[str, Any]] = []
        self.note("")

    def note(self, part: str) -> None:
        moment: Any = time.perf_counter()
        if self._on_device:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._moments.append((part, moment))

    def seconds(self, part: str) -> float:
        pairs = zip(self._moments, self._moments[1:], strict=False)
        if self._on_device:
            return sum(begin.elapsed_time(end) for (_, begin), (name, end) in pairs if name == part) / 1e3
        return sum(end - begin for (_, begin), (name, end) in pairs if name == part)


def take_step(contender: Contender, pace: Pace | None = None) -> tuple[StepTimes, int]:
    """One training step, timed, and the tokens that it has read."""
    pace = contender.at(pace or contender.pace)
    pace.done_steps += 1
    synchronise(contender.device)
    began_wall, began_cpu = time.perf_counter(), time.process_time()
    marks = _Marks(contender.device)
    batch = next(contender.batches)
    marks.note("data")

    @torch.no_grad()
    def run_forward() -> None:
        for inputs, labels in batch.micro_batches:
            contender.loss(inputs, labels, batch.num_targets)

    pace.before_step(pace.done_steps, run_forward)
    marks.note("optimizer")
    for number, (inputs, labels) in enumerate(batch.micro_batches, start=1):
        loss = contender.loss(inputs, labels, batch.num_targets)
        marks.note("forward")
        with contender.gradients.of_micro_batch(number, len(batch.micro_batches)):
            loss.backward()
        marks.note("backward")
    if contender.takes_norm:
        contender.gradients.clip(0.0)
    contender.gradients.step()
    pace.after_step(pace.done_steps)
    marks.note("optimizer")
    synchronise(contender.device)
    wall, cpu = time.perf_counter() - began_wall, time.process_time() - began_cpu
    parts = {f"{part}_seconds": marks.seconds(part) for part in ("data", "forward", "backward", "optimizer")}
    return StepTimes(wall_seconds=wall, cpu_seconds=cpu, **parts), batch.num_tokens


@dataclass(kw_only=True)
class RareWork:
    """What one pace does beyond the ordinary one, in each of its steps."""

    period_steps: int
    times: list[StepTimes] = field(default_factory=list)
    operations: int = 0


@dataclass(kw_only=True)
class Measured:
    """What was seen of one contender."""

    name: str
    steps: list[StepTimes] = field(default_factory=list)
    """Without rare work."""
    tokens: list[int] = field(default_factory=list)
    """Of each step."""
    operations: int = 0
    """Of the matrix products in a step without rare work."""
    rare: list[RareWork] = field(default_factory=list)

    @property
    def amortised_steps(self) -> list[StepTimes]:
        """The steps, each with its share of the rare work."""
        steps = self.steps
        for work in self.rare:
            extra = _median(work.times)
            steps = [step.plus(extra, 1 / work.period_steps) for step in steps]
        return steps

    @property
    def amortised_operations(self) -> float:
        """The same of the operations."""
        return self.operations + sum((work.operations / work.period_steps for work in self.rare), 0.0)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each step with its share of the rare work."""
        return [n / step.wall_seconds for n, step in zip(self.tokens, self.amortised_steps, strict=True)]

    def ratios(self, reference: Measured, key: str) -> list[float]:
        """How often this contender's step fits into the reference's, round by round, at equal tokens."""
        ours, theirs = (
            [getattr(s, key) / n for s, n in zip(m.amortised_steps, m.tokens, strict=True)] for m in (self, reference)
        )
        return [other / own for own, other in zip(ours, theirs, strict=True)]


def _median(times: Sequence[StepTimes]) -> StepTimes:
    columns = zip(*map(astuple, times), strict=True)
    return StepTimes(**dict(zip(StepTimes.__dataclass_fields__, map(statistics.median, columns), strict=True)))


def warm_up(contender: Contender, measured: Measured, steps: int = 2) -> None:
    """Takes untimed steps, at least two at each pace, and counts the operations of the second.

    The first step finds what is there from then on: directions, subspaces, the optimizer's state.
    """
    operations = []
    for pace in (contender.pace, *contender.rare):
        take_step(contender, pace)
        with counted_operations() as counted:
            take_step(contender, pace)
        operations.append(counted.total)
    measured.operations = operations[0]
    measured.rare = measured.rare or [RareWork(period_steps=pace.period_steps) for pace in contender.rare]
    for work, total in zip(measured.rare, operations[1:], strict=True):
        work.operations = total - measured.operations
    if contender.compile:
        contender.compile()
        take_step(contender)
    for _ in range(steps - 2):
        take_step(contender)


def measure(
    names: Sequence[str],
    build: Callable[[str, Measured], Contender],
    *,
    rounds: int,
    blocks: int = 0,
    beside: Callable[[int], object] = lambda index: None,
) -> dict[str, Measured]:
    """Steps of all contenders in turn.

    Args:
        names: the contenders.
        build: makes one that is warmed up, given what is seen of it.
        rounds: steps of each.
        blocks: 0 keeps all contenders at once and alternates steps; else each is built anew for each of so many blocks
            of rounds: weaker, because the two sides of a ratio then lie minutes apart.
        beside: called after each round, with its number from 0.
    """
    measured = {name: Measured(name=name) for name in names}

    def time_round(contenders: Mapping[str, Contender], index: int) -> None:
        for name in _rotated([name for name in names if name in contenders], index):
            _time_step(contenders[name], measured[name], with_rare=index % RARE_EVERY_ROUNDS == 0)
        beside(index)

    def time_block(together: Sequence[str], begin: int, end: int) -> None:
        contenders = {name: build(name, measured[name]) for name in together}
        try:
            for index in range(begin, end):
                time_round(contenders, index)
        finally:
            for contender in contenders.values():
                contender.close()
            contenders.clear()
            gc.collect()

    if not blocks:
        time_block(names, 0, rounds)
    for block in range(blocks):
        for name in _rotated(names, block):
            time_block([name], block * rounds // blocks, (block + 1) * rounds // blocks)
    return measured


def _time_step(contender: Contender, measured: Measured, *, with_rare: bool) -> None:
    times, tokens = take_step(contender)
    measured.steps.append(times)
    measured.tokens.append(tokens)
    # A block may hold none of the rounds that take a sample.
    for pace, work in zip(contender.rare, measured.rare, strict=True):
        if with_rare or not work.times:
            work.times.append(take_step(contender, pace)[0].plus(times, -1.0))


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "lower_quartile", "upper_quartile"), values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def figures_of(measured: Measured, baseline: Measured) -> dict[str, Any]:
    """What the steps of one contender say, alone and beside the baseline's."""
    steps, rates = measured.amortised_steps, measured.rates
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_samples": rates,
        **{key: spread([getattr(step, key) for step in steps]) for key in StepTimes.__dataclass_fields__},
        "rare_work": [
            {
                "period_steps": work.period_steps,
                "seconds": spread([times.wall_seconds for times in work.times]),
                "share_of_step": statistics.median(times.wall_seconds for times in work.times)
                / work.period_steps
                / statistics.median(step.wall_seconds for step in steps),
            }
            for work in measured.rare
        ],
        "matmul_operations": measured.amortised_operations,
        "wall_speed_ratio": spread(measured.ratios(baseline, "wall_seconds")),
        "cpu_speed_ratio": spread(measured.ratios(baseline, "cpu_seconds")),
        "matmul_limit_ratio": baseline.amortised_operations / measured.amortised_operations,
    }
