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
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from velora_pretrain import checkpoint
from velora_pretrain.config import Run
from velora_pretrain.data.loader import Batch, TrainLoader, evaluation_batches
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, memory_limit_bytes
from velora_pretrain.display import Display
from velora_pretrain.distributed import all_reduce, data_parallel, start_processes
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import EVALUATION_MICRO_BATCH, EVALUATION_SEQUENCES, evaluate
from velora_pretrain.generation import SampleLog
from velora_pretrain.gradients import Gradients, first_not_finite
from velora_pretrain.measurement import MEASURED_STEP, StepMemory
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.optim.schedule import lr_multiplier
from velora_pretrain.records import RunFolder, TrainingRecord
from velora_pretrain.setup import prepare
from velora_pretrain.signals import Interrupted, StopSignals
from velora_pretrain.summary import summarise

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the disk, not the program, does wrong."""

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
    return Trainer(run, folder, resume=resume, display=display).train()


class _EvaluationCut(Exception):
    """A signal came during an evaluation, which can be done again."""


class Trainer:
    """One process's part in a run; arguments as for `train`."""

    def __init__(self, run: Run, folder: RunFolder, *, resume: bool, display: Display) -> None:
        self.folder, self.display = folder, display
        self.accelerator = start_processes(run.device)
        self.device = self.accelerator.device
        self.prepared = prepare(run, folder, resume=resume, accelerator=self.accelerator, display=display)
        self.run = run = self.prepared.run

        self.mode = build_mode(run)
        self.model = Llama(run.llama, seed=run.seed, recompute=run.memory.recompute)
        self.mode.adapt(self.model)
        self.model.to(device=self.device, dtype=WEIGHT_DTYPES[run.precision])
        if run.compile:
            # In place, so that names and checkpoints stay; a part that cannot be compiled is an error.
            self.model.compile(fullgraph=True)
        self.wrapped: nn.Module = data_parallel(self.accelerator, self.model)
        self.optimizer = self.mode.build_optimizer(self.model)
        self.in_backward = run.optimizer.update == "in_backward"
        are_exchanged = self.accelerator.num_processes > 1
        self.gradients = Gradients(
            self.model, self.optimizer, in_backward=self.in_backward, are_exchanged=are_exchanged
        )
        self.step_memory = StepMemory(self.model, self.optimizer, self.device)
        if self.prepared.checkpoint:
            checkpoint.restore(self.prepared.checkpoint, model=self.model, optimizer=self.optimizer)
            display.note(f"going on from {self.prepared.checkpoint}")
        state = self.prepared.state
        self.done_steps: int = state.get("step", 0)
        self.tokens: int = state.get("tokens", 0)
        self.cursor: dict[str, Any] | None = state.get("cursor")
        self.seconds_before: float = state.get("seconds", 0.0)
        self.started = self.saved = time.monotonic()
        self.saved_steps = self.done_steps
        self.samples = SampleLog(folder.samples, run, self.prepared.validation, self.prepared.tokenizer)
        self.signals, self.is_stop_told = StopSignals(), False
        # Not beyond the checkpoint: another process may not have dropped the later records yet.
        evaluated = {record["step"] for record in folder.records() if "perplexity" in record}
        self.evaluated_steps = {step for step in evaluated if step <= self.done_steps}

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, over all its processes' lives."""
        return self.seconds_before + time.monotonic() - self.started

    def train(self) -> dict[str, Any]:
        """Runs to the end; see `train`."""
        try:
            return self._train()
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"{self.folder.path}: cannot be written ({error.strerror}); checkpoints are whole: free some space and"
                f" go on with: {self._way_on}"
            ) from error

    @property
    def _way_on(self) -> str:
        """The command that goes on with this run."""
        return f"velora-pretrain train --resume --run-dir {shlex.quote(str(self.folder.path))}"

    def _train(self) -> dict[str, Any]:
        run = self.run
        limit = memory_limit_bytes(self.device)
        name = str(self.folder.path)
        self.display.start(name=name, steps=run.steps, done_steps=self.done_steps, memory_limit_bytes=limit)
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
            cursor=self.cursor,
        )
        with closing(loader), self.signals:
            # A run that was stopped during an evaluation does it first.
            if not self._evaluate_if_due():
                raise self._interrupted()
            measured_step = min(self.done_steps + MEASURED_STEP, run.steps)
            if run.compile and self.device.type == "cpu":
                # What a compiled graph does cannot be watched operation by operation.
                measured_step = 0
            while self.done_steps < run.steps:
                with self.step_memory.watch(is_due=self.done_steps + 1 == measured_step):
                    is_stopped, is_due = self._step(loader)
                is_stopped = not self._evaluate_if_due() or is_stopped
                is_last = self.done_steps == run.steps
                is_due = is_due or is_last or _is_multiple(self.done_steps, run.checkpoint.every_steps)
                if is_due or is_stopped:
                    self._save()
                if is_stopped and not (is_last and self.is_evaluated):
                    raise self._interrupted()
        self.display.finish()
        summary = summarise(
            self.prepared,
            self.folder,
            steps=self.done_steps,
            tokens=self.tokens,
            seconds=self.seconds,
            device=str(self.device),
            processes=self.accelerator.num_processes,
            measured_memory=self.step_memory.measured,
        )
        if self.accelerator.is_main_process:
            self.folder.write_summary(summary)
        return summary

    def _interrupted(self) -> Interrupted:
        saved = self.folder.checkpoint(self.saved_steps)
        return Interrupted(
            f"stopped after step {self.done_steps} of {self.run.steps}; wrote {saved}; go on with: {self._way_on}"
        )

    def _step(self, loader: TrainLoader) -> tuple[bool, bool]:
        """Takes one optimizer step; gives whether to stop after it, and whether a checkpoint is due by the clock."""
        run, began, waited = self.run, time.monotonic(), loader.wait_seconds
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
        # All processes round alike, so that their weights stay the same.
        self.optimizer.step_seed = step_seed(run.seed, step, 0)
        micro_batches = self._micro_batches(batch)
        # What a step draws (dropout) follows from seed, step and process: a resumed run draws it again.
        torch.manual_seed(step_seed(run.seed, step, self.accelerator.process_index))
        self.mode.before_step(self.model, self.optimizer, step, lambda: self._forward_only(micro_batches))
        nats = self._backward(micro_batches, batch.num_target_tokens)

        # One message between processes: the loss, whether anyone was told to stop, whether the first one's clock is up.
        minutes = run.checkpoint.every_minutes
        is_due = self.accelerator.is_main_process and 0 < minutes <= (time.monotonic() - self.saved) / 60
        message = torch.tensor([nats, self.signals.is_set, is_due], dtype=torch.float64)
        nats, stops, due = all_reduce(self.accelerator, message).tolist()
        loss = nats / max(1, batch.num_target_tokens)
        grad_norm = self.gradients.clip(run.optimizer.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            last = self.folder.checkpoints_newest_first()
            kept = f"the last good checkpoint is {last[0]}" if last else "no checkpoint was written yet"
            self._record_failure(step, f"the loss is {loss}, the gradient norm {grad_norm}")
            raise UserError(
                f"step {step}: the loss is {loss}; first tensor that is not finite: {first_not_finite(self.model)}. The"
                f" step was {'cut short' if self.in_backward else 'not taken'}; {kept}. Lower the learning rate, or set"
                " optimizer.clip_norm, in a new run"
            )
        self.gradients.step()
        shares = self.mode.after_step(self.model, self.optimizer, step)
        for name, share in shares.items():
            self.display.note(f"step {step}: {name.replace('_', ' ')} {share:.4f}")

        self.done_steps, self.cursor = step, batch.cursor
        self.tokens += batch.num_input_tokens
        record = TrainingRecord(
            step=step,
            tokens=self.tokens,
            loss_nats_per_token=loss,
            learning_rate=run.lr * multiplier,
            grad_norm=grad_norm,
            tokens_per_second=batch.num_input_tokens / (time.monotonic() - began),
            peak_memory_bytes=self.step_memory.peak_memory_bytes,
            data_wait_seconds=loader.wait_seconds - waited,
            **shares,
        )
        if self.accelerator.is_main_process:
            self.folder.append(record)
        self.display.step(record)
        return stops > 0, due > 0

    def _next_batch(self, loader: TrainLoader) -> Batch:
        """The next batch; where reading fails for good, what was trained is saved first."""
        try:
            return next(loader)
        except (UserError, ConnectionError) as error:
            raise self._saved_from(error) from error

    def _saved_from(self, error: Exception) -> UserError:
        """The same failure, told after a checkpoint was written."""
        # Several processes may not all have failed, and saving waits for all of them.
        if self.accelerator.num_processes > 1 or self.done_steps == self.saved_steps:
            return UserError(f"after step {self.done_steps}: {error}")
        return UserError(f"after step {self.done_steps}: {error}; wrote {self._save()}; go on with: {self._way_on}")

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
        # DistributedDataParallel averages gradients over processes; the loss is a sum over them.
        factor = self.accelerator.num_processes / max(1, num_targets)
        nats = torch.zeros((), dtype=torch.float32, device=self.device)
        for place, (inputs, labels) in enumerate(micro_batches, start=1):
            # A sum that is kept in a form of its own is over what all processes have sent.
            is_sent = place == len(micro_batches) or self.optimizer.accumulates
            with nullcontext() if is_sent else self.accelerator.no_sync(self.wrapped):
                with autocast(self.run.precision, self.device.type):
                    loss = self.wrapped(inputs, labels)
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
        return nats.item()

    @property
    def is_evaluated(self) -> bool:
        """Whether the last step done has its evaluation."""
        return self.done_steps in self.evaluated_steps

    def _evaluate_if_due(self) -> bool:
        """Evaluates after the steps that ask for it, once; False if a signal cut the evaluation short."""
        is_last = self.done_steps == self.run.steps
        is_due = is_last or (self.done_steps > 0 and _is_multiple(self.done_steps, self.run.evaluation.every_steps))
        try:
            if is_due and not self.is_evaluated:
                self._evaluate()
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

    def _evaluate(self) -> None:
        run = self.run
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        batches = evaluation_batches(
            self.prepared.validation,
            self.prepared.tokenizer,
            packing=run.packing,
            sequence_length=run.batch.sequence_length,
            sequences=EVALUATION_SEQUENCES,
            max_target_tokens=run.evaluation.tokens,
            rank=rank,
            world_size=world_size,
            max_bad_lines=run.reading.max_bad_lines,
        )
        score = evaluate(
            self.model,
            batches,
            precision=run.precision,
            device=self.device,
            micro_batch=EVALUATION_MICRO_BATCH,
            all_reduce=lambda tensor: all_reduce(self.accelerator, tensor),
            progress=self._evaluation_progress,
        )
        if not math.isfinite(score.nats):
            self._record_failure(self.done_steps, f"the validation loss is {score.nats}")
            raise UserError(f"the validation loss is {score.nats}; lower the learning rate in a new run")
        record = score.record(self.done_steps)
        if self.accelerator.is_main_process:
            self.folder.append(record)
            self.samples.write(self.model, record.step)
        self.evaluated_steps.add(record.step)
        self.display.evaluation(record)

    def _record_failure(self, step: int, reason: str) -> None:
        if self.accelerator.is_main_process:
            self.folder.write_failure(step, reason)

    def _save(self) -> str:
        """Writes a checkpoint; gives its path."""
        path = self.folder.checkpoint(self.done_steps)
        if self.accelerator.is_main_process:
            tokenizer = self.prepared.tokenizer
            self.folder.sync_metrics()
            try:
                checkpoint.save(
                    self.folder,
                    step=self.done_steps,
                    model=self.model,
                    config=self.run.llama,
                    optimizer=self.optimizer,
                    progress={"tokens": self.tokens, "cursor": self.cursor, "seconds": self.seconds},
                    token_ids={"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id},
                    save_tokenizer=tokenizer.save_pretrained,
                    keep_last=self.run.checkpoint.keep_last,
                )
            except checkpoint.WeightsNotFinite as error:
                self._record_failure(self.done_steps, str(error))
                raise
        self.accelerator.wait_for_everyone()
        self.saved, self.saved_steps = time.monotonic(), self.done_steps
        return str(path)


def step_seed(seed: int, step: int, process: int) -> int:
    """A seed of 63 bits for what one process draws in one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _is_multiple(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
