"""LoRA: a frozen linear layer with a trained low-rank one beside it (arXiv 2106.09685), and its restarts (2307.05695).

For a frozen W: (M, D), with A: (r, D), B: (M, r), x: (N, D) and x̃ = dropout(x):

    forward    y = x Wᵀ + u Bᵀ       (N, D)(D, M) and (N, r)(r, M)
               u = (α/r) x̃ Aᵀ        (N, D)(D, r)
    backward   dB = dyᵀ u            (M, N)(N, r)
               du = (α/r) dy B       (N, M)(M, r)
               dA = duᵀ x̃            (r, N)(N, D)
               dx = dy W + mask ⊙ (du A) / (1 − rate)        (N, M)(M, D) and (N, r)(r, D)

B starts at zero, so that the adapted model starts as the plain one. α/r goes into u, the smallest tensor on the way.

Kept for the backward pass, per token of layers that read one x (q, k and v): x̃, D elements, and its mask, D bytes, once
for all of them, and u, r elements for each. x itself is not kept: dx of a frozen W needs W alone, and there is no dW.
For x̃ to be one tensor the layers share one dropout; PEFT draws one for each and keeps as many. Without dropout x̃ is x,
and no mask is kept. Where A's input is compressed (`nn/velora.py`), x̃ is not kept either.

Weights cost r (D + M) more; gradients and moments are r (D + M) in place of M D.

ReLoRA merges now and then, W ← W + (α/r) B A, and starts with a new A and B = 0: the sum of k restarts has rank up to
k r. A merge rounds to W's dtype, which in bf16 loses what is below 2⁻⁹ of an element.

When it does not pay: LoRA saves no activation (a plain linear keeps x alone). In operations it saves the 2 N M D of dW
and adds 6 N r (D + M), so a step is cheaper only below r = M D / 3 (D + M), 85 for D = M = 512; and a layer holds fewer
trained numbers only below r = M D / (D + M). From scratch W₀ + B A reaches few of the matrices that full rank does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from velora_pretrain.errors import UserError
from velora_pretrain.nn.llama import project
from velora_pretrain.nn.siblings import sibling_input_gradient, sibling_outputs


def merged_weight(
    weight: Float[Tensor, "outputs features"],
    a: Float[Tensor, "rank features"],
    b: Float[Tensor, "outputs rank"],
    scaling: float,
) -> Float[Tensor, "outputs features"]:
    """W + scaling · B A, summed in fp32 or wider and rounded once to W's dtype; (M, r)(r, D)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    # In place, which autocast leaves alone.
    return weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scaling).to(weight.dtype)


class _FrozenLinears(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i for frozen layers that read one x; keeps nothing but the weights.

    Plain autograd would do the same, but under autocast it keeps a narrow copy of every frozen weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_layers: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases = tensors[:num_layers], tensors[num_layers:]
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.save_for_backward(*weights)
        return sibling_outputs(x, weights, biases)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        leading_shape = dys[0].shape[:-1]
        dys = tuple(dy.flatten(0, -2) for dy in dys)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = sibling_input_gradient(dys, weights).unflatten(0, leading_shape)
        biases = [
            dy.sum(0).to(dtype) if needed else None
            for dy, dtype, needed in zip(dys, ctx.bias_dtypes, ctx.needs_input_grad[2 + len(dys) :], strict=True)
        ]
        return dx, None, *[None] * len(dys), *biases


class LoRALinear(nn.Module):
    """A linear layer whose weight stays, with a trained product of rank r beside it.

    In a state dict `weight` is the merged one, which a plain layer can take, and `base_weight` the frozen one, which
    this layer takes back. In the place of `lora_A` a layer of another kind may stand that has the call and the `weight`
    of `nn.Linear`.

    Args:
        linear: the layer whose weight and bias are taken over, not copied; the bias stays trainable.
        rank: r. One above min(M, D) is used as it stands, as PEFT does: it adds nothing but memory.
        alpha: the product is scaled by alpha / rank.
        dropout: share of the adapter's inputs that is dropped in training, drawn from torch's global generator.
        generator: on the CPU, draws A.
    """

    def __init__(
        self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.scaling, self.dropout = rank, alpha / rank, dropout
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = linear.bias
        self.lora_A = _linear_of(self.weight.new_empty(rank, self.in_features))
        self.lora_B = _linear_of(self.weight.new_empty(self.out_features, rank))
        self.restart(generator)

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """Draws A anew, Kaiming-uniform with a = √5: within ±1/√D; and sets B to zero."""
        a = torch.empty(self.rank, self.in_features, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        self.lora_A.weight.copy_(nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator))
        self.lora_B.weight.zero_()

    @torch.no_grad()
    def merged(self) -> Float[Tensor, "outputs features"]:
        """The weight of the plain layer that computes what this one does in evaluation."""
        return merged_weight(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """y = x Wᵀ + b + (alpha/r) · B(A(dropout(x)))."""
        return self.forward_siblings(x, [self])[0]

    @staticmethod
    def forward_siblings(x: Tensor, layers: Sequence[LoRALinear]) -> tuple[Tensor, ...]:
        """Outputs of layers that read one `x`, with one dropout, that of the first, so that one x̃ is kept for all.

        x itself is kept by none of them. The A's are called as layers that read one tensor, too: those whose input is
        compressed share what they keep.
        """
        if torch.is_autocast_enabled(x.device.type):
            # Once, in place of once for each A, each of which would keep its own.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        first = layers[0]
        weights, biases = (layer.weight for layer in layers), (layer.bias for layer in layers)
        outputs = cast("tuple[Tensor, ...]", _FrozenLinears.apply(x, len(layers), *weights, *biases))
        if first.training and first.dropout:
            # Of PyTorch's two dropouts this one keeps a bool mask alone, on every device.
            x, _ = torch.native_dropout(x, first.dropout, True)
        inner = project(x, *(layer.lora_A for layer in layers))
        return tuple(
            layer.lora_B(u * layer.scaling).add_(y) for layer, y, u in zip(layers, outputs, inner, strict=True)
        )

    def extra_repr(self) -> str:
        """Shape and scale, for printing; the rank is A's."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling:g},"
            f" dropout={self.dropout:g}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}base_weight"] = destination[f"{prefix}weight"]
        destination[f"{prefix}weight"] = self.merged()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        # Never the merged weight: the adapter would be in the sum twice.
        merged, base = f"{prefix}weight", f"{prefix}base_weight"
        state = {key: value for key, value in state_dict.items() if key not in (merged, base)}
        if base in state_dict:
            state[merged] = state_dict[base]
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, *args)
        missing_keys[:] = [base if key == merged else key for key in missing_keys]


def adapt_linears(
    model: nn.Module, *, layers: Sequence[str], rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> list[LoRALinear]:
    """Replaces, in place, every `nn.Linear` of `model` whose own name is in `layers`; the function stays the same.

    Args:
        model: the model; do this before it is moved, cast or wrapped, and before an optimizer is built.
        layers: last parts of the names of the linear layers.
        rank: r, of every layer.
        alpha: the products are scaled by alpha / rank.
        dropout: share of the adapters' inputs that is dropped in training.
        seed: of the A's, drawn on the CPU in the order of the layers.

    Returns:
        The new layers in the order of the model's modules.

    Raises:
        UserError: a name matches no layer.
    """
    generator = _generator(seed, 0)
    new_layers: list[LoRALinear] = []
    matched: set[str] = set()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name not in layers or not isinstance(linear, nn.Linear):
                continue
            layer = LoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout, generator=generator)
            setattr(parent, name, layer)
            new_layers.append(layer)
            matched.add(name)
    missing = [name for name in layers if name not in matched]
    if missing:
        raise UserError(f"modes.lora: no linear layer of the model is named {missing[0]}")
    return new_layers


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of every A and B: the parameters whose moments a restart resets."""
    adapters = [part for layer in _layers_of(model) for part in (layer.lora_A, layer.lora_B)]
    return [parameter for part in adapters for parameter in part.parameters() if parameter.requires_grad]


@torch.no_grad()
def merge_and_restart(model: nn.Module, *, seed: int, step: int) -> None:
    """ReLoRA's restart (arXiv 2307.05695, section 3): W ← W + (alpha/r) B A, a new A, B = 0, all in place.

    The function stays the same but for the rounding of W. The moments of `adapter_parameters` are the optimizer's.

    Args:
        model: holds `LoRALinear` layers.
        seed: of the run.
        step: at whose end this is; the draws depend on seed and step alone, so a resumed run repeats them.
    """
    generator = _generator(seed, step)
    for layer in _layers_of(model):
        layer.weight.copy_(layer.merged())
        layer.restart(generator)


def _layers_of(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def _linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight, without the draw of another from the global generator."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _generator(seed: int, step: int) -> torch.Generator:
    """Draws of one restart, unrelated to those of another and to the model's own."""
    digest = hashlib.sha256(f"{seed},{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
