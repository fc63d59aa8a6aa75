"""Training modes: one kind of linear layer × one optimizer. The one place that knows them by name.

A mode adapts the model, gives some parameters rules of their own, and says what to do around a step; the trainer owns
when to step. Everything that a mode keeps is a parameter, a registered buffer or a tensor in `optimizer.state`, so
checkpoints and memory accounting need not know it. Modes combine: each method takes the layers that are its own, and
the rest is left to the next. To add a mode: its settings in `config.ModesTable`, a class here, a row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from velora_pretrain.config import Run
from velora_pretrain.dimensions import PROJECTIONS, Projection
from velora_pretrain.nn.direction import directions_of, forget_seen, move_running_averages, take_directions
from velora_pretrain.nn.lora import adapt_linears, adapter_parameters, merge_and_restart
from velora_pretrain.nn.velora import VeLoRALinear, compress_linears, default_num_groups, keepers_of_inputs
from velora_pretrain.optim.adamw import AdamW, Factored, Rule
from velora_pretrain.optim.flora import flora_rules
from velora_pretrain.optim.galore import galore_rules
from velora_pretrain.optim.moments import check_eight_bit, keep_moment, load_moment
from velora_pretrain.optim.reset import reset_moments
from velora_pretrain.optim.schedule import restart_multiplier

Rules = dict[nn.Parameter, Rule]


class Method:
    """What one method does to the model, its parameters and a step. This one, full rank, does nothing."""

    period_key: ClassVar[str | None] = None
    """Its setting that says after how many steps some work is done once, if there is such work; 0 is never."""

    moves_rows_alone: ClassVar[bool] = True
    """Whether each row of a weight moves by its own gradient and state, so that processes can have some rows each."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def adapt(self, model: nn.Module) -> None:
        """Replaces projections in place; after initialisation, before the device and any wrapping."""

    def rules(self, model: nn.Module, free: Sequence[nn.Parameter]) -> Rules:
        """Rules for the parameters that do not move by plain AdamW.

        Args:
            model: the adapted model, on its device.
            free: the projections' trainable weights that no other method has taken.
        """
        return {}

    def lr_multiplier(self, step: int) -> float:
        """Factor on the learning rate of `step`, counted from 1, beside that of the schedule."""
        return 1.0

    def before_step(self, model: nn.Module, optimizer: AdamW, step: int, run_forward: Callable[[], None]) -> bool:
        """Called before the forward passes of `step`, counted from 1; says whether it changed anything.

        Args:
            model: the adapted model.
            optimizer: over its parameters.
            step: the step that is about to be taken.
            run_forward: runs the forward passes of this step's whole batch once, without gradients.
        """
        return False

    def after_step(self, model: nn.Module, optimizer: AdamW, step: int) -> dict[str, float]:
        """Called after the optimizer has taken `step`; what it gives is kept in the step's record."""
        return {}

    def after_skipped_step(self, model: nn.Module, optimizer: AdamW, step: int) -> None:
        """Called in its place where the numbers of `step` were not finite, and nothing has moved."""

    def memory_notes(self) -> list[str]:
        """What a reader of a memory table should know: whatever looks like a saving and is none."""
        return []

    def options(self) -> dict[str, Any]:
        """The settings that tell this method's rows in a table apart."""
        return _chosen(self.run.modes.full)

    @property
    def is_published(self) -> bool:
        """Whether its settings are those of the published runs."""
        return set(self.options()) <= {"rank", "inner"}


class GaLore(Method):
    """AdamW in a low-rank subspace of the gradient of every projection."""

    period_key = "update_gap"
    moves_rows_alone = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.settings = run.modes.galore
        self.rank = self.settings.rank_at(run.llama)

    def rules(self, model: nn.Module, free: Sequence[nn.Parameter]) -> Rules:
        """One for each projection whose smaller side is above the rank."""
        settings = self.settings
        return {
            **galore_rules(
                free,
                rank=self.rank,
                scale=settings.scale,
                update_gap=settings.update_gap,
                finder=settings.finder,
                seed=self.run.seed,
            )
        }

    def options(self) -> dict[str, Any]:
        """Rank, and what was set."""
        return {"rank": self.rank, **_chosen(self.settings)}


class LoRA(Method):
    """Adapters beside frozen projections, merged and started anew every so many steps if that is asked for."""

    period_key = "restart_every"
    moves_rows_alone = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.settings = run.modes.lora
        self.rank = self.settings.rank_at(run.llama)

    def adapt(self, model: nn.Module) -> None:
        """Adapters on all projections of the blocks."""
        settings = self.settings
        adapt_linears(
            model,
            layers=PROJECTIONS,
            rank=self.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            seed=self.run.seed,
        )

    def lr_multiplier(self, step: int) -> float:
        """Warms up again after each restart."""
        settings = self.settings
        return restart_multiplier(
            step, restart_every=settings.restart_every, warmup_steps=settings.warmup_after_restart_steps
        )

    def after_step(self, model: nn.Module, optimizer: AdamW, step: int) -> dict[str, float]:
        """Merges and restarts; gives the share of the adapters' moments that is zero then."""
        every = self.settings.restart_every
        if not every or step % every or step == self.run.steps:
            return {}
        merge_and_restart(model, seed=self.run.seed, step=step)
        share = reset_moments(optimizer, adapter_parameters(model), self.settings.reset_share)
        return {"zero_moments_share": share}

    def after_skipped_step(self, model: nn.Module, optimizer: AdamW, step: int) -> None:
        """Restarts all the same, as the learning rate's course does."""
        if any(optimizer.state.get(parameter) for parameter in adapter_parameters(model)):
            self.after_step(model, optimizer, step)

    def options(self) -> dict[str, Any]:
        """Rank, and what was set."""
        return {"rank": self.rank, **_chosen(self.settings)}


class FLoRA(Method):
    """Momentum in a random subspace, drawn anew now and then."""

    period_key = "kappa"
    moves_rows_alone = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.settings = run.modes.flora
        self.rank = self.settings.rank_at(run.llama)

    def rules(self, model: nn.Module, free: Sequence[nn.Parameter]) -> Rules:
        """The projections in a subspace, all other parameters by the same inner optimizer."""
        settings = self.settings
        taken = {id(parameter) for parameter in free}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        return {
            **flora_rules(
                free,
                others,
                rank=self.rank,
                kappa=settings.kappa,
                inner=settings.inner,
                accumulation=settings.accumulation,
                seed=self.run.seed,
            )
        }

    def options(self) -> dict[str, Any]:
        """Rank and inner optimizer, and what was set."""
        return {"rank": self.rank, "inner": self.settings.inner, **_chosen(self.settings)}


class VeLoRA(Method):
    """Compressed inputs of the chosen projections, and AdamW on their factored gradients."""

    period_key = "refresh_every"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.settings = run.modes.velora

    def adapt(self, model: nn.Module) -> None:
        """Replaces the chosen projections, or the first factors of the adapters that stand in their places."""
        compress_linears(
            model,
            layers=self.settings.projections,
            num_groups={name: self._num_groups(name) for name in self.settings.projections},
            init=self.settings.init,
            keeps_basis=self.settings.refresh == "cycle",
            scale=self.settings.scale,
            seed=self.run.seed,
        )

    def _num_groups(self, projection: Projection) -> int:
        """From the recipe, else the published number for these dimensions, else sub-tokens of width near 16."""
        dimensions = self.run.llama
        features = dimensions.input_size(projection)
        published = PUBLISHED_GROUPS.get((dimensions.hidden_size, dimensions.intermediate_size), {})
        return self.settings.num_groups.get(projection) or published.get(features) or default_num_groups(features)

    def rules(self, model: nn.Module, free: Sequence[nn.Parameter]) -> Rules:
        """AdamW in the compressed space, for the compressed layers."""
        # Beside a method whose own steps are scaled, steps of the same size.
        others = [getattr(table, "scale", 1.0) for table in self.run.mode_tables.values() if table != self.settings]
        scale = self.settings.step_scale or (others[0] if others else 1.0)
        return {
            layer.coefficients: Factored(
                weight=layer.weight, direction=layer.direction.vector, update=self.settings.update, scale=scale
            )
            for layer in model.modules()
            if isinstance(layer, VeLoRALinear)
        }

    def before_step(self, model: nn.Module, optimizer: AdamW, step: int, run_forward: Callable[[], None]) -> bool:
        """Takes v from the whole batch of the first step, and of every `refresh_every`-th after it."""
        directions = directions_of(model)
        every = self.settings.refresh_every
        is_refresh = every and step > 1 and (step - 1) % every == 0
        if all(direction.is_ready for direction in directions) and not is_refresh:
            return False
        before = {direction: direction.vector.clone() for direction in directions}
        if is_refresh and self.settings.refresh == "cycle":
            for direction in directions:
                direction.turn((step - 1) // every)
        else:
            take_directions(directions, run_forward)
        if is_refresh:
            for layer in model.modules():
                if isinstance(layer, VeLoRALinear):
                    cosine = torch.dot(before[layer.direction], layer.direction.vector)
                    self._carry_moments(optimizer.state[layer.coefficients], cosine)
        return True

    def _carry_moments(self, state: dict[str, Any], cosine: Tensor) -> None:
        """What becomes of a layer's moments when its direction has turned by the angle of `cosine`."""
        if self.settings.refresh_moments == "reset":
            state.clear()
        elif self.settings.refresh_moments == "reproject" and state:
            # The first moment is a vector of the old direction: what is left of it along the new one. The second is
            # a size, and the new coefficients are of about the same.
            m = load_moment(state, "exp_avg", state["exp_avg"])
            keep_moment(state, "exp_avg", m.mul_(cosine), self.run.optimizer.state_bits)

    def after_step(self, model: nn.Module, optimizer: AdamW, step: int) -> dict[str, float]:
        """Moves running averages by what this step's batch has shown."""
        move_running_averages(model)
        return {}

    def after_skipped_step(self, model: nn.Module, optimizer: AdamW, step: int) -> None:
        """Forgets what its batch has shown."""
        forget_seen(model)

    def memory_notes(self) -> list[str]:
        """Names the layers whose input somebody else keeps."""
        are_copies = any(getattr(table, "dropout", 0.0) for table in self.run.mode_tables.values())
        keepers = keepers_of_inputs(self.settings.projections, are_copies=are_copies)
        return [f"{name} saves no activation: its input is kept for {keeper}" for name, keeper in keepers.items()]

    def options(self) -> dict[str, Any]:
        """What was set."""
        return _chosen(self.settings)


def _chosen(settings: Any) -> dict[str, Any]:
    """The settings of a method that are not the default ones."""
    return settings.model_dump(mode="json", exclude_defaults=True, exclude={"lr", "rank", "inner"})


PUBLISHED_GROUPS: dict[tuple[int, int], dict[int, int]] = {
    (512, 1376): {512: 64, 1376: 86},
    (768, 2048): {768: 64, 2048: 64},
}
"""Sub-tokens by input width, for the hidden and MLP widths of 60m and 130m (arXiv 2405.17991, released scripts)."""

PUBLISHED_MEMORY_GB: dict[str, dict[str, float]] = {
    "60m": {"full": 1.30, "galore": 1.27, "lora": 0.86, "flora": 1.27, "velora": 1.18},
    "130m": {"full": 2.32, "galore": 2.02, "lora": 1.24, "flora": 2.01, "velora": 1.83},
}
"""GPU memory in GB as published beside the perplexities (arXiv 2405.17991, pre-training table)."""

METHODS: dict[str, Callable[[Run], Method]] = {
    "full": Method,
    "galore": GaLore,
    "lora": LoRA,
    "flora": FLoRA,
    "velora": VeLoRA,
}


class Mode:
    """A training mode, as the trainer sees it: its methods, each on what the others have left to it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.methods = [METHODS[name](run) for name in run.mode_tables]

    def adapt(self, model: nn.Module) -> None:
        """See `Method`."""
        for method in self.methods:
            method.adapt(model)

    def build_optimizer(self, model: nn.Module) -> AdamW:
        """See `Mode`.

        Raises:
            UserError: 8-bit moments are asked for without the extra that they need.
        """
        if self.run.optimizer.state_bits == 8:
            check_eight_bit()
        rules: Rules = {}
        # The last method named adapts layers; those before it take the projections that it has left as they were.
        for method in reversed(self.methods):
            free = [p for p in projection_weights(model) if p.requires_grad and p not in rules]
            rules = {**method.rules(model, free), **rules}
        options = {"lr": self.run.lr, "betas": self.run.optimizer.betas, "eps": self.run.optimizer.eps}
        rounding = self.run.optimizer.rounding
        return AdamW(parameter_groups(model, self.run), rules=rules, rounding=rounding, **options)

    def lr_multiplier(self, step: int) -> float:
        """See `Method`."""
        return reduce(lambda product, method: product * method.lr_multiplier(step), self.methods, 1.0)

    def before_step(self, model: nn.Module, optimizer: AdamW, step: int, run_forward: Callable[[], None]) -> bool:
        """See `Method`."""
        changes = [method.before_step(model, optimizer, step, run_forward) for method in self.methods]
        return any(changes)

    def after_step(self, model: nn.Module, optimizer: AdamW, step: int) -> dict[str, float]:
        """See `Method`."""
        return {key: value for m in self.methods for key, value in m.after_step(model, optimizer, step).items()}

    def after_skipped_step(self, model: nn.Module, optimizer: AdamW, step: int) -> None:
        """See `Method`."""
        for method in self.methods:
            method.after_skipped_step(model, optimizer, step)

    def periods(self) -> dict[str, int]:
        """Steps after which some work is done once, by the dotted key of the setting that says so."""
        found = {}
        for part, method in zip(self.run.mode_tables, self.methods, strict=True):
            steps = getattr(self.run.mode_tables[part], method.period_key) if method.period_key else 0
            if steps:
                found[f"modes.{part}.{method.period_key}"] = steps
        return found

    def memory_notes(self) -> list[str]:
        """See `Method`."""
        return [note for method in self.methods for note in method.memory_notes()]

    @property
    def moves_rows_alone(self) -> bool:
        """See `Method`."""
        return all(method.moves_rows_alone for method in self.methods)

    def published_memory_gb(self) -> float | None:
        """GPU memory in GB that was published for this size and mode, at the settings of the published runs."""
        figures = PUBLISHED_MEMORY_GB.get(self.run.size or "", {})
        as_published = all(method.is_published for method in self.methods)
        return figures.get(self.run.mode) if as_published else None

    def options(self) -> dict[str, Any]:
        """See `Method`."""
        each = {name: method.options() for name, method in zip(self.run.mode_tables, self.methods, strict=True)}
        if len(each) == 1:
            return each[self.run.mode]
        return {f"{name}.{key}": value for name, options in each.items() for key, value in options.items()}


def build_mode(run: Run) -> Mode:
    """The mode that a run names."""
    return Mode(run)


def with_periods(run: Run, periods: Mapping[str, int]) -> Run:
    """The run with other periods, by keys as of `Mode.periods`; not validated, since nobody trains with them."""
    modes = run.modes
    for key, steps in periods.items():
        _, part, name = key.split(".")
        modes = modes.model_copy(update={part: getattr(modes, part).model_copy(update={name: steps})})
    return run.model_copy(update={"modes": modes})


def projection_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the blocks' projections that are plain linear layers, in the model's order."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = [linear.weight for name, linear in linears if name.rpartition(".")[2] in PROJECTIONS]
    return [weight for weight in weights if isinstance(weight, nn.Parameter)]


def parameter_groups(model: nn.Module, run: Run) -> list[dict[str, Any]]:
    """Each trainable parameter in exactly one group: matrices with weight decay, the rest without.

    Moments of embedding and head stay in 32 bits. A group's learning rate is `lr_ratio` times the run's.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    in_blocks = [p for name, p in trainable if p.ndim >= 2 and ".layers." in name]
    around = [p for name, p in trainable if p.ndim >= 2 and ".layers." not in name]
    vectors = [p for _, p in trainable if p.ndim < 2]
    decay, ratio = run.optimizer.weight_decay, next(iter(run.mode_tables.values())).block_lr_ratio
    return [
        {"params": in_blocks, "weight_decay": decay, "lr_ratio": ratio, "state_bits": run.optimizer.state_bits},
        {"params": around, "weight_decay": decay, "lr_ratio": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
