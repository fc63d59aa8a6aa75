"""Loss spikes: told from the steps before, and from nothing else."""

import math
import random

from velora_pretrain.spikes import FIRST_STEPS, SMALLEST_NATS, WINDOW_STEPS, LossSpikes


def noisy(count: int, mean: float = 5.0, deviation: float = 0.1) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(mean, deviation) for _ in range(count)]


def test_a_spike_is_measured_from_the_median() -> None:
    spikes = LossSpikes([5.0] * WINDOW_STEPS)
    assert spikes.add(7.5) == 2.5
    assert spikes.add(5.0) is None
    assert spikes.add(5.0 + SMALLEST_NATS) is None


def test_noise_and_falling_losses_are_none() -> None:
    spikes = LossSpikes([])
    assert all(spikes.add(loss) is None for loss in noisy(2000))
    falling = LossSpikes([])
    assert all(falling.add(10.0 - 0.01 * step + noise) is None for step, noise in enumerate(noisy(500, 0.0)))


def test_what_counts_follows_the_noise() -> None:
    quiet, loud = LossSpikes(noisy(64, deviation=0.01)), LossSpikes(noisy(64, deviation=0.5))
    assert quiet.add(6.0) is not None
    assert loud.add(6.0) is None


def test_nothing_is_said_before_enough_is_known_nor_of_what_is_no_number() -> None:
    spikes = LossSpikes([5.0] * (FIRST_STEPS - 1))
    assert spikes.add(math.nan) is None
    assert spikes.add(50.0) is None
    assert spikes.add(50.0) == 45.0


def test_it_goes_on_from_the_losses_of_the_steps_before() -> None:
    losses = noisy(300)
    losses[200] = 9.0
    straight = LossSpikes([])
    expected = [straight.add(loss) for loss in losses]
    again = LossSpikes(losses[:150])
    assert [again.add(loss) for loss in losses[150:]] == expected[150:]
    assert [place for place, above in enumerate(expected) if above] == [200]
