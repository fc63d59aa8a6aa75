"""The commands that look at runs: `report`, `show`, `watch`, and `generate`, which alone needs torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from velora_pretrain.errors import UserError
from velora_pretrain.options import RUNS, Device, FolderTokenizer, Json, write_json


def add_run_commands(app: typer.Typer) -> None:
    """Adds them to the program's."""
    app.command()(report)
    app.command()(show)
    app.command()(watch)
    app.command()(generate)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of run folders.", metavar="RUN...")],
    output: Annotated[Path, typer.Option(help="Folder for report.html and the pictures.")] = Path("report"),
) -> None:
    """Compare runs on one HTML page that needs no network, with each picture as PNG and SVG."""
    from velora_pretrain.report import write_report

    page, *pictures = write_report(runs, output)
    print(f"{page}  ({len(pictures)} pictures beside it, in {output / 'pictures'})")


def show(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder, or a folder of them; by default all runs under runs/.")
    ] = None,
    json_file: Json = None,
) -> None:
    """List the runs there are, or show one: settings, last steps, evaluations, checkpoints."""
    from velora_pretrain.records import RunFolder
    from velora_pretrain.run_tables import print_run, print_runs, run_facts
    from velora_pretrain.run_view import age_seconds, find_runs, glance, view_run

    if run is not None and (run / "config.toml").is_file():
        view = view_run(RunFolder(run))
        write_json(json_file, run_facts(view))
        if json_file != "-":
            print_run(view)
        return
    if run is None and not RUNS.is_dir():
        raise UserError(f"{RUNS}: holds no run; give a run folder, or train first")
    glances = [glance(folder) for folder in sorted(find_runs([run or RUNS]), key=age_seconds)]
    write_json(json_file, {"runs": glances})
    if json_file != "-":
        print_runs(glances)


def watch(
    run: Annotated[Path | None, typer.Argument(help="A run folder; by default the newest run.")] = None,
) -> None:
    """Follow a run that another process trains, until it ends; Ctrl-C ends the watching, not the run."""
    from velora_pretrain.display import make_display
    from velora_pretrain.records import RunFolder, newest_run
    from velora_pretrain.watch import watch as follow

    folder = newest_run(RUNS) if run is None else RunFolder(run)
    with make_display(every_step=True) as display:
        state = follow(folder, display)
    print(f"{folder.path}: {state}")


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, run folder or Hugging Face folder.")],
    prompt: Annotated[str, typer.Argument(help="The beginning of the text.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.", min=1)] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            help="What logits are divided by: 0 takes the likeliest token, above that chance has a say.", min=0
        ),
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.", min=0)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the tokens that are drawn.", min=0, max=2**63 - 1)] = 0,
    tokenizer: FolderTokenizer = None,
    device: Device = "auto",
) -> None:
    """Continue a text with what a checkpoint's model has learnt."""
    from velora_pretrain.display import make_display

    if not checkpoint.exists():
        raise UserError(f"{checkpoint}: no such checkpoint or run folder")
    if not math.isfinite(temperature):
        raise UserError(f"--temperature {temperature}: is no finite number")

    from velora_pretrain.generation import generate as write_on

    with make_display(output_is_data=True) as display:
        text = write_on(
            checkpoint,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            device=device,
            display=display,
            tokenizer_name=tokenizer,
        )
    print(text)
