"""Recomputation: the same bits, fewer of them kept, and nothing seen twice."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from velora_pretrain.config import MODES
from velora_pretrain.memory import MemoryTracker
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.direction import directions_of
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.recompute import Recompute, rebuilt_in_backward, run_again_in_backward

WAYS = [way for way in get_args(Recompute) if way != "none"]
SETTINGS: dict[str, Any] = {"modes__velora__layers": ["v_proj", "down_proj", "q_proj"], "modes__lora__dropout": 0.3}


def gradients(run: Any, precision: str = "fp32") -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of two micro-batches."""
    mode, model = build_mode(run), Llama(run.llama, seed=0, recompute=run.memory.recompute)
    mode.adapt(model)
    torch.manual_seed(3)
    tokens = torch.randint(0, 120, (4, 32))
    mode.before_step(model, mode.build_optimizer(model), 1, torch.no_grad()(lambda: model(tokens, tokens)))
    for part in tokens.split(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model(part, part)
        loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["full", "lora", "velora", "lora+velora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_gradients_are_bitwise_those_without(tiny_run: Callable[..., Any], way: str, mode: str, precision: str) -> None:
    """Dropout draws the same masks again, too."""
    loss, expected = gradients(tiny_run(mode=mode, **SETTINGS), precision)
    again, recomputed = gradients(tiny_run(mode=mode, memory__recompute=way, **SETTINGS), precision)
    assert again == loss
    assert expected.keys() == recomputed.keys()
    assert all(torch.equal(expected[name], recomputed[name]) for name in expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_running_average_sees_each_input_once(tiny_run: Callable[..., Any], way: str) -> None:
    settings = {"mode": "velora", "modes__velora__layers": "all", "modes__velora__init": "running_average"}
    vectors = []
    for recompute in ("none", way):
        run = tiny_run(memory__recompute=recompute, **settings)
        mode, model = build_mode(run), Llama(run.llama, seed=0, recompute=run.memory.recompute)
        mode.adapt(model)
        optimizer = mode.build_optimizer(model)
        tokens = torch.arange(64).view(2, 32)
        mode.before_step(model, optimizer, 1, torch.no_grad()(lambda m=model, t=tokens: m(t, t)))
        model(tokens.flip(1), tokens).backward()
        assert all(d.statistics.abs().sum() > 0 for d in directions_of(model))
        # The sums, too: what is seen twice by all has the same direction.
        sums = [direction.statistics.clone() for direction in directions_of(model)]
        mode.after_step(model, optimizer, 1)
        vectors.append([*sums, *(direction.vector.clone() for direction in directions_of(model))])
    assert all(torch.equal(a, b) for a, b in zip(*vectors, strict=True))


def saved(run: Any) -> int:
    """Bytes that the graph keeps between forward and backward, of 4 sequences of 32 tokens."""
    mode, model = build_mode(run), Llama(run.llama, seed=0, recompute=run.memory.recompute)
    mode.adapt(model)
    optimizer = mode.build_optimizer(model)
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    mode.before_step(model, optimizer, 1, torch.no_grad()(lambda: model(tokens, tokens)))
    with MemoryTracker(model, optimizer) as tracker:
        loss = model(tokens, tokens)
        tracker.forget_peak()
        assert loss.requires_grad
        return tracker.use.saved_activations_bytes


@pytest.mark.parametrize("mode", MODES)
def test_each_way_keeps_no_more_than_the_one_before(tiny_run: Callable[..., Any], mode: str) -> None:
    kept = [saved(tiny_run(mode=mode, memory__recompute=way)) for way in get_args(Recompute)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 0.7 * kept[0]


def test_elementwise_keeps_what_a_plain_block_needs_by_hand(tiny_run: Callable[..., Any]) -> None:
    """Two norm outputs (D each) and the product (I) less for every token of every layer; `mlp`: gate and up, too."""
    run = tiny_run(model__num_key_value_heads=4)
    config, tokens = run.llama, 4 * 32
    per_layer = 4 * tokens * (2 * config.hidden_size + config.intermediate_size)
    elementwise = saved(run) - saved(tiny_run(model__num_key_value_heads=4, memory__recompute="elementwise"))
    assert elementwise == config.num_hidden_layers * per_layer
    mlp = saved(run) - saved(tiny_run(model__num_key_value_heads=4, memory__recompute="mlp"))
    inverse_root = 4 * tokens
    assert mlp == config.num_hidden_layers * (per_layer + 4 * tokens * 2 * config.intermediate_size + inverse_root)


def test_a_rebuilt_tensor_is_made_once_and_dropped() -> None:
    x, calls = torch.randn(3, 4, requires_grad=True), []
    weights = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
    y = x.exp()
    kept = x.detach()

    def make() -> torch.Tensor:
        calls.append(1)
        return kept.exp()

    with rebuilt_in_backward(y, make):
        total = sum((y @ w.t()).sum() for w in weights)
    assert isinstance(total, torch.Tensor)
    total.backward(retain_graph=True)
    assert len(calls) == 1
    total.backward()
    assert len(calls) == 2
    for weight in weights:
        torch.testing.assert_close(weight.grad, 2 * kept.exp().sum(0).expand(5, 4))


def test_views_of_a_rebuilt_tensor_come_back_as_they_were() -> None:
    """Parts, transposes and parts of transposes, each with its own offset and strides."""
    x, kept = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((4, 3), (6, 2), (3, 5))]

    def total(y: torch.Tensor) -> torch.Tensor:
        parts = (y[2:] @ weights[0], y.t() @ weights[1], y.t()[1:, 3:] @ weights[2])
        return torch.stack([part.square().sum() for part in parts]).sum()

    expected = torch.autograd.grad(total(x * kept), [x, *weights])
    y, plain = x * kept, x.detach()
    with rebuilt_in_backward(y, lambda: plain * kept):
        result = total(y)
    y.detach().fill_(torch.nan)  # what is kept is not y
    for ours, theirs in zip(torch.autograd.grad(result, [x, *weights]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_graph_with_rebuilt_tensors_that_is_dropped_is_gone_at_once() -> None:
    """Also where an operation keeps its own output, which would keep itself alive."""

    class Sentinel:
        pass

    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    y, plain = x.sin(), x.detach()
    gc.disable()
    try:
        with rebuilt_in_backward(y, lambda: plain.sin()):
            result = (y @ weight).exp()
        sentinel = Sentinel()
        result.grad_fn.metadata["sentinel"] = sentinel
        alive = weakref.ref(sentinel)
        del sentinel
        assert alive() is not None
        del result
        assert alive() is None
    finally:
        gc.enable()


def test_without_gradients_nothing_is_run_again() -> None:
    calls = []

    def region(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    with torch.no_grad():
        run_again_in_backward(region, torch.ones(2))
    assert calls == [1]
    run_again_in_backward(region, torch.ones(2, requires_grad=True)).sum().backward()
    assert len(calls) == 3 or len(calls) == 2  # a product with a number keeps nothing to run again for
