"""From a configuration and a run folder to what the loop needs: checked, found and, for a resumed run, reconciled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from velora_pretrain.checkpoint_files import (
    DamagedCheckpoint,
    newest_whole,
    recover_replaced,
    set_aside_newer,
    verified_state,
)
from velora_pretrain.config import Run
from velora_pretrain.data.c4 import Source, is_same_data, resolve
from velora_pretrain.data.loader import evaluation_batches, fingerprint
from velora_pretrain.data.needs import check_at_hand
from velora_pretrain.data.token_cache import with_tokens
from velora_pretrain.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from velora_pretrain.display import Display
from velora_pretrain.distributed import largest, meet, of_first_process
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import find_checkpoint, has_separate_validation, validation_source
from velora_pretrain.files import sha256_of
from velora_pretrain.hugging_face import start_llama, weight_files
from velora_pretrain.llama_folder import has_tokenizer, read_config
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.prediction import USABLE_SHARE, choose_micro_batch, free_memory_bytes
from velora_pretrain.recipe import differences
from velora_pretrain.records import RunFolder
from velora_pretrain.run_lock import RunLock
from velora_pretrain.sharding import predict_per_device

MAY_CHANGE = (
    "device",
    "checkpoint.",
    "compare.",
    "distributed.",
    "evaluation.sample",
    "reading.max_bad_lines",
    "reading.prefetch_batches",
    "reading.token_cache",
    "tracking.",
)
"""Keys, or beginnings of keys, that a resumed run may change: they leave the numbers as they are, to rounding."""


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
    initial: Path | None = None
    """The folder whose weights a run begins with; None where they are drawn, or those of a checkpoint follow."""

    def build_model(self) -> Llama:
        """The model that the run begins with, in fp32, on the CPU: drawn by the seed, or with the weights given."""
        run, recompute = self.run, self.run.memory.recompute
        if self.initial is None:
            return Llama(run.llama, seed=run.seed, recompute=recompute)
        return start_llama(self.initial, run.llama, recompute=recompute)


def prepare(
    run: Run, folder: RunFolder, *, resume: bool, accelerator: Accelerator, display: Display, lock: RunLock
) -> Prepared:
    """Checks the folder, finds data and tokenizer, decides every `auto`, takes the lock, and records the run.

    Raises:
        UserError: the folder holds another run, or another process trains in it; data, tokenizer or batch do not fit.
    """
    if resume and accelerator.is_main_process:
        lock.take()
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
    if run.distributed.sharding == "full":
        check_sharding(run, accelerator.num_processes)
    source = _training_source(run, accelerator)
    if source.fallback_reason:
        display.warn(
            f"{source.fallback_reason}. TRAINING ON THE BUNDLED SAMPLE, some 2 MB of Python documentation, NOT ON C4:"
            " fit for trying things out, not for a result. Give --data c4 to insist on C4, or --data PATH."
        )
    if run.data == "auto":
        run = run.model_copy(update={"data": source.name})
    validation = validation_source(run)
    path, state = agreed_checkpoint(folder, accelerator, display.warn) if resume else (None, {})
    if recorded is not None:
        _check_same_data(run, recorded, folder, source, state)
    if resume and path is None:
        display.note(f"{folder.path}: no whole checkpoint yet, starting from the beginning")
    initial = _initial_weights(run, accelerator, display) if run.init_from and path is None else None
    tokenizer = _tokenizer(run, path)
    check_vocabulary(tokenizer, run.llama.vocab_size)
    if (
        initial is not None
        and run.tokenizer != str(initial)
        and has_tokenizer(initial)
        and load_tokenizer(str(initial)).sha256 != tokenizer.sha256
    ):
        display.warn(f"tokenizer: {tokenizer.name} is not the one in {initial}, whose weights know other pieces")
    source, remarks = with_tokens(source, tokenizer, run.reading.token_cache)
    validation, more = with_tokens(validation, tokenizer, run.reading.token_cache, for_evaluation=True)
    for remark in dict.fromkeys(remarks + more):
        display.note(remark)
    elsewhere = check_at_hand(run, source, validation, first_position=_first_position(state))
    if elsewhere:
        display.note(elsewhere)
    _check_validation(run, validation, tokenizer)
    run = _with_micro_batch(run, accelerator)
    # Every process has looked at the folder before the first one changes it.
    meet(accelerator)
    if accelerator.is_main_process:
        lock.take()
        # Again, now that nobody else can begin one.
        _recorded_run(run, folder, resume=resume)
        try:
            folder.write_run(run)
            folder.forget_after(state.get("step", 0))
            if resume:
                set_aside_newer(folder, path)
        except OSError as error:
            raise UserError(f"{folder.path}: the run folder cannot be written ({error.strerror})") from None
    return Prepared(
        run=run,
        tokenizer=tokenizer,
        source=source,
        validation=validation,
        checkpoint=path,
        state=state,
        initial=initial,
    )


def _initial_weights(run: Run, accelerator: Accelerator, display: Display) -> Path:
    """The folder whose weights the run begins with, found whole, and the same on every process.

    Raises:
        UserError: it is damaged, does not hold the weights that it should, or other ones on another process.
    """
    assert run.init_from is not None
    folder, _ = find_checkpoint(Path(run.init_from), display)
    config = read_config(folder)
    files = weight_files(folder, config)
    if accelerator.num_processes > 1:
        hashes = [sha256_of(file) for file in files]
        if hashes != of_first_process(accelerator, hashes):
            raise UserError(f"init_from: {folder} holds other weights here than where the first process looks")
    apart = "; head and embedding, one matrix there, are trained apart" if config.tie_word_embeddings else ""
    display.note(f"starting from the weights in {folder}{apart}")
    return folder


def _tokenizer(run: Run, checkpoint: Path | None) -> Tokenizer:
    """The run's tokenizer; where its file is gone, or on the hub, that of the checkpoint that the run goes on from."""
    is_here = run.tokenizer == "bundled" or Path(run.tokenizer).expanduser().exists()
    if is_here or checkpoint is None or not has_tokenizer(checkpoint):
        return load_tokenizer(run.tokenizer)
    return load_tokenizer(str(checkpoint), name=run.tokenizer)


def agreed_checkpoint(
    folder: RunFolder, accelerator: Accelerator, warn: Callable[[str], None]
) -> tuple[Path | None, dict[str, Any]]:
    """The newest whole checkpoint and its state, the same on every process: the first one chooses.

    Raises:
        UserError: another process does not find what the first has found.
    """
    found = None
    if accelerator.is_main_process:
        recover_replaced(folder)
        found = newest_whole(folder, warn)
    name = of_first_process(accelerator, found and found[0].name)
    if found is not None or name is None:
        return found or (None, {})
    path = folder.checkpoints / name
    try:
        return path, verified_state(path)
    except DamagedCheckpoint as damage:
        raise UserError(f"{path}: another process reads it whole, this one does not ({damage})") from None


def check_sharding(run: Run, num_processes: int) -> None:
    """Says what does not go with full sharding.

    Raises:
        UserError: something that does not was asked for.
    """
    reasons = {
        "it is for several processes, and this is one; launch with torchrun": num_processes == 1,
        f"mode {run.mode} needs whole gradients or weights, of which each process would have some rows": (
            not build_mode(run).moves_rows_alone
        ),
        "optimizer.state_bits = 8 packs moments across rows; set 32": run.optimizer.state_bits == 8,
        "evaluation.samples continues texts in one process, which has some rows; set 0": run.evaluation.samples > 0,
        "parameters that are gathered for each pass are not compiled; leave out compile": run.compile,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"distributed.sharding: {reason}, or set distributed.sharding = none")


def _training_source(run: Run, accelerator: Accelerator) -> Source:
    """The documents to train on; what `auto` means is decided by one process for all."""
    every, separate = run.reading.holdout_every_documents, has_separate_validation(run)
    if accelerator.is_main_process:
        source = resolve(run.data, split="train", holdout_every_documents=every, separate=separate)
        if run.data == "auto":
            of_first_process(accelerator, source.name)
        return source
    name = of_first_process(accelerator, None) if run.data == "auto" else run.data
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


def _first_position(state: dict[str, Any]) -> int:
    """Place in the order of shards that a run goes on from; beyond the first epoch it needs them all."""
    cursor = state.get("cursor") or {}
    return cursor.get("shard_position", 0) if cursor.get("epoch") == 0 else 0


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
    if run.init_from and recorded.init_from and Path(recorded.init_from).is_relative_to(run.init_from):
        # A run's folder was given, of whose checkpoints one was taken.
        run = run.model_copy(update={"init_from": recorded.init_from})
    if run.batch.micro_batch == "auto":
        batch = run.batch.model_copy(update={"micro_batch": recorded.batch.micro_batch})
        run = run.model_copy(update={"batch": batch})
    for key, (given, was) in differences(run, recorded).items():
        is_same = key == "validation_data" and is_same_data(given, was)
        # Of `data` it is seen later whether they are the same documents.
        if not (key.startswith(MAY_CHANGE) or is_same or key == "data"):
            raise _other(key, given, was, folder)
    return run


def _check_same_data(run: Run, recorded: Run, folder: RunFolder, source: Source, state: dict[str, Any]) -> None:
    """Sees that a resumed run reads the documents that it began with, though they may lie elsewhere by now.

    Raises:
        UserError: they are others, or no checkpoint tells.
    """
    order = (state.get("cursor") or {}).get("order")
    known = order.get("data") if isinstance(order, dict) else None
    if not is_same_data(run.data, recorded.data) and known != fingerprint(source):
        raise _other("data", run.data, recorded.data, folder)


def _other(key: str, given: object, was: object, folder: RunFolder) -> UserError:
    return UserError(
        f"{key}: {given!r} was asked for, but the run in {folder.path} has {was!r}; leave it out to go on, or start a"
        " new run in another --run-dir"
    )


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
        predict=partial(predict_per_device, devices=processes),
    )
    smallest = -largest(accelerator, -mine)
    return run.model_copy(update={"batch": run.batch.model_copy(update={"micro_batch": smallest})})
