"""The commands under `eval`."""

from __future__ import annotations

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


@eval_app.callback()
def _eval() -> None:
    """Keeps `eval` a group of commands while it has only one."""


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
    from velora_pretrain.records import newest_run
    from velora_pretrain.tables import print_evaluation

    path = path or newest_run(RUNS).path
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run folder")

    from velora_pretrain.evaluation import evaluate_checkpoint

    with make_display(output_is_data=json_file == "-") as display:
        fields = evaluate_checkpoint(
            path, data=data, tokens=tokens, device=device, display=display, tokenizer_name=tokenizer
        )
    if process_rank() == 0:
        write_json(json_file, fields)
        if json_file != "-":
            print_evaluation(fields)
