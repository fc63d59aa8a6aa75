"""When and where a run's checkpoints are written: beside the training, from a copy, or at once."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from velora_pretrain.checkpoint import Snapshot, take_snapshot, write
from velora_pretrain.config import Run
from velora_pretrain.data.tokenizer import Tokenizer
from velora_pretrain.prediction import free_memory_bytes
from velora_pretrain.records import RunFolder

COPY_SHARE = 0.5
"""Share of the host's free memory that the copy of a checkpoint may take."""


class CheckpointWriter:
    """Writes the checkpoints of one run, one after the other.

    Args:
        run: its configuration.
        folder: where it is kept.
        model: the adapted model, unwrapped.
        optimizer: over its parameters.
        tokenizer: goes into every checkpoint.
        steps: of the newest checkpoint that is there.
    """

    def __init__(
        self, run: Run, folder: RunFolder, *, model: nn.Module, optimizer: Optimizer, tokenizer: Tokenizer, steps: int
    ) -> None:
        self._run, self._folder, self._tokenizer = run, folder, tokenizer
        self._model, self._optimizer = model, optimizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._saved_seconds = time.monotonic()
        self.steps = steps
        """Optimizer steps of the newest checkpoint, be it still being written."""

    @property
    def minutes(self) -> float:
        """Since the newest checkpoint was begun, or this process."""
        return (time.monotonic() - self._saved_seconds) / 60

    def save(self, step: int, progress: dict[str, Any], *, beside_training: bool) -> None:
        """Writes the checkpoint of `step`, after the one before is written.

        Args:
            step: optimizer steps done.
            progress: what else to resume from, for JSON: tokens, cursor.
            beside_training: whether training goes on, so that this may return before it is written.

        Raises:
            WeightsNotFinite: the model's numbers failed.
            UserError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        self.wait()
        snapshot = take_snapshot(
            step=step,
            model=self._model,
            config=self._run.llama,
            optimizer=self._optimizer,
            progress=progress,
            token_ids={"pad_token_id": self._tokenizer.pad_id, "eos_token_id": self._tokenizer.eos_id},
        )
        settings = self._run.checkpoint
        if beside_training and settings.background and _may_copy(snapshot):
            self._writing = self._thread.submit(self._write, snapshot.copied())
        else:
            self._write(snapshot)
        self._saved_seconds, self.steps = time.monotonic(), step

    def check(self) -> None:
        """Raises what went wrong with a checkpoint that was written beside the training, as `save` does."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is whole; raises as `save` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for a checkpoint that is being written, and says nothing about how it went."""
        self._thread.shutdown(wait=True)

    def _write(self, snapshot: Snapshot) -> Path:
        settings = self._run.checkpoint
        return write(
            self._folder,
            snapshot,
            save_tokenizer=self._tokenizer.save_pretrained,
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
        )


def _may_copy(snapshot: Snapshot) -> bool:
    return snapshot.num_bytes <= COPY_SHARE * free_memory_bytes(torch.device("cpu"))
