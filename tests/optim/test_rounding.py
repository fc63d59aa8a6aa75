"""Stochastic rounding: one of two neighbours, right on average, small steps kept, the same draws wherever they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from velora_pretrain.config import MODES
from velora_pretrain.errors import UserError
from velora_pretrain.gradients import Gradients
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.optim import rounding
from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.optim.rounding import StochasticStore, round_stochastically
from velora_pretrain.recipe import resolve
from velora_pretrain.records import RunFolder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 numbers around each element, towards zero and away from it."""
    bits = value.view(torch.int32)
    towards = (bits & -(2**16)).view(torch.float32)
    return towards, torch.where(towards == value, towards, ((bits & -(2**16)) + 2**16).view(torch.float32))


def test_it_is_one_of_two_neighbours_and_right_on_average() -> None:
    draws = 20_000
    value = torch.randn(50, generator=generator()) * 10 ** torch.linspace(-6, 6, 50)
    value[:5] = value[:5].bfloat16().float()  # what bf16 can hold stays
    towards, away = neighbours(value)
    rounded = round_stochastically(value.expand(draws, -1).contiguous(), generator(1)).float()
    assert ((rounded == towards) | (rounded == away)).all()
    assert (rounded[:, :5] == value[:5]).all()
    assert (rounded[:, 5:].min(0).values < rounded[:, 5:].max(0).values).any()
    # A mean of two-valued draws: at most half the gap over the root of their number, six times that by no chance.
    error = (rounded.double().mean(0) - value.double()).abs()
    assert (error <= 6 * (away - towards).abs().double() / 2 / draws**0.5).all()


def test_what_is_not_finite_stays() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan] * 50)
    values.view(torch.int32)[2::4] = 0x7FFFFFFF  # the NaN whose bits would run over
    for seed in range(20):
        assert torch.equal(round_stochastically(values, generator(seed)).isnan(), values.isnan())
        assert torch.equal(round_stochastically(values, generator(seed)).isinf(), values.isinf())


@pytest.mark.parametrize("way", ["nearest", "stochastic"])
def test_steps_below_half_a_unit_are_lost_to_the_nearest_alone(way: Any) -> None:
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=2.0**-11, rounding=way)
    for step in range(64):
        optimizer.step_seed = step
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 64 steps of 2⁻¹¹ each, where neighbours of one lie 2⁻⁸ below it: of the order of a random walk's deviation off.
    moved = 1 - weight.double().mean().item()
    assert moved == (0 if way == "nearest" else pytest.approx(64 * 2.0**-11, rel=0.02))


def step_of(run: Any, *, rounding_seed: int, in_backward: bool = False) -> dict[str, torch.Tensor]:
    """The weights after two steps."""
    torch.manual_seed(9)
    mode, model = build_mode(run), Llama(run.llama, seed=0)
    mode.adapt(model)
    model.to(torch.bfloat16)
    optimizer = mode.build_optimizer(model)
    gradients = Gradients(model, optimizer, in_backward=in_backward)
    tokens = torch.randint(0, 120, (4, 32), generator=generator(3))
    mode.before_step(model, optimizer, 1, torch.no_grad()(lambda: model(tokens, tokens)))
    for step in range(2):
        optimizer.step_seed = rounding_seed + step
        torch.manual_seed(step)
        with gradients.of_micro_batch(1, 1):
            (model(tokens, tokens) / tokens.numel()).backward()
        gradients.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.endswith("coefficients")}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_draws_by_seed_and_parameter_alone(tiny_run: Callable[..., Any], mode: str) -> None:
    """The same seed gives the same bits, inside the backward pass too; another seed others, in every matrix."""
    run = tiny_run(mode=mode, precision="bf16", optimizer__rounding="stochastic", modes__velora__layers="all")
    first = step_of(run, rounding_seed=0)
    for other in (step_of(run, rounding_seed=0), step_of(run, rounding_seed=0, in_backward=True)):
        assert all(torch.equal(first[name], other[name]) for name in first)
    third = step_of(run, rounding_seed=7)
    plain = step_of(tiny_run(mode=mode, precision="bf16", modes__velora__layers="all"), rounding_seed=0)
    frozen = "lora" in mode.split("+")
    moving = [n for n, p in first.items() if p.ndim == 2 and not (frozen and n.endswith("_proj.weight"))]
    assert moving
    assert [name for name in moving if torch.equal(first[name], third[name])] == []
    assert [name for name in moving if torch.equal(first[name], plain[name])] == []


def test_equal_parameters_are_rounded_differently() -> None:
    weights = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    AdamW(weights, lr=2.0**-10, rounding="stochastic").step()
    assert not torch.equal(*weights)


def test_the_trainer_gives_each_step_a_seed_of_its_own(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from velora_pretrain.display import Display
    from velora_pretrain.trainer import train

    seeds, step = [], AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self: (seeds.append(self.step_seed), step(self))[1])
    for seed in (0, 1):
        run = resolve(str(tiny_recipe(seed=seed, precision="bf16", optimizer__rounding="stochastic")), {}, [])
        train(run, RunFolder(tmp_path / str(seed)), resume=False, display=Display())
    # Two steps of each run's prediction have none.
    drawn = [seed for seed in seeds if seed]
    assert len(set(drawn)) == len(drawn) == 12


def test_pieces_are_rounded_by_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two pieces by the same random numbers, and what is not narrow as it is."""
    monkeypatch.setattr(rounding, "ROUNDED_ELEMENTS", 64)
    value = torch.full((4, 64), 1 + 2.0**-9)
    narrow = torch.zeros(4, 64, dtype=torch.bfloat16)
    StochasticStore(0)(narrow, value)
    assert all(not torch.equal(narrow[0], row) for row in narrow[1:])
    wide = torch.zeros(4, 64)
    StochasticStore(0)(wide, value)
    assert torch.equal(wide, value)


def test_a_resumed_run_rounds_as_the_straight_one(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from velora_pretrain.display import Display
    from velora_pretrain.trainer import train

    settings = {"precision": "bf16", "optimizer__rounding": "stochastic", "mode": "velora"}
    run = resolve(str(tiny_recipe(checkpoint__every_steps=3, **settings)), {}, [])
    straight, resumed = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "resumed")
    train(run, straight, resume=False, display=Display())
    train(run, resumed, resume=False, display=Display())
    for path in resumed.checkpoints_newest_first()[:1]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed.summary.unlink()
    train(run, resumed, resume=True, display=Display())
    ours, theirs = (folder.checkpoint(6) / "model.safetensors" for folder in (resumed, straight))
    assert ours.read_bytes() == theirs.read_bytes()


def test_it_is_refused_where_nothing_is_rounded() -> None:
    with pytest.raises(UserError, match=r"optimizer\.rounding: weights are fp32 in precision fp32"):
        resolve(None, {"size": "9m"}, ["optimizer.rounding=stochastic"])
