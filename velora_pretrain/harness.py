"""lm-evaluation-harness (the extra `harness`) on a checkpoint: tasks that others know, scored as others score them.

The checkpoint is given to the harness's own class for Hugging Face models, not to an adapter of ours: a checkpoint is
such a model, with the same logits, and so batching, caching and windows are the code that published figures come from.
Three things it would not know by itself are said to it:

    tokenizer     Our saved tokenizers end every text with `</s>`, as training does. A prompt would then be a document
                  that has ended, so nothing is added to texts; an empty prompt becomes `</s>` alone. A tokenizer that
                  does not do so is used as it stands, with whatever it puts in front.
    length        A run's model has seen positions up to the run's sequence length, whatever its config.json allows.
    precision     A run in mixed precision is scored under autocast, as it scores itself.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from velora_pretrain.config import Run
from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.devices import pick_device
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError, one_line
from velora_pretrain.evaluation import find_checkpoint
from velora_pretrain.hugging_face import weight_files
from velora_pretrain.llama_folder import has_tokenizer, read_config

TOKENIZER_JSON = "tokenizer.json"
FEW_SHOT_SEED = 1234
"""Of the examples in a prompt: the harness's own default."""
BOOTSTRAP_DRAWS = 1000
"""For standard errors that have no closed form."""

_reason = partial(one_line, most_letters=200)
"""What the harness says of a failure."""


def run_harness(
    path: Path,
    *,
    tasks: Sequence[str],
    task_path: Path | None,
    limit: int | None,
    batch_size: int,
    few_shot: int | None,
    sequence_length: int | None,
    device: str,
    display: Display,
) -> dict[str, Any]:
    """Scores a model on tasks of lm-evaluation-harness.

    Args:
        path: a checkpoint, a run folder, whose newest whole checkpoint is taken, or any Hugging Face LLaMA folder.
        tasks: names of tasks, groups or tags, or patterns of them.
        task_path: a folder of further tasks, in YAML.
        limit: documents of each task, its first ones; None for all.
        batch_size: sequences per forward pass.
        few_shot: examples in each prompt, except where a task fixes none; None leaves it to the task.
        sequence_length: longest sequence in tokens; None for the run's, or as many as a foreign model has positions.
        device: auto, cpu, cuda or mps.
        display: takes warnings.

    Returns:
        `rows`, one per task and metric, and what they depend on.

    Raises:
        UserError: no model or tokenizer there; a task is unknown, or cannot be loaded or run.
    """
    checkpoint, run = find_checkpoint(path, display)
    config = read_config(checkpoint)
    weight_files(checkpoint, config)
    if not has_tokenizer(checkpoint) and not (checkpoint / TOKENIZER_JSON).is_file():
        raise UserError(f"{checkpoint}: holds no tokenizer, which the harness needs; save the model's beside it")
    length = sequence_length or (run.batch.sequence_length if run else config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length {length}: is longer than the model's {config.max_position_embeddings} positions"
        )
    where = pick_device(device)
    # The harness writes some of its progress to standard output, which is for the result.
    with redirect_stdout(sys.stderr), _warnings_once(display):
        loaded = _load_tasks(tasks, task_path, few_shot)
        display.note(f"scoring {', '.join(loaded['tasks'])}")
        model = _harness_model(checkpoint, run, length=length, batch_size=batch_size, device=where)
        try:
            from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

            results = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=False)
        except (AssertionError, ValueError) as error:
            # What a task asks for that this model, or this command, does not give.
            raise UserError(f"--tasks: {_reason(error)}") from error
    return {
        "rows": _rows(results),
        "checkpoint": str(checkpoint),
        "tokenizer_sha256": load_tokenizer(str(checkpoint)).sha256 if has_tokenizer(checkpoint) else None,
        "precision": run.precision if run else str(model.model.dtype).removeprefix("torch."),
        "sequence_length": length,
        "limit": limit,
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")},
    }


def _harness_model(checkpoint: Path, run: Run | None, *, length: int, batch_size: int, device: torch.device) -> Any:
    """The harness's model of a folder; see the module's docstring."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    tokenizer = _saved_tokenizer(checkpoint)
    ends_texts = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return HFLM(
        str(checkpoint),
        tokenizer=tokenizer,
        add_bos_token=False if ends_texts else None,
        max_length=length,
        batch_size=batch_size,
        device=device.type,
        mixed_precision_dtype="bfloat16" if run and run.precision == "bf16-mixed" else None,
    )


def _saved_tokenizer(checkpoint: Path) -> Any:
    """A folder's tokenizer as transformers has it; made of its SentencePiece model where it has nothing else."""
    import transformers

    with TemporaryDirectory() as temporary:
        folder = checkpoint
        if not (checkpoint / TOKENIZER_JSON).is_file():
            # transformers' own conversion wants further packages, and loses spaces.
            folder = Path(temporary)
            load_tokenizer(str(checkpoint)).save_pretrained(folder)
        try:
            return transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{checkpoint}: transformers cannot load its tokenizer ({_reason(error)})") from error


def _load_tasks(names: Sequence[str], task_path: Path | None, few_shot: int | None) -> dict[str, Any]:
    """The tasks with their documents, as `evaluate` takes them.

    Raises:
        UserError: a name matches none, or a task cannot be loaded.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = None
    if task_path is not None:
        # Some thousand files of the harness's own need not be read for the tasks of one folder.
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
    found = list(dict.fromkeys(match for name in names for match in _matches(manager, name, task_path)))
    try:
        loaded = manager.load(found)
    except Exception as error:
        # Whatever a task's own code, a file of it or the hub may raise.
        raise UserError(f"--tasks {','.join(names)}: cannot be loaded ({_reason(error)})") from error
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (few_shot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=few_shot or 0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return {**loaded}


def _matches(manager: Any, name: str, task_path: Path | None) -> list[str]:
    matches = sorted(manager.match_tasks([name]))
    if not matches:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see the harness's own list: lm-eval ls tasks"
        folder = f" or {task_path}" if task_path else ""
        raise UserError(f"--tasks {name}: no such task in lm-evaluation-harness{folder}; {hint}")
    return matches


@contextmanager
def _warnings_once(display: Display) -> Iterator[None]:
    """Shows each of the harness's warnings once at the end, and how often it came: some come for every document."""
    messages: dict[tuple[str, int], list[str]] = {}
    logger, handler = logging.getLogger("lm_eval"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.setdefault((record.pathname, record.lineno), []).append(record.getMessage())
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        for first, *others in messages.values():
            display.warn(f"{' '.join(first.split())}{f' (and {len(others):,} times more)' if others else ''}")


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task or group and metric; the harness writes `metric,filter` and `metric_stderr,filter`."""
    rows: list[dict[str, Any]] = []
    for task, figures in results["results"].items():
        of_metrics = {key: key.split(",") for key in figures if "," in key}
        for key, (metric, kind) in of_metrics.items():
            if metric.endswith("_stderr"):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "version": results["versions"].get(task),
                    "metric": metric,
                    "filter": kind,
                    "value": figures[key],
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "few_shot": results["n-shot"].get(task),
                    "documents": figures.get("sample_len"),
                }
            )
    return rows
