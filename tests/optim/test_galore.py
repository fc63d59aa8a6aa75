"""GaLore: against galore-torch and dense AdamW, the finder's energy, resumption, staggering, convergence, and state."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from galore_torch import GaLoreAdamW
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.optim.galore import (
    Finder,
    GaLore,
    exact_subspace,
    galore_rules,
    gram_matrix,
    project,
    project_back,
    randomised_subspace,
)

RANK = 4
SHAPES = [(24, 10), (10, 24), (12, 12)]  # tall, wide, square


def gradients(shape: tuple[int, int], steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(steps)]


def train(optimizer: AdamW, parameter: nn.Parameter, steps: list[Tensor]) -> None:
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()


def start(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_galore_torch(shape: tuple[int, int], weight_decay: float) -> None:
    """20 steps in fp32, with refreshes at the 8th and 15th.

    galore-torch adds eps before the bias correction, which eps = 1e-30 leaves without effect. It decays after the step:
    W' = (1 − λ)(W − s) where ours is (1 − λ) W − s. With V = W / (1 − λ) just before its decay, it takes V ← (1 − λ) V
    − s, which is ours. So its weight, divided by 1 − λ, is held against ours, from starts that differ by that factor;
    gradients are given, so nothing else depends on the weight. A step rounds the weight (below 8) by at most 2**-22,
    in each of them; singular vectors come from the same call. 20 steps: 40 · 2**-22 < 1e-5.
    """
    lr, gap, scale = 0.05, 7, 0.25
    keep = 1 - lr * weight_decay
    ours = start(shape)
    theirs = nn.Parameter(ours.detach() * keep)
    rule = GaLore(rank=RANK, scale=scale, update_gap=gap, finder="svd")
    optimizer = AdamW([ours], rules={ours: rule}, lr=lr, eps=1e-30, weight_decay=weight_decay)
    group: Any = {"params": [theirs], "rank": RANK, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
    reference = GaLoreAdamW([group], lr=lr, eps=1e-30, weight_decay=weight_decay, no_deprecation_warning=True)
    for gradient in gradients(shape, 20):
        train(optimizer, ours, [gradient])
        theirs.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(ours.detach(), theirs.detach() / keep, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_on_the_unit_basis_it_is_adamw(shape: tuple[int, int]) -> None:
    """The projection is put in by hand, and no refresh comes; float64, so only the order of operations rounds."""
    options = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    ours, theirs = start(shape, torch.float64), start(shape, torch.float64)
    rule = GaLore(rank=min(shape), scale=1.0, update_gap=1000, offset=1)
    optimizer, reference = AdamW([ours], rules={ours: rule}, **options), torch.optim.AdamW([theirs], **options)
    optimizer.state[ours]["projection"] = torch.eye(min(shape), dtype=torch.float64)
    for gradient in gradients(shape, 20, torch.float64):
        train(optimizer, ours, [gradient])
        theirs.grad = gradient.clone()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def gaussian(outputs: int, features: int) -> Tensor:
    return torch.randn(outputs, features)


def with_singular_values(values: Tensor, outputs: int, features: int) -> Tensor:
    sizes = (outputs, features)
    left, right = (torch.linalg.qr(torch.randn(size, len(values), dtype=values.dtype)).Q for size in sizes)
    return (left * values) @ right.t()


def power_law(exponent: float) -> Callable[[int, int], Tensor]:
    def draw(outputs: int, features: int) -> Tensor:
        return with_singular_values(torch.arange(1, min(outputs, features) + 1) ** -exponent, outputs, features)

    return draw


def low_rank_and_noise(outputs: int, features: int) -> Tensor:
    return torch.randn(outputs, 10) @ torch.randn(10, features) + torch.randn(outputs, features)


def deficient(outputs: int, features: int) -> Tensor:
    return torch.randn(outputs, 10) @ torch.randn(10, features) * 1e-12


SPECTRA = {
    "gaussian": gaussian,
    "power-0.25": power_law(0.25),
    "power-0.5": power_law(0.5),
    "power-1": power_law(1.0),
    "power-3": power_law(3.0),
    "low rank and noise": low_rank_and_noise,
    "deficient": deficient,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(344, 128), (128, 344), (128, 128), (2000, 128)])
@pytest.mark.parametrize("rank", [8, 32, 64, 128])
def test_the_randomised_subspace_captures_99_percent(spectrum: str, shape: tuple[int, int], rank: int) -> None:
    """Of the energy in the leading singular values, in float64, and never more than that."""
    torch.manual_seed(3)
    gradient = SPECTRA[spectrum](*shape)
    projection = randomised_subspace(gradient, rank, torch.Generator().manual_seed(5))
    captured = project(gradient.double(), projection.double()).square().sum()
    best = torch.linalg.svdvals(gradient.double())[:rank].square().sum()
    assert 0.99 <= captured / best < 1 + 1e-5


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_directions_come_in_the_order_of_the_singular_values(shape: tuple[int, int]) -> None:
    """The moments, which a refresh keeps, are of the first, second, ... direction."""
    torch.manual_seed(3)
    gradient = with_singular_values(2.0 ** -torch.arange(10, dtype=torch.float64), *shape)
    exact, found = exact_subspace(gradient, RANK), randomised_subspace(gradient, RANK)
    overlaps = exact @ found.t() if shape[0] >= shape[1] else exact.t() @ found
    torch.testing.assert_close(overlaps.abs(), torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("side", [40, 300, 700])
def test_the_gram_matrix_of_blocks_is_the_product(side: int, in_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine both ways, of which each takes one by itself; products of 90 numbers, in bf16 2**-8 each."""
    monkeypatch.setattr("velora_pretrain.optim.galore._multiplies_bf16", lambda device_type: in_bf16)
    tall = torch.randn(90, side, generator=torch.Generator().manual_seed(3))
    exact = tall.double().t() @ tall.double()
    largest_error = (gram_matrix(tall).double() - exact).abs().max()
    assert largest_error < (1.0 if in_bf16 else 1e-4)
    assert (largest_error > 1e-3) == in_bf16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("find", [exact_subspace, randomised_subspace])
@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_directions_are_orthonormal_and_of_the_smaller_side(
    find: Callable[..., Tensor], shape: tuple[int, int], factor: float
) -> None:
    """Householder reflections and eigenvectors: errors of a few units of fp32 each; a zero gradient is no trouble."""
    projection = find(factor * torch.randn(*shape), RANK)
    tall = shape[0] >= shape[1]
    assert projection.shape == ((RANK, shape[1]) if tall else (shape[0], RANK))
    directions = projection if tall else projection.t()
    torch.testing.assert_close(directions @ directions.t(), torch.eye(RANK), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_back_undoes_projecting_within_the_subspace(shape: tuple[int, int]) -> None:
    projection = exact_subspace(torch.randn(*shape, dtype=torch.float64), RANK)
    low_rank = torch.randn(*((shape[0], RANK) if shape[0] >= shape[1] else (RANK, shape[1])), dtype=torch.float64)
    torch.testing.assert_close(project(project_back(low_rank, projection), projection), low_rank)


def test_the_random_start_depends_on_seed_and_step_alone() -> None:
    gradient = torch.randn(60, 40)

    def found(seed: int, step: int) -> Tensor:
        parameter = nn.Parameter(torch.zeros(60, 40))
        state: dict[str, Any] = {"step": step}
        parameter.grad = gradient
        with torch.no_grad():
            options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "state_bits": 32}
            GaLore(rank=RANK, seed=seed).step_(parameter, state, options)
        return state["projection"]

    torch.manual_seed(0)
    first = found(1, 5)
    torch.manual_seed(1)
    assert torch.equal(first, found(1, 5))
    assert not torch.equal(first, found(1, 6))
    assert not torch.equal(first, found(2, 5))


@pytest.mark.parametrize("finder", ["randomised", "svd"])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_run_goes_on_bitwise(finder: Finder, stop: int) -> None:
    """Stopped before, at and after a refresh, which comes with steps 1, 5 and 9."""
    shape, steps = (24, 10), gradients((24, 10), 10)

    def build(parameter: nn.Parameter) -> AdamW:
        return AdamW([parameter], rules=galore_rules([parameter], rank=RANK, update_gap=4, finder=finder), lr=0.1)

    straight, first = start(shape), start(shape)
    train(build(straight), straight, steps)
    interrupted = build(first)
    train(interrupted, first, steps[:stop])
    second = nn.Parameter(first.detach().clone())
    resumed = build(second)
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    train(resumed, second, steps[stop:])
    assert torch.equal(straight, second)


@pytest.mark.parametrize("num_matrices", [1, 3, 8, 20])
def test_refreshes_are_spread_over_the_gap(num_matrices: int) -> None:
    gap = 8
    parameters = [nn.Parameter(torch.zeros(6, 5)) for _ in range(num_matrices)]
    optimizer = AdamW(parameters, rules=galore_rules(parameters, rank=2, update_gap=gap))
    refreshes = []
    for _ in range(2 * gap + 1):
        before = [optimizer.state[p].get("projection") for p in parameters]
        for parameter in parameters:
            parameter.grad = torch.randn(6, 5)
        optimizer.step()
        after = [optimizer.state[p]["projection"] for p in parameters]
        refreshes.append([index for index, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b])
    assert len(refreshes[0]) == num_matrices
    assert max(map(len, refreshes[1:])) <= math.ceil(num_matrices / gap)
    # Evenly: two that follow each other are as far apart as the gap allows, to one step.
    turns = [step for step, due in enumerate(refreshes[: 2 * gap + 1]) for _ in due if step]
    between = [later - earlier for earlier, later in itertools.pairwise(turns)]
    assert {math.floor(gap / num_matrices), math.ceil(gap / num_matrices)} >= set(between)
    # In each full gap after the first step, every matrix has its turn once.
    for first in (1, gap + 1):
        assert Counter(itertools.chain(*refreshes[first : first + gap])) == Counter(range(num_matrices))


def test_moments_are_kept_over_a_refresh() -> None:
    """As published: after a refresh they go on from the same numbers, though the directions are others."""
    parameter = start((24, 10))
    optimizer = AdamW([parameter], rules={parameter: GaLore(rank=RANK, update_gap=2, finder="svd")})
    steps = gradients((24, 10), 3)
    train(optimizer, parameter, steps[:2])
    m, u = (optimizer.state[parameter][name].clone() for name in ("exp_avg", "exp_avg_sq"))
    train(optimizer, parameter, steps[2:])
    state = optimizer.state[parameter]
    r = project(steps[2], exact_subspace(steps[2], RANK))
    torch.testing.assert_close(state["exp_avg"], 0.9 * m + 0.1 * r)
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * u + 0.001 * r.square())


def test_matrices_that_a_projection_cannot_shrink_move_by_plain_adamw() -> None:
    parameters = [start(shape) for shape in ((24, RANK), (RANK, 24), (24, RANK + 1))]
    assert list(galore_rules(parameters, rank=RANK)) == parameters[2:]
    # Nor do they take a turn from those that are refreshed.
    rules = galore_rules([*parameters, *(start((24, RANK + 1)) for _ in range(3))], rank=RANK, update_gap=8)
    assert [rule.offset for rule in rules.values()] == [0, 2, 4, 6]


@pytest.mark.parametrize("finder", ["randomised", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_state_is_of_the_closed_form(shape: tuple[int, int], dtype: torch.dtype, finder: Finder) -> None:
    """Plain tensors and integers; by storage, so that no view keeps more alive than it shows."""
    parameter = start(shape, dtype)
    optimizer = AdamW([parameter], rules={parameter: GaLore(rank=RANK, finder=finder)})
    train(optimizer, parameter, gradients(shape, 2, dtype))
    state = optimizer.state[parameter]
    assert {name: type(value) for name, value in state.items()} == {
        "step": int,
        "projection": Tensor,
        "exp_avg": Tensor,
        "exp_avg_sq": Tensor,
    }
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    total_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert total_bytes == 4 * RANK * (min(shape) + 2 * max(shape))


def test_moments_may_be_kept_in_8_bits() -> None:
    pytest.importorskip("bitsandbytes")
    wide, narrow = start((256, 128)), start((256, 128))
    optimizers = [AdamW([p], rules={p: GaLore(rank=32)}, lr=0.1, state_bits=b) for p, b in ((wide, 32), (narrow, 8))]
    for parameter, optimizer in zip((wide, narrow), optimizers, strict=True):
        train(optimizer, parameter, gradients((256, 128), 5))
    assert {optimizers[1].state[narrow][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.uint8}
    assert (wide - narrow).norm() < 0.1 * (wide - start((256, 128))).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_weights_are_rounded_once_a_step(shape: tuple[int, int]) -> None:
    """A step on bf16 is that of the same numbers in fp32, rounded at the end."""
    narrow = start(shape, torch.bfloat16)
    exact = nn.Parameter(narrow.detach().float())
    optimizers = [
        AdamW([p], rules={p: GaLore(rank=RANK, update_gap=2)}, lr=0.1, weight_decay=0.1) for p in (narrow, exact)
    ]
    for gradient in gradients(shape, 5, torch.bfloat16):
        with torch.no_grad():
            exact.copy_(narrow)
        train(optimizers[0], narrow, [gradient])
        train(optimizers[1], exact, [gradient.float()])
        assert torch.equal(narrow, exact.bfloat16())


@pytest.mark.parametrize("finder", ["randomised", "svd"])
def test_tensors_without_memory_step_too(finder: Finder) -> None:
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(*shape)) for shape in SHAPES]
        optimizer = AdamW(parameters, rules=galore_rules(parameters, rank=RANK, update_gap=2, finder=finder))
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
    for (outputs, features), parameter in zip(SHAPES, parameters, strict=True):
        right = outputs >= features
        expected = (outputs, RANK) if right else (RANK, features)
        assert optimizer.state[parameter]["exp_avg"].shape == expected
        assert optimizer.state[parameter]["projection"].shape == ((RANK, features) if right else (outputs, RANK))


@pytest.mark.parametrize("shape", SHAPES)
def test_updating_in_chunks_changes_nothing_beyond_rounding(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for elements in (2**20, 5 * shape[1]):
        monkeypatch.setattr("velora_pretrain.optim.galore.UPDATE_ELEMENTS", elements)
        parameter = start(shape, torch.float64)
        optimizer = AdamW([parameter], rules={parameter: GaLore(rank=RANK)}, lr=0.1, weight_decay=0.1)
        train(optimizer, parameter, gradients(shape, 3, torch.float64))
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("finder", ["randomised", "svd"])
def test_it_converges_on_least_squares(finder: Finder) -> None:
    """The target has full rank, so that refreshes reach it and a single subspace does not."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(128, 10, generator=generator)
    target = x @ torch.randn(10, 24, generator=generator)

    def remaining(update_gap: int) -> float:
        weight = nn.Parameter(torch.zeros(24, 10))
        rules = galore_rules([weight], rank=RANK, scale=1.0, update_gap=update_gap, finder=finder)
        optimizer = AdamW([weight], rules=rules, lr=0.1)
        loss = target.square().mean()
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
            optimizer.zero_grad()
            loss = (x @ weight.t() - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item() / target.square().mean().item()

    assert remaining(25) < 1e-4
    assert remaining(1000) > 0.1
