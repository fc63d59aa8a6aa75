"""Dimensions of LLaMA models: in the names of Hugging Face's config.json, and those of the published sizes."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


class Section(BaseModel):
    """Base of every table: frozen, strict about keys and types, only finite numbers, help text from docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class LlamaConfig(Section):
    """Dimensions of a LLaMA model, in the names of Hugging Face's config.json."""

    vocab_size: PositiveInt = 32_000
    """Rows of the embedding and of the head."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    intermediate_size: PositiveInt
    """Width of the SwiGLU product."""
    num_hidden_layers: PositiveInt
    """Number of transformer blocks."""
    num_attention_heads: PositiveInt
    """Query heads per block."""
    num_key_value_heads: PositiveInt
    """Key and value heads per block; fewer than the query heads means grouped-query attention."""
    max_position_embeddings: PositiveInt = 1024
    """Longest sequence, in tokens."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """Whether head and embedding are one matrix; only untied models are trained, tied ones are evaluated."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def input_size(self, projection: Projection) -> int:
        """Width of what a projection reads."""
        return self.intermediate_size if projection == "down_proj" else self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Number of weights, embedding and head included."""
        keys_values = 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        attention = 2 * self.hidden_size * self.hidden_size + keys_values
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * block + self.hidden_size

    @model_validator(mode="after")
    def _heads_divide(self) -> LlamaConfig:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"model.num_attention_heads: {self.num_attention_heads} heads do not split hidden_size"
                f" {self.hidden_size} into heads of even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_key_value_heads: {self.num_key_value_heads} does not divide the"
                f" {self.num_attention_heads} query heads"
            )
        return self


def _published(hidden: int, intermediate: int, layers: int, heads: int, vocab_size: int = 32_000) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


SIZES: dict[str, LlamaConfig] = {
    "9m": _published(128, 352, 4, 4),
    "20m": _published(256, 688, 4, 4),
    "35m": _published(384, 1024, 6, 8),
    "60m": _published(512, 1376, 8, 8),
    "71m": _published(512, 1368, 12, 8),
    "100m": _published(640, 1708, 12, 10, vocab_size=32_100),
    "130m": _published(768, 2048, 12, 12),
    "250m": _published(768, 2560, 24, 16),
    "350m": _published(1024, 2736, 24, 16),
    "1b": _published(2048, 5461, 24, 32),
    "3b": _published(2560, 6848, 32, 32),
    "7b": _published(4096, 11_008, 32, 32),
    "13b": _published(5120, 13_824, 40, 40),
}
"""Published configurations (GaLore's configs/; 13b: LLaMA, arXiv 2302.13971, table 2)."""

PUBLISHED_STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000}
"""Optimizer steps of the published runs (GaLore, arXiv 2403.03507, table 2)."""
