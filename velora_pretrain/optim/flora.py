"""FLoRA: moments and summed gradients in a random subspace (arXiv 2402.03293), around Adafactor or AdamW.

The smaller side of a matrix W: (M, D) is compressed to r = `rank` by A with entries N(0, 1/r), so that E[A Aᵀ] = I and
compressing, then decompressing, is right on average. A is drawn from a seed each time it is used and is never kept:

    M ≥ D, right     A: (D, r)    compress C = G A     (M, D)(D, r)    decompress C Aᵀ    (M, r)(r, D)
    M < D, left      A: (M, r)    compress C = Aᵀ G    (r, M)(M, D)    decompress A C     (M, r)(r, D)

Written for the right side; A changes to A' after every κ = `kappa` steps.

    Adafactor (the paper's Algorithm 2; arXiv 1804.04235), β_t = 1 − t^−0.8:
        R = β_t R + (1 − β_t) mean of G² over columns; Q likewise over rows; Û = R Qᵀ / mean(R); N = G / √Û
        W −= lr · clip(β₁ m Aᵀ + (1 − β₁) N), where clip divides by the RMS if that is above 1
        m = β₁ m + (1 − β₁) N A;   every κ steps, m = (β₁ m Aᵀ + (1 − β₁) N) A' = β₁ (m Aᵀ) A' + (1 − β₁) N A'
    AdamW (our own): C = G A, m and u are its moments, W −= lr · (m̂ / (√û + ε)) Aᵀ;   every κ steps, m = m (Aᵀ A')
        (r, D)(D, r), then (M, r)(r, r), and u stays: given a row g of G, each entry of g A is N(0, ‖g‖² / r), so the
        square that u averages is expected to be the same in all entries of a row, and whatever A was.

Gradients of several micro-batches are summed compressed (Algorithm 1). Around AdamW the sum is in the subspace of the
moments and loses nothing more. Around Adafactor, which wants the dense gradient, the sum has a subspace of its own, new
in every step, and is decompressed for the step.

Kept: around Adafactor r · max(M, D) + M + D numbers, around AdamW 2 r · max(M, D), and r · max(M, D) more while
gradients are summed; dense AdamW keeps 2 M D, and M D while it sums. The cost is two GEMMs a step of 2 r M D operations
each, beside 6 N M D for the N tokens of the step; a sum of n micro-batches takes n + 1 more around Adafactor, n − 1
more around AdamW.

When it does not pay: where min(M, D) ≤ r, which is left alone. One micro-batch leaves a dense gradient beside the small
moments, unless it is stepped inside the backward pass. Decompressing a momentum or a sum multiplies its mean square by
(W + r + 1) / r, W = min(M, D), and all beyond 1 is noise. A resample leaves it in m, which therefore grows without
bound where β₁^κ √((W + r + 1) / r) ≥ 1: a small κ diverges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from velora_pretrain.optim.adamw import UPDATE_ELEMENTS, Rule, add_step_, move_moments
from velora_pretrain.optim.moments import keep_moment, load_moment, wide
from velora_pretrain.optim.parts import row_parts
from velora_pretrain.optim.seeds import mixed_seed

SQUARE_FLOOR = 1e-30
"""Added to squared gradients (ε₁ of arXiv 1804.04235, as in the reference implementation)."""
DECAY_EXPONENT = -0.8
"""Of the step, in 1 − β_t (arXiv 1804.04235, section 7.2)."""
LARGEST_RMS = 1.0
"""Of an update, before the learning rate (arXiv 1804.04235, section 6)."""


def random_projection(
    seed: int, width: int, rank: int, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "width rank"]:
    """A: entries N(0, 1 / rank), the same for the same seed on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(width, rank, generator=generator, device=device, dtype=dtype).div_(math.sqrt(rank))


@dataclass(frozen=True)
class Subspace:
    """One draw of A, and the side of a matrix that it compresses; see the module's docstring."""

    projection: Float[Tensor, "width rank"]
    """A."""
    is_left: bool
    """Whether rows are compressed, not columns."""

    def compress(self, dense: Float[Tensor, "rows columns"]) -> Float[Tensor, "small_rows small_columns"]:
        """C: (M, D)(D, r), or (r, M)(M, D)."""
        dense = dense.to(self.projection.dtype)
        return self.projection.t() @ dense if self.is_left else dense @ self.projection

    def decompress(self, compressed: Float[Tensor, "small_rows small_columns"]) -> Float[Tensor, "rows columns"]:
        """What C stands for in full: (M, r)(r, D) on either side."""
        return self.projection @ compressed if self.is_left else compressed @ self.projection.t()

    def carry(self, compressed: Float[Tensor, "rows columns"], to: Subspace) -> Float[Tensor, "rows columns"]:
        """`to.compress(self.decompress(compressed))` by way of (r, r): nothing of the matrix's size is made."""
        between = to.projection.t() @ self.projection
        return between @ compressed if self.is_left else compressed @ between.t()


@dataclass(frozen=True, kw_only=True)
class _Compressed:
    """What the compressed rules share."""

    rank: int
    """r, below both sides of the matrix."""
    kappa: int
    """κ, steps after which the moments move to a new subspace."""
    seed: int
    """Of this matrix alone."""

    def _moments_subspace(self, like: Tensor, steps: int) -> Subspace:
        """Where the moments of the matrix `like` are after `steps`: they tell the draw, so that no state need."""
        return self._subspace(like, mixed_seed(self.seed, "moments", steps // self.kappa))

    def _sum_subspace(self, like: Tensor, step: int) -> Subspace:
        """Where Adafactor's gradients of `step` are summed."""
        return self._subspace(like, mixed_seed(self.seed, "sum", step))

    def _subspace(self, like: Tensor, seed: int) -> Subspace:
        rows, columns = like.shape
        width, dtype = min(rows, columns), wide(like.dtype)
        return Subspace(random_projection(seed, width, self.rank, device=like.device, dtype=dtype), rows < columns)


Scales = tuple[Tensor, Tensor | None]
"""1 / √Û of a gradient, as factors of its rows and its columns; of each element and None, where it is no matrix."""


def move_squares(gradient: Float[Tensor, " *shape"], state: dict[str, Any], step: int) -> Scales:
    """Moves Adafactor's second moment, of rows and columns where there are both, and gives one over its root.

    Args:
        gradient: wide.
        state: holds `exp_avg_sq_row` and `exp_avg_sq_col`, or `exp_avg_sq`, from the first call on.
        step: counted from 1.
    """
    weight = step**DECAY_EXPONENT
    if gradient.ndim != 2:
        # Wide always: the root of a small second moment in 8 bits would be that of zero.
        state["exp_avg_sq"] = u = load_moment(state, "exp_avg_sq", gradient)
        return u.lerp_(gradient.square().add_(SQUARE_FLOOR), weight).rsqrt(), None
    state["exp_avg_sq_row"] = rows = load_moment(state, "exp_avg_sq_row", gradient[:, 0])
    state["exp_avg_sq_col"] = columns = load_moment(state, "exp_avg_sq_col", gradient[0])
    of_rows, of_columns = _mean_squares(gradient)
    rows.lerp_(of_rows, weight)
    columns.lerp_(of_columns, weight)
    return (rows / rows.mean()).rsqrt_()[:, None], columns.rsqrt()


def precondition(gradient: Float[Tensor, " *shape"], scales: Scales) -> Float[Tensor, " *shape"]:
    """N: the gradient, or some of its rows, over the root of the second moment."""
    of_rows, of_columns = scales
    return gradient * of_rows if of_columns is None else (gradient * of_rows).mul_(of_columns)


def _mean_squares(gradient: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Of each row and of each column."""
    # The squares of all are never in memory. Of columns, PyTorch's norm took a CPU 17 times as long as these sums.
    rows = torch.linalg.vector_norm(gradient, dim=1).square_()
    columns = torch.zeros_like(gradient[0])
    for (part,) in row_parts(UPDATE_ELEMENTS, gradient):
        columns += part.square().sum(0)
    num_rows, num_columns = gradient.shape
    return rows.div_(num_columns).add_(SQUARE_FLOOR), columns.div_(num_rows).add_(SQUARE_FLOOR)


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adafactor with a dense momentum (none where β₁ is 0), a given learning rate and decoupled decay."""

    def step_(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Takes one step; `betas[0]` is β₁, `betas[1]` and `eps` are not used."""
        state["step"] = step = state.get("step", 0) + 1
        gradient = self._take_gradient(parameter, state)
        scales = move_squares(gradient, state, step)
        update = self._momentum(gradient, scales, state, group) if group["betas"][0] else precondition(gradient, scales)
        rms = torch.linalg.vector_norm(update) / math.sqrt(update.numel())
        shrink, decay = (rms / LARGEST_RMS).clamp_(min=1.0), group["lr"] * group["weight_decay"]
        for weight, part in row_parts(UPDATE_ELEMENTS, parameter, update):
            add_step_(weight, part / shrink, group, lr=group["lr"], decay=decay)

    def _take_gradient(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """The gradient of the step, wide."""
        assert parameter.grad is not None
        return parameter.grad.to(wide(parameter.dtype))

    def _momentum(self, gradient: Tensor, scales: Scales, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Moves the momentum by the preconditioned gradient, and gives what the step is along; not to be changed."""
        m, (of_rows, of_columns) = load_moment(state, "exp_avg", gradient), scales
        for part, moment, scale in row_parts(UPDATE_ELEMENTS, gradient, m, of_rows):
            moment.lerp_(precondition(part, (scale, of_columns)), 1 - group["betas"][0])
        keep_moment(state, "exp_avg", m, group["state_bits"])
        return m


@dataclass(frozen=True, kw_only=True)
class FloraAdafactor(_Compressed, Adafactor):
    """Adafactor whose momentum is kept compressed."""

    def _momentum(self, gradient: Tensor, scales: Scales, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta1, step = group["betas"][0], state["step"]
        update = precondition(gradient, scales)
        subspace = self._moments_subspace(update, step - 1)
        compressed = subspace.compress(update)
        m = load_moment(state, "exp_avg", compressed)
        update.mul_(1 - beta1).add_(subspace.decompress(m), alpha=beta1)
        if step % self.kappa:
            m.lerp_(compressed, 1 - beta1)
        else:
            m = self._moments_subspace(update, step).compress(update)
        keep_moment(state, "exp_avg", m, group["state_bits"])
        return update


@dataclass(frozen=True, kw_only=True)
class AccumulatingFloraAdafactor(FloraAdafactor):
    """The same; gradients of several micro-batches are summed in a subspace of their own, anew in every step."""

    def accumulate_(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Adds `parameter.grad`, compressed, to `state["accumulated"]`."""
        _accumulate_(parameter, state, self._sum_subspace(parameter, state.get("step", 0) + 1))

    def _take_gradient(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        if "accumulated" not in state:
            return super()._take_gradient(parameter, state)
        subspace = self._sum_subspace(parameter, state["step"])
        if parameter.grad is not None:  # the last micro-batch, where it is stepped inside its backward pass
            _accumulate_(parameter, state, subspace)
        return subspace.decompress(state.pop("accumulated"))


@dataclass(frozen=True, kw_only=True)
class FloraAdamW(_Compressed):
    """AdamW in a random subspace of the gradient."""

    scale: float = 1.0
    """Factor on the step."""

    def step_(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Takes one step from `parameter.grad`, `state["accumulated"]` or the sum of both."""
        step = state.get("step", 0) + 1
        subspace = self._moments_subspace(parameter, step - 1)
        if parameter.grad is not None:
            _accumulate_(parameter, state, subspace)
        m, root_u = move_moments(state.pop("accumulated"), state, group)
        lr, decay = group["lr"] * self.scale, group["lr"] * group["weight_decay"]
        add_step_(parameter, subspace.decompress(m.div_(root_u.add_(group["eps"]))), group, lr=lr, decay=decay)
        if step % self.kappa == 0:
            carried = subspace.carry(load_moment(state, "exp_avg", m), self._moments_subspace(parameter, step))
            keep_moment(state, "exp_avg", carried, group["state_bits"])


@dataclass(frozen=True, kw_only=True)
class AccumulatingFloraAdamW(FloraAdamW):
    """The same; gradients of several micro-batches are summed in the subspace of the moments."""

    def accumulate_(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Adds `parameter.grad`, compressed, to `state["accumulated"]`."""
        _accumulate_(parameter, state, self._moments_subspace(parameter, state.get("step", 0)))


def _accumulate_(parameter: Tensor, state: dict[str, Any], subspace: Subspace) -> None:
    assert parameter.grad is not None
    compressed = subspace.compress(parameter.grad)
    state["accumulated"] = state["accumulated"].add_(compressed) if "accumulated" in state else compressed


def flora_rules(
    parameters: Sequence[nn.Parameter],
    others: Iterable[nn.Parameter],
    *,
    rank: int,
    kappa: int,
    inner: Literal["adafactor", "adamw"] = "adafactor",
    accumulation: Literal["compressed", "dense"] = "compressed",
    seed: int = 0,
) -> dict[nn.Parameter, Rule]:
    """Rules for `optim.adamw.AdamW`; a parameter that gets none is AdamW's.

    Args:
        parameters: matrices to be compressed, each with a seed of its own from its place in this order. One that is no
            wider than `rank` moves uncompressed.
        others: parameters that move uncompressed.
        rank: r.
        kappa: κ, steps between resamples.
        inner: the optimizer around the compression.
        accumulation: whether gradients of several micro-batches are summed compressed.
        seed: of the run.
    """
    kinds: dict[tuple[str, str], type[FloraAdafactor] | type[FloraAdamW]] = {
        ("adafactor", "compressed"): AccumulatingFloraAdafactor,
        ("adafactor", "dense"): FloraAdafactor,
        ("adamw", "compressed"): AccumulatingFloraAdamW,
        ("adamw", "dense"): FloraAdamW,
    }
    kind = kinds[inner, accumulation]
    rules: dict[nn.Parameter, Rule] = {}
    if inner == "adafactor":
        rules |= dict.fromkeys([*parameters, *others], Adafactor())
    for index, parameter in enumerate(parameters):
        if min(parameter.shape) > rank:
            rules[parameter] = kind(rank=rank, kappa=kappa, seed=mixed_seed(seed, index))
    return rules
