"""A run, described whole: pydantic models of a recipe and of the resolved configuration.

Every field's docstring is its help text. Models are frozen, an unknown key is an error with its dotted path, validation
never changes a value, and what follows from other values is a property. No torch here: configuration errors answer at
once.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from velora_pretrain.dimensions import PROJECTIONS, PUBLISHED_STEPS, SIZES, LlamaConfig, Projection, Section
from velora_pretrain.hints import nearest
from velora_pretrain.sections import (
    AsList,
    BatchTable,
    CheckpointTable,
    DistributedTable,
    EvaluationTable,
    MemoryTable,
    ModelTable,
    OptimizerTable,
    ReadingTable,
    ScheduleTable,
    TrackingTable,
)

ModeName = Literal["full", "galore", "lora", "flora", "velora", "galore+velora", "flora+velora", "lora+velora"]
MODES: tuple[ModeName, ...] = get_args(ModeName)
"""Training modes; one with a plus has the settings of both, and the learning rate of the first."""
BASELINE = MODES[0]
"""The mode that the others are held against."""
PUBLISHED_RANKS = {768: 256}
"""Ranks of the low-rank modes by hidden width, where they are not a quarter of it (arXiv 2403.03507, table 2)."""
Precision = Literal["fp32", "bf16-mixed", "bf16"]


class MethodTable(Section):
    """Settings that every mode has."""

    lr: PositiveFloat | None = None
    """Peak learning rate of this mode; by default `optimizer.lr`."""
    block_lr_ratio: PositiveFloat = 1.0
    """Learning rate of the blocks' matrices over that of embedding, head and norms."""


class FullTable(MethodTable):
    """`[modes.full]`: full-rank AdamW."""

    def check_fit(self, dimensions: LlamaConfig) -> None:
        """Fits every model."""

    @property
    def unused(self) -> dict[str, str]:
        """Nothing is set in vain."""
        return {}


class LowRankTable(MethodTable):
    """Settings that every low-rank mode has."""

    rank: PositiveInt | None = None
    """Rank; by default the published one (128 at 60m, 256 at 130m), a quarter of the hidden width elsewhere."""

    def rank_at(self, dimensions: LlamaConfig) -> int:
        """The rank that is used at these dimensions."""
        hidden = dimensions.hidden_size
        return self.rank or PUBLISHED_RANKS.get(hidden) or max(1, hidden // 4)

    def check_fit(self, dimensions: LlamaConfig) -> None:
        """Checks the rank against the hidden width.

        Raises:
            ValueError: it is larger.
        """
        if self.rank_at(dimensions) > dimensions.hidden_size:
            raise ValueError(
                f"{self._key}.rank: {self.rank} is more than the hidden width {dimensions.hidden_size}; lower it"
            )

    @property
    def unused(self) -> dict[str, str]:
        """Nothing is set in vain."""
        return {}

    _key: ClassVar[str]


class GaLoreTable(LowRankTable):
    """`[modes.galore]`: AdamW in a low-rank subspace of the gradient (arXiv 2403.03507)."""

    _key: ClassVar[str] = "modes.galore"
    scale: PositiveFloat = 0.25
    """Factor on the steps of projected matrices (the paper's α)."""
    update_gap: PositiveInt = 200
    """Steps after which a matrix's subspace is found anew (the paper's T)."""
    finder: Literal["randomised", "svd"] = "randomised"
    """How the subspace is found: by a randomised range finder, or by an exact SVD."""


class LoRATable(LowRankTable):
    """`[modes.lora]`: adapters beside frozen projections (arXiv 2106.09685), merged now and then (arXiv 2307.05695)."""

    _key: ClassVar[str] = "modes.lora"
    alpha: PositiveFloat = 32.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that is dropped in training."""
    restart_every: NonNegativeInt = 0
    """Steps after which adapters are merged and start anew (ReLoRA); 0 never merges."""
    restart_warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up after each restart; by default 50, and at most a tenth of `restart_every`."""
    reset_share: float = Field(default=0.99, ge=0.0, le=1.0)
    """Share of the adapters' moments, the smallest in magnitude, that a restart sets to zero."""

    @property
    def warmup_after_restart_steps(self) -> int:
        """Steps of warm-up after each restart."""
        return min(50, self.restart_every // 10) if self.restart_warmup_steps is None else self.restart_warmup_steps

    @model_validator(mode="after")
    def _warms_up_between_restarts(self) -> LoRATable:
        if self.restart_every and self.warmup_after_restart_steps > self.restart_every:
            raise ValueError(
                f"modes.lora.restart_warmup_steps: {self.restart_warmup_steps} is more than the {self.restart_every}"
                " steps between restarts; lower it or leave it out"
            )
        return self

    @property
    def unused(self) -> dict[str, str]:
        """Settings of restarts, where there are none."""
        if self.restart_every:
            return {}
        reason = "modes.lora.restart_every is 0, there is no restart that would read this"
        return {key: reason for key in ("restart_warmup_steps", "reset_share") if key in self.model_fields_set}


class FLoRATable(LowRankTable):
    """`[modes.flora]`: momentum in a random subspace that is resampled (arXiv 2402.03293)."""

    _key: ClassVar[str] = "modes.flora"
    kappa: PositiveInt = 1000
    """Steps after which the random projection is drawn anew (the paper's κ)."""
    inner: Literal["adafactor", "adamw"] = "adafactor"
    """Optimizer around it: Adafactor as in the paper, or AdamW with both moments in the subspace."""
    accumulation: Literal["compressed", "dense"] = "compressed"
    """How gradients of several micro-batches are summed: in a random subspace of this rank, or in full."""


class VeLoRATable(MethodTable):
    """`[modes.velora]`: rank-1 sub-token projections (arXiv 2405.17991)."""

    layers: Annotated[tuple[Projection, ...], AsList] | Literal["all"] = ("v_proj", "down_proj")
    """Projections that are compressed; the paper's value and down by default, or all."""
    num_groups: dict[Projection, PositiveInt] = Field(default_factory=dict)
    """Sub-tokens per token and projection; the paper's at 60m and 130m, else sub-tokens of width near 16. Projections
    that are not in `layers` may be named and are not used."""
    init: Literal["batch_average_once", "running_average", "svd", "random"] = "batch_average_once"
    """How the direction v comes from the data."""
    refresh_every: NonNegativeInt = 0
    """Steps after which v is taken anew from the current batch; 0 keeps the first."""
    scale: PositiveFloat = 1.0
    """Factor on the compressed weight gradient."""
    update: Literal["dense", "projected"] = "dense"
    """dense: AdamW on the dense gradient C ⊗ v, the paper's; projected: AdamW on C, the step stays along v."""
    refresh: Literal["anew", "cycle"] = "anew"
    """anew: a refreshed v comes from the current batch; cycle: from an orthonormal basis found once (with `svd`), one
    vector after the other."""
    refresh_moments: Literal["keep", "reset", "reproject"] = "keep"
    """What becomes of the moments when a direction is refreshed: they stay as they are, are set to zero, or are
    multiplied with the cosine between the old direction and the new."""
    step_scale: PositiveFloat | None = None
    """Factor on the steps of compressed weights; by default 1, and beside another method the factor of its own."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The compressed projections by name."""
        return PROJECTIONS if self.layers == "all" else self.layers

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_projections(cls, layers: Any) -> Any:
        """Says in one line what a union of types would say in two."""
        if layers == "all":
            return layers
        if not isinstance(layers, list | tuple):
            raise ValueError(f'modes.velora.layers: give a list of projections, or "all" (got {layers!r})')
        for name in layers:
            if name not in PROJECTIONS:
                raise ValueError(
                    f"modes.velora.layers: {name!r} is not a projection; {nearest(str(name), PROJECTIONS)}choose from"
                    f" {', '.join(PROJECTIONS)}"
                )
        return layers

    def check_fit(self, dimensions: LlamaConfig) -> None:
        """Checks the settings that depend on the model's widths.

        Raises:
            ValueError: the sub-tokens of a compressed projection do not divide its input.
        """
        for name in self.projections:
            width = dimensions.input_size(name)
            groups = self.num_groups.get(name, 1)
            if width % groups:
                fitting = min(
                    (each for each in range(1, width + 1) if width % each == 0), key=lambda n: abs(n - groups)
                )
                raise ValueError(
                    f"modes.velora.num_groups.{name}: {groups} sub-tokens do not divide the width {width} of what"
                    f" {name} reads; for example {fitting} do"
                )

    @property
    def unused(self) -> dict[str, str]:
        """Keys of this table that are set but that nothing reads, each with the reason."""
        reason = f"{{}} is not in modes.velora.layers ({', '.join(self.projections)}), nothing would read this"
        found = {f"num_groups.{name}": reason.format(name) for name in self.num_groups if name not in self.projections}
        if not self.refresh_every:
            never = "modes.velora.refresh_every is 0, there is no refresh that would read this"
            found |= {key: never for key in ("refresh", "refresh_moments") if key in self.model_fields_set}
        return found

    @model_validator(mode="after")
    def _layers_agree(self) -> VeLoRATable:
        if not self.layers:
            raise ValueError('modes.velora.layers: name at least one projection, or "all"')
        if len(set(self.layers)) < len(self.layers) and self.layers != "all":
            raise ValueError("modes.velora.layers: a projection is named twice")
        if self.refresh_every and self.init == "running_average":
            raise ValueError("modes.velora.refresh_every: a running average moves at every step; leave this 0")
        if self.refresh_every and self.init == "random":
            raise ValueError("modes.velora.refresh_every: a random direction is not of the data; leave this 0")
        if self.refresh == "cycle" and self.init != "svd":
            raise ValueError('modes.velora.refresh: cycle needs the basis that modes.velora.init = "svd" finds')
        return self


class CompareTable(Section):
    """`[compare]`: what `compare perplexity` trains of this recipe where its options do not say."""

    modes: Annotated[tuple[str, ...], AsList] = ()
    """As `--modes`: each a mode, or a mode with settings of its own in brackets; by default every mode."""
    learning_rates: Annotated[tuple[str, ...], AsList] = ()
    """As `--learning-rates`: each some rates with commas between, for all modes or, after its name, for one."""
    seeds: Annotated[tuple[NonNegativeInt, ...], AsList] = ()
    """Seeds of the weights; by default `seed`."""


class ModesTable(Section):
    """`[modes]`: one table per training mode."""

    full: FullTable = FullTable()
    """Full-rank training."""
    galore: GaLoreTable = GaLoreTable()
    """Low-rank gradients."""
    lora: LoRATable = LoRATable()
    """Adapters."""
    flora: FLoRATable = FLoRATable()
    """Random-projection momentum."""
    velora: VeLoRATable = VeLoRATable()
    """Compressed activations and gradients."""


class Run(Section):
    """A whole run: what a recipe holds, and what `config.toml` in a run folder records."""

    size: str | None = None
    """Model size: 9m, 20m, 35m, 60m, 71m, 100m, 130m, 250m, 350m, 1b, 3b, 7b or 13b; or give [model] instead."""
    mode: ModeName = "full"
    """Training mode: full, galore, lora, flora, velora, or velora beside another: galore+velora and so on."""
    data: str = "auto"
    """auto, c4, sample, or a path, glob or URL of .json(.gz), .jsonl(.gz/.zst) or .parquet files."""
    validation_data: str | None = None
    """Like data, for evaluation; by default C4's validation split, or documents held out of the training data."""
    tokenizer: str = "bundled"
    """bundled, a SentencePiece model's path, or a name on the Hugging Face hub."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Hugging Face LLaMA folder, run folder or checkpoint whose weights the run starts from, and whose dimensions and
    tokenizer it has; by default they are drawn by the seed."""
    packing: Literal["pad", "pack"] = "pad"
    """pad: one document per sequence, truncated or padded; pack: documents end to end."""
    precision: Precision = "fp32"
    """fp32, bf16-mixed (fp32 weights, bf16 arithmetic) or bf16 (weights too)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """Whether forward and backward pass are compiled by torch.compile, whole; on a CPU that needs a C++ compiler."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order, below 2**63."""
    model: ModelTable = ModelTable()
    """Explicit dimensions."""
    batch: BatchTable = BatchTable()
    """What one optimizer step reads."""
    schedule: ScheduleTable = ScheduleTable()
    """Steps and learning-rate course."""
    optimizer: OptimizerTable = OptimizerTable()
    """AdamW, and when it steps."""
    memory: MemoryTable = MemoryTable()
    """Recomputation."""
    evaluation: EvaluationTable = EvaluationTable()
    """Validation."""
    checkpoint: CheckpointTable = CheckpointTable()
    """Checkpoints."""
    reading: ReadingTable = ReadingTable()
    """Reading of documents."""
    distributed: DistributedTable = DistributedTable()
    """Several processes."""
    tracking: TrackingTable = TrackingTable()
    """Experiment trackers."""
    modes: ModesTable = ModesTable()
    """Settings of each mode."""
    compare: CompareTable = CompareTable()
    """What a comparison trains."""

    @model_validator(mode="after")
    def _agrees(self) -> Run:
        if self.size is not None and self.size not in SIZES:
            raise ValueError(
                f"size: {self.size!r} is not a size; {nearest(self.size, SIZES)}choose from {', '.join(SIZES)}"
            )
        dimensions = self.llama
        if self.batch.sequence_length > dimensions.max_position_embeddings:
            raise ValueError(
                f"batch.sequence_length: {self.batch.sequence_length} is longer than the model's"
                f" {dimensions.max_position_embeddings} positions; lower it or raise model.max_position_embeddings"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps: {self.warmup_steps} is more than the {self.steps} steps of the run;"
                " lower it or leave it out"
            )
        if isinstance(self.batch.micro_batch, int) and self.batch.sequences % self.batch.micro_batch:
            raise ValueError(
                f"batch.micro_batch: {self.batch.micro_batch} does not divide batch.sequences {self.batch.sequences}"
            )
        for table in self.mode_tables.values():
            table.check_fit(dimensions)
        return self

    @property
    def llama(self) -> LlamaConfig:
        """The model's dimensions: those of `size`, with what `[model]` gives in their place.

        Raises:
            ValueError: without `size`, a dimension is missing in `[model]`.
        """
        given = self.model.model_dump(exclude_none=True)
        if self.size is not None:
            base = SIZES[self.size].model_dump()
            if "num_attention_heads" in given:
                base["num_key_value_heads"] = given["num_attention_heads"]
            return LlamaConfig.model_validate(base | given)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if key not in given:
                raise ValueError(f"model.{key}: missing; give size (for example 60m) or all dimensions in [model]")
        return LlamaConfig.model_validate({"num_key_value_heads": given["num_attention_heads"]} | given)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.schedule.steps or PUBLISHED_STEPS.get(self.size or "", 10_000)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self.steps // 10 if self.schedule.warmup_steps is None else self.schedule.warmup_steps

    @property
    def shuffle_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.reading.shuffle_seed is None else self.reading.shuffle_seed

    @property
    def lr(self) -> float:
        """Peak learning rate of the chosen mode."""
        return next(iter(self.mode_tables.values())).lr or self.optimizer.lr

    @property
    def mode_tables(self) -> dict[str, Any]:
        """The settings of the chosen mode, or of both methods that it combines."""
        return {part: getattr(self.modes, part) for part in self.mode.split("+")}

    @property
    def unused(self) -> dict[str, str]:
        """Dotted keys that are set but that nothing reads, each with the reason."""
        tables = {name: getattr(self.modes, name) for name in ModesTable.model_fields}
        found = {f"modes.{mode}.{key}": why for mode, table in tables.items() for key, why in table.unused.items()}
        if self.optimizer.rounding == "stochastic" and self.precision != "bf16":
            found["optimizer.rounding"] = f"weights are fp32 in precision {self.precision}, nothing is rounded"
        first, *others = self.mode_tables
        for name in others:
            why = f"in mode {self.mode} the learning rate is that of modes.{first}, nothing would read this"
            found |= {f"modes.{name}.{key}": why for key in ("lr", "block_lr_ratio")}
        return found

    @property
    def name(self) -> str:
        """Short name of model and mode, for folders and tables."""
        return f"{self.size or 'custom'}-{self.mode}"

    @property
    def sha256(self) -> str:
        """Hash of the configuration, but for where its records go as well: that is no part of what was run."""
        settings = self.model_dump(mode="json", exclude={"tracking"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
