"""The commands under `eval`: `checkpoint` and `harness`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from velora_pretrain.errors import UserError
from velora_pretrain.options import DATA_HELP, RUNS, Device, FolderTokenizer, Json, write_json

eval_app = typer.Typer(help="Evaluate what was trained.")
CheckpointPath = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="A checkpoint, run folder or Hugging Face folder; by default the newest run's last.",
        show_default=False,
    ),
]


@eval_app.command("checkpoint")
def eval_checkpoint(
    path: CheckpointPath = None,
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} By default the run's, else auto.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Validation tokens to score; by default the run's number, else 10 million.", min=1),
    ] = None,
    tokenizer: FolderTokenizer = None,
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """Score validation text: perplexity, bits per byte, tokens."""
    from velora_pretrain.display import make_display, process_rank
    from velora_pretrain.tables import print_evaluation

    path = _chosen(path)

    from velora_pretrain.evaluation import evaluate_checkpoint

    with make_display(output_is_data=json_file == "-") as display:
        fields = evaluate_checkpoint(
            path, data=data, tokens=tokens, device=device, display=display, tokenizer_name=tokenizer
        )
    if process_rank() == 0:
        write_json(json_file, fields)
        if json_file != "-":
            print_evaluation(fields)


@eval_app.command("harness")
def eval_harness(
    path: CheckpointPath = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, groups or tags of lm-evaluation-harness, or patterns; commas between.", metavar="NAMES"
        ),
    ] = "",
    task_path: Annotated[
        Path | None, typer.Option(help="A folder of further tasks, in the harness's YAML; by default none.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task, its first ones; by default all.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)] = 16,
    few_shot: Annotated[int | None, typer.Option(help="Examples in each prompt; by default the task's.", min=0)] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Longest sequence, in tokens; by default the run's, else the model's positions.", min=2),
    ] = None,
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """Score tasks of lm-evaluation-harness (the extra `harness`): accuracies, perplexities, matches."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("which tasks? Give --tasks, for example --tasks lambada_openai,hellaswag")
    if task_path is not None and not task_path.is_dir():
        raise UserError(f"--task-path {task_path}: no such folder")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("eval harness has one process: start it without torchrun")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('eval harness needs lm-evaluation-harness: pip install "velora-pretrain[harness]"')

    from velora_pretrain.display import make_display
    from velora_pretrain.tables import print_harness

    path = _chosen(path)

    from velora_pretrain.harness import run_harness

    with make_display(output_is_data=json_file == "-") as display:
        result = run_harness(
            path,
            tasks=names,
            task_path=task_path,
            limit=limit,
            batch_size=batch_size,
            few_shot=few_shot,
            sequence_length=sequence_length,
            device=device,
            display=display,
        )
    write_json(json_file, result)
    if json_file != "-":
        print_harness(result)


def _chosen(path: Path | None) -> Path:
    """The folder that was given, else the newest run's."""
    from velora_pretrain.records import newest_run

    path = path or newest_run(RUNS).path
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run folder")
    return path
