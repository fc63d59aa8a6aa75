"""The chunked loss against PyTorch's, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from velora_pretrain.nn.loss import IGNORE_INDEX, linear_cross_entropy, log_p_and_p_


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(37, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(53, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, 53, (37,), generator=generator)
    labels[5:12] = IGNORE_INDEX
    return hidden, weight, labels


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [1, 7, 37, 100, None])
def test_value_and_gradients(chunk_rows: int | None) -> None:
    hidden, weight, labels = problem()
    ours = linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows)
    theirs = naive(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    # A factor, because the gradients are made before the backward pass knows it.
    expected = torch.autograd.grad(theirs * 0.3, (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(ours * 0.3, (hidden, weight)), expected, rtol=1e-11, atol=1e-13)


def test_no_targets_gives_zero_and_zero_gradients() -> None:
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    assert loss.item() == 0.0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_bf16_loss_is_fp32_and_no_worse_than_the_naive_bf16_loss() -> None:
    """Over 20 problems, because which of two equally rounded results is nearer is chance in any one of them."""
    loss_errors, gradient_errors = torch.zeros(2), torch.zeros(3)
    for seed in range(20):
        hidden64, weight64, labels = problem(seed=seed)
        exact = naive(hidden64, weight64, labels)
        exact_gradient = torch.autograd.grad(exact, weight64)[0]
        hidden, weight, _ = problem(torch.bfloat16, seed)
        losses = [
            linear_cross_entropy(hidden, weight, labels),
            naive(hidden, weight, labels),
            linear_cross_entropy(hidden, weight, labels, chunk_rows=8),
        ]
        assert losses[0].dtype == torch.float32
        loss_errors += torch.tensor([abs(loss.item() - exact.item()) for loss in losses[:2]])
        for column, loss in enumerate(losses):
            error = torch.autograd.grad(loss, weight)[0].double() - exact_gradient
            gradient_errors[column] += error.square().sum()
    assert loss_errors[0] <= loss_errors[1]
    assert gradient_errors[0] <= 1.05 * gradient_errors[1]
    # A chunk's product is rounded to its own share, so five of them together weigh one more rounding.
    assert gradient_errors[2] <= 2 * gradient_errors[1]


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("with_gradients", [True, False])
def test_logits_are_never_whole(with_gradients: bool) -> None:
    hidden = torch.randn(512, 4, requires_grad=True)
    weight = torch.randn(100, 4, requires_grad=True)
    labels = torch.randint(0, 100, (512,))
    with _LargestTensor() as mode, torch.set_grad_enabled(with_gradients):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=32)
        if with_gradients:
            loss.backward()
    assert mode.largest <= 32 * 100
    with _LargestTensor() as mode:
        naive(hidden, weight, labels)
    assert mode.largest == 512 * 100


def test_no_gradients_are_made_where_they_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = problem()
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels) > 0
    with pytest.raises(TypeError):
        linear_cross_entropy(hidden, weight, labels)


def test_passes_over_one_buffer_give_the_log_softmax_that_the_kernel_gives() -> None:
    """The CPU's way against the other devices' one, with scores whose exponentials alone would overflow."""
    scores = 200 * torch.randn(64, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index = torch.arange(64)[:, None]
    for dtype in (torch.float32, torch.float64):
        narrow = scores.to(dtype)
        expected = torch.log_softmax(narrow.double(), -1)
        log_p, p = log_p_and_p_(narrow.clone(), index, dtype)
        # A difference of two scores is rounded once more than the scores were.
        rounding = torch.finfo(dtype).eps * float(scores.abs().max())
        torch.testing.assert_close(log_p.double(), expected.gather(1, index), rtol=0, atol=2 * rounding)
        torch.testing.assert_close(p.double(), expected.exp(), rtol=2 * rounding, atol=1e-30)
