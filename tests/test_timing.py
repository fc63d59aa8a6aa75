"""The clock of a step: turns, rare work borne in shares, and that a timed step is a training step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from velora_pretrain.config import Run
from velora_pretrain.contender import NEVER, contender_of, random_batches
from velora_pretrain.modes import build_mode, with_periods
from velora_pretrain.nn.llama import Llama
from velora_pretrain.timing import Contender, Measured, RareWork, StepTimes, figures_of, measure, take_step, warm_up

CPU = torch.device("cpu")


def times(wall: float, optimizer: float = 0.0) -> StepTimes:
    parts = {"cpu_seconds": 2 * wall, "data_seconds": 0.0, "forward_seconds": 0.0, "backward_seconds": 0.0}
    return StepTimes(wall_seconds=wall, optimizer_seconds=optimizer, **parts)


def contender(run: Run) -> Contender:
    return contender_of(run, batches=random_batches(run, CPU), device=CPU)


def test_a_step_bears_its_share_of_what_is_done_once_in_a_period() -> None:
    steps = [times(1.0, 0.25), times(1.5, 0.25)]
    # The median of three samples: 40 s once in 200 steps.
    rare = RareWork(period_steps=200, times=[times(60.0, 60.0), times(39.0, 39.0), times(40.0, 40.0)], operations=600)
    measured = Measured(name="a", steps=steps, tokens=[120, 120], operations=10, rare=[rare])
    assert [step.wall_seconds for step in measured.amortised_steps] == pytest.approx([1.2, 1.7])
    assert [step.cpu_seconds for step in measured.amortised_steps] == pytest.approx([2.4, 3.4])
    assert [step.optimizer_seconds for step in measured.amortised_steps] == pytest.approx([0.45, 0.45])
    assert measured.rates == pytest.approx([100.0, 120 / 1.7])
    assert measured.amortised_operations == 13
    plain = Measured(name="b", steps=[times(0.6), times(3.4)], tokens=[60, 120], operations=26)
    # At equal tokens, round by round: 0.01 s a token against 0.01, and 3.4 / 120 against 1.7 / 120.
    assert measured.ratios(plain, "wall_seconds") == pytest.approx([1.0, 2.0])
    figures = figures_of(measured, plain)
    assert figures["matmul_limit_ratio"] == 2.0
    assert figures["rare_work"][0]["share_of_step"] == pytest.approx(0.2 / 1.45)


def test_contenders_take_turns_in_an_order_that_rotates(tiny_run: Callable[..., Any]) -> None:
    order: list[str] = []

    def build(name: str, measured: Measured) -> Contender:
        built = contender(tiny_run(batch__sequences=1, batch__micro_batch=1))
        built.pace.before_step = lambda step, run_forward: order.append(name)
        built.close = lambda: order.append(f"end {name}")
        return built

    rounds: list[int] = []
    measured = measure(["a", "b", "c"], build, rounds=4, beside=rounds.append)
    assert "".join(order[:12]) == "abcbcacababc"
    assert order[12:] == ["end a", "end b", "end c"]
    assert rounds == [0, 1, 2, 3]
    assert [len(one.steps) for one in measured.values()] == [4, 4, 4]
    order.clear()
    measure(["a", "b"], build, rounds=3, blocks=2)
    assert order == ["a", "end a", "b", "end b", "b", "b", "end b", "a", "a", "end a"]


def test_a_timed_step_is_a_training_step(tiny_run: Callable[..., Any]) -> None:
    # Such an eps that the size of the gradients matters, which Adam else divides out.
    run = tiny_run(batch__sequences=4, batch__micro_batch=2, optimizer__eps=0.01)
    timed = contender(run)
    for _ in range(3):
        step, tokens = take_step(timed)
        assert tokens == 4 * 32
        parts = step.data_seconds + step.forward_seconds + step.backward_seconds + step.optimizer_seconds
        assert 0 < parts <= step.wall_seconds
    model = Llama(run.llama, seed=run.seed)
    adamw = torch.optim.AdamW(model.parameters(), lr=run.lr, eps=run.optimizer.eps, weight_decay=0.0)
    batches = random_batches(run, CPU)
    for _ in range(3):
        for inputs, labels in next(batches).micro_batches:
            (model(inputs, labels) / (4 * 31)).backward()
        adamw.step()
        adamw.zero_grad()
    for ours, by_hand in zip(timed.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand)


@pytest.mark.parametrize("update", ["step", "in_backward"])
def test_rare_work_is_out_of_the_timed_steps_and_in_all_of_the_other_pace(
    tiny_run: Callable[..., Any], update: str
) -> None:
    run = tiny_run(mode="galore", modes__galore__rank=4, optimizer__update=update, modes__galore__update_gap=3)
    timed, measured = contender(run), Measured(name="a")
    (rare,) = timed.rare
    assert rare.period_steps == 3
    warm_up(timed, measured)

    def subspaces(pace: Any) -> list[torch.Tensor]:
        return [state["projection"] for state in pace.optimizer.state.values() if "projection" in state]

    usual, every = subspaces(timed.pace), subspaces(rare)
    assert len(usual) == len(every) == 14
    for _ in range(4):
        take_step(timed)
    take_step(timed, rare)
    assert all(a is b for a, b in zip(usual, subspaces(timed.pace), strict=True))
    assert not any(a is b for a, b in zip(every, subspaces(rare), strict=True))
    # The Gram matrices alone are products of their own.
    assert measured.rare[0].operations > 0
    # Each pace has stepped only where it was asked to.
    steps = {state["step"] for state in timed.pace.optimizer.state.values() if isinstance(state["step"], int)}
    assert steps == {6}


def test_every_modes_periods(tiny_run: Callable[..., Any]) -> None:
    changes = {"modes__lora__restart_every": 7, "modes__velora__refresh_every": 5}
    expected = {
        "full": {},
        "galore": {"modes.galore.update_gap": 200},
        "lora": {"modes.lora.restart_every": 7},
        "flora+velora": {"modes.flora.kappa": 1000, "modes.velora.refresh_every": 5},
    }
    for mode, periods in expected.items():
        run = tiny_run(mode=mode, **changes)
        assert build_mode(run).periods() == periods
        changed = with_periods(run, dict.fromkeys(periods, NEVER))
        assert build_mode(changed).periods() == dict.fromkeys(periods, NEVER)
        assert changed.optimizer == run.optimizer
    assert build_mode(tiny_run(mode="lora+velora")).periods() == {}
