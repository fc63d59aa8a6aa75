"""A run small enough for tests: its text, tokenizer and configuration, and the command that trains it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import sentencepiece

ROOT = Path(__file__).parents[1]
WORDS = [f"{a}{b}" for a in ("ba", "ce", "di", "fo", "gu", "ha", "ki") for b in ("l", "mer", "nos", "p", "rat", "sun")]

TRICKY_TEXTS = [
    "two  spaces,   three\n\nand newlines\r\n\ttabs ",
    "   ",
    "\n",
    "",
    "Héllo wörld — “quoted”… don't",
    "😀 👩‍👩‍👧 漢字かな 한국어 नमस्ते العربية",
    "ﬁne ½ Ａ ｶﾞ \u3000 e\u0301 \u200b zero width",
    "a\x00b 12345 3.14 0x0A",
]
"""Each breaks some tokenizer: several spaces, newlines, no text, characters of 2 to 4 bytes, joined emoji, ligatures
and fractions (which NFKC rewrites), full-width and zero-width ones, a NUL, digits."""

MODEL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Dimensions of a small model, with grouped queries."""


def write_documents(path: Path, count: int, seed: int = 0) -> Path:
    """JSON lines of word chains with a grammar that a small model can learn: each word has few successors."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        place, words = draw.randrange(len(WORDS)), []
        for _ in range(draw.randrange(5, 60)):
            words.append(WORDS[place])
            place = (place * 5 + draw.choice((1, 2, 7))) % len(WORDS)
        lines.append(json.dumps({"text": " ".join(words) + "."}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tokenizer(folder: Path, documents: Path) -> Path:
    """A SentencePiece model of 120 pieces, in T5's layout."""
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tiny"),
        vocab_size=120,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tiny.model"


def values(data: Path, tokenizer: Path, /, **changes: Any) -> dict[str, Any]:
    """The recipe of a small run, as nested tables; `changes` are dotted keys with `__` for the dots."""
    from velora_pretrain.recipe import set_dotted

    recipe: dict[str, Any] = {
        "data": str(data),
        "tokenizer": str(tokenizer),
        "device": "cpu",
        "model": {**MODEL, "max_position_embeddings": 32},
        "batch": {"sequences": 8, "micro_batch": 4, "sequence_length": 32},
        "schedule": {"steps": 6},
        "optimizer": {"lr": 0.01},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "reading": {"holdout_every_documents": 10, "shuffle_block_documents": 16},
    }
    for key, value in changes.items():
        set_dotted(recipe, key.replace("__", "."), value)
    return recipe


def command(*arguments: str) -> list[str]:
    """The command line that runs the tool."""
    return [sys.executable, "-m", "velora_pretrain", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a started tool: it finds the package, and uses one thread, so that its sums are the same."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


def start(*arguments: str, **changes: str) -> subprocess.Popen[str]:
    """Starts the tool, its output in pipes."""
    return subprocess.Popen(
        command(*arguments),
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def tool(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs the tool to its end."""
    return subprocess.run(
        command(*arguments),
        env=environment(**changes),
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=300,
        check=False,
    )
