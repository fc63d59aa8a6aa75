"""The training loop: it owns when to read, step, evaluate, save and stop. What a step does is the mode's.

One optimizer step reads one global batch, whose sequences do not depend on the number of processes; each process runs
its rows in micro-batches, and the loss is the sum over the targets of the global batch over their number. So a run
gives the same numbers, to rounding, however it is cut; only what a mode draws per pass, a dropout, depends on the cut.

At a step that is evaluated and saved, the evaluation comes first: a run that resumes from a checkpoint has then done
all that its step asked for, and its records are those of the uninterrupted run.
"""

from __future__ import annotations

import errno
import hashlib
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from velora_pretrain.checkpoint import WeightsNotFinite, restore
from velora_pretrain.checkpoint_files import set_aside_newer
from velora_pretrain.config import Run
from velora_pretrain.data.loader import Batch, TrainLoader
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, memory_limit_bytes
from velora_pretrain.display import Display
from velora_pretrain.distributed import all_reduce, is_lost_process, meet, start_processes
from velora_pretrain.errors import UserError
from velora_pretrain.gradients import Gradients, first_not_finite
from velora_pretrain.measurement import MEASURED_STEP, StepMemory
from velora_pretrain.modes import build_mode
from velora_pretrain.optim.schedule import lr_multiplier
from velora_pretrain.progress import Progress
from velora_pretrain.records import EvaluationRecord, RunFolder, TrainingRecord
from velora_pretrain.run_lock import RunLock
from velora_pretrain.saving import CheckpointWriter
from velora_pretrain.setup import agreed_checkpoint, prepare
from velora_pretrain.shards import placed
from velora_pretrain.signals import Interrupted, LeaveStep, StopSignals, ignore_termination
from velora_pretrain.summary import summarise
from velora_pretrain.trackers import Trackers
from velora_pretrain.validation import Validation

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOENT, errno.ESTALE, errno.EMFILE),
)
"""What the disk, not the program, does wrong."""
FAILURES_IN_A_ROW = 10
"""Steps whose numbers may fail one after the other, where they are skipped or gone back on, before the run ends."""

__all__ = ["Interrupted", "Trainer", "train"]


def train(run: Run, folder: RunFolder, *, resume: bool, display: Display) -> dict[str, Any]:
    """Trains a model, or goes on with one, and evaluates it.

    Args:
        run: the resolved configuration.
        folder: where the run is kept.
        resume: goes on from the folder's newest whole checkpoint.
        display: shows the run.

    Returns:
        The summary, as summary.json holds it.

    Raises:
        UserError: what was asked for cannot be done, or the numbers failed; nothing that was saved is lost.
        Interrupted: a signal ended the run; a checkpoint was written.
    """
    with RunLock(folder.path) as lock:
        try:
            trainer = Trainer(run, folder, resume=resume, display=display, lock=lock)
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            ignore_termination()
            raise ConnectionError("another process ended, or cannot be reached, before the run began") from error
        with closing(trainer):
            return trainer.train()


class _EvaluationCut(Exception):
    """A signal came during an evaluation, which can be done again."""


@dataclass(frozen=True)
class _StepEnd:
    """What the processes have agreed on in a step."""

    is_stopped: bool
    """Whether any was asked to stop."""
    is_due: bool
    """Whether a checkpoint is due, whatever the number of the step."""


class Trainer:
    """One process's part in a run; arguments as for `train`, and `lock` that of the folder. To be closed."""

    def __init__(self, run: Run, folder: RunFolder, *, resume: bool, display: Display, lock: RunLock) -> None:
        self.folder, self.display = folder, display
        self.accelerator = start_processes(run.device)
        self.device = self.accelerator.device
        self.prepared = prepare(run, folder, resume=resume, accelerator=self.accelerator, display=display, lock=lock)
        self.run = run = self.prepared.run

        self.mode = build_mode(run)
        self.model = self.prepared.build_model()
        self.mode.adapt(self.model)
        self.model.to(dtype=WEIGHT_DTYPES[run.precision])
        if run.compile:
            # In place, so that names and checkpoints stay; a part that cannot be compiled is an error.
            self.model.compile(fullgraph=True)
        is_sharded = run.distributed.sharding == "full"
        self.placement = placed(self.accelerator, self.model, is_sharded=is_sharded)
        self.own = self.placement.own
        self.optimizer = self.mode.build_optimizer(self.own)
        self.in_backward = run.optimizer.update == "in_backward"
        are_exchanged = self.accelerator.num_processes > 1
        self.gradients = Gradients(
            self.own,
            self.optimizer,
            in_backward=self.in_backward,
            are_exchanged=are_exchanged,
            total=self.placement.total,
        )
        self.step_memory = StepMemory(self.own, self.optimizer, self.device)
        if self.prepared.checkpoint:
            self._restore(self.prepared.checkpoint)
            display.note(f"going on from {self.prepared.checkpoint}")
        self.progress = Progress.of(self.prepared.state, folder.records())
        self.gone_back_to = -1
        """Step of the checkpoint that the run last went back to."""
        self.is_whole = True
        """Whether model and optimizer are as the last step done has left them."""
        tokenizer, steps = self.prepared.tokenizer, self.progress.step
        self.writer = CheckpointWriter(
            run, folder, self.placement, optimizer=self.optimizer, tokenizer=tokenizer, steps=steps
        )
        self.validation = Validation(self.prepared, folder, self.accelerator, self.placement)
        self.signals, self.is_stop_told = StopSignals(), False
        self.memory_limit_bytes = memory_limit_bytes(self.device)
        names = run.tracking.trackers if self.accelerator.is_main_process else ()
        self.trackers = Trackers(names, run, folder, step=steps, warn=display.warn)
        # To start them may take longer than processes wait for each other within a pass.
        meet(self.accelerator)

    @property
    def done_steps(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    def _restore(self, path: Path) -> None:
        restore(path, model=self.own, optimizer=self.optimizer, part=self.placement.part)

    def close(self) -> None:
        """Returns when no checkpoint is being written any more, and the trackers have what they were given."""
        self.writer.close()
        self.trackers.close()

    def train(self) -> dict[str, Any]:
        """Runs to the end; see `train`."""
        try:
            return self._train()
        except LeaveStep:
            raise self._left() from None
        except WeightsNotFinite as error:
            self._record_failure(error.step, str(error))
            raise
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"{self.folder.path}: cannot be written ({error.strerror}); checkpoints are whole: free some space and"
                f" go on with: {self._way_on}"
            ) from error
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            # The launcher's, which comes for the same reason and would cut this short.
            ignore_termination()
            self._save_alone()
            with suppress(UserError):
                self.writer.wait()
            raise ConnectionError(
                f"another process ended, or cannot be reached; {self._last_saved()}; go on with: {self._way_on}"
            ) from error

    @property
    def _way_on(self) -> str:
        """The command that goes on with this run."""
        return f"velora-pretrain train --resume --run-dir {shlex.quote(str(self.folder.path))}"

    def _train(self) -> dict[str, Any]:
        run = self.run
        self.display.start(name=str(self.folder.path), steps=run.steps, done_steps=self.done_steps)
        loader = TrainLoader(
            self.prepared.source,
            self.prepared.tokenizer,
            packing=run.packing,
            sequence_length=run.batch.sequence_length,
            sequences=run.batch.sequences,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=run.shuffle_seed,
            shuffle_block_documents=run.reading.shuffle_block_documents,
            max_bad_lines=run.reading.max_bad_lines,
            prefetch_batches=run.reading.prefetch_batches,
            cursor=self.progress.cursor,
        )
        with self.signals, closing(loader):
            # A run that was stopped during an evaluation does it first.
            if not self._evaluate_if_due():
                raise self._interrupted()
            measured_step = min(self.done_steps + MEASURED_STEP, run.steps)
            if (run.compile or run.distributed.sharding == "full") and self.device.type == "cpu":
                # What a compiled graph does cannot be watched operation by operation, nor what is given back of a
                # gathered parameter, whose storage stays.
                measured_step = 0
            first_step = self.done_steps + 1
            while self.done_steps < run.steps:
                with self.step_memory.watch(is_due=self.done_steps + 1 == measured_step):
                    end = self._step(loader)
                if self.done_steps == first_step < run.checkpoint.every_steps:
                    self.writer.prepare()
                is_stopped = not self._evaluate_if_due() or end.is_stopped
                is_last = self.done_steps == run.steps
                if end.is_due or is_stopped or is_last or _is_multiple(self.done_steps, run.checkpoint.every_steps):
                    self._save(beside_training=not (is_stopped or is_last))
                if is_stopped and not (is_last and self.progress.is_evaluated):
                    raise self._interrupted()
        self.display.finish()
        # The first process has written its records and its checkpoint, which the others may read.
        meet(self.accelerator)
        summary = summarise(
            self.prepared,
            self.folder,
            steps=self.done_steps,
            tokens=self.progress.tokens,
            seconds=self.progress.seconds,
            device=str(self.device),
            processes=self.accelerator.num_processes,
            measured_memory=self.step_memory.measured,
            reduced_bytes_per_step=self.placement.reduced_bytes_per_step(),
        )
        if self.accelerator.is_main_process:
            self.folder.write_summary(summary)
        return summary

    def _interrupted(self) -> Interrupted:
        saved = self.folder.checkpoint(self.writer.steps)
        return Interrupted(
            f"stopped after step {self.done_steps} of {self.run.steps}; wrote {saved}; go on with: {self._way_on}"
        )

    def _left(self) -> Interrupted:
        """Saves what the last step done has left, if it is there, after the step behind it was left."""
        is_saved = self._save_alone()
        self.writer.wait()
        where = f"left step {self.done_steps + 1} of {self.run.steps} unfinished"
        if not self.writer.steps:
            return Interrupted(f"{where}; no step was done, so there is no checkpoint")
        saved = self.folder.checkpoint(self.writer.steps)
        last = f"wrote {saved}" if is_saved else f"the last checkpoint is {saved}"
        return Interrupted(f"{where}; {last}; go on with: {self._way_on}")

    @contextmanager
    def _leavable(self, *, at_first: bool = False) -> Iterator[None]:
        """Around what a second signal may cut short: where that loses no more than the step that it is in."""
        can_go_back = self.is_whole or self.writer.steps == self.done_steps
        with self.signals.leavable(at_first=at_first) if can_go_back else nullcontext():
            yield

    def _step(self, loader: TrainLoader) -> _StepEnd:
        """Takes one optimizer step."""
        run, began, waited = self.run, time.monotonic(), loader.wait_seconds
        self.writer.check()
        # Several processes would have to agree on stopping here; they stop after the step.
        with self._leavable(at_first=self.accelerator.num_processes == 1):
            batch = self._next_batch(loader)
        step = self.done_steps + 1
        multiplier = self.mode.lr_multiplier(step) * lr_multiplier(
            step,
            steps=run.steps,
            warmup_steps=run.warmup_steps,
            kind=run.schedule.kind,
            min_lr_ratio=run.schedule.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = run.lr * multiplier * group["lr_ratio"]
        # Processes that have the same weights round alike, so that they stay the same.
        self.optimizer.step_seed = step_seed(run.seed, step, self.placement.stream)
        micro_batches = self._micro_batches(batch)
        # What a step draws (dropout) follows from seed, step and process: a resumed run draws it again.
        torch.manual_seed(step_seed(run.seed, step, self.accelerator.process_index))
        was_whole, self.is_whole = self.is_whole, False
        is_changed = self.mode.before_step(self.own, self.optimizer, step, lambda: self._forward_only(micro_batches))
        self.is_whole = was_whole and not (is_changed or self.in_backward)
        with self._leavable():
            nats = self._backward(micro_batches, batch.num_target_tokens)

        # One message between processes: the loss, whether anyone was told to stop, whether the first one's clock is up.
        minutes = run.checkpoint.every_minutes
        is_due = self.accelerator.is_main_process and 0 < minutes <= self.writer.minutes
        message = torch.tensor([nats, self.signals.is_set, is_due], dtype=torch.float64)
        nats, stops, due = all_reduce(self.accelerator, message).tolist()
        loss = nats / max(1, batch.num_target_tokens)
        grad_norm = self.gradients.clip(run.optimizer.clip_norm)
        is_taken = math.isfinite(loss) and math.isfinite(grad_norm)
        shares: dict[str, Any] = {}
        if is_taken:
            self.is_whole = False
            if run.optimizer.not_finite != "rollback" or self.writer.steps > self.gone_back_to:
                self.progress.failures_in_a_row = 0
            self.gradients.step()
            shares = self.mode.after_step(self.own, self.optimizer, step)
        else:
            self._fail(step, loss, grad_norm)
            if run.optimizer.not_finite == "rollback":
                self._roll_back(step, batch)
                # At once, so that a resumed run does not meet the same numbers again.
                return _StepEnd(stops > 0, is_due=True)
            self.gradients.drop()
            self.mode.after_skipped_step(self.own, self.optimizer, step)
            self.progress.skipped_steps += 1
        for name, share in shares.items():
            self.display.note(f"step {step}: {name.replace('_', ' ')} {share:.4f}")

        progress = self.progress
        progress.step, progress.cursor, self.is_whole = step, batch.cursor, True
        progress.tokens += batch.num_input_tokens
        record = TrainingRecord(
            step=step,
            tokens=progress.tokens,
            loss_nats_per_token=loss,
            learning_rate=run.lr * multiplier,
            grad_norm=grad_norm,
            tokens_per_second=batch.num_input_tokens / (time.monotonic() - began),
            peak_memory_bytes=self.step_memory.peak_memory_bytes,
            data_wait_seconds=loader.wait_seconds - waited,
            batch_digest=batch.digest,
            loss_above_median_nats=progress.spikes.add(loss),
            skipped_steps=progress.skipped_steps or None,
            rollbacks=progress.rollbacks or None,
            memory_limit_bytes=self.memory_limit_bytes,
            **shares,
        )
        self._record(record)
        self.display.step(record)
        return _StepEnd(stops > 0, due > 0)

    def _record(self, record: TrainingRecord | EvaluationRecord, samples: Sequence[dict[str, Any]] = ()) -> None:
        """Puts a record into metrics.jsonl, with the time, and from there to the trackers; the first process does."""
        if self.accelerator.is_main_process:
            run_seconds, unix_seconds = round(self.progress.seconds, 3), round(time.time(), 3)
            record = replace(record, run_seconds=run_seconds, unix_seconds=unix_seconds)
            self.folder.append(record)
            self.trackers.log(record, samples)

    def _fail(self, step: int, loss: float, grad_norm: float) -> None:
        """Says which numbers of a step are not finite, and where.

        Raises:
            UserError: the run is not to go on after that, or cannot.
        """
        run, progress = self.run, self.progress
        progress.failures_in_a_row += 1
        where = f"the loss is {loss}; first tensor that is not finite: {first_not_finite(self.own)}"
        self.writer.wait()
        reason = ""
        if run.optimizer.not_finite != "stop":
            if progress.failures_in_a_row > FAILURES_IN_A_ROW:
                reason = f"; for the {progress.failures_in_a_row}th time in a row"
            elif run.optimizer.not_finite == "rollback" and not self.writer.steps:
                reason = "; before there was a checkpoint to go back to"
            else:
                self.display.warn(f"step {step}: {where}; {run.optimizer.not_finite}")
                return
        self._record_failure(step, f"the loss is {loss}, the gradient norm {grad_norm}{reason}")
        taken = "cut short" if self.in_backward else "not taken"
        advice = "Lower the learning rate, or set optimizer.clip_norm, in a new run"
        if run.optimizer.not_finite == "stop":
            advice += "; or let optimizer.not_finite = skip or rollback go on after that"
        raise UserError(f"step {step}: {where}{reason}. The step was {taken}; {self._last_saved()}. {advice}")

    def _roll_back(self, step: int, batch: Batch) -> None:
        """Takes model, optimizer and counts back to the newest checkpoint; the data go on after `batch`."""
        meet(self.accelerator)
        path, state = agreed_checkpoint(self.folder, self.accelerator, self.display.warn)
        if path is None:
            raise UserError(f"step {step}: no checkpoint of {self.folder.path} is whole, so there is no way back")
        self.gradients.drop()
        self._restore(path)
        self.progress = self.progress.gone_back(Progress.of(state, self.folder.records()), batch.cursor)
        self.is_whole, self.gone_back_to = True, self.done_steps
        meet(self.accelerator)
        if self.accelerator.is_main_process:
            self.folder.forget_after(self.done_steps)
            self.trackers.go_back(self.done_steps)
            set_aside_newer(self.folder, path)
        self.display.note(f"went back to {path}; the data go on after those of step {step}")

    def _next_batch(self, loader: TrainLoader) -> Batch:
        """The next batch; where reading fails for good, what was trained is saved first."""
        try:
            batch = next(loader)
        except (UserError, ConnectionError) as error:
            raise self._saved_from(error) from error
        # Not within the passes: they are not meant to wait for long.
        meet(self.accelerator)
        return batch

    def _saved_from(self, error: Exception) -> UserError:
        """The same failure, told after a checkpoint was written."""
        if not self._save_alone():
            return UserError(f"after step {self.done_steps}: {error}")
        saved = self.folder.checkpoint(self.done_steps)
        return UserError(f"after step {self.done_steps}: {error}; wrote {saved}; go on with: {self._way_on}")

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """This process's rows of the batch, cut for the forward passes, on the device."""
        size = self.run.batch.micro_batch
        assert size != "auto"
        inputs, labels = (
            tensor.to(self.device, non_blocking=True).split(size) for tensor in (batch.inputs, batch.labels)
        )
        return list(zip(inputs, labels, strict=True))

    @torch.no_grad()
    def _forward_only(self, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        for inputs, labels in micro_batches:
            with autocast(self.run.precision, self.device.type):
                self.model(inputs, labels)

    def _backward(self, micro_batches: list[tuple[Tensor, Tensor]], num_targets: int) -> float:
        """Accumulates the gradient of the global batch's mean loss; gives this process's nats."""
        # Gradients are averaged over processes; the loss is a sum over them.
        factor = self.accelerator.num_processes / max(1, num_targets)
        nats = torch.zeros((), dtype=torch.float32, device=self.device)
        for place, (inputs, labels) in enumerate(micro_batches, start=1):
            # A sum that is kept in a form of its own is over what all processes have sent.
            is_sent = place == len(micro_batches) or self.optimizer.accumulates
            with nullcontext() if is_sent else self.placement.accumulating():
                with autocast(self.run.precision, self.device.type):
                    loss = self.placement.module(inputs, labels)
                nats += loss.detach()
                if self.in_backward and not loss.isfinite():
                    # Parameters that moved by it could not be saved any more.
                    return nats.item()
                with self.gradients.of_micro_batch(place, len(micro_batches)):
                    (loss * factor).backward()
            self.display.micro_batch(place, len(micro_batches))
            if self.signals.is_set and not self.is_stop_told:
                self.display.note("finishing this step, then writing a checkpoint; once more to stop at once")
                self.is_stop_told = True
        self.placement.complete_gradients()
        return nats.item()

    def _evaluate_if_due(self) -> bool:
        """Evaluates after the steps that ask for it, once; False if a signal cut the evaluation short."""
        is_last = self.done_steps == self.run.steps
        is_due = is_last or (self.done_steps > 0 and _is_multiple(self.done_steps, self.run.evaluation.every_steps))
        try:
            if is_due and not self.progress.is_evaluated:
                with self._leavable():
                    record, samples = self.validation.evaluate(self.model, self.done_steps, self._evaluation_progress)
                # After its samples: a step that has a record is not evaluated again.
                self._record(record, samples)
                self.progress.evaluated_steps.add(record.step)
                self.display.evaluation(record)
        except _EvaluationCut:
            return False
        except (UserError, ConnectionError) as error:
            raise self._saved_from(error) from error
        return True

    def _evaluation_progress(self, tokens: int) -> None:
        self.display.evaluating(tokens, self.run.evaluation.tokens)
        # Several processes would have to agree on stopping here; they stop after the evaluation.
        if self.signals.is_set and self.accelerator.num_processes == 1:
            raise _EvaluationCut

    def _last_saved(self) -> str:
        last = self.folder.checkpoints_newest_first()
        return f"the last good checkpoint is {last[0]}" if last else "no checkpoint was written yet"

    def _record_failure(self, step: int, reason: str) -> None:
        if self.accelerator.is_main_process:
            self.folder.write_failure(step, reason)

    def _save_alone(self) -> bool:
        """Saves what the last step done has left, without the other processes; says whether there was a need and a way.

        A step that has begun is forgotten.
        """
        self.gradients.drop()
        is_alone = self.accelerator.is_main_process and not self.placement.is_sharded
        may_save = is_alone and self.is_whole and self.done_steps > self.writer.steps
        if may_save:
            self._save(beside_training=False)
        return may_save

    def _save(self, *, beside_training: bool) -> None:
        self.writer.save(self.done_steps, self.progress.state(), beside_training=beside_training)


def step_seed(seed: int, step: int, process: int) -> int:
    """A seed of 63 bits for what one process draws in one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _is_multiple(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
