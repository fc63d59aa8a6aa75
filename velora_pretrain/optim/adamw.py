"""AdamW (arXiv 1711.05101) for plain parameters and for weights whose gradient is a rank-1 factor.

A factored weight W: (M, D) receives its gradient as C: (M, G), which stands for C ⊗ v with v: (s,), s = D / G, ‖v‖ = 1.
The moments live in (M, G) too, s times smaller than W's. Two update rules:

    dense       AdamW on C ⊗ v, element by element. Its moments are m ⊗ v and u ⊗ v², so its step is recovered exactly:
                m̂ v_j / (√û |v_j| + ε). This is what a dense optimizer would do, without its memory.
    projected   AdamW on C: ΔW = √s · m̂ / (√û + ε) ⊗ v. The step stays along v; √s gives its elements, on average, the
                size of the dense rule's.

Moments are fp32, or wider where the gradient is. Plain parameters go to PyTorch's fused kernel, so that full-rank
training is the best AdamW there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

UpdateRule = Literal["dense", "projected"]

UPDATE_ELEMENTS = 2**20
"""Elements of a factored weight that are updated at a time: bounds the temporary, and keeps it in a CPU's cache."""


def dense_step_(
    weight: Float[Tensor, "outputs features"],
    m: Float[Tensor, "outputs groups"],
    root_u: Float[Tensor, "outputs groups"],
    direction: Float[Tensor, " width"],
    *,
    lr: float,
    eps: float,
    decay: float = 0.0,
) -> None:
    """weight −= lr · m v_j / (root_u |v_j| + eps), in place: AdamW's step on the dense gradient C ⊗ v.

    Args:
        weight: W.
        m: first moment of C, bias-corrected.
        root_u: root of the second moment of C, bias-corrected.
        direction: v.
        lr: learning rate.
        eps: added to the dense root.
        decay: share of the weight that is taken off first.
    """
    # m v_j / (root_u |v_j| + eps) = m / (root_u sign(v_j) + eps / v_j): one temporary, none for the numerator.
    # Where v_j is 0, eps / v_j is infinite and the element stays, as it does under the dense rule.
    sign, floor = direction.sign(), eps / direction
    for rows, m_rows, root_rows in _row_chunks(weight, m, root_u):
        denominator = torch.addcmul(floor.to(root_rows), root_rows[..., None], sign.to(root_rows))
        # Narrow weights move in the moments' precision and are rounded once; for wide ones this is the weight itself.
        w = rows.to(m_rows.dtype)
        if decay:
            w.mul_(1 - decay)
        w.addcdiv_(m_rows[..., None], denominator, value=-lr)
        if w is not rows:
            rows.copy_(w)


def projected_step_(
    weight: Float[Tensor, "outputs features"],
    m: Float[Tensor, "outputs groups"],
    root_u: Float[Tensor, "outputs groups"],
    direction: Float[Tensor, " width"],
    *,
    lr: float,
    eps: float,
    decay: float = 0.0,
) -> None:
    """weight −= lr · √s · m / (root_u + eps) ⊗ v, in place; arguments as in `dense_step_`."""
    step = m / (root_u + eps)
    scale = -lr * math.sqrt(direction.numel())
    for rows, step_rows, _ in _row_chunks(weight, step, root_u):
        w = rows.to(step_rows.dtype)
        if decay:
            w.mul_(1 - decay)
        w.addcmul_(step_rows[..., None], direction.to(step_rows), value=scale)
        if w is not rows:
            rows.copy_(w)


def _row_chunks(weight: Tensor, *coefficients: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Rows of (M, D) as (m, G, s), beside the same rows of (M, G) tensors, `UPDATE_ELEMENTS` at a time."""
    rows = max(1, UPDATE_ELEMENTS // weight.shape[1])
    split = weight.unflatten(1, (coefficients[0].shape[1], -1))
    return zip(split.split(rows), *(c.split(rows) for c in coefficients), strict=True)


_STEPS: dict[str, Callable[..., None]] = {"dense": dense_step_, "projected": projected_step_}


class AdamW(Optimizer):
    """AdamW over plain parameters and factored weights.

    Args:
        params: parameters or groups. A parameter that is a key of `factored` is the handle P of a factored weight.
        factored: for each handle, the weight it moves (M, D), and v (s,); what `nn.velora.compressed_weights` gives.
        update: rule for factored weights.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; of factored weights it takes the dense weight.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        factored: Mapping[nn.Parameter, tuple[Tensor, Tensor]] | None = None,
        update: UpdateRule = "dense",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._factored = dict(factored or {})
        self._update = update
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step; parameters without a gradient stay."""
        assert closure is None
        for group in self.param_groups:
            plain = [p for p in group["params"] if p.grad is not None and p not in self._factored]
            if plain:
                self._step_plain(plain, group)
            for handle in group["params"]:
                if handle.grad is not None and handle in self._factored:
                    self._step_factored(handle, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; PyTorch's own would round fp32 moments to the dtype of bf16 weights."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            here = self.state[parameters[index]]
            for key, value in state.items():
                here[key] = value.to(here[key].device, copy=True) if isinstance(value, Tensor) else value

    def _moments(self, parameter: Tensor) -> dict[str, Any]:
        """Step count and moments of a parameter, in the shape of its gradient."""
        state = self.state[parameter]
        if not state:
            gradient = parameter.grad
            assert gradient is not None
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            # The fused kernel counts on the device, so that nobody waits for it; factored weights need no such care.
            on_device = torch.zeros((), dtype=torch.float32, device=gradient.device)
            state["step"] = 0 if parameter in self._factored else on_device
            state["exp_avg"] = torch.zeros_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
        return state

    def _step_plain(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        # The fused kernel wants gradients and moments in the weights' dtype. Narrow weights step in fp32, one by one,
        # so that the wide copy is never larger than one parameter.
        narrow = [p for p in parameters if p.dtype != torch.promote_types(p.dtype, torch.float32)]
        for parameter in narrow:
            weight = parameter.float()
            self._fused_step([weight], [parameter], group)
            parameter.copy_(weight)
        wide = [p for p in parameters if p.dtype == torch.promote_types(p.dtype, torch.float32)]
        if wide:
            self._fused_step(wide, wide, group)

    def _fused_step(self, weights: list[Tensor], parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One fused step of `weights`, with the gradients and states of `parameters`."""
        states = [self._moments(p) for p in parameters]
        adamw(
            weights,
            [p.grad.to(w.dtype) for p, w in zip(parameters, weights, strict=True) if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_factored(self, handle: Tensor, group: dict[str, Any]) -> None:
        weight, direction = self._factored[handle]  # type: ignore[index]
        state = self._moments(handle)
        gradient = handle.grad
        assert gradient is not None
        beta1, beta2 = group["betas"]
        m, u = state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        step = state["step"]
        m.lerp_(gradient, 1 - beta1)
        u.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        corrected_m = m / (1 - beta1**step)
        root_u = (u / (1 - beta2**step)).sqrt_()
        decay = group["lr"] * group["weight_decay"]
        _STEPS[self._update](weight, corrected_m, root_u, direction, lr=group["lr"], eps=group["eps"], decay=decay)
