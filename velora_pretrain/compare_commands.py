"""`velora-pretrain compare`: names of its commands and options. No logic, and no torch until a command needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from velora_pretrain.errors import UserError
from velora_pretrain.hints import nearest
from velora_pretrain.options import (
    DATA_HELP,
    INTERRUPTED,
    RUNS,
    Json,
    MicroBatch,
    Precision,
    Recipe,
    RunTokenizer,
    SequenceLength,
    Settings,
    Size,
    names_model,
    number_or_word,
    parse_bytes,
    write_json,
)

if TYPE_CHECKING:
    from velora_pretrain.config import Run

RIVALS = ("none", "elementwise", "block")
"""What every mode can recompute, exactly: a row each in a memory table, whatever else is compared."""

SHARDINGS = ("none", "data-parallel", "sharded")
"""What devices may share in a memory table."""

compare_app = typer.Typer(help="Compare training modes.")


@compare_app.callback()
def _compare() -> None:
    """Keeps `compare` a group of commands while it has only one."""


@compare_app.command("memory")
def compare_memory(
    size: Annotated[
        str | None,
        typer.Option(help="Model size, from 9m to 13b parameters; with --budget also any.", metavar="SIZE"),
    ] = "60m",
    modes: Annotated[
        str | None, typer.Option(help="Modes, with commas between; by default all that are not two together.")
    ] = None,
    micro_batch: MicroBatch = None,
    sequence_length: SequenceLength = None,
    precision: Precision = None,
    recompute: Annotated[
        str | None,
        typer.Option(
            help="What is rebuilt in the backward pass: none, elementwise, mlp or block; by default a row each for"
            " none, elementwise and block (gradient checkpointing)."
        ),
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="When parameters move: step or in_backward; by default step.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also take the step, on random tokens.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Where --measure runs: auto, cpu or cuda; by default auto.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Memory in which to find the largest micro-batch of each row, or with --size any the largest size; by"
            " default none.",
            metavar="24GiB",
        ),
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices that share in a step.", min=1)] = 1,
    sharding: Annotated[
        str | None,
        typer.Option(help="What devices share: none, data-parallel or sharded; by default data-parallel, of one none."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Also the published accountings, and what they leave out.")
    ] = False,
    settings: Settings = None,
    json_file: Json = None,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for a picture of the table (PNG and SVG); by default none.")
    ] = None,
) -> None:
    """Show where every byte of a training step goes, per mode, by category."""
    if size == "any" and budget is None:
        raise UserError("--size any: give --budget, for example --budget 24GiB")
    if sharding not in (None, *SHARDINGS):
        near = nearest(sharding, SHARDINGS)
        raise UserError(f"--sharding {sharding}: {near}choose from {', '.join(SHARDINGS)}")
    from velora_pretrain.config import MODES

    budget_bytes = parse_bytes("--budget", budget) if budget else None
    per_pass = number_or_word(micro_batch)
    options = {
        "size": "9m" if size == "any" else size,
        "batch.micro_batch": per_pass,
        "batch.sequence_length": sequence_length,
        "precision": precision,
        "optimizer.update": update,
        "device": device,
    }
    if isinstance(per_pass, int) and per_pass > 0:
        # About the published batch, in whole micro-batches of any number and on every device.
        options["batch.sequences"] = per_pass * devices * max(1, 512 // (per_pass * devices))
    is_given = recompute or any(each.partition("=")[0].strip() == "memory.recompute" for each in settings or [])
    kinds = [recompute] if is_given else RIVALS
    modes = modes or ",".join(mode for mode in MODES if "+" not in mode)
    lists = [compared_runs(modes, {**options, "memory.recompute": kind}, settings or []) for kind in kinds]
    runs = [run for rivals in zip(*lists, strict=True) for run in rivals]
    if plot is not None:
        from velora_pretrain.plots import HOW_TO_INSTALL, has_matplotlib

        if not has_matplotlib():
            raise UserError(f"--plot {plot}: {HOW_TO_INSTALL}")

    from velora_pretrain.compare import memory_rows
    from velora_pretrain.memory_table import print_memory_rows

    rows = memory_rows(
        runs,
        measure=measure,
        budget_bytes=budget_bytes,
        any_size=size == "any",
        devices=devices,
        sharding=sharding or ("data-parallel" if devices > 1 else "none"),  # pyright: ignore[reportArgumentType]
        published=published,
    )
    write_json(json_file, {"rows": rows})
    if json_file != "-":
        print_memory_rows(rows)
    if plot is not None:
        from velora_pretrain.memory_plot import write_memory_plot

        written = write_memory_plot(rows, plot)
        typer.echo(f"plots: {', '.join(map(str, written))}", err=json_file == "-")


@compare_app.command("speed")
def compare_speed(
    size: Size = "60m",
    modes: Annotated[
        str | None,
        typer.Option(
            help="Modes, with commas between; settings of a mode's own stand behind it in square brackets, quoted from"
            " the shell. By default all.",
            metavar="MODE,'MODE[KEY=VALUE,KEY=VALUE]'",
        ),
    ] = None,
    micro_batch: MicroBatch = None,
    sequence_length: SequenceLength = None,
    precision: Precision = None,
    recompute: Annotated[
        str | None,
        typer.Option(help="What is rebuilt in the backward pass: none, elementwise, mlp or block; by default none."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed optimizer steps of each mode.", min=1)] = 12,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps; by default auto.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Time every mode compiled, too.")] = False,
    settings: Settings = None,
    json_file: Json = None,
) -> None:
    """Time the training steps of modes side by side, part by part, each beside what matrix products alone allow."""
    per_pass = number_or_word(micro_batch)
    options = {
        "size": size,
        "batch.micro_batch": per_pass,
        "batch.sequence_length": sequence_length,
        "precision": precision,
        "memory.recompute": recompute,
        "device": device,
        "data": "sample",
        # Without padding every token of a step is one that counts.
        "packing": "pack",
    }
    if isinstance(per_pass, int) and per_pass > 0:
        options["batch.sequences"] = per_pass
    runs = timed_runs(modes, options, settings or [])
    if compile:
        both = {label: {label: run, f"{label}, compiled": compiled(run)} for label, run in runs.items()}
        runs = {label: run for each in both.values() for label, run in each.items()}

    from rich.console import Console

    from velora_pretrain.speed import Entry
    from velora_pretrain.speed import compare_speed as compare
    from velora_pretrain.speed_table import print_speed

    is_data = json_file == "-"
    console = Console(stderr=True)
    result = compare(
        [Entry(label=label, run=run) for label, run in runs.items()],
        rounds=steps,
        note=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    write_json(json_file, result)
    if not is_data:
        print_speed(result)


@compare_app.command("perplexity")
def compare_perplexity(
    recipe: Recipe = None,
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
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} By default the recipe's, else auto.")] = None,
    tokenizer: RunTokenizer = None,
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
    if size is None and recipe is None and not any(names_model(each) for each in assignments):
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
    write_json(json_file, result)
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


def compiled(run: Run) -> Run:
    """The same run by way of torch.compile."""
    return run.model_copy(update={"compile": True})


def timed_runs(modes: str | None, options: dict[str, Any], assignments: list[str]) -> dict[str, Run]:
    """Runs by label, as `compared_runs` has them; modes may have settings of their own, as in `compare perplexity`."""
    from velora_pretrain.config import MODES
    from velora_pretrain.recipe import resolve
    from velora_pretrain.variants import parse_variants

    runs = {}
    for variant in parse_variants(modes if modes is not None else ",".join(MODES)):
        given = {assignment.partition("=")[0].strip() for assignment in (*assignments, *variant.assignments)}
        run = resolve(None, {**options, "mode": variant.mode}, [*assignments, *variant.assignments])
        runs[variant.label] = run
        for part in (part for part, table in run.mode_tables.items() if hasattr(table, "layers")):
            key = f"modes.{part}.layers"
            if key not in given and not variant.assignments:
                own = "layers" if part == variant.mode else f"{part}.layers"
                everywhere = {**options, "mode": variant.mode, key: "all"}
                runs.setdefault(f"{variant.label}[{own}=all]", resolve(None, everywhere, assignments))
    return runs
