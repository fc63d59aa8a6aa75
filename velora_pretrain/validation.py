"""The evaluations of a run on its way: the same documents each time, over all its processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from velora_pretrain.data.loader import evaluation_batches
from velora_pretrain.distributed import all_reduce
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import EVALUATION_MICRO_BATCH, EVALUATION_SEQUENCES, evaluate
from velora_pretrain.generation import SampleLog
from velora_pretrain.nn.llama import Llama
from velora_pretrain.placement import Placement
from velora_pretrain.records import EvaluationRecord, RunFolder
from velora_pretrain.setup import Prepared


class Validation:
    """Scores a model on the run's validation documents.

    Args:
        prepared: what the run starts from.
        folder: takes samples, and failures.
        accelerator: the processes.
        placement: of the model.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, accelerator: Accelerator, placement: Placement) -> None:
        self._prepared, self._folder = prepared, folder
        self._accelerator, self._placement = accelerator, placement
        self._samples = SampleLog(folder.samples, prepared.run, prepared.validation, prepared.tokenizer)

    def evaluate(
        self, model: Llama, step: int, progress: Callable[[int], None]
    ) -> tuple[EvaluationRecord, list[dict[str, Any]]]:
        """Evaluates after `step` optimizer steps, and logs samples where they are asked for.

        Args:
            model: the adapted model.
            step: optimizer steps done.
            progress: told the targets scored so far; what it raises ends the evaluation.

        Returns:
            The record, and the samples, which the first process has.

        Raises:
            UserError: the loss is not finite, or the documents cannot be read.
        """
        run, accelerator = self._prepared.run, self._accelerator
        batches = evaluation_batches(
            self._prepared.validation,
            self._prepared.tokenizer,
            packing=run.packing,
            sequence_length=run.batch.sequence_length,
            sequences=EVALUATION_SEQUENCES,
            max_target_tokens=run.evaluation.tokens,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            max_bad_lines=run.reading.max_bad_lines,
        )
        score = evaluate(
            model,
            batches,
            precision=run.precision,
            device=accelerator.device,
            micro_batch=EVALUATION_MICRO_BATCH,
            all_reduce=lambda tensor: all_reduce(accelerator, tensor),
            passes=self._placement.passes,
            progress=progress,
        )
        if not math.isfinite(score.nats):
            reason = f"the validation loss is {score.nats}"
            if accelerator.is_main_process:
                self._folder.write_failure(step, reason)
            raise UserError(f"{reason}; lower the learning rate in a new run")
        return score.record(step), self._samples.write(model, step) if accelerator.is_main_process else []
