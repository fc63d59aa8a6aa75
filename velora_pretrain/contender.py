"""A run as a contender of a speed comparison: its model, mode and optimizer, and what its steps read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_pretrain.config import Run
from velora_pretrain.devices import WEIGHT_DTYPES, autocast, default_dtype
from velora_pretrain.matrix_products import counted_operations
from velora_pretrain.modes import Mode, build_mode, with_periods
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.loss import IGNORE_INDEX
from velora_pretrain.prediction import MICRO_BATCH_TOKENS
from velora_pretrain.timing import Contender, Pace, StepBatch, take_step

NEVER = 2**40
"""A period, in steps, that no measurement comes to the end of."""


def contender_of(
    run: Run, *, batches: Iterator[StepBatch], device: torch.device, model: Llama | None = None
) -> Contender:
    """A run's model, mode and optimizer, ready to train.

    Args:
        run: the run.
        batches: what its steps read.
        device: where.
        model: taken over, before any mode has adapted it; by default one whose weights follow from the run's seed.
    """
    mode = build_mode(run)
    if model is None:
        model = Llama(run.llama, seed=run.seed, recompute=run.memory.recompute)
    mode.adapt(model)
    embedding, dtype = model.model.embed_tokens.weight, WEIGHT_DTYPES[run.precision]
    # Tensors without memory are there already, and cannot be moved.
    if (embedding.device, embedding.dtype) != (device, dtype):
        model.to(device=device, dtype=dtype)

    def loss(inputs: Tensor, labels: Tensor, num_targets: int) -> Tensor:
        with autocast(run.precision, device.type):
            return model(inputs, labels) * (1 / max(1, num_targets))

    never = dict.fromkeys(mode.periods(), NEVER)
    rare = [
        _pace(build_mode(with_periods(run, {**never, key: 1})), model, period_steps=steps)
        for key, steps in mode.periods().items()
    ]
    return Contender(
        model=model,
        loss=loss,
        batches=batches,
        pace=_pace(build_mode(with_periods(run, never)), model),
        rare=rare,
        device=device,
        in_backward=run.optimizer.update == "in_backward",
        compile=(lambda: model.compile(fullgraph=True)) if run.compile else None,
        close=getattr(batches, "close", lambda: None),
    )


def _pace(mode: Mode, model: Llama, period_steps: int = 0) -> Pace:
    optimizer = mode.build_optimizer(model)
    return Pace(
        optimizer=optimizer,
        before_step=lambda step, run_forward: mode.before_step(model, optimizer, step, run_forward),
        after_step=lambda step: mode.after_step(model, optimizer, step),
        period_steps=period_steps,
    )


def batches_of(run: Run, device: torch.device, tell: Callable[[str], None] = lambda line: None) -> Iterator[StepBatch]:
    """What the run's own loader gives, on the device; random tokens where its packages are not installed.

    Args:
        run: the run.
        device: where the batches go.
        tell: is told of random tokens.
    """
    micro_batch = micro_batch_of(run)
    try:
        from velora_pretrain.data.c4 import resolve
        from velora_pretrain.data.loader import TrainLoader
        from velora_pretrain.data.token_cache import with_tokens
        from velora_pretrain.data.tokenizer import check_vocabulary, load_tokenizer
    except ImportError as error:
        tell(f"random tokens in place of text, no time for data: {error}")
        yield from random_batches(run, device)
        return
    tokenizer = load_tokenizer(run.tokenizer)
    check_vocabulary(tokenizer, run.llama.vocab_size)
    source = resolve(run.data, split="train", holdout_every_documents=run.reading.holdout_every_documents)
    loader = TrainLoader(
        with_tokens(source, tokenizer, run.reading.token_cache)[0],
        tokenizer,
        packing=run.packing,
        sequence_length=run.batch.sequence_length,
        sequences=run.batch.sequences,
        seed=run.shuffle_seed,
        shuffle_block_documents=run.reading.shuffle_block_documents,
        max_bad_lines=run.reading.max_bad_lines,
        prefetch_batches=run.reading.prefetch_batches,
    )
    with closing(loader):
        for batch in loader:
            pieces = [each.to(device, non_blocking=True).split(micro_batch) for each in (batch.inputs, batch.labels)]
            yield StepBatch(
                micro_batches=list(zip(*pieces, strict=True)),
                num_targets=batch.num_target_tokens,
                num_tokens=batch.num_input_tokens,
            )


def random_batches(run: Run, device: torch.device, seed: int = 0) -> Iterator[StepBatch]:
    """Random tokens and those that follow them; the last position of a sequence is no target."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = run.batch.sequences, run.batch.sequence_length
    while True:
        tokens = torch.randint(run.llama.vocab_size, (rows, length), generator=generator)
        labels = F.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
        pieces = [each.to(device).split(micro_batch_of(run)) for each in (tokens, labels)]
        yield StepBatch(
            micro_batches=list(zip(*pieces, strict=True)), num_targets=rows * (length - 1), num_tokens=rows * length
        )


def operations_of(run: Run) -> int:
    """Operations of the matrix products in one step without rare work: counted on tensors without memory."""
    with FakeTensorMode():
        with default_dtype(WEIGHT_DTYPES[run.precision]):
            model = Llama(run.llama, recompute=run.memory.recompute)
        device = torch.device("cpu")
        contender = contender_of(run, batches=_shapes_alone(run), device=device, model=model)
        contender.takes_norm = False  # it would be read
        take_step(contender)
        with counted_operations() as counted:
            take_step(contender)
    return counted.total


def _shapes_alone(run: Run) -> Iterator[StepBatch]:
    shape = (micro_batch_of(run), run.batch.sequence_length)
    while True:
        tokens = torch.zeros(shape, dtype=torch.int64)
        count = run.batch.sequences // shape[0]
        yield StepBatch(micro_batches=[(tokens, tokens)] * count, num_targets=1, num_tokens=1)


def micro_batch_of(run: Run) -> int:
    """Sequences per forward pass of a run that has been settled."""
    assert run.batch.micro_batch != "auto"
    return run.batch.micro_batch


def settled(run: Run, device_type: str) -> Run:
    """The run with a number of sequences per forward pass; a step has one such pass unless the run says otherwise."""
    batch, sequences = run.batch, run.batch.sequences
    is_given = "sequences" in batch.model_fields_set
    micro_batch = batch.micro_batch
    if micro_batch == "auto":
        most = max(1, MICRO_BATCH_TOKENS[device_type] // batch.sequence_length)
        micro_batch = max(n for n in range(1, most + 1) if not is_given or sequences % n == 0)
    changes = {"micro_batch": micro_batch, "sequences": sequences if is_given else micro_batch}
    return run.model_copy(update={"batch": batch.model_copy(update=changes)})
