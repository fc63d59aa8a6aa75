"""When and where a run's checkpoints are written: beside the training, from a copy, or at once.

The copy's memory is kept from one checkpoint to the next: to touch fresh memory takes many times as long as to copy.
From a GPU the copy goes through pinned memory and in the order of the stream, so that the loop does not wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from velora_pretrain.checkpoint import Keep, Snapshot, WeightsNotFinite, as_it_is, take_snapshot, write
from velora_pretrain.config import Run
from velora_pretrain.data.tokenizer import Tokenizer
from velora_pretrain.placement import Placement
from velora_pretrain.prediction import free_memory_bytes
from velora_pretrain.records import RunFolder

logger = logging.getLogger(__name__)

COPY_SHARE = 0.5
"""Share of the host's free memory that the copy of a checkpoint may take."""


class CopyRoom:
    """Memory on the host for the tensors of a snapshot, made once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def make(self, snapshot: Snapshot, *, is_pinned: bool) -> None:
        """Makes room for tensors like those of `snapshot`, and touches it."""
        for tensors in (snapshot.weights, snapshot.state):
            for name, tensor in tensors.items():
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned).zero_()

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Copies a tensor here; from a GPU in the order of its stream, without waiting."""
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


class CheckpointWriter:
    """Writes the checkpoints of one run, one after the other.

    Args:
        run: its configuration.
        folder: where it is kept.
        placement: of the adapted model.
        optimizer: over its parameters.
        tokenizer: goes into every checkpoint.
        steps: of the newest checkpoint that is there.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        placement: Placement,
        *,
        optimizer: Optimizer,
        tokenizer: Tokenizer,
        steps: int,
    ) -> None:
        self._run, self._folder, self._placement = run, folder, placement
        self._optimizer, self._tokenizer = optimizer, tokenizer
        self._device = next(placement.own.parameters()).device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._room: CopyRoom | None = None
        self._saved_seconds = time.monotonic()
        self.steps = steps
        """Optimizer steps of the newest checkpoint, be it still being written."""

    @property
    def minutes(self) -> float:
        """Since the newest checkpoint was begun, or this process."""
        return (time.monotonic() - self._saved_seconds) / 60

    def prepare(self) -> None:
        """Makes room for the copies beside the training, so that the first checkpoint need not; once states are there.

        Where memory is short there is none, and checkpoints are written at once.
        """
        if not self._placement.is_first or self._room is not None or not self._has_memory():
            return
        self._room = CopyRoom()
        if not self._placement.is_sharded:
            snapshot = self._snapshot(0, {}, keep=lambda name, tensor: tensor.new_empty(tensor.shape, device="meta"))
            self._pending = self._thread.submit(self._make_room, self._room, snapshot)

    def _make_room(self, room: CopyRoom, snapshot: Snapshot) -> None:
        try:
            room.make(snapshot, is_pinned=self._device.type == "cuda")
        except (MemoryError, RuntimeError) as error:
            logger.warning("no memory for copies of checkpoints, so training waits for each (%s)", error)
            self._room = None

    def _has_memory(self) -> bool:
        # Weights and two moments, all in 32 bits: what most modes keep, and some of them less.
        size_bytes = 3 * 4 * self._run.llama.num_parameters
        return self._run.checkpoint.background and size_bytes <= COPY_SHARE * free_memory_bytes(torch.device("cpu"))

    def save(self, step: int, progress: dict[str, Any], *, beside_training: bool) -> None:
        """Writes the checkpoint of `step`, after the one before is written; the first process does.

        Args:
            step: optimizer steps done.
            progress: what else to resume from, for JSON: tokens, cursor.
            beside_training: whether training goes on, so that this may return before it is written.

        Raises:
            WeightsNotFinite: the model's numbers failed.
            UserError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        if beside_training:
            self.prepare()
        self.wait()
        # The others wait here for one that is still being written, not within the gathering.
        self._placement.meet()
        if not self._placement.is_first:
            if self._placement.is_sharded:
                self._snapshot(step, progress, keep=lambda name, tensor: tensor.new_empty(0))
        elif beside_training and self._room is not None:
            snapshot = self._snapshot(step, progress, keep=self._room.keep)
            self._pending = self._thread.submit(self._write_beside, snapshot, self._copied())
        else:
            self._write(self._snapshot(step, progress, keep=as_it_is))
        self._saved_seconds, self.steps = time.monotonic(), step

    def check(self) -> None:
        """Raises what went wrong with a checkpoint that was written beside the training, as `save` does."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is whole; raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for a checkpoint that is being written, and says nothing about how it went."""
        self._thread.shutdown(wait=True)

    def _snapshot(self, step: int, progress: dict[str, Any], keep: Keep) -> Snapshot:
        return take_snapshot(
            step=step,
            model=self._placement.own,
            config=self._run.llama,
            optimizer=self._optimizer,
            progress=progress,
            token_ids={"pad_token_id": self._tokenizer.pad_id, "eos_token_id": self._tokenizer.eos_id},
            keep=keep,
            whole=self._placement.whole,
        )

    def _copied(self) -> Callable[[], None]:
        """Waits, when it is called, for the copies that were begun before."""
        if self._device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def _write_beside(self, snapshot: Snapshot, is_copied: Callable[[], None]) -> None:
        is_copied()
        try:
            self._write(snapshot)
        except WeightsNotFinite as error:
            # The next loss says the same, and takes the run back to an earlier checkpoint.
            if self._run.optimizer.not_finite != "rollback":
                raise
            logger.warning("%s", error)

    def _write(self, snapshot: Snapshot) -> None:
        settings = self._run.checkpoint
        write(
            self._folder,
            snapshot,
            save_tokenizer=self._tokenizer.save_pretrained,
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
        )
