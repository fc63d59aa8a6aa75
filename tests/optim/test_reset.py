"""The partial reset of moments at a restart."""

import pytest
import torch
from torch import nn

from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.optim.moments import load_moment
from velora_pretrain.optim.reset import reset_moments

SHAPE = (64, 100)


def stepped(state_bits: int = 32) -> tuple[nn.Parameter, nn.Parameter, AdamW]:
    """Two parameters after three steps, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    first, second = (nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(2))
    optimizer = AdamW([first, second], lr=1e-3, state_bits=state_bits)
    for _ in range(3):
        for parameter in (first, second):
            parameter.grad = torch.randn(SHAPE, generator=generator)
        optimizer.step()
    return first, second, optimizer


def pruned(m: torch.Tensor, u: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What is expected of moments without equal elements, by sorting."""
    number = round(share * m.numel())
    m, u = m.flatten().clone(), u.flatten().clone()
    u[u.argsort()[:number]] = 0
    m[m.abs().argsort()[:number]] = 0
    m[u == 0] = 0
    return m.view(SHAPE), u.view(SHAPE)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.99, 0.999, 1.0])
def test_the_smallest_share_is_zero_and_the_rest_is_untouched(share: float) -> None:
    first, second, optimizer = stepped()
    before = {name: t.clone() for name, t in optimizer.state[first].items()}
    other = {name: t.clone() for name, t in optimizer.state[second].items()}
    told = reset_moments(optimizer, [first], share)
    m, u = (optimizer.state[first][name] for name in ("exp_avg", "exp_avg_sq"))
    expected_m, expected_u = pruned(before["exp_avg"], before["exp_avg_sq"], share)
    assert torch.equal(u, expected_u)
    assert torch.equal(m, expected_m)
    assert int((u == 0).sum()) == round(share * first.numel())
    assert told == int((u == 0).sum() + (m == 0).sum()) / (2 * first.numel())
    assert optimizer.state[first]["step"] == before["step"]
    assert all(torch.equal(optimizer.state[second][name], t) for name, t in other.items())


def test_the_number_is_exact_where_all_are_equal() -> None:
    parameter, _, optimizer = stepped()
    optimizer.state[parameter]["exp_avg_sq"].fill_(1.0)
    reset_moments(optimizer, [parameter], 0.5)
    assert int((optimizer.state[parameter]["exp_avg_sq"] == 0).sum()) == parameter.numel() // 2


def test_no_step_explodes_where_the_new_gradient_is_zero() -> None:
    """As it is of a new A, beside B = 0: with the first moment left where the second is gone it would be 10⁴."""
    parameter, _, optimizer = stepped()
    reset_moments(optimizer, [parameter], 0.9)
    assert (optimizer.state[parameter]["exp_avg"] != 0).any()
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (parameter - before).abs().max() < 10 * 1e-3


@pytest.mark.parametrize("share", [0.5, 0.99, 1.0])
def test_moments_in_eight_bits(share: float) -> None:
    pytest.importorskip("bitsandbytes")
    parameter, _, optimizer = stepped(state_bits=8)
    state = optimizer.state[parameter]
    names = ("exp_avg", "exp_avg_sq")
    old = [load_moment(state, name, parameter).clone() for name in names]
    told = reset_moments(optimizer, [parameter], share)
    # Rounded moments have equal elements, of which any may go.
    assert share <= told <= 1
    for name, before in zip(names, old, strict=True):
        assert state[name].dtype == torch.uint8
        now, largest = load_moment(state, name, parameter), before.abs().max()
        # The kernel for the CPU rounds a zero to a value beside it, 3e-5 of its block's largest.
        gone = now.abs() <= 1e-4 * largest
        assert gone.float().mean().item() >= share
        torch.testing.assert_close(now[~gone], before[~gone], rtol=0.1, atol=0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.isfinite().all()


def test_parameters_that_were_never_stepped_are_passed_over() -> None:
    parameter, _, optimizer = stepped()
    fresh = nn.Parameter(torch.ones(3))
    assert reset_moments(optimizer, [fresh, parameter], 1.0) == 1.0
