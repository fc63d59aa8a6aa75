"""LLaMA (arXiv 2302.13971), from scratch, with Hugging Face's module names.

RMSNorm before attention and MLP, rotary position embeddings, causal attention with optional grouped queries
(arXiv 2305.13245), SwiGLU, an untied head. Logits and gradients are those of transformers' LlamaForCausalLM.

What a block keeps for its backward pass, per token, with hidden width D and MLP width I (grouped queries aside):

    norms        2 D    their inputs; the inverse roots are one number each
    q, k, v      D      the first norm's output, once for the three        (gone where all three are compressed)
    attention    4 D    rotated q and k, v, the output (which o_proj shares)
    gate, up     D      the second norm's output, once for the two         (gone where both are compressed)
    SwiGLU       2 I    gate and up
    down         I      the product                                        (gone where down is compressed)

The seam for memory-saving modes is the seven projections of a block: any module with the call of `nn.Linear` can stand
in their place, and one with a static `forward_siblings(x, layers)` is called once for all layers that read one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.nn.loss import linear_cross_entropy
from velora_pretrain.nn.recompute import Recompute, is_recomputing, rebuilt_in_backward, run_again_in_backward


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product on `x` would run in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


CPU_ELEMENTS, DEVICE_ELEMENTS = 2**17, 2**24
"""Fewest elements whose gradients are made at a time: a CPU has them in its cache, another device is filled by them."""
MOST_PIECES = 16
"""Most pieces that a tensor's gradients are made in."""


def rows_at_a_time(x: Float[Tensor, "*batch features"]) -> int:
    """How many rows of an elementwise backward pass are made at a time; under a compiler, which fuses it, all."""
    rows = x.numel() // x.shape[-1]
    if torch.compiler.is_compiling():
        return max(1, rows)
    fewest = CPU_ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS
    return max(1, fewest // x.shape[-1], -(-rows // MOST_PIECES))


def _normalised(x: Tensor, inverse_root: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * inverse_root).mul_(weight).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """y = x r ⊙ w with r = (mean(x²) + ε)^(−1/2); keeps x and r, not the normalised x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse_root = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_root)
        ctx.mark_non_differentiable(inverse_root)
        return _normalised(x, inverse_root, weight, dtype), inverse_root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_root = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = torch.zeros_like(weight, dtype=inverse_root.dtype) if ctx.needs_input_grad[1] else None
        flat = [tensor.flatten(0, -2) for tensor in (x, inverse_root, dy, dx)]
        # Some rows at a time: beside dx nothing of its size is made.
        for rows, root, dy_rows, dx_rows in zip(*(t.split(rows_at_a_time(x)) for t in flat), strict=True):
            normalised = rows * root
            dy_rows = dy_rows.to(normalised.dtype)
            # dw = Σ dy ⊙ x̂;  dx = r (dy ⊙ w − x̂ mean(dy ⊙ w ⊙ x̂)) with x̂ = x r
            if d_weight is not None:
                d_weight += (dy_rows * normalised).sum(0)
            dx_wide = dy_rows * weight
            mean = torch.linalg.vecdot(dx_wide, normalised).div_(x.shape[-1]).unsqueeze(-1)
            dx_rows.copy_(dx_wide.addcmul_(normalised, mean, value=-1).mul_(root))
        return dx, None if d_weight is None else d_weight.to(weight.dtype), None, None


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), in fp32 or wider inside."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """x over its root mean square, times the weight; in the dtype of the products that read it."""
        return _RMSNorm.apply(x, self.weight, self.eps, _compute_dtype(x))[0]

    def rebuildable(self, x: Float[Tensor, "*batch features"]) -> tuple[Tensor, Callable[[], Tensor]]:
        """The same, and how to make it again from what is kept anyway."""
        dtype, weight = _compute_dtype(x), self.weight
        y, inverse_root = _RMSNorm.apply(x, weight, self.eps, dtype)
        x = x.detach()
        return y, lambda: _normalised(x, inverse_root, weight, dtype)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) ⊙ up; keeps gate and up, not silu(gate).

    The backward pass writes the gradients over gate and up, some elements at a time: of the four tensors of their size
    that it would have made, none is there at the peak, and a CPU finds in its cache what it has just written.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, is_read: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()  # rows of them are written in the backward pass
        ctx.save_for_backward(gate, up)
        ctx.is_spent = False
        return _product(gate, up) if is_read else gate.new_zeros(()).expand_as(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # A compiler fuses this, and reuses memory by itself.
            return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate) * dy, None
        # Autograd's own check of versions does not see through hooks on saved tensors.
        if ctx.is_spent:
            raise RuntimeError(
                "a second backward pass over one graph: gate and up were modified by an inplace operation"
            )
        ctx.is_spent = True
        flat = (tensor.flatten(0, -2).split(rows_at_a_time(gate)) for tensor in (gate, up, dy))
        for gate_rows, up_rows, dy_rows in zip(*flat, strict=True):
            d_up = F.silu(gate_rows).mul_(dy_rows)
            up_rows.mul_(dy_rows)
            torch.ops.aten.silu_backward.grad_input(up_rows, gate_rows, grad_input=gate_rows)
            up_rows.copy_(d_up)
        return gate, up, None


def swiglu_(
    gate: Float[Tensor, "*batch width"], up: Float[Tensor, "*batch width"], *, is_read: bool = True
) -> Float[Tensor, "*batch width"]:
    """silu(gate) ⊙ up (arXiv 2002.05202). The backward pass overwrites gate and up, which nobody else may hold.

    Args:
        gate: before the nonlinearity.
        up: what it gates.
        is_read: whether the value is wanted, and not the place in the graph alone; else it is zeros without memory.
    """
    return _SwiGLU.apply(gate, up, is_read)


def rotary_tables(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "length head"], Float[Tensor, "length head"]]:
    """Cosines and sines of the rotary angles (arXiv 2104.09864), the two halves of a head alike."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1).to(wide)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x ⊙ cos, plus x with its halves swapped and the first negated ⊙ sin: in three passes, without a copy of x."""
    cosines, sines = cosines[:, None], sines[:, None]
    half = x.shape[-1] // 2
    y = x * cosines
    y[..., :half].addcmul_(x[..., half:], sines[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sines[..., half:])
    return y


class _Rotation(torch.autograd.Function):
    """Keeps nothing of x: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(dy, cosines, -sines), None, None


def rotate(
    x: Float[Tensor, "batch length heads head"],
    cosines: Float[Tensor, "length head"],
    sines: Float[Tensor, "length head"],
) -> Float[Tensor, "batch length heads head"]:
    """Rotates the pairs (x[i], x[i + head/2]) by their position's angles."""
    return _Rotation.apply(x, cosines, sines)


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Outputs of layers that read one tensor; a kind of layer that can share work between them is asked to."""
    outputs: list[Tensor] = []
    # Not by itertools.groupby, which torch.compile does not trace.
    while len(outputs) < len(layers):
        rest = layers[len(outputs) :]
        kind = type(rest[0])
        together = getattr(kind, "forward_siblings", None)
        if together:
            others = [place for place, layer in enumerate(rest) if type(layer) is not kind]
            outputs.extend(together(x, list(rest[: others[0]] if others else rest)))
        else:
            outputs.append(rest[0](x))
    return outputs


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.is_grouped = config.num_key_value_heads < config.num_attention_heads
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch length hidden"], cosines: Tensor, sines: Tensor) -> Tensor:
        """Mixes positions, each with those before it."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.is_grouped
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: LlamaConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.rebuilds_product = recompute == "elementwise"
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch length hidden"]:
        """down(silu(gate(x)) ⊙ up(x))."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        product = swiglu_(gate, up)
        if not self.rebuilds_product:
            return self.down_proj(product)
        gate, up = gate.detach(), up.detach()
        with rebuilt_in_backward(product, lambda: _product(gate, up)):
            return self.down_proj(product)

    def run_again(self, x: Float[Tensor, "batch length hidden"], norm: RMSNorm) -> Float[Tensor, "batch length hidden"]:
        """self(norm(x)), of which only x is kept, and what `down_proj` keeps if that is not its whole input."""
        if getattr(self.down_proj, "keeps_input", True):
            return run_again_in_backward(lambda x: self(norm(x)), x)
        # Outside: inside, its matrix product would be repeated for nothing.
        return self.down_proj(run_again_in_backward(lambda x: self._gated(norm(x)), x))

    def _gated(self, x: Tensor) -> Tensor:
        """silu(gate(x)) ⊙ up(x); when run again, only what it keeps is made, not its value, which nobody reads."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        return swiglu_(gate, up, is_read=not is_recomputing())


class Block(nn.Module):
    """One transformer block: attention, then MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.recompute: Recompute = recompute
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, recompute)

    def forward(self, x: Float[Tensor, "batch length hidden"], cosines: Tensor, sines: Tensor) -> Tensor:
        """The next state of the residual stream."""
        if self.recompute == "block":
            return run_again_in_backward(self._through, x, cosines, sines)
        return self._through(x, cosines, sines)

    def _through(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        rebuilds_norms = self.recompute in ("elementwise", "mlp")
        x = x + _after_norm(
            self.input_layernorm, x, lambda normalised: self.self_attn(normalised, cosines, sines), rebuilds_norms
        )
        if self.recompute == "mlp":
            return x + self.mlp.run_again(x, self.post_attention_layernorm)
        return x + _after_norm(self.post_attention_layernorm, x, self.mlp, rebuilds_norms)


def _after_norm(norm: RMSNorm, x: Tensor, layer: Callable[[Tensor], Tensor], rebuilds: bool) -> Tensor:
    """layer(norm(x)); with `rebuilds`, what the layer would keep of norm(x) is made again in the backward pass."""
    if not rebuilds:
        return layer(norm(x))
    normalised, make = norm.rebuildable(x)
    with rebuilt_in_backward(normalised, make):
        return layer(normalised)


class Trunk(nn.Module):
    """Embedding, blocks and final norm: everything but the head."""

    def __init__(self, config: LlamaConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, recompute) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length hidden"]:
        """Final hidden states."""
        x = self.embed_tokens(tokens)
        cosines, sines = rotary_tables(
            tokens.shape[1], self.config.head_dim, self.config.rope_theta, x.device, _compute_dtype(x)
        )
        for block in self.layers:
            x = block(x, cosines, sines)
        return self.norm(x)


class Llama(nn.Module):
    """A LLaMA language model.

    Args:
        config: its dimensions.
        seed: of the initial weights, drawn on the CPU in the order of the parameters, so that every mode and device
            starts from the same function. None leaves them as allocated, for weights that are loaded.
        recompute: what is made again in the backward pass, see `recompute.py`: `elementwise`, norm outputs and SwiGLU
            products; `mlp`, norm outputs and the MLP; `block`, everything but the blocks' inputs.
    """

    def __init__(self, config: LlamaConfig, *, seed: int | None = None, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, recompute)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if seed is not None:
            self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Matrices from N(0, initializer_range²), norms one."""
        for parameter in self.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward(self, tokens: Int[Tensor, "batch length"], labels: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Cross-entropy summed over the targets, in nats.

        Args:
            tokens: token ids.
            labels: the token that follows each position, or `loss.IGNORE_INDEX`.
        """
        hidden = self.model(tokens).flatten(0, 1)
        return linear_cross_entropy(hidden, self.lm_head.weight, labels.flatten())

    def logits(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of every position, whole: for inspection and generation, not for training."""
        return cast(Tensor, self.lm_head(self.model(tokens)))
