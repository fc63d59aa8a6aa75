"""Modes: same start, proven parameter groups, placement, and when directions are taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from velora_pretrain.config import MODES as MODE_NAMES
from velora_pretrain.config import ModesTable
from velora_pretrain.modes import METHODS, build_mode, parameter_groups
from velora_pretrain.nn.direction import directions_of
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.velora import VeLoRALinear
from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.recipe import resolve

no_optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))])
"""What a step looks at the optimizer for is tested elsewhere."""


def built(run: Any) -> tuple[Any, Llama]:
    mode, model = build_mode(run), Llama(run.llama, seed=run.seed)
    mode.adapt(model)
    return mode, model


def test_every_mode_of_the_configuration_is_there() -> None:
    assert {part for mode in MODE_NAMES for part in mode.split("+")} == set(METHODS) == set(ModesTable.model_fields)


@pytest.mark.parametrize("layers", ["all", ["v_proj", "down_proj"]])
def test_all_modes_start_from_identical_logits(tiny_run: Callable[..., Any], layers: Any) -> None:
    tokens = torch.arange(40).view(2, 20)
    logits = [
        built(tiny_run(mode=mode, modes__velora__layers=layers))[1].logits(tokens).detach() for mode in MODE_NAMES
    ]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_each_trainable_parameter_is_in_exactly_one_group(tiny_run: Callable[..., Any], mode: str) -> None:
    run = tiny_run(mode=mode, optimizer__weight_decay=0.1, modes__velora__layers="all")
    _, model = built(run)
    groups = parameter_groups(model, run)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.requires_grad and p.ndim == 2}


def placement(run: Any) -> dict[str, int]:
    """Number of groups by projection of the first block."""
    with torch.device("meta"):
        model = Llama(run.llama)
    build_mode(run).adapt(model)
    prefix = "model.layers.0."
    return {
        name.removeprefix(prefix).partition(".")[2]: layer.direction.num_groups
        for name, layer in model.named_modules()
        if isinstance(layer, VeLoRALinear) and name.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        ("60m", {"v_proj": 64, "down_proj": 86}),
        ("130m", {"v_proj": 64, "down_proj": 64}),
        ("350m", {"v_proj": 64, "down_proj": 171}),
        ("1b", {"v_proj": 128, "down_proj": 127}),
    ],
)
def test_default_placement_is_the_papers(size: str, groups: dict[str, int]) -> None:
    assert placement(resolve(None, {"size": size, "mode": "velora"}, [])) == groups


def test_all_seven_projections_and_their_own_groups() -> None:
    run = resolve(
        None, {"size": "60m", "mode": "velora"}, ["modes.velora.layers=all", "modes.velora.num_groups.o_proj=8"]
    )
    assert placement(run) == {
        "q_proj": 64,
        "k_proj": 64,
        "v_proj": 64,
        "o_proj": 8,
        "gate_proj": 64,
        "up_proj": 64,
        "down_proj": 86,
    }


@pytest.mark.parametrize("size", ["9m", "20m", "35m", "71m", "100m", "250m", "3b", "7b", "13b"])
def test_the_rule_fits_every_size(size: str) -> None:
    run = resolve(None, {"size": size, "mode": "velora"}, ["modes.velora.layers=all"])
    dimensions = run.llama
    for projection, groups in placement(run).items():
        width = (dimensions.intermediate_size if projection == "down_proj" else dimensions.hidden_size) // groups
        assert 8 <= width <= 43, projection


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (["v_proj", "down_proj"], {"v_proj": "q_proj and k_proj"}),
        (["q_proj", "k_proj", "v_proj", "up_proj"], {"up_proj": "gate_proj"}),
        (["o_proj"], {"o_proj": "the attention"}),
        (["down_proj"], {}),
    ],
)
def test_a_layer_that_saves_nothing_is_said_to(
    tiny_run: Callable[..., Any], layers: list[str], named: dict[str, str]
) -> None:
    """The closed form in test_memory.py counts what these notes say."""
    notes = build_mode(tiny_run(mode="velora", modes__velora__layers=layers)).memory_notes()
    assert notes == [f"{name} saves no activation: its input is kept for {keeper}" for name, keeper in named.items()]


def test_the_first_direction_is_of_the_whole_first_batch_and_stays(tiny_run: Callable[..., Any]) -> None:
    mode, model = built(tiny_run(mode="velora"))
    first, second = torch.randint(0, 120, (4, 8)), torch.randint(0, 120, (4, 8))

    def forward_in_parts(tokens: torch.Tensor) -> Callable[[], None]:
        def run_forward() -> None:
            with torch.no_grad():
                for part in tokens.split(1):
                    model(part, part)

        return run_forward

    mode.before_step(model, no_optimizer, 1, forward_in_parts(first))
    v = [direction.vector.clone() for direction in directions_of(model)]
    assert all(abs(vector.norm() - 1) < 1e-6 for vector in v)
    whole_mode, whole_model = built(tiny_run(mode="velora"))
    whole_mode.before_step(whole_model, no_optimizer, 1, lambda: whole_model(first, first))
    for vector, direction in zip(v, directions_of(whole_model), strict=True):
        torch.testing.assert_close(vector, direction.vector)
    mode.before_step(model, no_optimizer, 2, forward_in_parts(second))
    assert all(torch.equal(a, b.vector) for a, b in zip(v, directions_of(model), strict=True))


def test_refresh_takes_new_directions_every_so_many_steps(tiny_run: Callable[..., Any]) -> None:
    mode, model = built(tiny_run(mode="velora", modes__velora__refresh_every=3))
    calls = []
    for step in range(1, 9):
        tokens = torch.randint(0, 120, (4, 8))

        def run_forward(step: int = step, tokens: torch.Tensor = tokens) -> None:
            calls.append(step)
            with torch.no_grad():
                model(tokens, tokens)

        mode.before_step(model, no_optimizer, step, run_forward)
    assert calls == [1, 4, 7]


def test_an_evaluation_moves_no_direction(tiny_run: Callable[..., Any]) -> None:
    for init in ("batch_average_once", "running_average"):
        mode, model = built(tiny_run(mode="velora", modes__velora__init=init))
        tokens = torch.randint(0, 120, (4, 8))
        with torch.no_grad():
            model(tokens, tokens)
        assert not any(direction.is_ready for direction in directions_of(model))
        mode.before_step(model, no_optimizer, 1, lambda tokens=tokens, model=model: model(tokens, tokens))
        v = directions_of(model)[0].vector.clone()
        with torch.no_grad():
            model(tokens.flip(0), tokens)
        mode.after_step(model, no_optimizer, 1)
        torch.testing.assert_close(directions_of(model)[0].vector, v)
