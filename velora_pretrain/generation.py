"""Continuing a text: the next token from the logits of all before it, again and again.

Nothing is kept between tokens, so a continuation of n tokens costs n forward passes over the whole text: enough to look
at what a model has learnt, not to serve it. Drawing uses a generator of its own, on the CPU, so that a seed gives the
same text on every device, up to rounding, and a training run that samples has the same numbers as one that does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from velora_pretrain.config import Precision, Run
from velora_pretrain.data.c4 import Source
from velora_pretrain.data.loader import evaluation_batches
from velora_pretrain.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from velora_pretrain.devices import autocast, pick_device
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import find_checkpoint
from velora_pretrain.files import write_atomically
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.nn.llama import Llama
from velora_pretrain.records import lines_up_to

PROMPT_TOKENS = 16
"""Tokens of a validation document that a logged continuation begins with, of a shorter document half."""
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50
"""How logged continuations are drawn."""


def choose(logits: Float[Tensor, " vocabulary"], *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token.

    Args:
        logits: of every token, on the CPU.
        temperature: what they are divided by before the softmax; 0 takes the likeliest.
        top_k: draws from so many of the likeliest; 0 from all.
        generator: of the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.double() / temperature
    if 0 < top_k < len(scaled):
        values, tokens = scaled.topk(top_k)
        return int(tokens[torch.multinomial(values.softmax(0), 1, generator=generator)])
    return int(torch.multinomial(scaled.softmax(0), 1, generator=generator))


@torch.no_grad()
def continue_tokens(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
    precision: Precision = "fp32",
) -> list[int]:
    """The tokens that follow a prompt, up to the end of the document, of the model's positions, or `max_new_tokens`.

    Args:
        model: gives the logits; it is in the mode of evaluation meanwhile.
        prompt: at least one token.
        max_new_tokens: the most that are added.
        eos_id: the token that ends a document; it is not among those returned.
        temperature: see `choose`.
        top_k: see `choose`.
        generator: see `choose`.
        precision: of the run that trained the model.
    """
    device, was_training = model.lm_head.weight.device, model.training
    tokens = list(prompt)
    model.eval()
    try:
        for _ in range(min(max_new_tokens, model.config.max_position_embeddings - len(prompt))):
            with autocast(precision, device.type):
                hidden = model.model(torch.tensor([tokens], device=device))
                logits = model.lm_head(hidden[0, -1])
            token = choose(logits.float().cpu(), temperature=temperature, top_k=top_k, generator=generator)
            if token == eos_id:
                break
            tokens.append(token)
    finally:
        model.train(was_training)
    return tokens[len(prompt) :]


def generate(
    path: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: str,
    display: Display,
    tokenizer_name: str | None = None,
) -> str:
    """The prompt and what a checkpoint's model writes after it.

    Args:
        path: a checkpoint, a run folder, or any Hugging Face LLaMA folder.
        prompt: the beginning of the text.
        max_new_tokens: the most tokens that are added.
        temperature: see `choose`.
        top_k: see `choose`.
        seed: of what is drawn.
        device: auto, cpu, cuda or mps.
        display: takes warnings.
        tokenizer_name: where the folder holds none: as `config.Run.tokenizer`.

    Raises:
        UserError: no model or tokenizer there, or a prompt that is empty or longer than the model's positions.
    """
    checkpoint, run = find_checkpoint(path, display)
    model = load_llama(checkpoint)
    tokenizer = load_tokenizer(tokenizer_name or str(checkpoint))
    check_vocabulary(tokenizer, model.config.vocab_size)
    (tokens,) = tokenizer.encode([prompt])
    if not tokens:
        raise UserError("the prompt has not one token; give some text")
    positions = model.config.max_position_embeddings
    if len(tokens) >= positions:
        raise UserError(f"the prompt has {len(tokens)} tokens, and the model {positions} positions; shorten it")
    new = continue_tokens(
        model.to(pick_device(device)),
        tokens,
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
        precision=run.precision if run else "fp32",
    )
    return tokenizer.decode([*tokens, *new])


class SampleLog:
    """Continuations of the first validation documents' beginnings, a line of samples.jsonl for each."""

    def __init__(self, path: Path, run: Run, validation: Source, tokenizer: Tokenizer) -> None:
        self._path, self._run, self._validation, self._tokenizer = path, run, validation, tokenizer
        self._prompts: list[list[int]] | None = None

    def write(self, model: Llama, step: int) -> list[dict[str, Any]]:
        """Adds a line for each prompt: `step`, `prompt`, `continuation`; the same model and step give the same.

        Args:
            model: as it is after `step` optimizer steps.
            step: optimizer steps done.

        Returns:
            The lines, as objects.
        """
        count = self._run.evaluation.samples
        if not count:
            return []
        if self._prompts is None:
            self._prompts = self._beginnings(count)
        generator = torch.Generator().manual_seed((self._run.seed + step) % 2**63)
        # An evaluation that was cut off is done again.
        lines, samples = lines_up_to(self._path, step - 1), []
        for prompt in self._prompts:
            new = continue_tokens(
                model,
                prompt,
                max_new_tokens=self._run.evaluation.sample_tokens,
                eos_id=self._tokenizer.eos_id,
                temperature=SAMPLE_TEMPERATURE,
                top_k=SAMPLE_TOP_K,
                generator=generator,
                precision=self._run.precision,
            )
            # Where the prompt ends within a character, that belongs to the continuation.
            before = self._tokenizer.decode(prompt).rstrip("\N{REPLACEMENT CHARACTER}")
            text = self._tokenizer.decode([*prompt, *new])
            samples.append({"step": step, "prompt": before, "continuation": text.removeprefix(before)})
        lines += [json.dumps(sample) + "\n" for sample in samples]
        write_atomically(self._path, "".join(lines).encode())
        return samples

    def _beginnings(self, count: int) -> list[list[int]]:
        batches = evaluation_batches(
            self._validation,
            self._tokenizer,
            packing="pad",
            sequence_length=min(2 * PROMPT_TOKENS, self._run.llama.max_position_embeddings),
            sequences=count,
            max_bad_lines=self._run.reading.max_bad_lines,
            prefetch_batches=1,
        )
        with closing(batches):
            # The target of each position is the next token, so as many positions have targets as come before the end.
            batch = next(batches)
        lengths = (batch.labels >= 0).sum(1).tolist()
        rows = zip(batch.inputs.tolist(), lengths, strict=True)
        return [row[: max(1, min(PROMPT_TOKENS, length // 2))] for row, length in rows]
