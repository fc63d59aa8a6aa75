"""Contenders of `bench_step.py`: models with their loss and optimizer, all from the same weights.

    transformers                LlamaForCausalLM with its own loss (sdpa, no cache), torch.optim.AdamW (fused)
    full                        the tool's model, loss and AdamW
    velora, velora-all          the same with compressed projections: value and down, or all seven
    galore, lora, flora         the same in these modes, with an exact SVD and without dropout, so that devices agree
    straightforward-velora      VeLoRA as the paper writes it, on transformers' model and with torch.optim.AdamW: each
                                compressed layer keeps its own z, rebuilds x̂ and computes the dense weight gradient
    straightforward-velora-all  the same on all seven

With bf16 weights torch.optim.AdamW keeps bf16 moments, the tool's AdamW fp32 ones: not the same work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import Optimizer

from velora_pretrain.config import Precision, Run
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, default_dtype
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.direction import Direction
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.lora import LoRALinear
from velora_pretrain.nn.loss import IGNORE_INDEX
from velora_pretrain.nn.velora import VeLoRALinear
from velora_pretrain.recipe import resolve

CONTENDERS: dict[str, dict[str, Any]] = {
    "transformers": {"mode": "full"},
    "full": {"mode": "full"},
    "velora": {"mode": "velora"},
    "velora-all": {"mode": "velora", "modes.velora.layers": "all"},
    "galore": {"mode": "galore", "modes.galore.finder": "svd"},
    "lora": {"mode": "lora", "modes.lora.dropout": 0.0},
    "flora": {"mode": "flora"},
    "straightforward-velora": {"mode": "velora"},
    "straightforward-velora-all": {"mode": "velora", "modes.velora.layers": "all"},
}
"""What each contender sets in a recipe; of those on transformers' model it is the placement and the sub-tokens."""
ON_TRANSFORMERS = ("transformers", "straightforward-velora", "straightforward-velora-all")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every contender does in a step."""

    size: str | None
    micro_batch_sequences: int
    sequence_length: int
    accumulation: int = 1
    precision: Precision = "fp32"
    device: str = "cpu"
    grad_norm: bool = False
    """Whether the global gradient norm is taken before the optimizer's step, as `train` does."""
    assignments: tuple[str, ...] = ()
    """`dotted.key=value` of a recipe, for every contender."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.accumulation * self.micro_batch_sequences * self.sequence_length

    def run_of(self, contender: str) -> Run:
        """The recipe that a contender stands for."""
        options = {
            "size": self.size,
            "precision": self.precision,
            "batch.sequences": self.accumulation * self.micro_batch_sequences,
            "batch.micro_batch": self.micro_batch_sequences,
            "batch.sequence_length": self.sequence_length,
            **CONTENDERS[contender],
        }
        return resolve(None, options, list(self.assignments))

    def micro_batches(self, vocab_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Random tokens and the tokens that follow them; the last position of a sequence is no target."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.accumulation, self.micro_batch_sequences, self.sequence_length)
        tokens = torch.randint(vocab_size, shape, generator=generator)
        labels = F.pad(tokens[..., 1:], (0, 1), value=IGNORE_INDEX)
        return list(zip(tokens.to(self.device), labels.to(self.device), strict=True))


@dataclass(kw_only=True)
class Contender:
    """A model that is ready to train."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    """Mean nats per target of a micro-batch, over the micro-batches of a step."""
    first_loss_nats_per_token: float = 0.0
    peak_bytes: int = 0


class _StraightforwardVeLoRA(torch.autograd.Function):
    """y = x Wᵀ; keeps z: (N, G), and computes dyᵀ x̂ from the rebuilt x̂: (N, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, direction: Tensor) -> Tensor:
        z = x.unflatten(-1, (-1, direction.numel())) @ direction.to(x.dtype)
        ctx.save_for_backward(z, weight, direction)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        z, weight, direction = ctx.saved_tensors
        # dx: (N, M)(M, D)
        dx = dy @ weight.to(dy.dtype)
        x_hat = (z[..., None] * direction.to(z.dtype)).flatten(-2)
        # dW: (M, N)(N, D)
        d_weight = dy.flatten(0, -2).t() @ x_hat.flatten(0, -2)
        return dx, d_weight.to(weight.dtype), None


class StraightforwardVeLoRALinear(nn.Module):
    """VeLoRA on one `nn.Linear` as the paper writes it: nothing factored, nothing shared.

    Args:
        linear: the layer whose weight is taken over.
        num_groups: sub-tokens per token; divides the width.
    """

    direction: Tensor

    def __init__(self, linear: nn.Linear, num_groups: int) -> None:
        super().__init__()
        assert linear.bias is None
        self.weight = linear.weight
        self.register_buffer("direction", linear.weight.new_zeros(linear.in_features // num_groups))
        self.is_ready = False

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ; the first input gives v, its normalised mean sub-token."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.is_ready:
            sub_tokens = x.detach().reshape(-1, self.direction.numel()).to(self.direction.dtype)
            self.direction.copy_(F.normalize(sub_tokens.sum(0), dim=0))
            self.is_ready = True
        return _StraightforwardVeLoRA.apply(x, self.weight, self.direction)


def compress_straightforwardly(model: nn.Module, num_groups: Mapping[str, int]) -> None:
    """Replaces, in place, each `nn.Linear` that `num_groups` names by the last part of its name."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name in num_groups and isinstance(linear, nn.Linear):
                setattr(parent, name, StraightforwardVeLoRALinear(linear, num_groups[name]))


def adapted_outline(run: Run) -> Llama:
    """The model of a run as its mode adapts it, without memory: for its shapes."""
    with torch.device("meta"):
        model = Llama(run.llama)
        build_mode(run).adapt(model)
    return model


def matmul_operations(name: str, work: Work) -> int:
    """Multiplications and additions of the matrix products in one step.

    A linear layer (N, D)(D, M) has three products of 2 N D M: forward, dx, dW. Compressed, dW is 2 N M G, and z 2 N D
    once per compressed input; frozen, there is no dW. The straightforward way has z for every layer beside the dense
    dW. Attention has two products forward and five backward (the scores are computed again), half of each causal. What
    an optimizer multiplies, once a step, is left out.
    """
    run = work.run_of(name)
    tokens, operations = work.step_tokens, 0
    for module in adapted_outline(run).modules():
        if isinstance(module, nn.Linear):
            operations += 6 * tokens * module.in_features * module.out_features
        elif isinstance(module, LoRALinear):
            operations += 4 * tokens * module.in_features * module.out_features
        elif isinstance(module, VeLoRALinear):
            width, outputs = module.in_features, module.out_features
            if name in ON_TRANSFORMERS:
                operations += tokens * (6 * width * outputs + 2 * width)
            else:
                operations += tokens * (4 * width * outputs + 2 * module.direction.num_groups * outputs)
        elif isinstance(module, Direction) and name not in ON_TRANSFORMERS:
            operations += 2 * tokens * module.num_groups * module.vector.numel()
    attention = 7 * tokens * work.sequence_length * run.llama.hidden_size * run.llama.num_hidden_layers
    return operations + attention


def build(name: str, work: Work, initial: Llama, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Contender:
    """A contender with the weights of `initial`, on its device."""
    run = work.run_of(name)
    if name in ON_TRANSFORMERS:
        return _build_on_transformers(name, work, run, initial)
    mode, model = build_mode(run), copy.deepcopy(initial)
    mode.adapt(model)
    model.to(device=work.device, dtype=WEIGHT_DTYPES[work.precision])
    factor = 1 / (work.accumulation * work.micro_batch_sequences * (work.sequence_length - 1))

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        with autocast(work.precision, work.device):
            return model(tokens, labels) * factor

    @torch.no_grad()
    def run_forward() -> None:
        for micro_batch in micro_batches:
            loss(*micro_batch)

    optimizer = mode.build_optimizer(model)
    mode.before_step(model, optimizer, 1, run_forward)
    return Contender(model=model, optimizer=optimizer, loss=loss)


def _build_on_transformers(name: str, work: Work, run: Run, initial: Llama) -> Contender:
    import transformers

    dimensions: dict[str, Any] = run.llama.model_dump()
    config = transformers.LlamaConfig(**dimensions, attn_implementation="sdpa", use_cache=False)  # type: ignore[call-arg]
    with default_dtype(WEIGHT_DTYPES[work.precision]):
        model: Any = transformers.LlamaForCausalLM(config)
    model.load_state_dict(initial.state_dict())
    if name != "transformers":
        layers = {path: m for path, m in adapted_outline(run).named_modules() if isinstance(m, VeLoRALinear)}
        groups = {path.rpartition(".")[2]: layer.direction.num_groups for path, layer in layers.items()}
        compress_straightforwardly(model, groups)
    model.to(work.device).train()
    settings = run.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=run.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        # transformers shifts the labels itself.
        with autocast(work.precision, work.device):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss / work.accumulation

    return Contender(model=model, optimizer=optimizer, loss=loss)
