"""AdamW: against PyTorch's dense AdamW, bitwise determinism, convergence, and the algebra of factored weights."""

import copy
import itertools

import pytest
import torch
from torch import nn

from velora_pretrain.nn.direction import Direction
from velora_pretrain.nn.velora import VeLoRALinear, compressed_weights, expand
from velora_pretrain.optim import adamw
from velora_pretrain.optim.adamw import AdamW, UpdateRule

M, D, G = 6, 20, 5
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def make_layer(seed: int = 0) -> VeLoRALinear:
    torch.manual_seed(seed)
    direction = Direction(D, G, dtype=torch.float64)
    direction.vector.copy_(nn.functional.normalize(torch.randn(D // G, dtype=torch.float64), dim=0))
    direction.is_ready = True
    return VeLoRALinear(nn.Linear(D, M, bias=True, dtype=torch.float64), direction)


def optimizer_of(layer: VeLoRALinear, update: UpdateRule = "dense", **changes: object) -> AdamW:
    trainable = [p for p in layer.parameters() if p.requires_grad]
    return AdamW(trainable, factored=compressed_weights(layer), update=update, **(OPTIONS | changes))


def micro_batches(steps: int, accumulation: int = 3) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [[(draw(7, D), draw(7, M)) for _ in range(accumulation)] for _ in range(steps)]


class DenseReference:
    """The layer trained densely: the dense VeLoRA gradient dyᵀ x̂, given to torch.optim.AdamW."""

    def __init__(self, layer: VeLoRALinear) -> None:
        self.v = layer.direction.vector.clone()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.optimizer = torch.optim.AdamW([self.weight, self.bias], **OPTIONS)

    def step(self, batch: list[tuple[torch.Tensor, torch.Tensor]], clip_norm: float) -> None:
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        for x, dy in batch:
            projector = torch.block_diag(*[torch.outer(self.v, self.v)] * G)
            self.weight.grad += dy.t() @ (x @ projector)
            self.bias.grad += dy.sum(0)
        nn.utils.clip_grad_norm_([self.weight, self.bias], clip_norm)
        self.optimizer.step()

    def turn(self, v: torch.Tensor) -> None:
        """The new direction; the moments of C stay, so the dense moments are rebuilt along the new v."""
        state = self.optimizer.state[self.weight]
        old = self.v
        m = state["exp_avg"].unflatten(1, (G, -1)) @ old
        u = state["exp_avg_sq"].unflatten(1, (G, -1)).sum(-1)  # u_j = u v_j², and Σ v_j² = 1
        state["exp_avg"].copy_(expand(m, v))
        state["exp_avg_sq"].copy_(expand(u, v.square()))
        self.v = v.clone()


def our_step(
    layer: VeLoRALinear, optimizer: AdamW, batch: list[tuple[torch.Tensor, torch.Tensor]], clip: float
) -> None:
    optimizer.zero_grad()
    for x, dy in batch:
        layer(x).backward(dy)
    nn.utils.clip_grad_norm_([p for p in layer.parameters() if p.requires_grad], clip)
    optimizer.step()


@pytest.mark.parametrize("refresh_every", [0, 7])
def test_dense_rule_is_dense_adamw(refresh_every: int) -> None:
    """20 steps with weight decay, clipping and accumulation, in float64."""
    layer = make_layer()
    reference, optimizer = DenseReference(layer), optimizer_of(layer)
    generator = torch.Generator().manual_seed(9)
    for step, batch in enumerate(micro_batches(20)):
        if refresh_every and step and step % refresh_every == 0:
            v = nn.functional.normalize(torch.randn(D // G, generator=generator, dtype=torch.float64), dim=0)
            layer.direction.vector.copy_(v)
            reference.turn(v)
        our_step(layer, optimizer, batch, clip=5.0)
        reference.step(batch, clip_norm=5.0)
        torch.testing.assert_close(layer.weight, reference.weight, rtol=1e-12, atol=1e-13, check_dtype=False)
        torch.testing.assert_close(layer.bias, reference.bias, rtol=1e-12, atol=1e-13)


def test_projected_rule_is_adamw_on_the_coefficients() -> None:
    layer = make_layer()
    v, start = layer.direction.vector, layer.weight.detach().clone()
    optimizer = optimizer_of(layer, "projected", weight_decay=0.0)
    p = nn.Parameter(torch.zeros(M, G, dtype=torch.float64))
    reference = torch.optim.AdamW([p], **(OPTIONS | {"weight_decay": 0.0}))
    for batch in micro_batches(20):
        our_step(layer, optimizer, batch, clip=1e9)
        p.grad = sum(dy.t() @ (x.unflatten(1, (G, -1)) @ v) for x, dy in batch)
        reference.step()
        expected = start + (D // G) ** 0.5 * expand(p.detach(), v)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=1e-13)


def test_an_element_where_v_is_zero_stays() -> None:
    layer = make_layer()
    layer.direction.vector.copy_(torch.tensor([0.6, 0.0, -0.8, 0.0]))
    start = layer.weight.detach().clone()
    optimizer = optimizer_of(layer, weight_decay=0.0)
    our_step(layer, optimizer, micro_batches(1)[0], clip=1e9)
    moved = (layer.weight != start).unflatten(1, (G, -1)).all(0).all(0)
    assert moved.tolist() == [True, False, True, False]
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("update", ["dense", "projected"])
def test_moments_are_as_small_as_the_gradient(update: UpdateRule) -> None:
    layer = make_layer()
    optimizer = optimizer_of(layer, update)
    our_step(layer, optimizer, micro_batches(1)[0], clip=1.0)
    state = optimizer.state[layer.coefficients]
    assert {tuple(value.shape) for value in state.values() if isinstance(value, torch.Tensor)} == {(M, G)}


def test_updating_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (2**20, 2 * D):
        monkeypatch.setattr("velora_pretrain.optim.adamw.UPDATE_ELEMENTS", elements)
        for update in ("dense", "projected"):
            layer = make_layer()
            optimizer = optimizer_of(layer, update)
            for batch in micro_batches(3):
                our_step(layer, optimizer, batch, clip=1.0)
            results.append(layer.weight.detach().clone())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_parameters_take_pytorchs_steps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(9, 4, dtype=dtype))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer, reference = AdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS, fused=True)
    for _ in range(20):
        ours.grad = theirs.grad = torch.randn(9, 4, dtype=dtype)
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_bf16_weights_have_fp32_moments_and_step_no_worse_than_pytorchs() -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 8, dtype=torch.float64).bfloat16()
    exact, ours, theirs = (nn.Parameter(start.clone().to(d)) for d in (torch.float64, torch.bfloat16, torch.bfloat16))
    optimizers = [
        torch.optim.AdamW([exact], lr=0.05),
        AdamW([ours], lr=0.05, weight_decay=0.01),
        torch.optim.AdamW([theirs], lr=0.05),
    ]
    for _ in range(10):
        gradient = torch.randn(64, 8).bfloat16()
        for parameter, optimizer in zip((exact, ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    assert optimizers[1].state[ours]["exp_avg"].dtype == torch.float32
    assert (ours.double() - exact).norm() <= (theirs.double() - exact).norm()


@pytest.mark.parametrize(
    ("update", "dtype"), list(itertools.product(["dense", "projected"], [torch.float32, torch.bfloat16]))
)
def test_same_steps_bitwise(update: UpdateRule, dtype: torch.dtype) -> None:
    def train() -> torch.Tensor:
        layer = make_layer().to(dtype)
        optimizer = optimizer_of(layer, update)
        for batch in micro_batches(5):
            our_step(layer, optimizer, [(x.to(dtype), dy.to(dtype)) for x, dy in batch], clip=1.0)
        return layer.weight.detach()

    assert torch.equal(train(), train())


@pytest.mark.parametrize("update", ["dense", "projected"])
def test_it_converges_where_the_inputs_lie_along_v(update: UpdateRule) -> None:
    layer = make_layer()
    optimizer = optimizer_of(layer, update, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    x = expand(torch.randn(64, G, generator=generator, dtype=torch.float64), layer.direction.vector)
    target = x @ torch.randn(D, M, generator=generator, dtype=torch.float64)
    first = last = 0.0
    for step in range(400):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    assert last < 1e-3 * first


@pytest.mark.parametrize("update", ["dense", "projected"])
def test_decay_of_bf16_weights_is_not_lost(update: UpdateRule) -> None:
    """lr · decay is below bf16's resolution near 1: applied to the rounded weight alone it would change nothing."""
    layer = make_layer().to(torch.bfloat16)
    optimizer = optimizer_of(layer, update, lr=1e-3, weight_decay=1.0)
    start = layer.weight.float().norm().item()
    for _ in range(300):
        layer.coefficients.grad = torch.randn(M, G) * 1e-3
        optimizer.step()
    assert layer.weight.float().norm().item() < 0.995 * start


def test_loading_a_state_rounds_nothing() -> None:
    weight = nn.Parameter(torch.randn(4, 4).bfloat16())
    optimizer = AdamW([weight])
    weight.grad = torch.randn(4, 4).bfloat16()
    optimizer.step()
    resumed = AdamW([weight])
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert resumed.state[weight]["exp_avg"].dtype == torch.float32


def test_state_dict_round_trip_goes_on_bitwise() -> None:
    batches = micro_batches(6)
    layer = make_layer()
    optimizer = optimizer_of(layer)
    for batch in batches[:3]:
        our_step(layer, optimizer, batch, clip=1.0)
    again = make_layer()
    again.load_state_dict(layer.state_dict())
    again.direction.is_ready = True
    resumed = optimizer_of(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in batches[3:]:
        our_step(layer, optimizer, batch, clip=1.0)
        our_step(again, resumed, batch, clip=1.0)
    assert torch.equal(layer.weight, again.weight)


@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_narrow_parameter_steps_some_rows_at_a_time(state_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in one piece and in several, and never a wide copy of the whole."""
    results = []
    for elements in (2**22, 2**11):
        monkeypatch.setattr(adamw, "WIDE_ELEMENTS", elements)
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in ((70, 64), (5,), ())]
        optimizer = AdamW(weights, lr=0.01, weight_decay=0.1, state_bits=state_bits)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
            with _LargestTensor() as made:
                optimizer.step()
        results.append((weights, optimizer))
    # In 8 bits the moments are widened whole.
    assert (made.largest < 70 * 64) == (state_bits == 32)
    (ours, first), (theirs, second) = results
    for weight, other in zip(ours, theirs, strict=True):
        assert torch.equal(weight, other)
        assert first.state[weight].keys() == second.state[other].keys()
        assert all(torch.equal(value, second.state[other][key]) for key, value in first.state[weight].items())
        assert first.state[weight]["step"] == 3


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest wide tensor that any operation makes, and not in place."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and "split" not in str(func):
            given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if result.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, result.numel())
        return result
