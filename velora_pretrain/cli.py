"""The command line: names of commands and options, and how they end. No logic, and no torch until a command needs it.

Exit status: 0 done, 2 the user's mistake (one line on standard error), 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from velora_pretrain import __version__
from velora_pretrain.errors import UserError

if TYPE_CHECKING:
    from velora_pretrain.config import Run

RUNS = Path("runs")
"""Where runs lie unless a folder is given."""

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit status of a network that stays away, of a user's mistake, and of Ctrl-C or SIGTERM."""

app = typer.Typer(
    help="Pre-train LLaMA from scratch on C4 with little memory, and see what each memory-saving mode costs and saves.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Evaluate what was trained.")
compare_app = typer.Typer(help="Compare training modes.")
app.add_typer(eval_app, name="eval")
app.add_typer(compare_app, name="compare")

Size = Annotated[str | None, typer.Option(help="Model size, from 9m to 13b.", metavar="SIZE")]
MicroBatch = Annotated[str | None, typer.Option(help="Sequences per forward pass, or auto.", metavar="N|auto")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per sequence.")]
Precision = Annotated[str | None, typer.Option(help="fp32, bf16-mixed or bf16.", metavar="FORMAT")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe key; repeatable.", metavar="DOTTED.KEY=VALUE")
]
Json = Annotated[str | None, typer.Option("--json", help="Write the result to a file; - is standard output.")]
DATA_HELP = "auto, c4, sample, or a path, glob or URL of .json, .jsonl (.gz, .zst) or .parquet files."


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
    mode: Annotated[str | None, typer.Option(help="Training mode; the recipes list them.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A TOML recipe, or a bundled one by name (quickstart).")] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bundled, a SentencePiece model's path, or a hub name.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step, over all devices.")] = None,
    micro_batch: MicroBatch = None,
    sequence_length: SequenceLength = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Precision = None,
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
    settings: Settings = None,
) -> None:
    """Pre-train a model, evaluate it, and keep everything in a run folder."""
    from velora_pretrain.display import make_display, process_rank
    from velora_pretrain.recipe import resolve
    from velora_pretrain.records import RunFolder, newest_run
    from velora_pretrain.tables import print_summary

    assignments = settings or []
    if not resume and size is None and recipe is None and not any(_names_model(each) for each in assignments):
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
        "schedule.steps": steps,
        "batch.sequences": batch_size,
        "batch.micro_batch": _number_or_word(micro_batch),
        "batch.sequence_length": sequence_length,
        "optimizer.lr": lr,
        "seed": seed,
        "device": device,
        "precision": precision,
    }
    run = resolve(recipe, options, assignments, recorded=recorded)
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


@eval_app.callback()
def _eval() -> None:
    """Keeps `eval` a group of commands while it has only one."""


@eval_app.command("checkpoint")
def eval_checkpoint(
    path: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint, run folder or Hugging Face folder; by default the newest run's last."),
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    tokens: Annotated[int | None, typer.Option(help="Validation tokens to score.", min=1)] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bundled, a SentencePiece model's path, or a hub name; by default the folder's own."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
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
        _write_json(json_file, fields)
        if json_file != "-":
            print_evaluation(fields)


@compare_app.callback()
def _compare() -> None:
    """Keeps `compare` a group of commands while it has only one."""


@compare_app.command("memory")
def compare_memory(
    size: Size = "60m",
    modes: Annotated[str | None, typer.Option(help="Modes, with commas between; by default all.")] = None,
    micro_batch: MicroBatch = None,
    sequence_length: SequenceLength = None,
    precision: Precision = None,
    recompute: Annotated[str | None, typer.Option(help="What is rebuilt in the backward pass.")] = None,
    settings: Settings = None,
    json_file: Json = None,
) -> None:
    """Show where every byte of a training step goes, per mode, by category."""
    per_pass = _number_or_word(micro_batch)
    options = {
        "size": size,
        "batch.micro_batch": per_pass,
        "batch.sequence_length": sequence_length,
        "precision": precision,
        "memory.recompute": recompute,
    }
    if isinstance(per_pass, int) and per_pass > 0:
        # About the published batch, in whole micro-batches of any number.
        options["batch.sequences"] = per_pass * max(1, 512 // per_pass)
    runs = compared_runs(modes, options, settings or [])

    from velora_pretrain.compare import memory_rows
    from velora_pretrain.tables import print_memory_rows

    rows = memory_rows(runs)
    _write_json(json_file, {"rows": rows})
    if json_file != "-":
        print_memory_rows(rows)


@compare_app.command("perplexity")
def compare_perplexity(
    recipe: Annotated[str | None, typer.Option(help="A TOML recipe, or a bundled one by name (quickstart).")] = None,
    size: Size = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Modes to train, with commas between; settings of a mode's own stand behind it in square brackets,"
            " quoted from the shell. By default those that the recipe names, else all modes.",
            metavar="MODE,'MODE[KEY=VALUE,KEY=VALUE]'",
        ),
    ] = None,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(
            help="Peak learning rates to try, as many for every mode: 1e-3,2e-3, or MODE:1e-3,2e-3 for one of them;"
            " repeatable. By default the recipe's.",
            metavar="[MODE:]LR,LR",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds of the weights; the data order stays the recipe's. By default the recipe's.", metavar="N,N"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run; by default the recipe's.")] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bundled, a SentencePiece model's path, or a hub name.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of all runs, which the same command goes on with; by default runs/perplexity-RECIPE.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs that train side by side.", min=1)] = 1,
    settings: Settings = None,
    json_file: Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the plots (PNG and SVG); by default plots in the folder of all runs.", show_default=False
        ),
    ] = None,
) -> None:
    """Train modes over learning rates and seeds, all on the same text; show each at its best, beside full rank.

    Every run has a process and a run folder of its own. Stopped, the same command goes on and repeats nothing.
    """
    from rich.console import Console

    from velora_pretrain.display import make_display
    from velora_pretrain.plots import HOW_TO_INSTALL, has_matplotlib, write_plots
    from velora_pretrain.signals import Interrupted
    from velora_pretrain.tables import print_perplexity
    from velora_pretrain.variants import plan_cells

    assignments = settings or []
    if size is None and recipe is None and not any(_names_model(each) for each in assignments):
        raise UserError("what to train? Give --recipe (for example quickstart) or --size (for example --size 60m)")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("every run has one process here: start it without torchrun, and give --jobs for several")
    options = {"size": size, "schedule.steps": steps, "data": data, "tokenizer": tokenizer}
    cells = plan_cells(
        recipe,
        options,
        assignments,
        modes=modes,
        learning_rates=learning_rates or [],
        seeds=seeds,
    )
    if plot and not has_matplotlib():
        raise UserError(f"--plot {plot}: {HOW_TO_INSTALL}")
    root = run_dir or RUNS / f"perplexity-{Path(recipe).stem if recipe else size or 'custom'}"

    from velora_pretrain.perplexity import compare_perplexity as compare

    is_data = json_file == "-"
    console = Console(stderr=is_data)
    try:
        with make_display(output_is_data=is_data) as display:
            result = compare(cells, root, jobs=jobs, display=display, console=console)
    except Interrupted as interrupted:
        console.print(interrupted.message, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    curves = result.pop("curves")
    _write_json(json_file, result)
    if not is_data:
        print_perplexity(result)
    if has_matplotlib():
        written = write_plots(result["rows"], curves, plot or root / "plots")
        line = f"plots: {', '.join(map(str, written))}" if written else "no plots: every run diverged"
    else:
        line = HOW_TO_INSTALL
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def compared_runs(modes: str | None, options: dict[str, Any], assignments: list[str]) -> list[Run]:
    """One run per mode; a mode that works on chosen layers has a second one on all layers, unless they were given.

    Args:
        modes: names with commas between; None takes every mode.
        options: dotted keys to values, as for `recipe.resolve`.
        assignments: `dotted.key=value`, laid over the options.
    """
    from velora_pretrain.config import MODES
    from velora_pretrain.recipe import resolve

    names = [name.strip() for name in modes.split(",")] if modes else list(MODES)
    runs = []
    for name in names:
        run = resolve(None, {**options, "mode": name}, assignments)
        runs.append(run)
        for part in (part for part, table in run.mode_tables.items() if hasattr(table, "layers")):
            key = f"modes.{part}.layers"
            if not any(assignment.partition("=")[0].strip() == key for assignment in assignments):
                runs.append(resolve(None, {**options, "mode": name, key: "all"}, assignments))
    return runs


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


def _names_model(assignment: str) -> bool:
    key = assignment.partition("=")[0].strip()
    return key == "size" or key.startswith("model.")


def _number_or_word(text: str | None) -> int | str | None:
    """A number if the text is one; what is neither a number nor a known word is refused with the configuration."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def _write_json(target: str | None, value: object) -> None:
    """Writes `value` as JSON to a file, or to standard output for `-`; nothing for None."""
    if target is None:
        return
    from velora_pretrain.records import finite

    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {target}: cannot be written: {error.strerror}") from None


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
