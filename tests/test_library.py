"""VeLoRA in Hugging Face models under the Hugging Face Trainer: steps against the paper's formula and our own mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from velora_pretrain.config import Run
from velora_pretrain.errors import UserError
from velora_pretrain.gradients import Gradients
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.library import add_velora, velora_adamw
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.direction import directions_of
from velora_pretrain.nn.velora import VeLoRALinear
from velora_pretrain.recipe import build_run

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DIMENSIONS = {**runs.MODEL, "max_position_embeddings": 32}
LENGTH, LR, EPS = 12, 5e-3, 1e-6
ROUNDING = 5e-5
"""Of fp32 sums in another order, some 1e-6, which Adam makes larger where a gradient is small."""


def llama(seed: int = 0, **changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DIMENSIONS, **changes}))


def dataset(count: int = 32, different: int = 32) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(0, DIMENSIONS["vocab_size"], (different, LENGTH), generator=draw)
    rows = rows.repeat(count // different, 1)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(
    model: transformers.PreTrainedModel,
    folder: Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    resume: Path | None = None,
    rows: list[dict[str, Tensor]] | None = None,
    **changes: Any,
) -> tuple[transformers.Trainer, list[dict[str, Any]]]:
    """Trains by the Trainer; gives it, and what each forward pass was called with."""
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    seen: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**settings, **changes}),
        train_dataset=rows or dataset(),
        optimizers=(optimizer or velora_adamw(model, lr=LR, eps=EPS), None),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    hook.remove()
    return trainer, seen


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest difference of two courses of a weight, over how far it has gone."""
    assert ours.keys() == theirs.keys() == start.keys()
    return max(float((ours[n] - theirs[n]).norm() / (theirs[n] - start[n]).norm()) for n in start)


def paper_gradient(x: Tensor, dy: Tensor, v: Tensor) -> Tensor:
    """dW = dyᵀ x̂ of a dense weight, x̂ rebuilt from its inner products with v."""
    sub_tokens = x.reshape(-1, x.shape[-1]).unflatten(-1, (-1, v.numel()))
    x_hat = ((sub_tokens @ v)[..., None] * v).flatten(-2)
    return dy.reshape(-1, dy.shape[-1]).t() @ x_hat


class PaperSteps:
    """The paper's method as it is written, on a plain model: dense gradients put in place of the exact ones.

    Args:
        model: plain.
        num_groups: by name of the compressed layers.
    """

    def __init__(self, model: nn.Module, num_groups: dict[str, int], total_steps: int) -> None:
        self.model, self.total_steps, self.directions = model, total_steps, {}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
        self.dense: dict[nn.Parameter, Tensor] = {}
        for name, module in model.named_modules():
            groups = num_groups.get(name.rpartition(".")[2])
            if groups and isinstance(module, nn.Linear):
                module.register_forward_hook(self._hook(module, module.in_features // groups))

    def _hook(self, module: nn.Linear, width: int) -> Callable[..., None]:
        def forward_hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach()
            mean = x.reshape(-1, width).sum(0)
            v = self.directions.setdefault(module, mean / mean.norm())
            output.register_hook(lambda dy: self._add(module.weight, paper_gradient(x, dy, v)))

        return forward_hook

    def _add(self, weight: nn.Parameter, gradient: Tensor) -> None:
        self.dense[weight] = self.dense.get(weight, 0) + gradient

    def step(self, micro_batches: list[dict[str, Any]], number: int, max_norm: float) -> None:
        for inputs in micro_batches:
            self.model(**inputs).loss.backward()
        for weight, gradient in self.dense.items():
            weight.grad = gradient
        self.dense.clear()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * (1 - number / self.total_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("layers", [("v_proj", "down_proj"), ALL], ids=["value and down", "all"])
def test_the_trainers_steps_are_the_papers(tmp_path: Path, layers: tuple[str, ...]) -> None:
    """With accumulation, clipping at every step, a scheduler of the Trainer's own, biases; against dense gradients."""
    shape = {"attention_bias": True, "mlp_bias": True}
    model, plain = llama(**shape), llama(**shape)
    start = weights(plain)
    add_velora(model, layers=layers, num_groups=dict.fromkeys(layers, 8))
    _, seen = train(model, tmp_path, gradient_accumulation_steps=2)
    reference = PaperSteps(plain, dict.fromkeys(layers, 8), total_steps=4)
    for step in range(4):
        reference.step(seen[2 * step : 2 * step + 2], step, 0.5)
    assert len(seen) == 8
    assert largest_difference(weights(model), weights(plain), start) < ROUNDING


def test_the_trainers_steps_are_those_of_our_own_mode(tmp_path: Path) -> None:
    """Our own model, mode and clipping, on the same weights and batches."""
    model = llama()
    model.save_pretrained(tmp_path / "start")
    start = weights(model)
    _, seen = train(add_velora(model, layers=ALL), tmp_path, lr_scheduler_type="constant")
    run: Run = build_run(
        {
            "mode": "velora",
            "model": DIMENSIONS,
            "batch": {"sequence_length": LENGTH},
            "optimizer": {"lr": LR, "eps": EPS},
            "modes": {"velora": {"layers": "all"}},
        },
        where="test",
    )
    ours, mode = load_llama(tmp_path / "start"), build_mode(run)
    mode.adapt(ours)
    optimizer = mode.build_optimizer(ours)
    gradients = Gradients(ours, optimizer)
    for step, inputs in enumerate(seen, start=1):
        tokens = inputs["input_ids"]
        labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)

        def loss(tokens: Tensor = tokens, labels: Tensor = labels) -> Tensor:
            return ours(tokens, labels) / inputs["num_items_in_batch"]  # noqa: B023

        mode.before_step(ours, optimizer, step, torch.no_grad()(loss))
        with gradients.of_micro_batch(1, 1):
            loss().backward()
        gradients.clip(0.5)
        gradients.step()
        mode.after_step(ours, optimizer, step)
    theirs = {name: tensor for name, tensor in weights(ours).items() if name in start}
    assert largest_difference(weights(model), theirs, start) < ROUNDING


def test_what_is_saved_is_a_plain_model_and_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    model = add_velora(llama(), layers=ALL)
    trainer, _ = train(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "final"))
    assert load_file(tmp_path / "final" / "model.safetensors").keys() == llama().state_dict().keys()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokens = torch.stack([row["input_ids"] for row in dataset(4, 4)])
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, model.eval()(tokens).logits)

    other = add_velora(llama(seed=7), layers=ALL)
    train(other, tmp_path / "resumed", resume=tmp_path / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(weights(other).values(), weights(model).values(), strict=True))
    for ours, theirs in zip(directions_of(other), directions_of(model), strict=True):
        assert torch.equal(ours.vector, theirs.vector)
        assert ours.is_ready


def saved_bytes(model: nn.Module) -> int:
    """Bytes that a forward pass keeps, once per storage, without those of weights and buffers."""
    constant = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.stack([row["input_ids"] for row in dataset(4, 4)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in constant)


def test_less_is_kept_for_the_backward_pass_to_the_byte() -> None:
    tokens, blocks, width = 4 * LENGTH, DIMENSIONS["num_hidden_layers"], 4
    hidden, inner, groups = DIMENSIONS["hidden_size"], DIMENSIONS["intermediate_size"], 4

    def after(layers: tuple[str, ...]) -> int:
        model = add_velora(llama(), layers=layers, num_groups=dict.fromkeys(layers, groups))
        saved_bytes(model)  # finds v
        return saved_bytes(model)

    full = saved_bytes(llama())
    of_each = blocks * tokens * width
    assert full - after(("down_proj",)) == of_each * (inner - groups)
    # The inputs of q, k and v are one tensor, and those of gate and up.
    assert full - after(("v_proj",)) == -of_each * groups
    rest = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert full - after(rest) == of_each * (2 * hidden - 5 * groups)


@pytest.mark.parametrize("kind", ["Qwen2", "Mistral", "Llama in bf16"])
def test_other_models_train(kind: str, tmp_path: Path) -> None:
    """With biases and a tied embedding; with few key heads; and in bf16."""
    torch.manual_seed(0)
    sliding = {"sliding_window": None} if kind == "Mistral" else {}
    names = {"Qwen2": "qwen2", "Mistral": "mistral"}
    config = transformers.AutoConfig.for_model(names.get(kind, "llama"), **DIMENSIONS, **sliding, head_dim=8)
    config.tie_word_embeddings = kind == "Qwen2"
    model = transformers.AutoModelForCausalLM.from_config(config)
    if kind.endswith("bf16"):
        model = model.to(torch.bfloat16)
    start = weights(model)
    logging = {"logging_strategy": "steps", "logging_steps": 1}
    trainer, _ = train(
        add_velora(model, layers=ALL),
        tmp_path,
        rows=dataset(different=2),
        max_steps=8,
        bf16=kind == "Mistral",
        **logging,
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, start[name])}
    assert moved == set(start)
    assert all(layer.coefficients.count_nonzero() == 0 for layer in model.modules() if isinstance(layer, VeLoRALinear))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_steps(tmp_path: Path, reentrant: bool) -> None:
    start = weights(llama())
    models = [add_velora(llama(), layers=ALL) for _ in range(2)]
    train(models[0], tmp_path)
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    train(models[1], tmp_path)
    assert largest_difference(weights(models[1]), weights(models[0]), start) < 1e-5


def test_v_is_looked_up_when_a_step_is_taken() -> None:
    """A move to another device gives a layer another tensor for v, after the optimizer was made."""
    models = [add_velora(llama()) for _ in range(2)]
    optimizers = [velora_adamw(model, lr=LR) for model in models]
    for direction in directions_of(models[1]):
        direction.vector = direction.vector.clone()
    tokens = torch.stack([row["input_ids"] for row in dataset(4, 4)])
    for model, optimizer in zip(models, optimizers, strict=True):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]).values(), weights(models[1]).values(), strict=True))
    assert not torch.equal(weights(models[0])["model.layers.0.mlp.down_proj.weight"],
                           weights(llama())["model.layers.0.mlp.down_proj.weight"])  # fmt: skip


def test_frozen_layers_are_left_as_they_are() -> None:
    model = llama()
    model.model.layers[0].requires_grad_(False)
    add_velora(model)
    kinds = [type(block.mlp.down_proj) for block in model.model.layers]
    assert kinds == [nn.Linear, VeLoRALinear]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"^layers: no linear layer .* is named c_attn; those that train are .*q_proj"):
        add_velora(llama(), layers=("c_attn",))
    with pytest.raises(UserError, match=r"^num_groups\.v_proj: 5 sub-tokens do not divide the width 32"):
        add_velora(llama(), num_groups={"v_proj": 5})
    with pytest.raises(UserError, match="call add_velora on it first"):
        velora_adamw(llama())
    state = velora_adamw(add_velora(llama())).state_dict()
    for other in (("down_proj",), ALL):
        with pytest.raises(UserError, match="other layers compressed"):
            velora_adamw(add_velora(llama(), layers=other)).load_state_dict(state)
    with pytest.raises(UserError, match="other layers compressed"):
        velora_adamw(add_velora(llama())).load_state_dict(torch.optim.AdamW(llama().parameters()).state_dict())


def test_a_weight_that_is_the_embeddings_too_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"^layers: lm_head and model\.embed_tokens have one weight"):
        add_velora(model, layers=("down_proj", "lm_head"))
    add_velora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_blocks_that_are_one_module_are_compressed_once() -> None:
    model = llama(num_hidden_layers=2)
    model.model.layers[1] = model.model.layers[0]
    add_velora(model)
    assert sum(isinstance(module, VeLoRALinear) for module in model.modules()) == 2


@pytest.mark.parametrize("mistake", [{"layers": ("v_proj", "donw_proj")}, {"num_groups": {"down_proj": 7}}])
def test_a_mistake_leaves_the_model_as_it_was(mistake: dict[str, Any]) -> None:
    model = llama()
    with pytest.raises(UserError):
        add_velora(model, **mistake)
    assert not any(isinstance(module, VeLoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_replica_in_the_same_process_is_refused() -> None:
    (direction, *_) = directions_of(add_velora(llama()))
    with pytest.raises(UserError, match="a process per GPU"):
        direction._replicate_for_data_parallel()


def test_weight_decay_takes_matrices_alone() -> None:
    model = add_velora(llama(), layers=ALL)
    optimizer = velora_adamw(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros(parameter.shape)
    for direction in directions_of(model):
        direction.put(torch.ones_like(direction.vector), is_ready=True)
    start = weights(model)
    optimizer.step()
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, start[name] * (0.95 if tensor.ndim > 1 else 1.0))


@pytest.mark.parametrize("is_launched", [False, True])
def test_other_optimizers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_launched: bool) -> None:
    """That of the Trainer's own, where none was given to it; plain models have them as before."""
    if is_launched:
        monkeypatch.setenv("WORLD_SIZE", "2")
    model = add_velora(llama())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="AdamW does not move weights by compressed gradients"):
        optimizer.step()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    plain = llama()
    train(plain, tmp_path, optimizer=torch.optim.AdamW(plain.parameters()))


def test_a_wrapper_that_writes_to_parameters_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = add_velora(llama())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        tokens = torch.stack([row["input_ids"] for row in dataset(4, 4)])
        wrapped(tokens, labels=tokens).loss.backward()
    finally:
        dist.destroy_process_group()
    layers = [layer for layer in model.modules() if isinstance(layer, VeLoRALinear)]
    assert all(layer.coefficients.is_contiguous() and layer.coefficients.grad is not None for layer in layers)
    assert all(layer.to(torch.bfloat16).coefficients.is_contiguous() for layer in layers)


@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one(tmp_path: Path) -> None:
    """Each has half of every batch; v is that of both halves."""
    for processes, batch in ((1, 8), (2, 4)):
        script = [str(Path(__file__).parent / "library_steps.py"), str(batch), str(tmp_path / f"{processes}.json")]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run(
            [sys.executable, *launch, *script],
            env={**os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            check=True,
            timeout=300,
        )
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(values), rtol=1e-4, atol=1e-5)
