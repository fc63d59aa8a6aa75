"""The commands that look at runs: `report`, `show`, `watch`. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from velora_pretrain.errors import UserError
from velora_pretrain.options import RUNS, Json, write_json


def add_run_commands(app: typer.Typer) -> None:
    """Adds them to the program's."""
    app.command()(report)
    app.command()(show)
    app.command()(watch)


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
