"""Gradients of a step: norm and clipping against PyTorch's, and stepping inside the backward pass."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from velora_pretrain.config import MODES
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError
from velora_pretrain.gradients import Gradients, first_not_finite
from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.optim.flora import AccumulatingFloraAdafactor
from velora_pretrain.prediction import predict_memory
from velora_pretrain.records import RunFolder
from velora_pretrain.trainer import train

SETTINGS = {"modes__velora__layers": ["q_proj", "down_proj"], "modes__galore__rank": 8, "modes__galore__update_gap": 3}


def losses(run: Any, path: Path) -> list[tuple[float, float]]:
    train(run, RunFolder(path), resume=False, display=Display())
    training = [r for r in RunFolder(path).records() if "loss_nats_per_token" in r]
    final = [r["perplexity"] for r in RunFolder(path).records() if "perplexity" in r]
    return [*((r["loss_nats_per_token"], r["grad_norm"]) for r in training), (final[0], 0.0)]


@pytest.mark.parametrize("mode", MODES)
def test_stepping_in_the_backward_pass_changes_nothing(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """One micro-batch a step: losses, norms and the final perplexity are bitwise those of stepping after it."""
    settings = {"mode": mode, "batch__micro_batch": 8, "optimizer__weight_decay": 0.1, **SETTINGS}
    expected = losses(tiny_run(**settings), tmp_path / "after")
    step = AdamW.step

    def step_of_a_prediction(self: AdamW) -> None:
        """No step is left for afterwards, which numbers alone would not tell; but predicting memory takes one."""
        assert all(isinstance(p, FakeTensor) for group in self.param_groups for p in group["params"])
        step(self)

    monkeypatch.setattr(AdamW, "step", step_of_a_prediction)
    assert losses(tiny_run(optimizer__update="in_backward", **settings), tmp_path / "inside") == expected


@pytest.mark.parametrize("mode", ["full", "flora"])
def test_with_accumulation_parameters_move_on_the_last_micro_batch_only(
    tiny_run: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    settings = {"mode": mode, "batch__micro_batch": 2, **SETTINGS}
    expected = losses(tiny_run(**settings), tmp_path / "after")
    assert losses(tiny_run(optimizer__update="in_backward", **settings), tmp_path / "inside") == expected


def test_gradients_are_freed_one_by_one(tiny_run: Callable[..., Any]) -> None:
    settings = {"model__hidden_size": 128, "model__num_hidden_layers": 6, "model__intermediate_size": 256}
    after, inside = (
        predict_memory(tiny_run(optimizer__update=update, **settings), 1, accumulates=False)
        for update in ("step", "in_backward")
    )
    assert inside.peak_bytes < after.peak_bytes
    assert inside.optimizer_state_bytes == after.optimizer_state_bytes
    assert inside.gradients_bytes < 0.4 * after.weights_bytes


def test_compressed_sums_take_the_place_of_gradients(tiny_run: Callable[..., Any]) -> None:
    settings = {"mode": "flora", "modes__flora__rank": 2, "model__vocab_size": 128}
    compressed, dense = (
        predict_memory(tiny_run(modes__flora__accumulation=kind, **settings), 1, accumulates=True)
        for kind in ("compressed", "dense")
    )
    assert compressed.peak_bytes < dense.peak_bytes


def test_in_backward_is_refused_with_clipping(tiny_run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"optimizer.update: in_backward .* optimizer.clip_norm = 0"):
        tiny_run(optimizer__update="in_backward", optimizer__clip_norm=1.0)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_norm_and_clipping_are_pytorchs(max_norm: float) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    theirs = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or torch.inf)
    assert Gradients(ours, AdamW(ours.parameters())).clip(max_norm) == pytest.approx(norm.item(), rel=1e-6)
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_does_not_hide_where_it_came_from(bad: float) -> None:
    """Clipping by it would make every gradient NaN."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(first, second)
    gradients = Gradients(model, AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    second.weight.grad = torch.full_like(second.weight, bad)
    assert not math.isfinite(gradients.clip(1.0))
    assert first_not_finite(model) == "the gradient of 1.weight"


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_norm_of_narrow_gradients_is_summed_wide(in_backward: bool) -> None:
    """In bf16 it would be right to 2**-8 alone, which a norm near a threshold of clipping shows."""
    torch.manual_seed(0)
    model = nn.Linear(33, 65, bias=False).bfloat16()
    gradients = Gradients(model, AdamW(model.parameters()), in_backward=in_backward)
    x, dy = torch.randn(7, 33).bfloat16(), torch.randn(7, 65).bfloat16()
    with gradients.of_micro_batch(1, 1):
        model(x).backward(dy)
    exact = (dy.t() @ x).double().norm().item()
    assert gradients.clip(0.0) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("in_backward", [False, True])
def test_only_gradients_of_several_micro_batches_are_summed_compressed(in_backward: bool) -> None:
    """One micro-batch has nothing to add to: compressing its gradient would lose what Adafactor can use."""
    torch.manual_seed(0)
    taken: list[bool] = []

    class Watched(AccumulatingFloraAdafactor):
        def step_(self, parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            taken.append("accumulated" in state)
            super().step_(parameter, state, group)

    model = nn.Linear(9, 12, bias=False)
    optimizer = AdamW(model.parameters(), rules={model.weight: Watched(rank=3, kappa=5, seed=0)})
    gradients = Gradients(model, optimizer, in_backward=in_backward)
    for count in (1, 2):
        for number in range(1, count + 1):
            with gradients.of_micro_batch(number, count):
                model(torch.randn(4, 9)).square().sum().backward()
            assert in_backward or (model.weight.grad is None) == (count == 2)
        gradients.step()
    assert taken == [False, True]


def test_a_sum_in_a_subspace_is_clipped_as_a_gradient_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12, bias=False), nn.Linear(12, 5))
    rules = {model[0].weight: AccumulatingFloraAdafactor(rank=3, kappa=5, seed=0)}
    optimizer = AdamW(model.parameters(), rules=rules)
    gradients = Gradients(model, optimizer)
    for number in (1, 2):
        with gradients.of_micro_batch(number, 2):
            model(torch.randn(4, 9)).square().sum().backward()
    compressed = optimizer.state[model[0].weight]["accumulated"]
    parts = [compressed, model[1].weight.grad, model[1].bias.grad]
    before = [part.clone() for part in parts if part is not None]
    norm = torch.cat([part.flatten() for part in before]).norm()
    assert gradients.clip(0.5) == pytest.approx(norm.item(), rel=1e-6)
    for part, old in zip(parts, before, strict=True):
        torch.testing.assert_close(part, old * 0.5 / norm)


def test_a_loss_that_is_not_finite_moves_nothing_in_backward(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[Any] = []
    original = AdamW.step_parameter

    def count(self: AdamW, parameter: torch.Tensor) -> None:
        stepped.append(parameter)
        original(self, parameter)

    monkeypatch.setattr(AdamW, "step_parameter", count)
    from velora_pretrain.nn import llama

    forward = llama.Llama.forward
    monkeypatch.setattr(llama.Llama, "forward", lambda self, tokens, labels: forward(self, tokens, labels) * torch.inf)
    with pytest.raises(UserError, match="step 1: the loss is inf"):
        losses(tiny_run(optimizer__update="in_backward"), tmp_path)
    assert stepped == []
