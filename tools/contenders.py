"""Contenders of `bench_step.py`: models with their loss and optimizer, all from the same weights.

    transformers                LlamaForCausalLM with its own loss (sdpa, no cache), torch.optim.AdamW (fused)
    full                        the tool's model, loss and AdamW
    velora, velora-all          the same with compressed projections: value and down, or all seven
    galore, lora, flora         the same in these modes, without dropout
    straightforward-velora      VeLoRA as the paper writes it, on transformers' model and with torch.optim.AdamW: each
                                compressed layer keeps its own z, rebuilds x̂ and computes the dense weight gradient
    straightforward-velora-all  the same on all seven
    galore-torch                transformers' model and GaLoreAdamW of the package galore-torch, with our rank and gap
    peft-lora                   transformers' model with peft's adapters on all seven, embedding, norms and head
                                trained; torch.optim.AdamW

`NAME:RECOMPUTE`, such as full:elementwise, is the same with that recomputation; transformers:block, with gradient
checkpointing. `NAME:compiled` is one of the tool's own by torch.compile.

With bf16 weights torch.optim.AdamW keeps bf16 moments, the tool's AdamW fp32 ones: not the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from velora_pretrain.config import Precision, Run
from velora_pretrain.contender import NEVER, contender_of
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, default_dtype
from velora_pretrain.dimensions import PROJECTIONS
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.loss import IGNORE_INDEX
from velora_pretrain.nn.recompute import Recompute
from velora_pretrain.nn.velora import VeLoRALinear
from velora_pretrain.recipe import resolve
from velora_pretrain.timing import Contender, Pace, StepBatch

CONTENDERS: dict[str, dict[str, Any]] = {
    "transformers": {"mode": "full"},
    "full": {"mode": "full"},
    "velora": {"mode": "velora"},
    "velora-all": {"mode": "velora", "modes.velora.layers": "all"},
    "galore": {"mode": "galore"},
    "lora": {"mode": "lora", "modes.lora.dropout": 0.0},
    "flora": {"mode": "flora"},
    "straightforward-velora": {"mode": "velora"},
    "straightforward-velora-all": {"mode": "velora", "modes.velora.layers": "all"},
    "galore-torch": {"mode": "galore"},
    "peft-lora": {"mode": "lora", "modes.lora.dropout": 0.0},
}
"""What each contender sets in a recipe; of those on transformers' model it is placement, sub-tokens, rank and gap."""
ON_TRANSFORMERS = (
    "transformers",
    "straightforward-velora",
    "straightforward-velora-all",
    "galore-torch",
    "peft-lora",
)


def settings_of(contender: str) -> dict[str, Any]:
    """What a contender sets in a recipe.

    Raises:
        ValueError: there is none of that name, or it has no such way.
    """
    name, _, how = contender.partition(":")
    if name not in CONTENDERS:
        raise ValueError(f"{contender}: no contender; there are {', '.join(CONTENDERS)}")
    if not how:
        return CONTENDERS[name]
    known = ("block",) if name in ON_TRANSFORMERS else (*get_args(Recompute), "compiled")
    if how not in known:
        raise ValueError(f"{contender}: {name} has {', '.join(known)}")
    return CONTENDERS[name] | ({"compile": True} if how == "compiled" else {"memory.recompute": how})


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

    @property
    def num_targets(self) -> int:
        """Targets of one step."""
        return self.accumulation * self.micro_batch_sequences * (self.sequence_length - 1)

    def run_of(self, contender: str) -> Run:
        """The recipe that a contender stands for."""
        options = {
            "size": self.size,
            "precision": self.precision,
            "batch.sequences": self.accumulation * self.micro_batch_sequences,
            "batch.micro_batch": self.micro_batch_sequences,
            "batch.sequence_length": self.sequence_length,
            **settings_of(contender),
        }
        return resolve(None, options, list(self.assignments))

    def micro_batches(self, vocab_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Random tokens and the tokens that follow them; the last position of a sequence is no target."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.accumulation, self.micro_batch_sequences, self.sequence_length)
        tokens = torch.randint(vocab_size, shape, generator=generator)
        labels = F.pad(tokens[..., 1:], (0, 1), value=IGNORE_INDEX)
        return list(zip(tokens.to(self.device), labels.to(self.device), strict=True))

    def batches(self, vocab_size: int) -> Iterator[StepBatch]:
        """Such micro-batches for ever, the same for every contender."""
        for seed in count(1):
            micro_batches = self.micro_batches(vocab_size, seed)
            yield StepBatch(micro_batches=micro_batches, num_targets=self.num_targets, num_tokens=self.step_tokens)


class AnyOptimizer:
    """An optimizer of PyTorch's kind as the tool asks for it: dense gradients, stepped together."""

    accumulates = False

    def __init__(self, optimizer: Any) -> None:
        self.state, self.step = optimizer.state, optimizer.step

    def accumulate(self, parameter: Tensor) -> None:
        """Leaves the gradient where it is."""

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The dense one."""
        return parameter.grad

    def step_parameter(self, parameter: Tensor) -> None:
        """Is not asked for: nothing is stepped in the backward pass."""
        raise NotImplementedError


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


def build(name: str, work: Work, initial: Llama, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Contender:
    """A contender with the weights of `initial`, on its device; v, where it has one, is taken from `micro_batches`."""
    run, device = work.run_of(name), torch.device(work.device)
    name = name.partition(":")[0]
    if name in ON_TRANSFORMERS:
        contender = _build_on_transformers(name, work, run, initial)
    else:
        model = Llama(run.llama, recompute=run.memory.recompute)
        model.load_state_dict(initial.state_dict())
        contender = contender_of(run, batches=work.batches(run.llama.vocab_size), device=device, model=model)
    contender.takes_norm = work.grad_norm
    num_targets = work.num_targets

    @torch.no_grad()
    def run_forward() -> None:
        for micro_batch in micro_batches:
            contender.loss(*micro_batch, num_targets)

    contender.pace.before_step(1, run_forward)
    return contender


def _build_on_transformers(name: str, work: Work, run: Run, initial: Llama) -> Contender:
    import transformers

    dimensions: dict[str, Any] = run.llama.model_dump()
    config = transformers.LlamaConfig(**dimensions, attn_implementation="sdpa", use_cache=False)  # type: ignore[call-arg]
    with default_dtype(WEIGHT_DTYPES[work.precision]):
        model: Any = transformers.LlamaForCausalLM(config)
    model.load_state_dict(initial.state_dict())
    if name.startswith("straightforward"):
        layers = {path: m for path, m in adapted_outline(run).named_modules() if isinstance(m, VeLoRALinear)}
        groups = {path.rpartition(".")[2]: layer.direction.num_groups for path, layer in layers.items()}
        compress_straightforwardly(model, groups)
    elif name == "peft-lora":
        model = _with_adapters(model, run)
    model.to(work.device).train()
    if run.memory.recompute == "block":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if name == "galore-torch":
        paces = {steps: _galore_torch(model, run, steps) for steps in (NEVER, 1)}
    else:
        paces = {NEVER: _adamw(model, run)}

    def loss(tokens: Tensor, labels: Tensor, num_targets: int) -> Tensor:
        # transformers shifts the labels itself, and takes the mean over the targets of a micro-batch.
        with autocast(work.precision, work.device):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss / work.accumulation

    return Contender(
        model=model,
        loss=loss,
        batches=work.batches(run.llama.vocab_size),
        device=torch.device(work.device),
        pace=Pace(optimizer=AnyOptimizer(paces[NEVER])),
        rare=[Pace(optimizer=AnyOptimizer(paces[1]), period_steps=run.modes.galore.update_gap)] if 1 in paces else [],
    )


def _adamw(model: nn.Module, run: Run) -> Any:
    settings = run.optimizer
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=run.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _galore_torch(model: nn.Module, run: Run, update_gap: int) -> Any:
    from galore_torch import GaLoreAdamW

    inside = [m.weight for path, m in model.named_modules() if path.rpartition(".")[2] in PROJECTIONS]
    taken, settings = {id(weight) for weight in inside}, run.modes.galore
    projected: dict[str, Any] = {
        "params": inside,
        "rank": settings.rank_at(run.llama),
        "update_proj_gap": update_gap,
        "scale": settings.scale,
        "proj_type": "std",
    }
    others = {"params": [p for p in model.parameters() if id(p) not in taken]}
    groups: Any = [others, projected]
    return GaLoreAdamW(groups, lr=run.lr, no_deprecation_warning=True)


def _with_adapters(model: Any, run: Run) -> nn.Module:
    import peft

    settings = run.modes.lora
    config = peft.LoraConfig(
        r=settings.rank_at(run.llama),
        lora_alpha=int(settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=list(PROJECTIONS),
    )
    adapted: Any = peft.get_peft_model(model, config)
    for path, parameter in adapted.named_parameters():
        # The published protocol trains all that is not a projection.
        if not any(f".{name}." in path for name in PROJECTIONS):
            parameter.requires_grad_(True)
    return adapted
