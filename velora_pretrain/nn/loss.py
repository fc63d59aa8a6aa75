"""Cross-entropy of a linear head, without ever holding the logits of all tokens.

    logits = h Wᵀ     (n, D)(D, V)    per chunk of n rows
    dh = p W          (n, V)(V, D)    p: softmax(logits) − onehot(labels)
    dW += pᵀ h        (V, n)(n, D)

A chunk's gradients are made in the forward pass, while its logits are there, so nothing is computed twice: the same
three GEMMs as the naive loss. Kept for the backward pass: dh, and dW, which becomes the head's gradient. PyTorch 2.13's
`F.linear_cross_entropy` does the same; it is missing in 2.11, its default chunks are small, and it rounds a bf16 loss.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Label of a position that is no target."""

CHUNK_LOGITS = 2**24
"""Logits held at a time: 64 MiB in fp32, enough rows for the GEMMs to run at full rate."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int, with_gradients: bool
    ) -> Tensor:
        # needs_input_grad says what requires gradients, even where they are switched off.
        needs_hidden, needs_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        is_opaque = hidden.device.type == "cpu" and torch.compiler.is_compiling()
        loss_and_gradients = _opaque_loss_and_gradients if is_opaque else _loss_and_gradients
        nats, d_hidden, d_weight = loss_and_gradients(hidden, weight, labels, chunk_rows, needs_hidden, needs_weight)
        ctx.save_for_backward(d_hidden if needs_hidden else None, d_weight if needs_weight else None)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nats: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward pass over one graph is refused by autograd's version check, not answered wrongly.
        d_hidden, d_weight = (None if t is None else t.mul_(d_nats) for t in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dh and dW; empty, where they are not needed."""
    head = weight.to(hidden.dtype)
    d_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    # Summed over chunks in fp32, or in double where the weights are.
    accumulator = torch.promote_types(weight.dtype, torch.float32)
    d_weight = torch.zeros_like(weight, dtype=accumulator) if needs_weight else weight.new_empty(0)
    nats = torch.zeros((), dtype=accumulator, device=hidden.device)
    # Written anew by every chunk: memory that an allocator hands out afresh is slow to touch first.
    scores = hidden.new_empty(min(chunk_rows, hidden.shape[0]), weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            h, targets = hidden[rows], labels[rows]
            is_target = (targets != IGNORE_INDEX)[:, None]
            index = targets.clamp(min=0)[:, None]
            torch.mm(h, head.t(), out=scores[: len(h)])
            target_log_p, p = log_p_and_p_(scores[: len(h)], index, accumulator)
            nats -= (target_log_p * is_target).sum()
            if needs_hidden or needs_weight:
                p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
                p = p.mul_(is_target).to(h.dtype)
                if needs_hidden:
                    torch.mm(p, head, out=d_hidden[rows])
                if needs_weight and p.dtype == accumulator:
                    d_weight.addmm_(p.t(), h)
                elif needs_weight:
                    d_weight += p.t() @ h
            # Else it would still be there beside the next chunk's.
            del p
    del scores
    return nats, d_hidden, d_weight.to(weight.dtype)


_opaque_loss_and_gradients = torch.library.custom_op(
    "velora_pretrain::loss_and_gradients",
    _loss_and_gradients,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor labels, int chunk_rows, bool needs_hidden, bool needs_weight)"
    " -> (Tensor, Tensor, Tensor)",
)
"""The same as one operation of a compiled graph: in pieces of its own making a compiler would give each of these
buffers anew, which on a CPU took longer than what it fuses saves."""


@_opaque_loss_and_gradients.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    return hidden.new_empty((), dtype=torch.promote_types(weight.dtype, torch.float32)), d_hidden, d_weight


def log_p_and_p_(
    scores: Float[Tensor, "tokens vocabulary"], index: Int[Tensor, "tokens 1"], dtype: torch.dtype
) -> tuple[Float[Tensor, "tokens 1"], Float[Tensor, "tokens vocabulary"]]:
    """log softmax(scores) at `index`, and softmax(scores), which overwrites scores of that dtype.

    On a CPU in passes over one buffer: PyTorch's log_softmax and an exponential of its result take twice the time. On
    other devices its one kernel reads memory less often than the passes would.

    Args:
        scores: logits.
        index: a column of each row.
        dtype: fp32 or wider, of the results.
    """
    if scores.device.type != "cpu":
        log_p = torch.log_softmax(scores, dim=-1, dtype=dtype)
        return log_p.gather(1, index), log_p.exp_()
    p = scores.to(dtype)
    p.sub_(p.amax(-1, keepdim=True))
    shifted = p.gather(1, index)
    total = p.exp_().sum(-1, keepdim=True)
    return shifted - total.log(), p.div_(total)


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "vocabulary features"],
    labels: Int[Tensor, " tokens"],
    *,
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over the targets of −log softmax(hidden weightᵀ)[label], in nats.

    Args:
        hidden: final hidden states.
        weight: the head.
        labels: the next token of each row, or `IGNORE_INDEX`.
        chunk_rows: rows whose logits are held at a time; by default as many as `CHUNK_LOGITS` allows.

    Returns:
        The sum in fp32 or wider, whatever the precision of the arguments.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    rows = chunk_rows or max(1, CHUNK_LOGITS // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, rows, torch.is_grad_enabled())
