"""Training modes: one kind of linear layer × one optimizer. The one place that knows them by name.

A mode adapts the model, groups its parameters and builds the stepping rule; the trainer owns when to step. Everything
that a mode keeps is a parameter, a registered buffer or a tensor in `optimizer.state`, so checkpoints and memory
accounting need not know it. To add a mode: its settings in `config.ModesTable`, a class here, a row in `MODES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim.optimizer import Optimizer

from velora_pretrain.config import Run
from velora_pretrain.dimensions import Projection
from velora_pretrain.nn.direction import directions_of, move_running_averages
from velora_pretrain.nn.velora import compress_linears, compressed_weights, default_num_groups, keepers_of_inputs
from velora_pretrain.optim.adamw import AdamW


@runtime_checkable
class Mode(Protocol):
    """What the trainer asks of a mode."""

    def adapt(self, model: nn.Module) -> None:
        """Replaces projections in place; after initialisation, before the device and any wrapping."""

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """Names the parameter groups and returns the stepping rule; after the model is on its device."""
        ...

    def before_step(self, model: nn.Module, step: int, run_forward: Callable[[], None]) -> None:
        """Called before the forward passes of `step`, counted from 1.

        Args:
            model: the adapted model.
            step: the step that is about to be taken.
            run_forward: runs the forward passes of this step's whole batch once, without gradients.
        """

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after the optimizer has taken `step`."""

    def memory_notes(self) -> list[str]:
        """What a reader of a memory table should know: whatever looks like a saving and is none."""
        ...


class FullRank:
    """Plain linear layers × AdamW."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def adapt(self, model: nn.Module) -> None:
        """Leaves the model as it is."""

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over all parameters; weight decay on matrices."""
        return AdamW(parameter_groups(model, self.run), **adamw_options(self.run))

    def before_step(self, model: nn.Module, step: int, run_forward: Callable[[], None]) -> None:
        """Nothing to prepare."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Nothing to follow up."""

    def memory_notes(self) -> list[str]:
        """Nothing is claimed."""
        return []


class VeLoRA:
    """Compressed linear layers × AdamW on their factored gradients."""

    def __init__(self, run: Run) -> None:
        self.run, self.settings = run, run.modes.velora

    def adapt(self, model: nn.Module) -> None:
        """Replaces the chosen projections."""
        compress_linears(
            model,
            layers=self.settings.projections,
            num_groups={name: self._num_groups(name) for name in self.settings.projections},
            init=self.settings.init,
            scale=self.settings.scale,
            seed=self.run.seed,
        )

    def _num_groups(self, projection: Projection) -> int:
        """From the recipe, else the published number for these dimensions, else sub-tokens of width near 16."""
        dimensions = self.run.llama
        features = dimensions.input_size(projection)
        published = PUBLISHED_GROUPS.get((dimensions.hidden_size, dimensions.intermediate_size), {})
        return self.settings.num_groups.get(projection) or published.get(features) or default_num_groups(features)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW; for compressed layers in the compressed space."""
        return AdamW(
            parameter_groups(model, self.run),
            factored=compressed_weights(model),
            update=self.settings.update,
            **adamw_options(self.run),
        )

    def before_step(self, model: nn.Module, step: int, run_forward: Callable[[], None]) -> None:
        """Takes v from the whole batch of the first step, and of every `refresh_every`-th after it."""
        directions = directions_of(model)
        is_refresh = self.settings.refresh_every and step > 1 and (step - 1) % self.settings.refresh_every == 0
        if all(direction.is_ready for direction in directions) and not is_refresh:
            return
        for direction in directions:
            direction.observing = True
        run_forward()
        for direction in directions:
            direction.observing = False
            direction.take()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Moves running averages by what this step's batch has shown."""
        move_running_averages(model)

    def memory_notes(self) -> list[str]:
        """Names the layers whose input somebody else keeps."""
        keepers = keepers_of_inputs(self.settings.projections)
        return [f"{name} saves no activation: its input is kept for {keeper}" for name, keeper in keepers.items()]


PUBLISHED_GROUPS: dict[tuple[int, int], dict[int, int]] = {
    (512, 1376): {512: 64, 1376: 86},
    (768, 2048): {768: 64, 2048: 64},
}
"""Sub-tokens by input width, for the hidden and MLP widths of 60m and 130m (arXiv 2405.17991, released scripts)."""

MODES: dict[str, Callable[[Run], Mode]] = {"full": FullRank, "velora": VeLoRA}


def build_mode(run: Run) -> Mode:
    """The mode that a run names."""
    return MODES[run.mode](run)


def adamw_options(run: Run) -> dict[str, Any]:
    """Settings of AdamW that are the same for every group."""
    return {"lr": run.lr, "betas": run.optimizer.betas, "eps": run.optimizer.eps}


def parameter_groups(model: nn.Module, run: Run) -> list[dict[str, Any]]:
    """Each trainable parameter in exactly one group: matrices with weight decay, the rest without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": run.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
