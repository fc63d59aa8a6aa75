"""Validation perplexity: sum of nats over the number of targets, and the published repositories' number beside it.

The released code behind the published tables averages the mean losses of batches and starts the count of batches at 1,
so that n batches are divided by n + 1. For 60m it does so on each of 4 GPUs over batches of 128 sequences, and averages
the GPUs. `perplexity_paper` is that number, for holding a result against a published table;
it is too low, by some 2 to 4 % over 10M tokens and by far more over fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from velora_pretrain.checkpoint_files import STATE_FILE, DamagedCheckpoint, newest_whole, verified_state
from velora_pretrain.config import Precision, ReadingTable, Run
from velora_pretrain.data.c4 import Source, resolve
from velora_pretrain.data.loader import IGNORE_INDEX, Batch, evaluation_batches
from velora_pretrain.data.token_cache import with_tokens
from velora_pretrain.data.tokenizer import check_vocabulary, load_tokenizer
from velora_pretrain.devices import autocast, pick_device
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.llama_folder import step_of
from velora_pretrain.records import EvaluationRecord, RunFolder, fields_of, safe_exp

PAPER_RANKS = 4
"""GPUs of the published 60m runs."""
PAPER_BATCH_SEQUENCES = 128
"""Sequences of one evaluation batch on each."""
EVALUATION_SEQUENCES = PAPER_RANKS * PAPER_BATCH_SEQUENCES
"""Sequences of one batch here: one of each published rank."""
EVALUATION_MICRO_BATCH = 32
"""Sequences per forward pass."""
HOLDOUT_EVERY_DOCUMENTS = ReadingTable().holdout_every_documents
"""For folders that belong to no run."""


@dataclass
class Score:
    """Sums over evaluation batches, from which the figures follow."""

    nats: float = 0.0
    targets: int = 0
    target_bytes: int = 0
    paper_batch_means: list[float] = field(default_factory=list)

    def add(self, nats: Tensor, targets: Tensor, target_bytes: int) -> None:
        """Adds a batch.

        Args:
            nats: sum of nats by published rank, (PAPER_RANKS,), float64.
            targets: number of targets by published rank, (PAPER_RANKS,).
            target_bytes: UTF-8 bytes that the targets stand for.
        """
        self.nats += float(nats.sum())
        self.targets += int(targets.sum())
        self.target_bytes += target_bytes
        has_targets = targets > 0
        if bool(has_targets.any()):
            self.paper_batch_means.append(float((nats[has_targets] / targets[has_targets]).mean()))

    def record(self, step: int) -> EvaluationRecord:
        """The figures.

        Raises:
            UserError: no target was scored.
        """
        if not self.targets:
            raise UserError("validation data: not one target token to score; give more or longer documents")
        loss = self.nats / self.targets
        paper_loss = sum(self.paper_batch_means) / (len(self.paper_batch_means) + 1)
        return EvaluationRecord(
            step=step,
            eval_loss_nats_per_token=loss,
            perplexity=safe_exp(loss),
            perplexity_paper=safe_exp(paper_loss),
            bits_per_byte=self.nats / math.log(2) / self.target_bytes if self.target_bytes else math.nan,
            eval_tokens=self.targets,
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    precision: Precision,
    device: torch.device,
    micro_batch: int,
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    passes: Callable[[int], int] = lambda count: count,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Scores `batches`, each of at most `EVALUATION_SEQUENCES` rows over all ranks.

    Args:
        model: gives the summed cross-entropy of (tokens, labels).
        batches: this rank's rows of each batch.
        precision: of the run.
        device: where the model is.
        micro_batch: sequences per forward pass.
        all_reduce: sums a tensor over ranks.
        passes: how many forward passes to take part in where this rank's rows of a batch need so many.
        progress: told the targets scored so far.
    """
    was_training = model.training
    model.eval()
    score = Score()
    for batch in batches:
        # Nats and targets by published rank, summed over the ranks of this run.
        sums = torch.zeros(2, PAPER_RANKS, dtype=torch.float64)
        paper_rank = (batch.first_row + torch.arange(len(batch.inputs))) // PAPER_BATCH_SEQUENCES
        cuts = [
            (rank, inputs, labels)
            for rank in paper_rank.unique().tolist()
            for inputs, labels in zip(
                batch.inputs[paper_rank == rank].split(micro_batch),
                batch.labels[paper_rank == rank].split(micro_batch),
                strict=True,
            )
        ]
        # A pass without a target, for the sake of the others.
        idle = (0, batch.inputs.new_zeros(1, 1), batch.labels.new_full((1, 1), IGNORE_INDEX))
        cuts += [idle] * (passes(len(cuts)) - len(cuts))
        for rank, inputs, labels in cuts:
            with autocast(precision, device.type):
                sums[0, rank] += model(inputs.to(device), labels.to(device)).item()
            sums[1, rank] += int((labels != IGNORE_INDEX).sum())
        nats, targets = all_reduce(sums)
        score.add(nats, targets, batch.target_bytes)
        progress(score.targets)
    model.train(was_training)
    return score


def evaluate_checkpoint(
    path: Path,
    *,
    data: str | None,
    tokens: int | None,
    device: str,
    display: Display,
    tokenizer_name: str | None = None,
) -> dict[str, Any]:
    """Scores a checkpoint, a run folder's newest checkpoint, or any Hugging Face LLaMA folder.

    A checkpoint of a run is scored as the run scores itself, on the run's validation documents unless `data` is given.
    Any other folder is scored on padded sequences of the published length, in the format of its weights.

    Args:
        path: the folder.
        data: validation documents: every document of files, the validation part of `c4` and `sample`.
        tokens: targets to score; None for the run's number.
        device: auto, cpu, cuda or mps.
        display: shows progress.
        tokenizer_name: where the folder holds none: as `config.Run.tokenizer`.

    Returns:
        The fields of an `EvaluationRecord`, `tokenizer_sha256`, `checkpoint` and `data`.

    Raises:
        UserError: no model there, no tokenizer, or unusable data.
    """
    checkpoint, run = find_checkpoint(path, display)
    model = load_llama(checkpoint)
    tokenizer = load_tokenizer(tokenizer_name or str(checkpoint))
    check_vocabulary(tokenizer, model.config.vocab_size)
    where = pick_device(device)
    model.to(where)
    dtype = model.lm_head.weight.dtype
    precision: Precision = run.precision if run else "fp32" if dtype == torch.float32 else "bf16"
    length = min(run.batch.sequence_length if run else 256, model.config.max_position_embeddings)
    source = validation_source(run, data)
    if source.fallback_reason:
        display.warn(f"{source.fallback_reason}; scored on the bundled sample instead of C4")
    setting = run.reading.token_cache if run else "auto"
    source, remarks = with_tokens(source, tokenizer, setting, for_evaluation=True)
    for remark in remarks:
        display.note(remark)
    limit = tokens or (run.evaluation.tokens if run else 10_000_000)
    batches = evaluation_batches(
        source,
        tokenizer,
        packing=run.packing if run else "pad",
        sequence_length=length,
        sequences=EVALUATION_SEQUENCES,
        max_target_tokens=limit,
        max_bad_lines=run.reading.max_bad_lines if run else 0,
    )
    score = evaluate(
        model,
        batches,
        precision=precision,
        device=where,
        micro_batch=EVALUATION_MICRO_BATCH,
        progress=lambda done: display.evaluating(done, limit),
    )
    record = score.record(step_of(checkpoint) if run else 0)
    return {
        **fields_of(record),
        "tokenizer_sha256": tokenizer.sha256,
        "checkpoint": str(checkpoint),
        "data": source.name,
        "sequence_length": length,
    }


def validation_source(run: Run | None, data: str | None = None) -> Source:
    """The documents to score: `data` if given, else the run's validation data, else the held-out part of its data.

    Raises:
        UserError: they cannot be found.
    """
    named = data or (run.validation_data if run and has_separate_validation(run) else None)
    every = run.reading.holdout_every_documents if run else HOLDOUT_EVERY_DOCUMENTS
    if named is None:
        return resolve(run.data if run else "auto", split="validation", holdout_every_documents=every)
    # Files that the user names for evaluation are scored whole; the sample is also trained on.
    return resolve(named, split="validation", holdout_every_documents=every, separate=named not in ("auto", "sample"))


def has_separate_validation(run: Run) -> bool:
    """Whether validation documents are files of their own, so that training may take all of its data."""
    return run.validation_data not in (None, run.data, "auto", "sample")


def find_checkpoint(path: Path, display: Display) -> tuple[Path, Run | None]:
    """The folder with the weights, and the run it belongs to, if any.

    Args:
        path: a checkpoint, a run folder, whose newest whole checkpoint is taken, or a Hugging Face folder.
        display: takes warnings.

    Raises:
        UserError: it is none of these, or damaged.
    """
    folder = RunFolder(path)
    if folder.config.exists():
        found = newest_whole(folder, display.warn)
        if found is None:
            raise UserError(f"{path}: the run has no whole checkpoint yet")
        return found[0], folder.read_run()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a checkpoint, a run folder or a Hugging Face LLaMA folder")
    folder = RunFolder(path.parent.parent)
    if not ((path / STATE_FILE).exists() and folder.holds_run()):
        return path, None
    try:
        verified_state(path)
    except DamagedCheckpoint as damage:
        raise UserError(f"{path}: the checkpoint is damaged ({damage})") from None
    return path, folder.read_run()
