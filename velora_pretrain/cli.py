"""The command line: names of commands and options, and how they end. No logic, and no torch until a command needs it.

Exit status: 0 done, 2 the user's mistake (one line on standard error), 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from velora_pretrain import __version__
from velora_pretrain.compare_commands import compare_app
from velora_pretrain.data_commands import data_app
from velora_pretrain.doctor_command import doctor
from velora_pretrain.errors import UserError
from velora_pretrain.eval_commands import eval_app
from velora_pretrain.options import (
    DATA_HELP,
    DEVICES,
    FAILED,
    INTERRUPTED,
    MISTAKE,
    RUNS,
    MicroBatch,
    Mode,
    Precision,
    Recipe,
    RunTokenizer,
    SequenceLength,
    Settings,
    Size,
    Trackers,
    completing,
    names_model,
    number_or_word,
)
from velora_pretrain.run_commands import add_run_commands

if TYPE_CHECKING:
    from velora_pretrain.config import Run

app = typer.Typer(
    help="Pre-train LLaMA from scratch on C4 with little memory, and see what each memory-saving mode costs and saves.",
    pretty_exceptions_enable=False,
)
app.add_typer(eval_app, name="eval")
app.add_typer(compare_app, name="compare")
app.add_typer(data_app, name="data")


def _show_version(is_asked: bool) -> bool:
    if is_asked:
        print(f"velora-pretrain {__version__}")
        raise typer.Exit
    return is_asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Takes the options that go before a command."""


@app.command()
def train(
    size: Size = None,
    mode: Mode = None,
    recipe: Recipe = None,
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} By default the recipe's, else auto.")] = None,
    tokenizer: RunTokenizer = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face LLaMA folder, run folder or checkpoint whose weights, dimensions and tokenizer to"
            " start with; by default the recipe's, else weights are drawn by the seed.",
            metavar="FOLDER",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; by default the recipe's, else as published for the size.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences per optimizer step, over all devices; by default the recipe's, else 512."),
    ] = None,
    micro_batch: MicroBatch = None,
    sequence_length: SequenceLength = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default the recipe's, else 0.001.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of weights and data order; by default the recipe's, else 0.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto, cpu, cuda or mps; by default the recipe's, else auto.",
            autocompletion=completing(lambda: DEVICES),
        ),
    ] = None,
    precision: Precision = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Compile forward and backward pass by torch.compile.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/SIZE-MODE-TIME.", show_default=False)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with --run-dir, or with the newest run; steps and learning rate stay as recorded.",
        ),
    ] = False,
    tracker: Trackers = None,
    settings: Settings = None,
) -> None:
    """Pre-train a model, evaluate it, and keep everything in a run folder."""
    from velora_pretrain.display import make_display, process_rank
    from velora_pretrain.recipe import resolve
    from velora_pretrain.records import RunFolder, newest_run
    from velora_pretrain.tables import print_summary
    from velora_pretrain.trackers import check_installed

    assignments = settings or []
    is_named = any(each is not None for each in (size, recipe, init_from)) or any(map(names_model, assignments))
    if not resume and not is_named:
        raise UserError("what to train? Give --size (for example --size 60m) or --recipe (for example quickstart)")
    folder, recorded = None, resume and recipe is None
    if resume:
        folder = RunFolder(run_dir) if run_dir else newest_run(RUNS)
        folder.read_run()
        recipe = recipe or str(folder.config)  # one that is given is read as when the run began
    options = {
        "size": size,
        "mode": mode,
        "data": data,
        "tokenizer": tokenizer,
        "init_from": init_from,
        "schedule.steps": steps,
        "batch.sequences": batch_size,
        "batch.micro_batch": number_or_word(micro_batch),
        "batch.sequence_length": sequence_length,
        "optimizer.lr": lr,
        "seed": seed,
        "device": device,
        "precision": precision,
        "compile": compile,
        "tracking.trackers": tracker or None,
    }
    run = resolve(recipe, options, assignments, recorded=recorded)
    check_installed(run.tracking.trackers)
    folder = folder or RunFolder(run_dir or new_run_dir(run))

    from velora_pretrain.trainer import Interrupted
    from velora_pretrain.trainer import train as train_run

    try:
        with make_display() as display:
            summary = train_run(run, folder, resume=resume, display=display)
    except Interrupted as interrupted:
        if process_rank() == 0:
            print(interrupted.message, flush=True)
        raise typer.Exit(INTERRUPTED) from None
    if process_rank() == 0:
        print_summary(summary)


add_run_commands(app)
app.command()(doctor)


def new_run_dir(run: Run) -> Path:
    """A folder for a new run, named after model, mode and time; the same on every rank.

    Raises:
        UserError: several processes, and nothing that they share tells them one name.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # The ranks' clocks may differ by a second; the launcher's run id is the same for all, unless left at "none".
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        if launch == "none":
            raise UserError(
                f"several processes need one folder: give --run-dir, for example --run-dir {RUNS / run.name},"
                " or launch with torchrun --standalone"
            )
        return RUNS / f"{run.name}-{launch[:8]}"
    path = RUNS / f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    others = (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))
    return next(candidate for candidate in (path, *others) if not candidate.exists())


_USAGE_ERROR: type[BaseException] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""Base of Typer's errors of usage, which older versions take from click and newer ones bring along."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status.

    Args:
        arguments: those after the program's name; by default the process's own.
    """
    sys.exit(_status(arguments))


def _status(arguments: Sequence[str] | None) -> int:
    try:
        # Without a command there is nothing to do but to say which there are.
        arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        status = app(args=arguments, prog_name="velora-pretrain", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        return _complain(str(error))
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) went away; Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConnectionError as error:
        # The network went for good: nobody's mistake, and a traceback would say no more.
        _complain(str(error) or type(error).__name__)
        return FAILED
    except _USAGE_ERROR as error:
        return _complain(error.format_message())  # pyright: ignore[reportAttributeAccessIssue]
    return status if isinstance(status, int) else 0


def _complain(message: str) -> int:
    """Shows one line about what went wrong; every rank does, since only one of them may have met it."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[rank {rank}] "
    print(f"{where}error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return MISTAKE
