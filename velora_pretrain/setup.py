"""From a configuration and a run folder to what the loop needs: checked, found and, for a resumed run, reconciled."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from velora_pretrain import checkpoint
from velora_pretrain.config import Run
from velora_pretrain.data.c4 import Source, resolve
from velora_pretrain.data.loader import evaluation_batches
from velora_pretrain.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import has_separate_validation, validation_source
from velora_pretrain.prediction import USABLE_SHARE, choose_micro_batch, free_memory_bytes
from velora_pretrain.recipe import differences
from velora_pretrain.records import RunFolder

MAY_CHANGE = (
    "device",
    "checkpoint.",
    "compare.",
    "evaluation.sample",
    "reading.max_bad_lines",
    "reading.prefetch_batches",
)
"""Keys, or beginnings of keys, that a resumed run may change: they leave the numbers as they are."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run starts from."""

    run: Run
    """With every `auto` decided, as config.toml records it."""
    tokenizer: Tokenizer
    source: Source
    validation: Source
    checkpoint: Path | None
    """Where a resumed run goes on from."""
    state: dict[str, Any]
    """training_state.json of that checkpoint."""


def prepare(run: Run, folder: RunFolder, *, resume: bool, accelerator: Accelerator, display: Display) -> Prepared:
    """Checks the folder, finds data and tokenizer, decides every `auto`, and records the run.

    Raises:
        UserError: the folder holds another run, or data, tokenizer or batch do not fit.
    """
    recorded = _recorded_run(run, folder, resume=resume)
    if recorded is not None:
        run = _reconciled(run, recorded, folder)
    if run.batch.sequences % accelerator.num_processes:
        raise UserError(
            f"batch.sequences: {run.batch.sequences} sequences cannot be shared evenly by"
            f" {accelerator.num_processes} processes"
        )
    if run.optimizer.update == "in_backward" and accelerator.num_processes > 1:
        raise UserError(
            "optimizer.update: in_backward moves weights before the processes have exchanged their gradients, so it"
            " works in one process only; set optimizer.update = step"
        )
    source = _training_source(run, accelerator)
    if source.fallback_reason:
        display.warn(
            f"{source.fallback_reason}. TRAINING ON THE BUNDLED SAMPLE, some 2 MB of Python documentation, NOT ON C4:"
            " fit for trying things out, not for a result. Give --data c4 to insist on C4, or --data PATH."
        )
    if run.data == "auto":
        run = run.model_copy(update={"data": source.name})
    validation = validation_source(run)
    tokenizer = load_tokenizer(run.tokenizer)
    check_vocabulary(tokenizer, run.llama.vocab_size)
    _check_validation(run, validation, tokenizer)
    run = _with_micro_batch(run, accelerator)
    found = checkpoint.newest_whole(folder, display.warn) if resume else None
    path, state = found if found else (None, {})
    if resume and path is None:
        display.note(f"{folder.path}: no whole checkpoint yet, starting from the beginning")
    # Every process has looked at the folder before the first one changes it.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            folder.write_run(run)
            folder.forget_after(state.get("step", 0))
            if resume:
                checkpoint.set_aside_newer(folder, path)
        except OSError as error:
            raise UserError(f"{folder.path}: the run folder cannot be written ({error.strerror})") from None
    return Prepared(run=run, tokenizer=tokenizer, source=source, validation=validation, checkpoint=path, state=state)


def _training_source(run: Run, accelerator: Accelerator) -> Source:
    """The documents to train on; what `auto` means is decided by one process for all."""
    every, separate = run.reading.holdout_every_documents, has_separate_validation(run)
    if accelerator.is_main_process:
        source = resolve(run.data, split="train", holdout_every_documents=every, separate=separate)
        if run.data == "auto":
            broadcast_object_list([source.name])
        return source
    name = broadcast_object_list([run.data])[0] if run.data == "auto" else run.data
    return resolve(name, split="train", holdout_every_documents=every, separate=separate)


def _check_validation(run: Run, validation: Source, tokenizer: Tokenizer) -> None:
    """Reads the beginning of the validation documents, so that a run does not find out at its end.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    batches = evaluation_batches(
        validation,
        tokenizer,
        packing=run.packing,
        sequence_length=run.batch.sequence_length,
        sequences=1,
        max_target_tokens=1,
        max_bad_lines=run.reading.max_bad_lines,
        prefetch_batches=1,
    )
    with contextlib.closing(batches):
        for _ in batches:
            return
    raise UserError(f"{validation.name}: not one validation document has a token; give other or more text")


def _recorded_run(run: Run, folder: RunFolder, *, resume: bool) -> Run | None:
    if resume:
        return folder.read_run()
    if folder.holds_run():
        raise UserError(
            f"{folder.path}: already holds a run; go on with it by --resume, or give another folder by --run-dir"
        )
    if folder.holds_foreign_config():
        raise UserError(f"{folder.config}: is no run of velora-pretrain; give another folder by --run-dir")
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path}: is a file, not a folder; give another --run-dir")
    return None


def _reconciled(run: Run, recorded: Run, folder: RunFolder) -> Run:
    """`run` with what was decided when the run began in place of its `auto`s.

    Raises:
        UserError: it differs from the recorded run in a key that would change the numbers.
    """
    if run.data == "auto":
        run = run.model_copy(update={"data": recorded.data})
    if run.batch.micro_batch == "auto":
        batch = run.batch.model_copy(update={"micro_batch": recorded.batch.micro_batch})
        run = run.model_copy(update={"batch": batch})
    for key, (given, was) in differences(run, recorded).items():
        if not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{key}: {given!r} was asked for, but the run in {folder.path} has {was!r}; leave it out to go on, or"
                " start a new run in another --run-dir"
            )
    return run


def _with_micro_batch(run: Run, accelerator: Accelerator) -> Run:
    """The run with a number of sequences per forward pass, the same on every process."""
    if run.batch.micro_batch != "auto":
        return run
    processes = accelerator.num_processes
    on_this_machine = processes if accelerator.device.type == "cpu" else 1
    budget = int(USABLE_SHARE * free_memory_bytes(accelerator.device) / on_this_machine)
    mine = choose_micro_batch(
        run,
        local_sequences=run.batch.sequences // processes,
        device_type=accelerator.device.type,
        budget_bytes=budget,
    )
    smallest = min(accelerator.gather_for_metrics([mine], use_gather_object=True)) if processes > 1 else mine
    return run.model_copy(update={"batch": run.batch.model_copy(update={"micro_batch": smallest})})
