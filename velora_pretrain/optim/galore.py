"""GaLore: Adam's moments of the gradient's projection on its leading subspace (arXiv 2403.03507, sections 3 and 4).

For a weight W: (M, D) with gradient G, the smaller side is projected on `rank` (r) orthonormal directions P, found anew
every `update_gap` (T) steps. With M ≥ D (right; where M < D all is transposed, P: (M, r), moments (r, D)):

    refresh    P: (r, D)  the leading right singular vectors of G, once in T steps
    project    R = G Pᵀ                  (M, D)(D, r)
    moments    m, u of R                 Adam's, bias-corrected: m̂, û; kept as they are over a refresh
    step       ΔW = −lr · scale · N P    (M, r)(r, D), with N = m̂ / (√û + ε)

Decay is decoupled, lr · weight_decay. Kept in fp32: P, r · min(M, D) numbers, and m and u, r · max(M, D) each. Plain
AdamW keeps 2 M D, so a square matrix breaks even at r = 2/3 D. In 8 bits, where P stays fp32, that is at r = D/3.

The subspace. GaLore takes it from a full SVD of each gradient, all of them in the same step. Here it is found by
randomised subspace iteration (arXiv 0909.4061, algorithm 4.4) on the Gram matrix of the smaller side, k = min(M, D),
with l = r + max(r / 6, k / 24, 16) columns:

    Gram matrix    A = Gᵀ G / ‖G‖²                           (D, M)(M, D), once, in bf16 where that is native
    start          Q = orth(A Ω), Ω Gaussian                 (k, k)(k, l)
    filter         Q = orth(T₃(2 A / c − 1) Q)               (k, k)(k, l) three times, and QR; twice if max(M, D) ≥ 10 l
    end            P = leading r eigenvectors of Qᵀ A Q      (k, k)(k, l), (l, k)(k, l), eigenproblem of l

Plain powers of A hardly tell apart the eigenvalues of a flat spectrum: at 1376×512 and r = 128 five applications, as
here, capture 97 % of what the SVD's subspace does of Gaussian numbers. The Chebyshev polynomial T₃ (Zhou and Saad, SIAM
J. Matrix Anal. Appl. 29, 2007) holds eigenvalues below c down and lets those above grow. c is the r-th Ritz value,
which never exceeds the r-th eigenvalue. Then it is 99 % at any rank, of Gaussian numbers, of low rank and noise, and of
singular values i^-p with p ≥ 1/4; 98.5 % at p = 1/20. The exact rival, all eigenvectors of A, costs a third of the SVD;
see `tools/bench_subspace.py`.

When it does not pay: gradients are as large as ever, unless each is freed as it is used (`in_backward`). Matrices so
small that moments are no burden; ranks near the smaller side; gradients whose energy does not lie in few directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from velora_pretrain.optim.adamw import UPDATE_ELEMENTS, add_step_, move_moments
from velora_pretrain.optim.moments import wide
from velora_pretrain.optim.parts import row_parts

Finder = Literal["randomised", "svd"]

SMALLEST_CUT = 1e-6
"""Share of the energy below which an eigenvalue of a Gram matrix in fp32 is rounding; bounds the filter's growth."""


GRAM_BLOCKS, SMALLEST_BLOCK = 4, 128
"""Block rows of a Gram matrix, and the fewest rows of one that a matrix product is efficient on."""


def exact_subspace(gradient: Float[Tensor, "outputs features"], rank: int) -> Float[Tensor, "_ _"]:
    """The leading singular vectors of the smaller side, by a full SVD: GaLore's own way (section 4.2).

    Args:
        gradient: G (M, D).
        rank: r, at most the smaller side.

    Returns:
        P with orthonormal rows (r, D) where M ≥ D, orthonormal columns (M, r) where M < D.
    """
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    # Copies, since a slice would keep all singular vectors alive.
    vectors = right[:rank] if _projects_right(gradient) else left[:, :rank]
    return vectors.clone(memory_format=torch.contiguous_format)


def randomised_subspace(
    gradient: Float[Tensor, "outputs features"], rank: int, generator: torch.Generator | None = None
) -> Float[Tensor, "_ _"]:
    """Directions that capture nearly the energy which those of `exact_subspace` do; see the module's docstring.

    Args:
        gradient: G (M, D), in fp32 or wider.
        rank: r, at most the smaller side.
        generator: source of the random start, on the gradient's device.

    Returns:
        P as of `exact_subspace`.
    """
    right = _projects_right(gradient)
    tall = gradient if right else gradient.t()
    gram = gram_matrix(tall)
    side = len(gram)
    gram /= gram.trace().clamp_min(torch.finfo(gram.dtype).tiny)
    width = min(side, rank + max(rank // 6, side // 24, 16))
    start = torch.randn(side, width, generator=generator, device=gram.device, dtype=gram.dtype)
    basis = torch.linalg.qr(gram @ start).Q
    # A second filter where the Gram matrix, (k, M)(M, k), has cost so much more that it is nearly free.
    for _ in range(2 if len(tall) >= 10 * width else 1):
        image = gram @ basis
        cut = _eigenvalues(basis.t() @ image)[-rank].clamp_min(SMALLEST_CUT)
        basis = torch.linalg.qr(_filter(gram, basis, image, cut)).Q
    # Eigenvalues come in ascending order.
    vectors = torch.linalg.eigh(basis.t() @ (gram @ basis)).eigenvectors[:, -rank:].flip(1)
    return vectors.t() @ basis.t() if right else basis @ vectors


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """In ascending order; `torch.linalg.eigvalsh` gives other bits where a memory tracker watches operations."""
    return torch.ops.aten._linalg_eigh(symmetric, "L", False)[0]


def gram_matrix(tall: Float[Tensor, "long short"]) -> Float[Tensor, "short short"]:
    """XᵀX, in bf16 where the device multiplies that natively: rounding by 2⁻⁹ hardly turns the subspace.

    Elsewhere in `GRAM_BLOCKS` block rows of its upper triangle, mirrored: five eighths of the operations.
    """
    if tall.dtype == torch.float32 and _multiplies_bf16(tall.device.type):
        narrow = tall.to(torch.bfloat16)
        return (narrow.t() @ narrow).to(tall.dtype)
    side = tall.shape[1]
    step = max(SMALLEST_BLOCK, -(-side // GRAM_BLOCKS))
    gram = tall.new_empty(side, side)
    for begin in range(0, side, step):
        rows = slice(begin, begin + step)
        gram[rows, begin:] = tall[:, rows].t() @ tall[:, begin:]
        gram[rows, :begin] = gram[:begin, rows].t()
    return gram


@cache
def _multiplies_bf16(device_type: str) -> bool:
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _filter(gram: Tensor, basis: Tensor, image: Tensor, cut: Tensor) -> Tensor:
    """T₃(2 A / cut − 1) Q by the three-term recurrence, given Q and its image A Q."""
    operator = gram * (2 / cut)
    operator.diagonal().sub_(1)
    first = image * (2 / cut) - basis
    second = torch.addmm(basis, operator, first, beta=-1, alpha=2)
    return torch.addmm(first, operator, second, beta=-1, alpha=2)


def project(gradient: Float[Tensor, "outputs features"], projection: Float[Tensor, "_ _"]) -> Float[Tensor, "_ _"]:
    """R: G Pᵀ (M, r) where M ≥ D, Pᵀ G (r, D) where M < D."""
    return gradient @ projection.t() if _projects_right(gradient) else projection.t() @ gradient


def project_back(low_rank: Float[Tensor, "_ _"], projection: Float[Tensor, "_ _"]) -> Float[Tensor, "outputs features"]:
    """N P or P N: what a low-rank (M, r) or (r, D) stands for in full size (M, D)."""
    left, right = _factors(low_rank, projection)
    return left @ right


def _factors(low_rank: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    # (M, r) is never wide, since r ≤ D ≤ M; (r, D) always is, since r ≤ M < D.
    return (low_rank, projection) if _projects_right(low_rank) else (projection, low_rank)


def _projects_right(matrix: Tensor) -> bool:
    return matrix.shape[0] >= matrix.shape[1]


@dataclass(frozen=True, kw_only=True)
class GaLore:
    """The rule of a weight W (M, D) whose moments are of the projected gradient.

    The state holds `step`, `projection`, and both moments in the shape of the projected gradient.
    """

    rank: int
    """r, at most the smaller side of the weight."""
    scale: float = 0.25
    """Factor on the step; the paper's α."""
    update_gap: int = 200
    """Steps from one refresh of the projection to the next; the paper's T."""
    offset: int = 0
    """Steps by which refreshes come earlier than after each full gap, so that not all weights refresh in one step."""
    finder: Finder = "randomised"
    """How the projection is found."""
    seed: int = 0
    """Of the randomised finder, together with the step, so that a resumed run draws the same."""

    def step_(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Moves the parameter within the directions of its projection."""
        m, root_u = move_moments(self._low_rank_gradient(parameter, state), state, group)
        left, right = _factors(m.div_(root_u.add_(group["eps"])), state["projection"])
        lr, decay = group["lr"] * self.scale, group["lr"] * group["weight_decay"]
        # Some rows at a time, so that the step is never there in full size.
        for weight, coefficients in row_parts(UPDATE_ELEMENTS, parameter, left):
            add_step_(weight, coefficients @ right, group, lr=lr, decay=decay)

    def _low_rank_gradient(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """R; finds P first where a refresh is due."""
        assert parameter.grad is not None
        gradient = parameter.grad.to(wide(parameter.grad.dtype))
        steps_done = state.get("step", 0)
        if "projection" not in state or (steps_done + self.offset) % self.update_gap == 0:
            state["projection"] = self._find(gradient, steps_done + 1)
        return project(gradient, state["projection"])

    def _find(self, gradient: Tensor, step: int) -> Tensor:
        if self.finder == "svd":
            return exact_subspace(gradient, self.rank)
        seed = (self.seed * 1_000_003 + step) % 2**63
        return randomised_subspace(gradient, self.rank, torch.Generator(gradient.device).manual_seed(seed))


def galore_rules(
    parameters: Sequence[nn.Parameter],
    *,
    rank: int,
    scale: float = 0.25,
    update_gap: int = 200,
    finder: Finder = "randomised",
    seed: int = 0,
) -> dict[nn.Parameter, GaLore]:
    """Rules for matrices, with refreshes spread evenly over the gap; the first step alone takes all of them.

    A matrix whose smaller side is not above `rank` gets no rule: a projection would save nothing, so it moves by plain
    AdamW.

    Args:
        parameters: matrices.
        rank: r.
        scale: see `GaLore`.
        update_gap: see `GaLore`.
        finder: see `GaLore`.
        seed: see `GaLore`.
    """
    projected = [parameter for parameter in parameters if min(parameter.shape) > rank]
    return {
        parameter: GaLore(
            rank=rank,
            scale=scale,
            update_gap=update_gap,
            offset=index * update_gap // len(projected),
            finder=finder,
            seed=seed,
        )
        for index, parameter in enumerate(projected)
    }
