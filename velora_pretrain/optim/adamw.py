"""AdamW (arXiv 1711.05101), and rules for the parameters that move otherwise.

A parameter without a rule goes to PyTorch's fused kernel, so that full-rank training is the best AdamW there is. A rule
moves one parameter from its gradient, its state and its group's settings; each memory-saving method of this package is
a rule in a file of its own, so methods combine by being given to different parameters. Moments are fp32, or wider where
the gradient is, or kept in 8 bits (`moments.py`).

The rule of this file is `Factored`. A factored weight W: (M, D) receives its gradient as C: (M, G), which stands for
C ⊗ v with v: (s,), s = D / G, ‖v‖ = 1. The moments live in (M, G) too, s times smaller than W's. Two update rules:

    dense       AdamW on C ⊗ v, element by element. Its moments are m ⊗ v and u ⊗ v², so its step is recovered exactly:
                m̂ v_j / (√û |v_j| + ε). This is what a dense optimizer would do, without its memory.
    projected   AdamW on C: ΔW = √s · m̂ / (√û + ε) ⊗ v. The step stays along v; √s gives its elements, on average, the
                size of the dense rule's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from velora_pretrain.optim.moments import keep_moment, load_moment, wide
from velora_pretrain.optim.parts import row_parts
from velora_pretrain.optim.rounding import NEAREST, Rounding, StochasticStore, Store
from velora_pretrain.optim.seeds import mixed_seed

UpdateRule = Literal["dense", "projected"]

WIDE_ELEMENTS = 2**22
"""Elements of a narrow parameter that are widened at a time for its step."""

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
    store: Store = NEAREST,
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
        store: how a narrow weight takes what it has become.
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
        store(rows, w)


def projected_step_(
    weight: Float[Tensor, "outputs features"],
    m: Float[Tensor, "outputs groups"],
    root_u: Float[Tensor, "outputs groups"],
    direction: Float[Tensor, " width"],
    *,
    lr: float,
    eps: float,
    decay: float = 0.0,
    store: Store = NEAREST,
) -> None:
    """weight −= lr · √s · m / (root_u + eps) ⊗ v, in place; arguments as in `dense_step_`."""
    step = m / (root_u + eps)
    scale = -lr * math.sqrt(direction.numel())
    for rows, step_rows, _ in _row_chunks(weight, step, root_u):
        w = rows.to(step_rows.dtype)
        if decay:
            w.mul_(1 - decay)
        w.addcmul_(step_rows[..., None], direction.to(step_rows), value=scale)
        store(rows, w)


def _row_chunks(weight: Tensor, *coefficients: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Rows of (M, D) as (m, G, s), beside the same rows of (M, G) tensors, `UPDATE_ELEMENTS` at a time."""
    split = weight.unflatten(1, (coefficients[0].shape[1], -1))
    chunks = list(row_parts(UPDATE_ELEMENTS, split, *coefficients))
    # Without memory, three show all there is to see: two whole ones in a row, and a last one that may be smaller.
    return chunks[:2] + chunks[2:][-1:] if isinstance(weight, FakeTensor) else chunks


_STEPS: dict[str, Callable[..., None]] = {"dense": dense_step_, "projected": projected_step_}


def move_moments(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Counts a step, moves both moments by `gradient`, and gives them bias-corrected: m̂ and √û.

    Args:
        gradient: of any shape, which is that of the moments.
        state: holds `step`, `exp_avg` and `exp_avg_sq` from the first call on.
        group: `betas` and `state_bits`.
    """
    beta1, beta2 = group["betas"]
    state["step"] = step = state.get("step", 0) + 1
    m, u = load_moment(state, "exp_avg", gradient), load_moment(state, "exp_avg_sq", gradient)
    m.lerp_(gradient.to(m.dtype), 1 - beta1)
    u.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    keep_moment(state, "exp_avg", m, group["state_bits"])
    keep_moment(state, "exp_avg_sq", u, group["state_bits"])
    return m / (1 - beta1**step), (u / (1 - beta2**step)).sqrt_()


def add_step_(parameter: Tensor, step: Tensor, group: dict[str, Any], *, lr: float, decay: float = 0.0) -> None:
    """parameter −= lr · step, after its decay, in place; a narrow parameter is rounded once, as its group has it."""
    weight = parameter.to(step.dtype)
    if decay:
        weight.mul_(1 - decay)
    weight.add_(step, alpha=-lr)
    store_of(group)(parameter, weight)


def store_of(group: dict[str, Any]) -> Store:
    """How the parameters of a group take what they become."""
    return group.get("store", NEAREST)


@runtime_checkable
class Rule(Protocol):
    """How a parameter moves, where that is not plain AdamW."""

    def step_(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Takes one step from `parameter.grad`.

        Args:
            parameter: the parameter that the gradient belongs to.
            state: its state, empty at first: tensors and integers.
            group: the settings of its group: lr, betas, eps, weight_decay, state_bits; and `store`, if narrow
                parameters are not rounded to the nearest.
        """


@runtime_checkable
class AccumulatingRule(Rule, Protocol):
    """A rule that sums the gradients of several micro-batches in a form of its own, smaller than the parameter."""

    def accumulate_(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Adds `parameter.grad` to `state["accumulated"]`, which the next step takes out."""


@dataclass(frozen=True, kw_only=True)
class Factored:
    """The rule of a factored weight, given to the parameter P (M, G) that receives C as its gradient."""

    weight: Tensor
    """W (M, D), which is what moves."""
    direction: Tensor
    """v (s,)."""
    update: UpdateRule = "dense"
    """See the module's docstring."""
    scale: float = 1.0
    """Factor on the step."""

    def step_(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Moves W; P stays zero."""
        assert parameter.grad is not None
        m, root_u = move_moments(parameter.grad, state, group)
        lr, decay = group["lr"] * self.scale, group["lr"] * group["weight_decay"]
        how = {"lr": lr, "eps": group["eps"], "decay": decay, "store": store_of(group)}
        _STEPS[self.update](self.weight, m, root_u, self.direction, **how)


class AdamW(Optimizer):
    """AdamW over plain parameters and those that have a rule.

    Args:
        params: parameters or groups.
        rules: for some parameters, the rule that moves them in AdamW's place.
        factored: for some parameters, each the handle P of a factored weight: the weight it moves (M, D), and v (s,);
            what `nn.velora.compressed_weights` gives.
        update: rule for factored weights.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; of factored weights it takes the dense weight.
        state_bits: 32 or 8, the bits of an element of the moments.
        rounding: how bf16 weights take their new values, see `rounding.py`.
    """

    step_seed: int = 0
    """Of what stochastic rounding draws in the next step; to be set anew before each."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        rules: Mapping[nn.Parameter, Rule] | None = None,
        factored: Mapping[nn.Parameter, tuple[Tensor, Tensor]] | None = None,
        update: UpdateRule = "dense",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        rounding: Rounding = "nearest",
    ) -> None:
        self.rules: dict[Any, Rule] = dict(rules or {})
        for handle, (weight, direction) in (factored or {}).items():
            self.rules[handle] = Factored(weight=weight, direction=direction, update=update)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_bits": state_bits}
        super().__init__(params, defaults)
        self.rounding: Rounding = rounding
        parameters = (p for group in self.param_groups for p in group["params"])
        self._places = {parameter: place for place, parameter in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step; parameters without a gradient stay."""
        assert closure is None
        for group in self.param_groups:
            moving = [p for p in group["params"] if self.gradient(p) is not None]
            plain = [p for p in moving if p not in self.rules]
            for together in (plain, *([p] for p in moving if p in self.rules)):
                if together:
                    self._move(together, group)

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Takes the step of one parameter alone; over all parameters, in any order, the same as `step`."""
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        self._move([parameter], group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Steps one parameter by its rule, or plain ones together."""
        rule = self.rules.get(parameters[0])
        if rule:
            rule.step_(parameters[0], self.state[parameters[0]], self._with_store(parameters[0], group))
        else:
            self._step_plain(parameters, group)

    def _with_store(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The group's settings for one parameter, whose draws do not depend on which others step, or when."""
        if self.rounding == "nearest":
            return group
        return {**group, "store": StochasticStore(mixed_seed("rounding", self.step_seed, self._places[parameter]))}

    @torch.no_grad()
    def accumulate(self, parameter: Tensor) -> None:
        """Where a parameter's rule has its own sum of gradients, moves the gradient there and frees it."""
        rule = self.rules.get(parameter)
        if isinstance(rule, AccumulatingRule):
            rule.accumulate_(parameter, self.state[parameter])
            parameter.grad = None

    @property
    def accumulates(self) -> bool:
        """Whether any rule has its own sum of gradients."""
        return any(isinstance(rule, AccumulatingRule) for rule in self.rules.values())

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """What has been accumulated for the next step of `parameter`, in whatever form, if anything."""
        return parameter.grad if parameter.grad is not None else self.state.get(parameter, {}).get("accumulated")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; PyTorch's own would round fp32 moments to the dtype of bf16 weights."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            here = self.state[parameters[index]]
            for key, value in state.items():
                here[key] = value.to(here[key].device, copy=True) if isinstance(value, Tensor) else value

    def _step_plain(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        # The fused kernel wants weights, gradients and moments in one wide format. Where that takes copies, parameters
        # step one by one, and some rows at a time.
        alone = [p for p in parameters if group["state_bits"] != 32 or p.dtype != wide(p.dtype)]
        together = [p for p in parameters if group["state_bits"] == 32 and p.dtype == wide(p.dtype)]
        for parameter in alone:
            self._step_alone(parameter, group)
        if together:
            states = [self._counted_state(p) for p in together]
            moments = [_moments(state, p) for state, p in zip(states, together, strict=True)]
            gradients = [p.grad for p in together if p.grad is not None]
            _fused_adamw_(together, gradients, moments, [state["step"] for state in states], group)
            for state, (m, u) in zip(states, moments, strict=True):
                state |= {"exp_avg": m, "exp_avg_sq": u}

    def _step_alone(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Steps a parameter that is narrow, or whose moments are."""
        assert parameter.grad is not None
        state, store = self._counted_state(parameter), store_of(self._with_store(parameter, group))
        m, u = _moments(state, parameter)
        for part, gradient, first, second in row_parts(WIDE_ELEMENTS, parameter, parameter.grad, m, u):
            weight = part.to(m.dtype)
            # The kernel counts the step, which is one for all rows.
            _fused_adamw_([weight], [gradient.to(m.dtype)], [(first, second)], [state["step"].clone()], group)
            store(part, weight)
        state["step"] += 1
        keep_moment(state, "exp_avg", m, group["state_bits"])
        keep_moment(state, "exp_avg_sq", u, group["state_bits"])

    def _counted_state(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's state with its count of steps, on the device, so that nobody waits for it."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state


def _moments(state: dict[str, Any], parameter: Tensor) -> tuple[Tensor, Tensor]:
    return load_moment(state, "exp_avg", parameter), load_moment(state, "exp_avg_sq", parameter)


def _fused_adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    moments: list[tuple[Tensor, Tensor]],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """PyTorch's fused kernel on tensors of one format; counts `steps` up."""
    adamw(
        weights,
        gradients,
        [m for m, _ in moments],
        [u for _, u in moments],
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
