"""VeLoRA in a transformers model of your own, trained by the Hugging Face Trainer or by any other loop.

    model = add_velora(AutoModelForCausalLM.from_config(config))
    trainer = Trainer(model, args, train_dataset=dataset, optimizers=(velora_adamw(model, lr=1e-3), None))

What a loop does around a step is right as it stands, since C: (M, G) is the gradient of an ordinary parameter: it
accumulates, is averaged over processes, unscaled and clipped (‖C‖ = ‖C ⊗ v‖). Two things are kept apart for it:

    weights   the model's state dict is the plain model's, so what is saved loads without this package.
    v         is in the optimizer's state dict, beside the moments that speak of it: a resumed run goes on with both.

v comes from the first micro-batch that is trained on, of all processes. Several GPUs have a process each
(DistributedDataParallel, by torchrun or `accelerate launch`); FSDP and DeepSpeed, which lay parameters out anew, do not
know the weight behind a gradient.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from velora_pretrain.errors import UserError
from velora_pretrain.nn.direction import directions_of
from velora_pretrain.nn.velora import VeLoRALinear, compress_linears
from velora_pretrain.optim.adamw import AdamW, Factored, Rule, UpdateRule

Model = TypeVar("Model", bound=nn.Module)
HANDLE = "_moves_a_weight"
"""Attribute of the parameters that receive compressed gradients."""


def add_velora(
    model: Model,
    *,
    layers: Sequence[str] = ("v_proj", "down_proj"),
    num_groups: Mapping[str, int] | None = None,
    init: Literal["batch_average_once", "svd", "random"] = "batch_average_once",
    scale: float = 1.0,
    seed: int = 0,
) -> Model:
    """Compresses, in place, what the chosen linear layers keep for the backward pass; outputs stay as they were.

    An input is freed only if nobody else keeps it: of q_proj, k_proj and v_proj, or of gate_proj and up_proj, all or
    none read it compressed. Layers whose weights are frozen keep no input and are left as they are.

    Args:
        model: any module; do this before it is wrapped and before its optimizer is built.
        layers: last parts of the names of the linear layers.
        num_groups: sub-tokens per token, by such a name; by default sub-tokens of width near 16.
        init: how the direction v comes from the first batch, see `nn.direction`.
        scale: factor on the weight gradients.
        seed: of `random` directions.

    Returns:
        The same model.

    Raises:
        UserError: a name matches no layer, a weight belongs to others too, or a number of groups does not divide a
            width.
    """
    try:
        added = compress_linears(model, layers=layers, num_groups=num_groups, init=init, scale=scale, seed=seed)
    except UserError as error:
        raise UserError(str(error).removeprefix("modes.velora.")) from None
    for direction in directions_of(model):
        for name, buffer in list(direction.named_buffers()):
            direction.register_buffer(name, buffer, persistent=False)
    _refuse_other_optimizers()
    # A launcher's processes, be it one, are joined by DistributedDataParallel, which writes to every parameter.
    is_launched = "WORLD_SIZE" in os.environ or (dist.is_available() and dist.is_initialized())
    for layer in added:
        setattr(layer.coefficients, HANDLE, True)
        if is_launched:
            layer.make_coefficients_writable()
    return model


@functools.cache
def _refuse_other_optimizers() -> None:
    """Lets no optimizer step that would move P, which stays zero, and leave the weights as they are."""

    def check(optimizer: Optimizer, *_: Any) -> None:
        if isinstance(optimizer, AdamW):
            return
        if any(hasattr(p, HANDLE) for group in optimizer.param_groups for p in group["params"]):
            raise UserError(
                f"{type(optimizer).__name__} does not move weights by compressed gradients: give the Trainer"
                " optimizers=(velora_adamw(model, lr=...), None)"
            )

    register_optimizer_step_pre_hook(check)


def velora_adamw(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    update: UpdateRule = "dense",
) -> AdamW:
    """AdamW over the trainable parameters of a model, whose compressed gradients move the weights that they belong to.

    Args:
        model: what `add_velora` gave; it may still be moved to another device.
        lr: learning rate, to which a scheduler adds its course.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, on matrices only.
        update: dense: AdamW on C ⊗ v, the paper's; projected: AdamW on C, see `optim.adamw`.

    Raises:
        UserError: the model has no compressed layer.
    """
    layers = [module for module in model.modules() if isinstance(module, VeLoRALinear)]
    if not layers:
        raise UserError("velora_adamw: the model has no compressed layer; call add_velora on it first")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    rules: dict[nn.Parameter, Rule] = {layer.coefficients: _OfLayer(layer, update) for layer in layers}
    return _AdamWWithDirections(model, groups, rules=rules, lr=lr, betas=betas, eps=eps)


@dataclass(frozen=True)
class _OfLayer:
    """`Factored` of a layer whose weight and v may still be moved, or replaced, when it is made."""

    layer: VeLoRALinear
    update: UpdateRule

    def step_(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Moves the layer's weight."""
        rule = Factored(weight=self.layer.weight, direction=self.layer.direction.vector, update=self.update)
        rule.step_(parameter, state, group)


class _AdamWWithDirections(AdamW):
    """AdamW whose state dict has the directions of a model in it."""

    def __init__(self, model: nn.Module, params: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(params, **options)
        self._directions = directions_of(model)

    def state_dict(self) -> dict[str, Any]:
        """Moments, settings and directions."""
        directions = [{"vector": each.vector, "is_ready": each.is_ready} for each in self._directions]
        return {**super().state_dict(), "directions": directions}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over all three.

        Raises:
            UserError: it is the state of another optimizer, or of other layers.
        """
        saved = state_dict.get("directions", [])
        if [each["vector"].shape for each in saved] != [each.vector.shape for each in self._directions]:
            raise UserError(
                "the optimizer's state was saved with other layers compressed, or none; go on with the same layers and"
                " num_groups, or start from the weights alone"
            )
        super().load_state_dict(state_dict)
        for direction, values in zip(self._directions, saved, strict=True):
            direction.put(values["vector"], is_ready=values["is_ready"])
