"""The correctness checks of `check_gpu.py`: each files figures with the limits that they must not exceed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from contenders import Work, compress_straightforwardly
from torch import Tensor, nn

from velora_pretrain.config import Precision
from velora_pretrain.devices import autocast
from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.direction import Direction
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.loss import linear_cross_entropy
from velora_pretrain.nn.velora import VeLoRALinear, compress, expand

MODES = ("full", "velora", "velora-all", "galore", "lora", "flora")
DRAWN = ("flora",)
"""Those that draw other numbers on another kind of device: their paths part at once."""
SMALL = LlamaConfig(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
)
"""Of the comparison with transformers: grouped queries, an MLP width that is no power of two."""
SMALL_SETTINGS = tuple(
    f"model.{key}={value}" for key, value in SMALL.model_dump(exclude={"tie_word_embeddings"}).items()
)
ROUNDING = 1e-5
"""Relative difference that fp32 sums in another order may show: some eighty units of rounding."""


@dataclass(kw_only=True)
class Checks:
    """What is checked where, and what was found."""

    device: str
    trajectory_steps: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def hold(self, name: str, setting: str, value: float, limit: float) -> None:
        """Files a figure that must not exceed its limit; NaN fails."""
        self.rows.append({"check": name, "setting": setting, "value": value, "limit": limit, "ok": value <= limit})


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64."""
    wide, exact = value.detach().double(), reference.detach().double()
    return ((wide - exact).norm() / exact.norm()).item()


def check_against_transformers(checks: Checks) -> None:
    """Logits, loss and every gradient in fp32, the same weights in both models."""
    import transformers

    ours = Llama(SMALL, seed=0).to(checks.device)
    dimensions: dict[str, Any] = SMALL.model_dump()
    config = transformers.LlamaConfig(**dimensions, attn_implementation="sdpa", use_cache=False)  # type: ignore[call-arg]
    theirs: Any = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    theirs.to(checks.device).train()
    work = Work(size=None, micro_batch_sequences=4, sequence_length=100, device=checks.device)
    tokens, labels = work.micro_batches(SMALL.vocab_size, seed=0)[0]
    with torch.no_grad():
        logits = relative_difference(ours.logits(tokens), theirs(tokens).logits)
    checks.hold("logits = transformers'", "fp32, grouped queries", logits, ROUNDING)
    loss, reference = ours(tokens, labels) / (labels >= 0).sum(), theirs(tokens, labels=tokens).loss
    loss.backward()
    reference.backward()
    checks.hold("loss = transformers'", "fp32, nats per token", abs((loss - reference).item()), ROUNDING)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    worst = max(relative_difference(p.grad, gradients[name]) for name, p in ours.named_parameters())  # type: ignore[arg-type]
    checks.hold("gradients = transformers'", "fp32, the worst parameter", worst, ROUNDING)


def check_velora_gradient(checks: Checks) -> None:
    """C ⊗ v and dx of one layer against the dense formula in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, outputs, groups = 2048, 1376, 512, 86
    x, dy = (torch.randn(tokens, size, generator=generator).to(checks.device) for size in (width, outputs))
    v = F.normalize(torch.randn(width // groups, generator=generator), dim=0).to(checks.device)
    weight = torch.randn(outputs, width, generator=generator).to(checks.device) * 0.02

    def dense(dtype: torch.dtype) -> Tensor:
        return dy.to(dtype).t() @ expand(compress(x.to(dtype), v.to(dtype)), v.to(dtype))

    def factored(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        linear = nn.Linear(width, outputs, bias=False, device=checks.device, dtype=dtype)
        direction = Direction(width, groups, init="random", device=torch.device(checks.device))
        layer = VeLoRALinear(linear, direction)
        with torch.no_grad():
            layer.weight.copy_(weight)
            direction.vector.copy_(v)
        inputs = x.detach().to(dtype).requires_grad_()
        layer(inputs).backward(dy.to(dtype))
        assert layer.coefficients.grad is not None
        assert inputs.grad is not None
        return expand(layer.coefficients.grad, v), inputs.grad

    exact = dense(torch.float64)
    gradient, dx = factored(torch.float32)
    checks.hold(
        "VeLoRA gradient = dense formula", "fp32, against float64", relative_difference(gradient, exact), ROUNDING
    )
    exact_dx = dy.double() @ weight.double()
    checks.hold("VeLoRA dx = dense dx", "fp32, against float64", relative_difference(dx, exact_dx), ROUNDING)
    naive_error = relative_difference(dense(torch.bfloat16), exact)
    error = relative_difference(factored(torch.bfloat16)[0], exact)
    checks.hold("VeLoRA gradient, error", "bf16; limit: the dense formula's", error, naive_error)


def losses_of_steps(mode_name: str, steps: int, device: str, dtype: torch.dtype) -> Tensor:
    """Loss of each training step on one batch, in nats per token."""
    work = Work(
        size=None,
        micro_batch_sequences=4,
        sequence_length=64,
        device=device,
        # An exact subspace, so that devices agree.
        assignments=(*SMALL_SETTINGS, "modes.galore.finder=svd"),
    )
    run = work.run_of(mode_name)
    mode, model = build_mode(run), Llama(run.llama, seed=0)
    mode.adapt(model)
    model.to(device=device, dtype=dtype)
    if dtype == torch.float64:
        _widen_directions(model)
    tokens, labels = work.micro_batches(run.llama.vocab_size, seed=0)[0]
    optimizer, losses = mode.build_optimizer(model), []
    mode.before_step(model, optimizer, 1, torch.no_grad()(lambda: model(tokens, labels)))
    for _ in range(steps):
        loss = model(tokens, labels) / (labels >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double().cpu())
    return torch.stack(losses)


def _widen_directions(model: nn.Module) -> None:
    """A direction stays in fp32 whatever the weights become; an oracle wants float64."""
    for module in model.modules():
        if isinstance(module, Direction):
            module.vector, module.statistics = module.vector.double(), module.statistics.double()


def check_trajectories(checks: Checks) -> None:
    """Training on the device leaves the float64 path no further than training on the CPU does.

    Adam divides a gradient by its own size, so where one is next to nothing its rounding decides a step's sign: paths
    part by more than rounding, on a CPU too. Four times the CPU's distance allows for chance.
    """
    for name in MODES:
        exact = losses_of_steps(name, checks.trajectory_steps, "cpu", torch.float64)
        on_cpu = losses_of_steps(name, checks.trajectory_steps, "cpu", torch.float32)
        on_device = losses_of_steps(name, checks.trajectory_steps, checks.device, torch.float32)
        limit = max(4 * (on_cpu - exact).abs().max().item(), ROUNDING * exact.max().item())
        setting = f"{name}, fp32; limit: from the CPU's own distance"
        distance = (on_device - exact).abs().max().item() if name not in DRAWN else 0.0
        checks.hold(f"loss over {checks.trajectory_steps} steps", setting, distance, limit)
        checks.hold("loss falls", f"{name}; last over first", (on_device[-1] / on_device[0]).item(), 1.0)


def check_loss(checks: Checks) -> None:
    """The loss of bf16 hidden states is fp32 and as near to float64 as fp32 sums of bf16 products are."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 256, generator=generator).to(checks.device, torch.bfloat16)
    head = (torch.randn(8000, 256, generator=generator) * 0.1).to(checks.device, torch.bfloat16)
    labels = torch.randint(8000, (4000,), generator=generator).to(checks.device)
    exact = F.cross_entropy(hidden.double() @ head.double().t(), labels, reduction="sum")
    naive = F.cross_entropy((hidden @ head.t()).float(), labels, reduction="sum")
    limit = max(2 * relative_difference(naive, exact), ROUNDING)
    weights: dict[Precision, Tensor] = {"bf16": head, "bf16-mixed": head.float()}
    for precision, weight in weights.items():
        with autocast(precision, checks.device):
            nats = linear_cross_entropy(hidden, weight, labels, chunk_rows=512)
        checks.hold(
            "loss, error", f"{precision}; limit: twice the naive one's", relative_difference(nats, exact), limit
        )
        is_wide = nats.dtype == torch.float32
        checks.hold("loss is fp32", precision, 0.0 if is_wide else 1.0, 0.0)


def check_straightforward(checks: Checks) -> None:
    """The straightforward VeLoRA that speed is held against computes the same gradients."""
    work = Work(
        size=None, micro_batch_sequences=2, sequence_length=64, device=checks.device, assignments=SMALL_SETTINGS
    )
    run = work.run_of("velora-all")
    mode, initial = build_mode(run), Llama(run.llama, seed=0)
    ours, plain = initial, copy.deepcopy(initial)
    mode.adapt(ours)
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, VeLoRALinear)}
    compress_straightforwardly(plain, {name.rpartition(".")[2]: m.direction.num_groups for name, m in layers.items()})
    tokens, labels = work.micro_batches(run.llama.vocab_size, seed=0)[0]
    for model in (ours, plain):
        model.to(checks.device)
        model(tokens, labels).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    worst = 0.0
    for name, layer in layers.items():
        assert layer.coefficients.grad is not None
        reference = gradients[f"{name}.weight"]
        assert reference is not None
        worst = max(worst, relative_difference(expand(layer.coefficients.grad, layer.direction.vector), reference))
    checks.hold("straightforward VeLoRA = ours", "fp32, the worst layer's gradient", worst, ROUNDING)


ALL = (
    check_against_transformers,
    check_velora_gradient,
    check_straightforward,
    check_trajectories,
    check_loss,
)
