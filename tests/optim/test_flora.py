"""FLoRA's rules: against flora-opt, PyTorch and Transformers, bitwise, on a small problem, and their algebra."""

import copy
import math
import weakref
from types import SimpleNamespace
from typing import Any

import flora_opt.optimizers.torch.flora as reference
import pytest
import torch
from flora_opt.optimizers.torch.flora import Flora, FloraAccelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.optimization import Adafactor as TransformersAdafactor

from velora_pretrain.optim import flora
from velora_pretrain.optim.adamw import AccumulatingRule, AdamW, Rule
from velora_pretrain.optim.flora import (
    AccumulatingFloraAdafactor,
    AccumulatingFloraAdamW,
    Adafactor,
    FloraAdafactor,
    FloraAdamW,
    Subspace,
    flora_rules,
    random_projection,
)
from velora_pretrain.optim.seeds import mixed_seed

RANK, KAPPA = 3, 5
SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (9, 9)}
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
COMPRESSED = [FloraAdafactor, AccumulatingFloraAdafactor, FloraAdamW, AccumulatingFloraAdamW]
ACCUMULATING = [AccumulatingFloraAdafactor, AccumulatingFloraAdamW]


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> list[Tensor]:
    """A direction that stays, noise, and a size that changes from step to step."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mean = draw()
    return [((mean + draw()) * 10.0 ** (step % 3 - 2)).to(dtype) for step in range(steps)]


def parameter_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype))


def optimizer_of(parameter: nn.Parameter, rule: Rule, **changes: Any) -> AdamW:
    return AdamW([parameter], rules={parameter: rule}, **(OPTIONS | changes))


def rule_of(kind: type[Any], **changes: int) -> Any:
    return kind(**({"rank": RANK, "kappa": KAPPA, "seed": 7} | changes))


def take_steps(optimizer: AdamW, parameter: nn.Parameter, steps: list[Tensor]) -> nn.Parameter:
    for gradient in steps:
        parameter.grad = gradient
        optimizer.step()
    return parameter


def drawn(seed: int, purpose: str, number: int, shape: tuple[int, ...], rank: int = RANK) -> Tensor:
    """A as the rule with this seed should have it, in float64."""
    seed = mixed_seed(seed, purpose, number)
    return random_projection(seed, min(shape), rank, device=torch.device("cpu"), dtype=torch.float64)


def use_our_projections(monkeypatch: pytest.MonkeyPatch, purpose: str = "moments") -> None:
    """flora-opt's seeds become 1000 · (our rule's seed) + (our number of the draw)."""

    def stable_randn(shape: tuple[int, int], seed: int, device: Any = None, dtype: Any = None) -> Tensor:
        is_left = shape[0] == RANK
        matrix = drawn(seed // 1000, purpose, seed % 1000, shape[1:] if is_left else shape[:1]) * math.sqrt(RANK)
        return matrix.t() if is_left else matrix

    monkeypatch.setattr(reference, "stable_randn", stable_randn)
    monkeypatch.setattr(reference, "next_seed", lambda seed: seed + 1)
    monkeypatch.setattr(reference, "split_seed", lambda seed: (seed, seed))


def reference_of(parameter: nn.Parameter, *, rank: int | None, kappa: int = KAPPA, beta1: float = 0.9) -> Flora:
    return Flora(
        [parameter],
        lr=OPTIONS["lr"],
        rank=rank,  # pyright: ignore[reportArgumentType]
        kappa=kappa,
        beta1=beta1,
        weight_decay=OPTIONS["weight_decay"],
        scale_parameter=False,
    )


@pytest.mark.parametrize("kappa", [1, 5, 100])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adafactor_in_a_subspace_is_flora_opts(
    shape: tuple[int, int], kappa: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 steps in float64: the weight and the momentum, from the same projections."""
    use_our_projections(monkeypatch)
    ours, theirs = parameter_of(shape), parameter_of(shape)
    optimizer, oracle = (
        optimizer_of(ours, rule_of(FloraAdafactor, kappa=kappa)),
        reference_of(theirs, rank=RANK, kappa=kappa),
    )
    oracle.state[theirs]["seed"] = 7000
    for gradient in gradients(shape, 24):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        for key in ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"):
            torch.testing.assert_close(optimizer.state[ours][key], oracle.state[theirs][key], rtol=1e-10, atol=1e-12)
    assert oracle.state[theirs]["seed"] == 7000 + 24 // kappa


@pytest.mark.parametrize("together", [2**20, 20, 1], ids=lambda elements: f"{elements} elements together")
@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (10,), (4, 3, 2)])
def test_plain_adafactor_is_flora_opts(
    shape: tuple[int, ...], beta1: float, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("velora_pretrain.optim.flora.UPDATE_ELEMENTS", together)
    ours, theirs = parameter_of(shape), parameter_of(shape)
    optimizer, oracle = (
        optimizer_of(ours, Adafactor(), betas=(beta1, 0.5)),
        reference_of(theirs, rank=None, beta1=beta1),
    )
    for gradient in gradients(shape, 24):
        gradient[1] = 0.0  # as the embedding of a token that is not in the batch
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert ("exp_avg" in optimizer.state[ours]) == bool(beta1)


@pytest.mark.parametrize("shape", [(12, 7), (10,)])
def test_adafactor_without_momentum_is_transformers(shape: tuple[int, ...]) -> None:
    ours, theirs = parameter_of(shape), parameter_of(shape)
    optimizer = optimizer_of(ours, Adafactor(), betas=(0.0, 0.5))
    oracle = TransformersAdafactor(
        [theirs], lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"], scale_parameter=False, relative_step=False
    )
    for gradient in gradients(shape, 20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_of_adafactor_are_flora_opts(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps of 3 micro-batches, each step's sum in a new subspace, then its dense estimate to a plain Adafactor."""
    use_our_projections(monkeypatch, "sum")
    ours, theirs = parameter_of(shape), parameter_of(shape)
    # The momentum's subspace has been compared above: here it is left out of both.
    optimizer = optimizer_of(ours, rule_of(AccumulatingFloraAdafactor), betas=(0.0, 0.5))
    oracle = reference_of(theirs, rank=None, beta1=0.0)
    accelerator: Any = SimpleNamespace(proj_rank=RANK)
    batches = gradients(shape, 60)
    for step in range(1, 21):
        packed: Any = 0.0
        for gradient in batches[3 * step - 3 : 3 * step]:
            ours.grad = gradient.clone()
            optimizer.accumulate(ours)
            packed = packed + FloraAccelerator._down_project(accelerator, 7000 + step, gradient)
        torch.testing.assert_close(optimizer.state[ours]["accumulated"], packed, rtol=1e-12, atol=1e-13)
        theirs.grad = FloraAccelerator._up_project(accelerator, 7000 + step, theirs, packed)
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        assert "accumulated" not in optimizer.state[ours]


@pytest.mark.parametrize("kappa", [1, 5, 100])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adamw_in_a_subspace_is_its_equations(shape: tuple[int, int], kappa: int) -> None:
    """By hand in float64: moments of G A, a dense step, m Aᵀ A' every κ steps, u as it was."""
    parameter, weight = parameter_of(shape), parameter_of(shape).detach()
    scale, (beta1, beta2), lr = 0.5, OPTIONS["betas"], OPTIONS["lr"]
    optimizer = optimizer_of(parameter, FloraAdamW(rank=RANK, kappa=kappa, seed=7, scale=scale))
    flip = (lambda matrix: matrix.t()) if shape[0] < shape[1] else (lambda matrix: matrix)
    m = u = torch.zeros(max(shape), RANK, dtype=torch.float64)
    for step, gradient in enumerate(gradients(shape, 24), start=1):
        a = drawn(7, "moments", (step - 1) // kappa, shape)
        if step > 1 and (step - 1) % kappa == 0:
            m = m @ drawn(7, "moments", (step - 2) // kappa, shape).t() @ a
        c = flip(gradient) @ a
        m, u = beta1 * m + (1 - beta1) * c, beta2 * u + (1 - beta2) * c**2
        n = (m / (1 - beta1**step)) / ((u / (1 - beta2**step)).sqrt() + OPTIONS["eps"])
        weight = weight - lr * OPTIONS["weight_decay"] * weight - lr * scale * flip(n @ a.t())
        take_steps(optimizer, parameter, [gradient])
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-11, atol=1e-12)


def use_identity_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(seed: int, width: int, rank: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.eye(width, rank, device=device, dtype=dtype)

    monkeypatch.setattr(flora, "random_projection", identity)


@pytest.mark.parametrize("kind", [FloraAdamW, AccumulatingFloraAdamW])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adamw_in_the_whole_space_is_pytorchs(
    shape: tuple[int, int], kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_identity_projections(monkeypatch)
    ours, theirs = parameter_of(shape), parameter_of(shape)
    optimizer, oracle = optimizer_of(ours, rule_of(kind, rank=min(shape))), torch.optim.AdamW([theirs], **OPTIONS)
    for gradient in gradients(shape, 20):
        take_steps(optimizer, ours, [gradient])
        theirs.grad = gradient
        oracle.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("is_accumulated", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adafactor_in_the_whole_space_is_plain_adafactor(
    shape: tuple[int, int], is_accumulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_identity_projections(monkeypatch)
    ours, theirs = parameter_of(shape), parameter_of(shape)
    rule = rule_of(AccumulatingFloraAdafactor, rank=min(shape))
    optimizer, plain = optimizer_of(ours, rule), optimizer_of(theirs, Adafactor())
    for gradient in gradients(shape, 20):
        ours.grad = theirs.grad = gradient
        if is_accumulated:
            optimizer.accumulate(ours)
        optimizer.step()
        plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("kind", COMPRESSED)
def test_the_state_has_the_size_that_the_docstring_says(kind: type[Any], shape: tuple[int, int]) -> None:
    parameter = parameter_of(shape, torch.float32)
    rule = rule_of(kind)
    optimizer = optimizer_of(parameter, rule)
    take_steps(optimizer, parameter, gradients(shape, KAPPA + 2, torch.float32))
    state, compressed_size = optimizer.state[parameter], RANK * max(shape)
    moments_size = 2 * compressed_size if isinstance(rule, FloraAdamW) else compressed_size + sum(shape)
    held = lambda: sum(v.untyped_storage().nbytes() for v in state.values() if isinstance(v, Tensor))  # noqa: E731
    assert held() == 4 * moments_size
    if kind in ACCUMULATING:
        for gradient in gradients(shape, 3, torch.float32):
            parameter.grad = gradient
            optimizer.accumulate(parameter)
            assert parameter.grad is None
        assert held() == 4 * (moments_size + compressed_size)
    assert all(not isinstance(value, Tensor) for value in vars(rule).values())


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_projection_outlives_no_use_of_it(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    storages: list[Any] = []

    def watched(*args: Any, **options: Any) -> Tensor:
        projection = random_projection(*args, **options)
        storages.append(weakref.ref(projection.untyped_storage()))
        return projection

    monkeypatch.setattr(flora, "random_projection", watched)
    parameter = parameter_of((12, 7))
    optimizer = optimizer_of(parameter, rule_of(kind))
    for gradient in gradients((12, 7), KAPPA + 1):
        parameter.grad = gradient
        optimizer.accumulate(parameter)
        optimizer.step()
        assert storages and all(storage() is None for storage in storages)


def test_projections_are_the_identity_on_average() -> None:
    """A Aᵀ has variance 1/r off its diagonal and 2/r on it; 6 standard deviations are for 36 elements."""
    draws, width, rank = 4000, 6, 4
    products = [a @ a.t() for a in (drawn(3, "moments", number, (width, 9), rank) for number in range(draws))]
    mean = torch.stack(products).mean(0)
    deviation = math.sqrt(2 / rank / draws)
    torch.testing.assert_close(mean, torch.eye(width, dtype=torch.float64), rtol=0.0, atol=6 * deviation)


@pytest.mark.parametrize("is_left", [False, True])
def test_a_carried_momentum_means_the_same_on_average(is_left: bool) -> None:
    """Over draws of the new subspace, (m Aᵀ A') A'ᵀ is m Aᵀ; and the short way there is the long one."""
    width, rank, draws = 6, 4, 4000
    old = Subspace(drawn(1, "moments", 0, (width, 9), rank), is_left)
    m = torch.randn(*((rank, 5) if is_left else (5, rank)), dtype=torch.float64)
    meant, found = old.decompress(m), []
    for number in range(1, draws + 1):
        new = Subspace(drawn(1, "moments", number, (width, 9), rank), is_left)
        carried = old.carry(m, new)
        torch.testing.assert_close(carried, new.compress(meant), rtol=1e-12, atol=1e-12)
        found.append(new.decompress(carried))
    # Each element's variance is at most 2/r times the square of its row or column.
    deviation = meant.norm(dim=0 if is_left else 1).max().item() * math.sqrt(2 / rank / draws)
    torch.testing.assert_close(torch.stack(found).mean(0), meant, rtol=0.0, atol=6 * deviation)


def test_squares_in_the_subspace_are_the_same_whatever_the_projection() -> None:
    """Why u stays: over draws, the square of every entry of a row of G A is ‖g‖² / r (with deviation √2 of that)."""
    gradient = torch.randn(5, 6, dtype=torch.float64) * torch.logspace(-2, 2, 6, dtype=torch.float64)
    draws, rank = 4000, 4
    squares = torch.stack([(gradient @ drawn(2, "moments", n, (9, 6), rank)) ** 2 for n in range(draws)]).mean(0)
    expected = gradient.square().sum(1, keepdim=True).expand(5, rank) / rank
    torch.testing.assert_close(squares, expected, rtol=6 * math.sqrt(2 / draws), atol=0.0)


def test_decompressing_adds_the_noise_that_the_docstring_says() -> None:
    vector, width, rank, draws = torch.randn(1, 6, dtype=torch.float64), 6, 4, 4000
    spaces = [Subspace(drawn(2, "moments", n, (9, width), rank), is_left=False) for n in range(draws)]
    squares = torch.stack([space.decompress(space.compress(vector)).square().sum() for space in spaces])
    expected = vector.square().sum() * (width + rank + 1) / rank
    assert (squares.mean() - expected).abs() < 6 * squares.std() / math.sqrt(draws)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("kind", COMPRESSED)
def test_the_step_costs_what_the_docstring_says(kind: type[Any], shape: tuple[int, int]) -> None:
    parameter, micro_batches = parameter_of(shape), 4
    optimizer = optimizer_of(parameter, rule_of(kind))
    gemm_flops = 2 * RANK * shape[0] * shape[1]
    with FlopCounterMode(display=False) as plain:
        take_steps(optimizer, parameter, gradients(shape, 1))
    assert plain.get_total_flops() == 2 * gemm_flops
    if kind in ACCUMULATING:
        with FlopCounterMode(display=False) as summed:
            for gradient in gradients(shape, micro_batches):
                parameter.grad = gradient
                optimizer.accumulate(parameter)
            optimizer.step()
        more = micro_batches + 1 if kind is AccumulatingFloraAdafactor else micro_batches - 1
        assert summed.get_total_flops() == (2 + more) * gemm_flops


@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_micro_batches_of_adamw_are_one_batch(shape: tuple[int, int], keeps_last: bool) -> None:
    """Up to rounding; also where the last micro-batch's gradient is not summed but stepped."""
    whole, parts = parameter_of(shape), parameter_of(shape)
    of_whole = optimizer_of(whole, rule_of(FloraAdamW))
    of_parts = optimizer_of(parts, rule_of(AccumulatingFloraAdamW))
    batches = gradients(shape, 3 * 12)
    for step in range(12):
        batch = batches[3 * step : 3 * step + 3]
        for micro, gradient in enumerate(batch):
            parts.grad = gradient.clone()
            if micro < 2 or not keeps_last:
                of_parts.accumulate(parts)
        of_parts.step()
        parts.grad = None
        take_steps(of_whole, whole, [sum(batch, torch.zeros(shape, dtype=torch.float64))])
        torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-12)


def test_the_last_micro_batch_may_be_stepped_without_being_summed() -> None:
    results = []
    for keeps_last in (False, True):
        parameter = parameter_of((12, 7))
        optimizer = optimizer_of(parameter, rule_of(AccumulatingFloraAdafactor))
        first, last = gradients((12, 7), 2)
        parameter.grad = first
        optimizer.accumulate(parameter)
        parameter.grad = last
        if not keeps_last:
            optimizer.accumulate(parameter)
        optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def train(kind: type[Any], shape: tuple[int, int], steps: range, start: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """From `start`, a result of this function, on; each step has two micro-batches where the rule sums them."""
    parameter = parameter_of(shape, torch.float32)
    optimizer = optimizer_of(parameter, rule_of(kind))
    if start is not None:
        parameter.data.copy_(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
    batches = gradients(shape, 2 * 100, torch.float32)
    for step in steps:
        for gradient in batches[2 * step : 2 * step + 2]:
            parameter.grad = gradient.clone()
            optimizer.accumulate(parameter)
        optimizer.step()
    return parameter.detach(), optimizer.state_dict()


@pytest.mark.parametrize("done", [3, KAPPA - 1, KAPPA, KAPPA + 1])
@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_resumed_run_is_the_straight_run_bitwise(kind: type[Any], done: int) -> None:
    """In the middle of a period, before, at and after a resample; also that two straight runs are the same."""
    straight, _ = train(kind, (12, 7), range(12))
    first = train(kind, (12, 7), range(done))
    resumed, _ = train(kind, (12, 7), range(done, 12), first)
    assert torch.equal(resumed, straight)


def test_each_matrix_has_its_own_projections() -> None:
    matrices = [parameter_of((12, 7)) for _ in range(4)]
    rules = flora_rules(matrices, [], rank=RANK, kappa=KAPPA, inner="adamw", seed=3)
    optimizer = AdamW(matrices, rules=rules, **OPTIONS)
    for matrix in matrices:
        matrix.grad = gradients((12, 7), 1)[0]
    optimizer.step()
    for index, matrix in enumerate(matrices):
        assert all(not torch.allclose(matrix, other) for other in matrices[:index])
    other_run = flora_rules(matrices, [], rank=RANK, kappa=KAPPA, inner="adamw", seed=4)
    seeds = {rule.seed for rule in [*rules.values(), *other_run.values()] if isinstance(rule, FloraAdamW)}
    assert len(seeds) == 8


@pytest.mark.parametrize("kind", ACCUMULATING)
def test_a_subspace_lasts_as_long_as_it_should(kind: type[Any]) -> None:
    """κ steps for the moments, one step for Adafactor's sums."""
    parameter = parameter_of((12, 7))
    optimizer = optimizer_of(parameter, rule_of(kind))
    gradient, sums = gradients((12, 7), 1)[0], []
    for _ in range(3 * KAPPA):
        parameter.grad = gradient.clone()
        optimizer.accumulate(parameter)
        sums.append(optimizer.state[parameter]["accumulated"].clone())
        optimizer.step()
    lifetime = 1 if kind is AccumulatingFloraAdafactor else KAPPA
    for step, found in enumerate(sums):
        if step:
            assert torch.equal(found, sums[step - 1]) == (step % lifetime != 0)
    assert len({tuple(found.flatten().tolist()) for found in sums}) == 3 * KAPPA // lifetime


@pytest.mark.parametrize("kind", [*COMPRESSED, Adafactor])
def test_it_converges(kind: type[Any]) -> None:
    """Least squares, with a rate that falls to zero; AdamW sees half of the space at a time, so it needs many draws."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(24, 16))
    target, x = torch.randn(24, 16), torch.randn(64, 16)
    rule = Adafactor() if kind is Adafactor else rule_of(kind, rank=8, kappa=20)
    optimizer = optimizer_of(parameter, rule, weight_decay=0.0, betas=(0.9, 0.99))
    losses, steps = [], 400
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        for half in x.chunk(2):
            loss = (half @ (parameter - target).t()).square().mean() / 2
            loss.backward()
            if isinstance(rule, AccumulatingRule):
                optimizer.accumulate(parameter)
        losses.append((x @ (parameter - target).t()).square().mean().item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.parametrize("kind", [*COMPRESSED, Adafactor])
def test_tensors_without_memory_will_do(kind: type[Any]) -> None:
    """Whatever reads a value back from the device fails here."""
    with FakeTensorMode():
        parameter = nn.Parameter(torch.zeros(12, 7, dtype=torch.bfloat16))
        optimizer = optimizer_of(parameter, Adafactor() if kind is Adafactor else rule_of(kind, kappa=2))
        for _ in range(3):
            for _ in range(2):
                parameter.grad = torch.zeros_like(parameter)
                optimizer.accumulate(parameter)
            optimizer.step()
    expected = (12, 7) if kind is Adafactor else (12, RANK)
    assert optimizer.state[parameter]["exp_avg"].shape == expected


@pytest.mark.parametrize("kind", [*COMPRESSED, Adafactor])
def test_bf16_weights_are_rounded_once(kind: type[Any]) -> None:
    """A step of bf16 weights is that of fp32 weights of the same values, rounded; moments are the same, fp32."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        parameter = nn.Parameter(parameter_of((12, 7), torch.float32).bfloat16().to(dtype))
        optimizer = optimizer_of(parameter, Adafactor() if kind is Adafactor else rule_of(kind))
        for gradient in gradients((12, 7), 2, torch.bfloat16):
            parameter.grad = gradient.to(dtype)
            optimizer.accumulate(parameter)
        optimizer.step()
        results.append((parameter.detach().bfloat16(), optimizer.state[parameter]))
    (ours, ours_state), (exact, exact_state) = results
    assert torch.equal(ours, exact)
    assert all(torch.equal(torch.as_tensor(ours_state[key]), torch.as_tensor(exact_state[key])) for key in exact_state)
    assert ours_state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", [*COMPRESSED, Adafactor])
def test_moments_in_eight_bits(kind: type[Any]) -> None:
    """Over a resample; a table of 256 values leaves an element some percent off."""
    shape = (192, 64)
    start, ends, states = parameter_of(shape, torch.float32).detach(), [], []
    for bits in (32, 8):
        parameter = parameter_of(shape, torch.float32)
        rule = Adafactor() if kind is Adafactor else rule_of(kind, rank=32)
        optimizer = optimizer_of(parameter, rule, state_bits=bits)
        take_steps(optimizer, parameter, gradients(shape, KAPPA + 2, torch.float32))
        ends.append(parameter.detach() - start)
        states.append(optimizer.state[parameter])
    assert states[1]["exp_avg"].dtype == torch.uint8
    assert states[1]["exp_avg"].shape == states[0]["exp_avg"].shape
    for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
        assert key not in states[0] or states[1][key].dtype == torch.float32
    assert (ends[1] - ends[0]).norm() < 0.05 * ends[0].norm()


def test_a_vectors_second_moment_stays_wide() -> None:
    vector = parameter_of((5000,), torch.float32)
    optimizer = optimizer_of(vector, Adafactor(), state_bits=8)
    take_steps(optimizer, vector, gradients((5000,), 2, torch.float32))
    assert optimizer.state[vector]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[vector]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(
    ("inner", "accumulation", "kind"),
    [
        ("adafactor", "compressed", AccumulatingFloraAdafactor),
        ("adafactor", "dense", FloraAdafactor),
        ("adamw", "compressed", AccumulatingFloraAdamW),
        ("adamw", "dense", FloraAdamW),
    ],
)
def test_who_gets_which_rule(inner: Any, accumulation: Any, kind: type[Any]) -> None:
    tall, wide, narrow = (parameter_of(shape) for shape in ((12, 7), (7, 12), (12, RANK)))
    embedding, norm = parameter_of((40, 7)), parameter_of((7,))
    rules = flora_rules(
        [tall, wide, narrow], [embedding, norm], rank=RANK, kappa=KAPPA, inner=inner, accumulation=accumulation, seed=0
    )
    assert type(rules[tall]) is type(rules[wide]) is kind
    assert isinstance(rules[tall], AccumulatingRule) == (accumulation == "compressed")
    assert (rules[tall].rank, rules[tall].kappa) == (RANK, KAPPA)  # type: ignore[attr-defined]
    uncompressed = {type(rules.get(parameter)) for parameter in (narrow, embedding, norm)}
    assert uncompressed == {Adafactor if inner == "adafactor" else type(None)}
    assert not isinstance(Adafactor(), AccumulatingRule)
