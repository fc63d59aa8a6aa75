"""Model folders as others write them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import runs
import torch
import transformers

ROPE_THETA = 50_000.0


def write_llama(
    folder: Path, tokenizer: Path | None, *, dtype: torch.dtype, max_shard_size: str | None = None, **changes: Any
) -> Path:
    """A random LLaMA, saved by transformers: grouped queries, its own rotary base.

    Args:
        folder: where to.
        tokenizer: a SentencePiece model that lies beside it under LLaMA's name.
        dtype: what its weights are stored in.
        max_shard_size: largest file, as transformers takes it; bf16 is cut into several by itself.
        changes: of config.json.
    """
    torch.manual_seed(0)
    told = {**runs.MODEL, "max_position_embeddings": 512, "initializer_range": 0.3, **changes}
    config = transformers.LlamaConfig(**told, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    model = transformers.LlamaForCausalLM(config).to(dtype)
    shards = max_shard_size or ("10KB" if dtype == torch.bfloat16 else "1GB")
    model.save_pretrained(folder, max_shard_size=shards)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder
