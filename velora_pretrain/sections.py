"""The tables of a recipe that every mode shares: model, batch, schedule, optimizer and so on. No torch here.

A field's docstring is its help text.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict, model_validator

from velora_pretrain.dimensions import Section

AsList = Strict(False)
"""For tuples: their values come as the lists of TOML and JSON, which strict types would refuse."""
TrackerName = Literal["tensorboard", "wandb", "trackio"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
"""Experiment trackers, each of which comes with the extra of its name."""


class ModelTable(Section):
    """`[model]`: explicit dimensions, or changes to those of `size`. Names as in Hugging Face's config.json."""

    vocab_size: PositiveInt | None = None
    """Rows of the embedding and of the head."""
    hidden_size: PositiveInt | None = None
    """Width of the residual stream."""
    intermediate_size: PositiveInt | None = None
    """Width of the SwiGLU product."""
    num_hidden_layers: PositiveInt | None = None
    """Number of transformer blocks."""
    num_attention_heads: PositiveInt | None = None
    """Query heads per block."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads per block; by default as many as query heads."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence, in tokens."""
    rms_norm_eps: PositiveFloat | None = None
    """Added to the mean square in RMSNorm."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies."""
    initializer_range: PositiveFloat | None = None
    """Standard deviation of the initial weights."""


class BatchTable(Section):
    """`[batch]`: what one optimizer step reads."""

    sequences: PositiveInt = 512
    """Sequences per optimizer step, over all devices."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Sequences per forward pass on one device, or auto."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens per sequence."""


class ScheduleTable(Section):
    """`[schedule]`: how long, and the learning rate's course."""

    steps: PositiveInt | None = None
    """Optimizer steps; by default the published number for the size (10,000 where none is published)."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; by default 10 % of the steps."""
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Course after the warm-up."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate at the last step, as a share of the peak (cosine and linear)."""


class OptimizerTable(Section):
    """`[optimizer]`: AdamW (arXiv 1711.05101)."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate; a mode's own `lr` goes before it."""
    betas: Annotated[tuple[float, float], AsList] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest global gradient norm; 0 clips nothing."""
    update: Literal["step", "in_backward"] = "step"
    """step: all parameters move after the backward pass; in_backward: each moves as soon as its gradient is complete,
    which is then freed."""
    state_bits: Literal[32, 8] = 32
    """Bits per element of the moments of the blocks' matrices; 8 needs the extra eight-bit. Embeddings stay in 32."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How weights in bf16 take a step: to the nearest, as published, where small steps are lost; or up and down by
    chance, where they add up (arXiv 2010.06192)."""
    not_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What a loss or gradient norm that is not finite does. stop: ends the run; skip: the step is not taken, and
    counted; rollback: goes back to the last checkpoint and on with the data after this batch."""

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerTable:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {list(self.betas)} must lie in [0, 1)")
        return self

    @model_validator(mode="after")
    def _norm_is_known_when_clipped(self) -> OptimizerTable:
        if self.update == "in_backward" and self.clip_norm:
            raise ValueError(
                "optimizer.update: in_backward steps before the global gradient norm is known, so it cannot be clipped;"
                " set optimizer.clip_norm = 0, or optimizer.update = step"
            )
        return self

    @model_validator(mode="after")
    def _step_can_be_skipped(self) -> OptimizerTable:
        if self.update == "in_backward" and self.not_finite == "skip":
            raise ValueError(
                "optimizer.not_finite: with update = in_backward a part of the step is taken before its numbers are"
                " known, so it cannot be skipped; use rollback, or optimizer.update = step"
            )
        return self


class MemoryTable(Section):
    """`[memory]`: what is kept for the backward pass."""

    recompute: Literal["none", "elementwise", "mlp", "block"] = "none"
    """none: everything that the backward pass reads is kept; elementwise: norm outputs and SwiGLU products are rebuilt,
    no matrix product is repeated; mlp: the MLP is run again; block: whole blocks are."""


class EvaluationTable(Section):
    """`[evaluation]`: validation perplexity during the run and at its end."""

    every_steps: NonNegativeInt = 1000
    """Optimizer steps between evaluations; 0 evaluates only at the end."""
    tokens: PositiveInt = 10_000_000
    """Validation targets to score, in tokens; all of them where the data holds fewer."""
    samples: NonNegativeInt = 0
    """Validation documents whose beginnings are continued at each evaluation, into samples.jsonl."""
    sample_tokens: PositiveInt = 32
    """Most tokens of such a continuation."""


class CheckpointTable(Section):
    """`[checkpoint]`: what is kept of the run while it goes on."""

    every_steps: NonNegativeInt = 1000
    """Optimizer steps between checkpoints; 0 writes one only at the end."""
    every_minutes: NonNegativeFloat = 30.0
    """Longest time between checkpoints, in minutes; 0 sets no such limit."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept; older ones are removed."""
    keep_every_steps: NonNegativeInt = 0
    """Checkpoints of steps that are a multiple of this are never removed; 0 keeps none beside the newest."""
    background: bool = True
    """Whether checkpoints are written while training goes on, from a copy in the host's memory that lives until then;
    the last one, and where memory is short, is written at once and takes no copy."""


class ReadingTable(Section):
    """`[reading]`: how documents are read."""

    shuffle_block_documents: PositiveInt = 1024
    """Documents read and permuted together."""
    shuffle_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the data order alone, below 2**63; by default `seed`."""
    max_bad_lines: NonNegativeInt = 0
    """Unreadable records skipped before reading stops with an error."""
    holdout_every_documents: int = Field(default=50, ge=2)
    """Of data without validation files, every so many-th document is kept from training, for validation."""
    prefetch_batches: PositiveInt = 4
    """Batches read and tokenised ahead of the training step."""
    token_cache: str = "auto"
    """What `data tokenise` wrote, used where it fits data and tokenizer: auto looks beside the data; a folder, what
    --output named; none tokenises anew. The batches are the same."""


class DistributedTable(Section):
    """`[distributed]`: how several processes share a run; how many there are is the launcher's to say."""

    sharding: Literal["none", "full"] = "none"
    """none: each process has the whole model and its states; full: some rows of every weight and state, gathered block
    by block for each pass (FSDP, arXiv 2304.11277), for modes that move each row by itself."""


class TrackingTable(Section):
    """`[tracking]`: where a run's records go beside metrics.jsonl; none of it changes a number of the run."""

    trackers: Annotated[tuple[TrackerName, ...], AsList] = ()
    """Any of tensorboard, wandb and trackio, each with the extra of its name; by default none."""
    project: str = Field(default="velora-pretrain", min_length=1)
    """Project that the run belongs to in wandb and trackio."""

    @model_validator(mode="after")
    def _each_once(self) -> TrackingTable:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError("tracking.trackers: a tracker is named twice")
        return self
