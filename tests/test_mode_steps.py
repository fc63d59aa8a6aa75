"""What a mode does around a step: refreshes and their moments, restarts; and that what is set reaches the rules."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from velora_pretrain.dimensions import PROJECTIONS
from velora_pretrain.modes import Mode, build_mode
from velora_pretrain.nn.direction import directions_of
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.lora import LoRALinear, adapt_linears, adapter_parameters, merge_and_restart
from velora_pretrain.nn.velora import VeLoRALinear
from velora_pretrain.optim.adamw import AdamW, Factored
from velora_pretrain.optim.flora import AccumulatingFloraAdamW, FloraAdafactor, flora_rules
from velora_pretrain.optim.galore import GaLore

COMPRESSED: dict[str, Any] = {"mode": "velora", "modes__velora__num_groups": {"v_proj": 8, "down_proj": 12}}
"""Sub-tokens of width 4, so that a cycle through a basis comes round soon."""


def built(run: Any) -> tuple[Mode, Llama, AdamW]:
    mode, model = build_mode(run), Llama(run.llama, seed=run.seed)
    mode.adapt(model)
    return mode, model, mode.build_optimizer(model)


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(step))


def start_step(mode: Mode, model: Llama, optimizer: AdamW, step: int) -> int:
    """Comes to a step; gives how often the model was run for it."""
    calls = []

    def run_forward() -> None:
        calls.append(step)
        with torch.no_grad():
            model(tokens_of(step), tokens_of(step))

    mode.before_step(model, optimizer, step, run_forward)
    return len(calls)


def take_step(model: Llama, optimizer: AdamW, step: int) -> None:
    (model(tokens_of(step), tokens_of(step)) / 64).backward()
    optimizer.step()
    optimizer.zero_grad()


def states_of(model: Llama, optimizer: AdamW) -> dict[str, dict[str, Any]]:
    """A copy of all that the optimizer keeps, by parameter."""
    return {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def are_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(other[k])) for k, v in one.items()
    )


# Refreshes


def test_a_cycle_goes_through_the_basis_of_the_first_batch(tiny_run: Callable[..., Any]) -> None:
    settings = {"init": "svd", "refresh": "cycle", "refresh_every": 2}
    run = tiny_run(**COMPRESSED, **{f"modes__velora__{key}": value for key, value in settings.items()})
    mode, model, optimizer = built(run)
    assert start_step(mode, model, optimizer, 1) == 1
    bases = [direction.basis.clone() for direction in directions_of(model) if direction.basis is not None]
    assert len(bases) == len(directions_of(model)) == 4
    for basis in bases:
        torch.testing.assert_close(basis @ basis.t(), torch.eye(4))
    for step in range(1, 14):
        if step > 1:
            assert start_step(mode, model, optimizer, step) == 0
        for basis, direction in zip(bases, directions_of(model), strict=True):
            assert torch.equal(direction.vector, basis[(step - 1) // 2 % 4])
        take_step(model, optimizer, step)
        vectors = [direction.vector.clone() for direction in directions_of(model)]
        assert mode.after_step(model, optimizer, step) == {}
        assert all(torch.equal(a, b.vector) for a, b in zip(vectors, directions_of(model), strict=True))


@pytest.mark.parametrize("init", ["batch_average_once", "svd"])
def test_a_refresh_is_of_the_batch_of_its_step_alone(tiny_run: Callable[..., Any], init: str) -> None:
    """Nothing that was seen before, in training or in the refresh before it, is in it."""
    mode, model, optimizer = built(tiny_run(**COMPRESSED, modes__velora__init=init, modes__velora__refresh_every=2))
    for step in range(1, 6):
        fresh = copy.deepcopy(model)
        start_step(mode, model, optimizer, step)
        if step in (1, 3, 5):
            for direction in directions_of(fresh):
                direction.statistics.zero_()
                direction.observing = True
            with torch.no_grad():
                fresh(tokens_of(step), tokens_of(step))
            for direction, expected in zip(directions_of(model), directions_of(fresh), strict=True):
                expected.take()
                assert torch.equal(direction.vector, expected.vector)
        take_step(model, optimizer, step)
        mode.after_step(model, optimizer, step)


@pytest.mark.parametrize("moments", ["keep", "reset", "reproject"])
@pytest.mark.parametrize("refresh", ["anew", "cycle"])
def test_what_becomes_of_moments_at_a_refresh(tiny_run: Callable[..., Any], moments: str, refresh: str) -> None:
    """Those of compressed weights at a refresh; those of others, and all in other steps, stay as they are."""
    settings = {"init": "svd", "refresh": refresh, "refresh_every": 3, "refresh_moments": moments}
    run = tiny_run(**COMPRESSED, **{f"modes__velora__{key}": value for key, value in settings.items()})
    mode, model, optimizer = built(run)
    for step in range(1, 6):
        before, old = states_of(model, optimizer), [d.vector.clone() for d in directions_of(model)]
        start_step(mode, model, optimizer, step)
        after = states_of(model, optimizer)
        cosines = {
            name: float(before_v @ layer.direction.vector)
            for before_v, direction in zip(old, directions_of(model), strict=True)
            for name, layer in model.named_modules()
            if isinstance(layer, VeLoRALinear) and layer.direction is direction
        }
        for name, state in before.items():
            layer = name.removesuffix(".coefficients")
            if step != 4 or layer == name or moments == "keep":
                assert are_same(state, after[name]), (step, name)
            elif moments == "reset":
                assert after[name] == {}
            else:
                assert abs(cosines[layer]) < 0.99999
                torch.testing.assert_close(
                    after[name]["exp_avg"], state["exp_avg"] * cosines[layer], atol=1e-9, rtol=1e-4
                )
                assert torch.equal(after[name]["exp_avg_sq"], state["exp_avg_sq"])
                assert after[name]["step"] == state["step"] == 3
        take_step(model, optimizer, step)
    # Where moments were reset, the bias correction begins anew, too.
    counts = {optimizer.state[m.coefficients]["step"] for m in model.modules() if isinstance(m, VeLoRALinear)}
    assert counts == ({2} if moments == "reset" else {5})


def test_reprojected_moments_stay_in_eight_bits(tiny_run: Callable[..., Any]) -> None:
    pytest.importorskip("bitsandbytes")
    run = tiny_run(
        mode="velora",
        optimizer__state_bits=8,
        model__hidden_size=128,
        model__intermediate_size=256,
        model__num_hidden_layers=1,
        modes__velora__layers=["gate_proj", "up_proj"],
        modes__velora__num_groups={"gate_proj": 16, "up_proj": 16},
        modes__velora__refresh_every=1,
        modes__velora__refresh_moments="reproject",
    )
    mode, model, optimizer = built(run)
    start_step(mode, model, optimizer, 1)
    take_step(model, optimizer, 1)
    layer = next(module for module in model.modules() if isinstance(module, VeLoRALinear))
    absmax, v = optimizer.state[layer.coefficients]["exp_avg_absmax"].clone(), layer.direction.vector.clone()
    start_step(mode, model, optimizer, 2)
    state = optimizer.state[layer.coefficients]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    torch.testing.assert_close(state["exp_avg_absmax"], absmax * (v @ layer.direction.vector).abs())


# Restarts


def test_a_restart_is_that_of_run_and_step_and_resets_the_adapters_alone(tiny_run: Callable[..., Any]) -> None:
    settings = {"rank": 8, "restart_every": 2, "reset_share": 0.5}
    run = tiny_run(mode="lora", seed=7, **{f"modes__lora__{key}": value for key, value in settings.items()})
    mode, model, optimizer = built(run)
    for step in range(1, run.steps + 1):
        take_step(model, optimizer, step)
        expected, before = copy.deepcopy(model), states_of(model, optimizer)
        told = mode.after_step(model, optimizer, step)
        adapters = {id(p) for p in adapter_parameters(model)}
        assert len(adapters) == 2 * 7 * 2
        # Not at the end: what would be started could not be trained any more.
        if step not in (2, 4):
            assert told == {}
        else:
            merge_and_restart(expected, seed=7, step=step)
            halves = {p.numel() // 2 for p in adapter_parameters(model)}
            zeros = {int((optimizer.state[p]["exp_avg_sq"] == 0).sum()) for p in adapter_parameters(model)}
            assert zeros == halves
            assert 0.5 <= told["zero_moments_share"] < 0.7
        theirs = dict(expected.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, theirs[name])
            if name in before and (not told or id(parameter) not in adapters):
                assert are_same(optimizer.state[parameter], before[name]), name


# What is set arrives


def test_settings_reach_the_adapters(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run(mode="lora", seed=7, modes__lora__rank=8, modes__lora__alpha=4.0, modes__lora__dropout=0.3)
    model = built(run)[1]
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert {(layer.rank, layer.scaling, layer.dropout) for layer in layers} == {(8, 0.5, 0.3)}
    same = Llama(run.llama, seed=7)
    adapt_linears(same, layers=PROJECTIONS, rank=8, alpha=4.0, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_settings_reach_the_low_rank_rules(tiny_run: Callable[..., Any]) -> None:
    settings = {"rank": 8, "scale": 0.5, "update_gap": 28, "finder": "svd"}
    run = tiny_run(mode="galore", seed=7, **{f"modes__galore__{key}": value for key, value in settings.items()})
    rules = list(built(run)[2].rules.values())
    # Seven projections in each of two blocks; the small k and v are above the rank, too.
    assert rules == [
        GaLore(rank=8, scale=0.5, update_gap=28, finder="svd", seed=7, offset=2 * index) for index in range(14)
    ]


@pytest.mark.parametrize(
    ("inner", "accumulation", "kind"),
    [("adafactor", "dense", FloraAdafactor), ("adamw", "compressed", AccumulatingFloraAdamW)],
)
def test_settings_reach_the_random_rules(
    tiny_run: Callable[..., Any], inner: Any, accumulation: Any, kind: type[Any]
) -> None:
    settings = {"rank": 8, "kappa": 5, "inner": inner, "accumulation": accumulation}
    run = tiny_run(mode="flora", seed=7, **{f"modes__flora__{key}": value for key, value in settings.items()})
    _, model, optimizer = built(run)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    assert {type(optimizer.rules[p]) for p in matrices} == {kind}
    expected = flora_rules(matrices, others, rank=8, kappa=5, inner=inner, accumulation=accumulation, seed=7)
    assert optimizer.rules == expected


def test_settings_reach_the_compressed_layers(tiny_run: Callable[..., Any]) -> None:
    settings = {"update": "projected", "init": "running_average", "scale": 0.5, "step_scale": 0.125}
    run = tiny_run(**COMPRESSED, **{f"modes__velora__{key}": value for key, value in settings.items()})
    _, model, optimizer = built(run)
    layers = [module for module in model.modules() if isinstance(module, VeLoRALinear)]
    assert {(layer.scale, layer.direction.init, layer.direction.vector.numel()) for layer in layers} == {
        (0.5, "running_average", 4)
    }
    for layer in layers:
        rule = optimizer.rules[layer.coefficients]
        assert isinstance(rule, Factored)
        assert (rule.update, rule.scale) == ("projected", 0.125)
        assert rule.weight is layer.weight
        assert rule.direction is layer.direction.vector


def test_random_directions_are_of_the_runs_seed(tiny_run: Callable[..., Any]) -> None:
    one, same, other = (
        [d.vector for d in directions_of(built(tiny_run(**COMPRESSED, seed=seed, modes__velora__init="random"))[1])]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("update", ["dense", "projected"])
@pytest.mark.parametrize(
    ("mode", "step_scale", "expected"),
    [
        ("velora", 0.5, 0.5),
        ("galore+velora", None, 0.75),
        ("galore+velora", 0.5, 0.5),
        ("flora+velora", None, 1.0),
        ("lora+velora", 0.5, 0.5),
    ],
)
def test_compressed_steps_are_scaled_and_their_decay_is_not(
    tiny_run: Callable[..., Any], mode: str, step_scale: float | None, expected: float, update: str
) -> None:
    """Beside a method whose steps are scaled, by its scale: W' − (1 − lr λ) W is the step."""
    steps = []
    for settings in ({"mode": "velora"}, {"mode": mode, "modes__velora__step_scale": step_scale}):
        if mode == "lora+velora":
            settings["mode"] = mode
        settings = {key: value for key, value in settings.items() if value is not None}
        run = tiny_run(
            modes__velora__layers=["v_proj", "down_proj"],
            modes__velora__update=update,
            modes__galore__rank=8,
            modes__galore__scale=0.75,
            modes__lora__dropout=0.0,
            optimizer__weight_decay=0.5,
            **settings,
        )
        model_and_rest = built(run)
        start_step(*model_and_rest, 1)
        model, optimizer = model_and_rest[1:]
        layers = [module for module in model.modules() if isinstance(module, VeLoRALinear)]
        before = [layer.weight.clone() for layer in layers]
        take_step(model, optimizer, 1)
        decay = run.lr * 0.5
        steps.append([layer.weight - (1 - decay) * w for layer, w in zip(layers, before, strict=True)])
    assert steps[0]
    for plain, scaled in zip(*steps, strict=True):
        torch.testing.assert_close(scaled, expected * plain, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("mode", ["galore", "galore+velora", "lora+velora"])
def test_the_rate_of_the_blocks_is_set_by_the_first_method(tiny_run: Callable[..., Any], mode: str) -> None:
    optimizer = built(tiny_run(mode=mode, **{f"modes__{mode.partition('+')[0]}__block_lr_ratio": 0.25}))[2]
    rates = {len(group["params"]): group["lr_ratio"] for group in optimizer.param_groups}
    in_blocks = max(rates)
    assert rates.pop(in_blocks) == 0.25
    assert set(rates.values()) == {1.0}
