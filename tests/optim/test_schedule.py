"""Learning-rate schedules."""

import itertools
import math

import pytest

from velora_pretrain.optim.schedule import lr_multiplier, restart_multiplier


def course(kind: str, steps: int = 100, warmup: int = 10) -> list[float]:
    return [
        lr_multiplier(step, steps=steps, warmup_steps=warmup, kind=kind, min_lr_ratio=0.1)  # type: ignore[arg-type]
        for step in range(1, steps + 1)
    ]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    for kind in ("cosine", "linear", "constant"):
        assert course(kind)[:10] == pytest.approx([k / 10 for k in range(1, 11)])


def test_decay_ends_at_the_smallest_rate() -> None:
    assert course("cosine")[-1] == pytest.approx(0.1)
    assert course("linear")[-1] == pytest.approx(0.1)
    assert course("constant")[-1] == 1.0


def test_half_way_through_the_decay() -> None:
    assert course("cosine")[54] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert course("linear")[54] == pytest.approx(0.55)


def test_it_never_rises_after_the_warm_up() -> None:
    for kind in ("cosine", "linear"):
        after = course(kind)[9:]
        assert all(a > b for a, b in itertools.pairwise(after))


def test_no_warm_up_and_all_warm_up() -> None:
    assert course("cosine", warmup=0)[0] == pytest.approx(1.0, abs=1e-3)
    assert course("cosine", steps=10, warmup=10) == pytest.approx([k / 10 for k in range(1, 11)])


def test_restarts_warm_up_each_and_the_beginning_does_not() -> None:
    course = [restart_multiplier(step, restart_every=6, warmup_steps=4) for step in range(1, 19)]
    assert course == [1.0] * 6 + [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] * 2


def test_restarts_without_warm_up_with_a_long_one_and_none() -> None:
    assert [restart_multiplier(step, restart_every=2, warmup_steps=0) for step in range(1, 6)] == [1.0] * 5
    assert [restart_multiplier(step, restart_every=2, warmup_steps=4) for step in range(1, 6)] == [
        1,
        1,
        0.25,
        0.5,
        0.25,
    ]
    assert [restart_multiplier(step, restart_every=0, warmup_steps=4) for step in range(1, 6)] == [1.0] * 5
