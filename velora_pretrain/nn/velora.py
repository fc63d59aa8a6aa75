"""VeLoRA: linear layers that keep one number per sub-token for the backward pass (arXiv 2405.17991, section 3).

For y = x Wᵀ with x: (N, D), W: (M, D), each token is split into G = `num_groups` sub-tokens of width s = D / G, and
v: (s,) is a unit vector. The paper keeps z[n, g] = ⟨x[n, g·s:(g+1)·s], v⟩ in place of x and rebuilds
x̂[n, g·s+j] = z[n, g] v[j] for the weight gradient. Here x̂ is never rebuilt, because the gradient factors:

    forward    y = x Wᵀ         (N, D)(D, M)       exact
               z = x · v        (N·G, s)(s)        all that is kept of x: s times less
    backward   dx = dy W        (N, M)(M, D)       exact
               C = dyᵀ z        (M, N)(N, G)       s times fewer operations than dyᵀ x̂;  dyᵀ x̂ = C ⊗ v

C is dL/dP of W(P) = W₀ + P ⊗ v, so autograd is given P (`coefficients`) as the parameter: its gradient, and with it
accumulation, norm clipping (‖C‖ = ‖C ⊗ v‖), all-reduce and Adam's moments, is (M, G), s times smaller than W. P itself
is zero always and takes no memory (one number, expanded); the optimizer moves `weight`.

When it does not pay: a layer whose input another layer keeps anyway (v_proj beside uncompressed q_proj and k_proj)
saves no activation, only the cheaper gradient; and inputs far from v give a gradient far from the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from velora_pretrain.errors import UserError
from velora_pretrain.nn.direction import Direction, Initialisation
from velora_pretrain.nn.siblings import sibling_input_gradient, sibling_outputs

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one block that read the same tensor."""

KEPT_ANYWAY = {"o_proj": "the attention"}
"""Projections whose input another part of the block keeps for its own backward pass."""


def compress(x: Float[Tensor, "*batch features"], direction: Float[Tensor, " width"]) -> Float[Tensor, "*batch groups"]:
    """z: the inner product of each sub-token of `x` with the unit vector `direction` (v)."""
    return x.unflatten(-1, (-1, direction.numel())) @ direction.to(x.dtype)


def expand(
    coefficients: Float[Tensor, "*batch groups"], direction: Float[Tensor, " width"]
) -> Float[Tensor, "*batch features"]:
    """Coefficients ⊗ v: what (M, G) or (N, G) coefficients stand for in full width."""
    return (coefficients[..., None] * direction.to(coefficients.dtype)).flatten(-2)


def keepers_of_inputs(layers: Sequence[str], *, are_copies: bool = False) -> dict[str, str]:
    """For each compressed layer that saves no activation: who keeps its input alive all the same.

    Args:
        layers: names of the compressed layers of a block.
        are_copies: whether they read copies of what the rest of the block reads, after a dropout.
    """
    keepers = {} if are_copies else {name: keeper for name, keeper in KEPT_ANYWAY.items() if name in layers}
    for siblings in SIBLINGS:
        others = [name for name in siblings if name not in layers]
        if others:
            keepers |= {name: " and ".join(others) for name in siblings if name in layers}
    return keepers


def default_num_groups(features: int) -> int:
    """Number of sub-tokens that brings their width, a divisor of `features`, nearest to 16 in ratio."""
    divisors = [width for width in range(1, features + 1) if features % width == 0]
    return features // min(divisors, key=lambda width: (max(width / 16, 16 / width), width))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _CompressedLinears(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i for layers that read one x; keeps z (N, G) once for all of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, direction: Tensor, scale: float, num_layers: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases = tensors[:num_layers], tensors[num_layers : 2 * num_layers]
        ctx.scale, ctx.num_layers, ctx.gradient_dtypes = scale, num_layers, [t.dtype for t in tensors[2 * num_layers :]]
        ctx.save_for_backward(compress(x, direction), *weights)
        return sibling_outputs(x, weights, biases)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        z, *weights = ctx.saved_tensors
        leading_shape = dys[0].shape[:-1]
        dys = tuple(dy.flatten(0, -2) for dy in dys)
        needs = ctx.needs_input_grad
        needs_bias, needs_coefficients = needs[4 + ctx.num_layers :][: ctx.num_layers], needs[4 + 2 * ctx.num_layers :]

        dx = None
        if needs[0]:
            dx = sibling_input_gradient(dys, weights).unflatten(0, leading_shape)

        z = z.flatten(0, -2)
        if ctx.scale != 1.0:
            z = z * ctx.scale
        # C: (M, N)(N, G), one for each layer
        coefficients = [
            (dy.t() @ z).to(dtype) if needed else None
            for dy, dtype, needed in zip(dys, ctx.gradient_dtypes, needs_coefficients, strict=True)
        ]
        biases = [dy.sum(0) if needed else None for dy, needed in zip(dys, needs_bias, strict=True)]
        return dx, None, None, None, *[None] * ctx.num_layers, *biases, *coefficients


class VeLoRALinear(nn.Module):
    """A linear layer whose input is kept compressed and whose weight gradient is C: (M, G).

    `weight` is moved by the optimizer, not by autograd; `coefficients` (P) receives the gradient.

    Args:
        linear: the layer whose weight and bias are taken over, not copied.
        direction: v of its input.
        scale: factor on the weight gradient.
    """

    coefficients: nn.Parameter
    keeps_input = False
    """Of what it reads, only z is kept for the backward pass."""

    def __init__(self, linear: nn.Linear, direction: Direction, *, scale: float = 1.0) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = scale
        self._is_writable = False
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = linear.bias
        self.direction = direction
        self.coefficients = nn.Parameter(self._zero_coefficients())

    def _zero_coefficients(self) -> Tensor:
        # Its dtype is that of the gradient it receives: fp32 at least.
        zero = torch.zeros((), dtype=_wide(self.weight.dtype), device=self.weight.device)
        zeros = zero.expand(self.out_features, self.direction.num_groups)
        return zeros.contiguous() if self._is_writable else zeros

    def make_coefficients_writable(self) -> None:
        """Gives P memory of its own, for a wrapper that writes to every parameter, if only what they are."""
        self._is_writable = True
        self.coefficients.data = self._zero_coefficients()

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """y = x Wᵀ + b; gradients as in the module's docstring."""
        return self.forward_siblings(x, [self])[0]

    @staticmethod
    def forward_siblings(x: Tensor, layers: Sequence[VeLoRALinear]) -> tuple[Tensor, ...]:
        """Outputs of layers that read one `x`; those with one direction compress it once and keep it once."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        outputs: dict[VeLoRALinear, Tensor] = {}
        for direction in dict.fromkeys(layer.direction for layer in layers):
            group = [layer for layer in layers if layer.direction is direction]
            direction.watch(x)
            if not torch.is_grad_enabled():
                outputs |= {layer: F.linear(x, layer.weight.to(x.dtype), layer.bias) for layer in group}
                continue
            tensors = (
                *(layer.weight for layer in group),
                *(layer.bias for layer in group),
                *(layer.coefficients for layer in group),
            )
            scale = group[0].scale
            outputs |= zip(
                group, _CompressedLinears.apply(x, direction.vector, scale, len(group), *tensors), strict=True
            )
        return tuple(outputs[layer] for layer in layers)

    def extra_repr(self) -> str:
        """Shape and sub-tokens, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_groups={self.direction.num_groups}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Always zero: a checkpoint of the layer is the weight, as if it were uncompressed, and v.
        destination.pop(f"{prefix}coefficients", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({f"{prefix}coefficients": self.coefficients, **state_dict}, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VeLoRALinear:
        super()._apply(fn, recurse)
        # A move would write the expanded zero out in full, and a cast would round the gradient it receives.
        self.coefficients.data = self._zero_coefficients()
        return self


def compress_linears(
    model: nn.Module,
    *,
    layers: Sequence[str] = ("v_proj", "down_proj"),
    num_groups: Mapping[str, int] | None = None,
    init: Initialisation = "batch_average_once",
    keeps_basis: bool = False,
    scale: float = 1.0,
    seed: int = 0,
) -> list[VeLoRALinear]:
    """Replaces, in place, every `nn.Linear` of `model` whose own name is in `layers` and whose weight trains.

    Works on any module tree; Hugging Face's LlamaForCausalLM has the names q_proj, k_proj, v_proj, o_proj, gate_proj,
    up_proj and down_proj. Layers of one parent that read one tensor (`SIBLINGS`) share their direction. Of an adapter
    in a projection's place (`nn/lora.py`), the `nn.Linear` named `lora_A` is replaced.

    Args:
        model: the model; do this before it is moved, cast or wrapped, and before an optimizer is built.
        layers: last parts of the names of the linear layers.
        num_groups: sub-tokens per token by layer name; `default_num_groups` for names that are missing.
        init: see `Direction`; `running_average` wants `move_running_averages` after each step.
        keeps_basis: see `Direction`.
        scale: factor on the weight gradients.
        seed: of `random` directions.

    Returns:
        The new layers in the order of the model's modules.

    Raises:
        UserError: a name matches no layer, a weight belongs to others too, or a number of groups does not divide a
            width.
    """
    generator = torch.Generator().manual_seed(seed)
    directions: dict[tuple[str, str, int], Direction] = {}
    new_layers: list[VeLoRALinear] = []
    # All are looked at before one is replaced: a mistake leaves the model as it was.
    for place in _places(model, layers, num_groups or {}):
        linear = place.linear
        family = next((siblings[0] for siblings in SIBLINGS if place.name in siblings), place.name)
        key = (place.parent_name, family, place.num_groups)
        if key not in directions:
            directions[key] = Direction(
                linear.in_features,
                place.num_groups,
                init=init,
                keeps_basis=keeps_basis,
                generator=generator,
                device=linear.weight.device,
                dtype=_wide(linear.weight.dtype),
            )
        layer = VeLoRALinear(linear, directions[key], scale=scale)
        setattr(place.owner, place.attribute, layer)
        new_layers.append(layer)
    return new_layers


class _Place(NamedTuple):
    """Where a linear layer is to be replaced."""

    parent_name: str
    name: str
    owner: nn.Module
    attribute: str
    linear: nn.Linear
    num_groups: int


def _places(model: nn.Module, layers: Sequence[str], num_groups: Mapping[str, int]) -> list[_Place]:
    """Every place in the order of the model's modules; raises as `compress_linears`."""
    places: list[_Place] = []
    known: dict[str, None] = {}
    holders: dict[Tensor, list[str]] = {}
    for parent_name, parent in model.named_modules():
        for name, module in parent.named_children():
            for parameter in module.parameters(recurse=False):
                holders.setdefault(parameter, []).append(f"{parent_name}.{name}".lstrip("."))
    for parent_name, parent in model.named_modules():
        for name, module in parent.named_children():
            # Where an adapter stands in a projection's place, it is the adapter's A that would keep the input.
            owner, attribute = (parent, name) if isinstance(module, nn.Linear) else (module, "lora_A")
            linear = getattr(owner, attribute, None)
            if not isinstance(linear, nn.Linear) or not linear.weight.requires_grad:
                continue
            known[name] = None
            if name not in layers:
                continue
            if len(holders[linear.weight]) > 1:
                together = " and ".join(holders[linear.weight])
                raise UserError(
                    f"modes.velora.layers: {together} have one weight, which only the sum of their gradients could"
                    f" move; leave {name} out, or untie it first"
                )
            features = linear.in_features
            groups = num_groups.get(name) or default_num_groups(features)
            if features % groups:
                raise UserError(
                    f"modes.velora.num_groups.{name}: {groups} sub-tokens do not divide the width {features} of"
                    f" {parent_name}.{name}; for example {default_num_groups(features)} do"
                )
            places.append(_Place(parent_name, name, owner, attribute, linear, groups))
    missing = [name for name in layers if name not in known]
    if missing:
        raise UserError(
            f"modes.velora.layers: no linear layer of the model is named {missing[0]}; those that train are"
            f" {', '.join(known) or 'none'}"
        )
    return places


def compressed_weights(model: nn.Module) -> dict[nn.Parameter, tuple[nn.Parameter, Tensor]]:
    """For each parameter P of compressed gradients: the weight that it moves, and v. What `AdamW` asks for."""
    return {
        layer.coefficients: (layer.weight, layer.direction.vector)
        for layer in model.modules()
        if isinstance(layer, VeLoRALinear)
    }
