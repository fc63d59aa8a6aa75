"""The commands that bring data to hand: `data fetch` and `data tokenise`."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from velora_pretrain.errors import UserError
from velora_pretrain.options import INTERRUPTED, Recipe, Settings, Size, names_model

data_app = typer.Typer(help="Bring data to hand: shards of C4 in a folder, tokens that lie ready.")


@data_app.command()
def fetch(
    to: Annotated[Path, typer.Option(help="Folder for the files; `train --data` takes it.")],
    shards: Annotated[
        int | None, typer.Option(help="Training shards, 319 MB each; by default as many as the run reads.", min=1)
    ] = None,
    recipe: Recipe = None,
    size: Size = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; by default as for train.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step; by default as for train.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the data order, as for train; by default the recipe's, else 0.")
    ] = None,
    validation: Annotated[
        bool, typer.Option(help="Bring also the validation shards that the run's evaluations read, 40 MB each.")
    ] = True,
    connections: Annotated[int, typer.Option(help="Files that are fetched at a time.", min=1, max=64)] = 4,
    settings: Settings = None,
) -> None:
    """Download the shards of C4 that a run reads first, for `train --data`; go on where it was interrupted."""
    from rich.console import Console

    from velora_pretrain.bars import Bars
    from velora_pretrain.data.c4 import OFFLINE, is_c4, is_offline
    from velora_pretrain.data.fetch import Fetch
    from velora_pretrain.data.manifest import take_manifest
    from velora_pretrain.data.needs import shards_to_fetch
    from velora_pretrain.recipe import resolve
    from velora_pretrain.run_lock import RunLock

    assignments = settings or []
    is_run_known = recipe is not None or size is not None or any(names_model(each) for each in assignments)
    if shards is None and not is_run_known:
        raise UserError("how many shards? Give --recipe or --size, of which they are counted, or --shards")
    options = {
        "size": size if is_run_known else "60m",  # whose order of the data is that of any size
        "schedule.steps": steps,
        "batch.sequences": batch_size,
        "seed": seed,
    }
    run = resolve(recipe, options, assignments)
    if recipe is not None and run.data != "auto" and not is_c4(run.data):
        raise UserError(
            f"{recipe}: reads {run.data}, of which nothing is fetched; add --set data=c4 to read C4 instead"
        )
    if str(to) in ("auto", "c4", "sample"):
        raise UserError(f"--to {to}: train would take --data {to} for the word; name the folder otherwise, say c4-en")
    if is_offline():
        raise UserError(f"data fetch: {OFFLINE}; unset it")
    wanted = shards_to_fetch(run, count=shards, validation=validation)
    count, again = sum("train." in shard for shard in wanted), "go on with the same command"
    with RunLock(to, file="fetch.lock", busy="is fetching into this folder; wait for it, or stop it") as lock:
        lock.take()
        manifest, remark = take_manifest(to)
        if remark:
            print(remark)
        if shards is None:
            how = "" if run.packing == "pad" else ", by estimate"
            total = manifest.num_shards["train"]
            print(f"{run.name}: {run.steps:,} steps read {count} of the {total:,} training shards{how}")
        bars = Bars(Console(), "bytes")
        work = Fetch(to, manifest, bars=bars)
        try:
            with bars:
                work.run(wanted, connections=connections)
        except KeyboardInterrupt:
            whole = sum(work.is_whole(shard) for shard in wanted)
            print(f"stopped: {whole} of {len(wanted)} files are whole in {to}, others may be there in part; {again}")
            raise typer.Exit(INTERRUPTED) from None
        except ConnectionError as error:
            raise ConnectionError(f"{error}; whole files stay in {to}: {again}") from error
    total_bytes = sum(work.manifest.files[shard.rpartition("/")[2]].size_bytes for shard in wanted)
    print(
        f"{to}: training shards 1 to {count} of the order that seed {run.shuffle_seed} draws, and {len(wanted) - count}"
        f" for validation; {len(wanted)} files, {decimal(total_bytes)}, {bars.ended_files} of them fetched now"
    )
    what = f"--recipe {shlex.quote(recipe)}" if recipe else f"--size {run.size if is_run_known else 'SIZE'}"
    what += "" if seed is None else f" --seed {seed}"
    print(f"train on them with: velora-pretrain train {what} --data {shlex.quote(str(to))}")


@data_app.command()
def tokenise(
    data: Annotated[str, typer.Option(help="sample, or a path, folder or glob, as for train.")],
    tokenizer: Annotated[
        str, typer.Option(help="bundled, a SentencePiece model's path, or a hub name, as for train.")
    ] = "bundled",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the tokens, which reading.token_cache must name then; by default beside the data."
        ),
    ] = None,
    for_evaluation: Annotated[
        bool,
        typer.Option(
            "--for-evaluation",
            help="Keep also how many bytes each token stands for, without which evaluations read the text;"
            " validation shards that were fetched have it always.",
        ),
    ] = False,
    processes: Annotated[
        int | None, typer.Option(help="Shards that are tokenised at a time; by default as many as cores.", min=1)
    ] = None,
) -> None:
    """Tokenise data once: every later run on it with this tokenizer reads the tokens, and the same batches."""
    from rich.console import Console

    from velora_pretrain.bars import Bars, short_count
    from velora_pretrain.cells import usable_cores
    from velora_pretrain.data.shard_tokens import Meta
    from velora_pretrain.data.token_jobs import jobs_of
    from velora_pretrain.data.tokenise import tokenise as write_tokens
    from velora_pretrain.data.tokenizer import load_tokenizer
    from velora_pretrain.run_lock import RunLock

    began = time.monotonic()
    jobs, ready = jobs_of(data, load_tokenizer(tokenizer), output=output, for_evaluation=for_evaluation)
    written: list[Meta] = []
    bars = Bars(Console(), "tokens")

    def done(meta: Meta) -> None:
        written.append(meta)
        bars.end(meta.shard, f"{short_count(meta.num_tokens)} tokens")

    try:
        with ExitStack() as held, bars:
            for folder in sorted({Path(job.folder).parent for job in jobs}):
                lock = held.enter_context(RunLock(folder, file="tokenise.lock", busy="is tokenising; wait for it"))
                try:
                    lock.take()
                except UserError as error:
                    raise UserError(f"{error}; --output names another folder") from None
            bars.start(files=len(jobs))
            write_tokens(jobs, processes=processes or usable_cores(), tell=bars.advance, done=done)
    except KeyboardInterrupt:
        whole = len(written) + ready
        print(f"stopped: {whole} of {len(jobs) + ready} shards are tokenised; go on with the same command")
        raise typer.Exit(INTERRUPTED) from None
    tokens, records = sum(meta.num_tokens for meta in written), sum(meta.num_records for meta in written)
    size_bytes = sum(sum(meta.sizes_bytes().values()) for meta in written)
    print(
        f"{data}: {len(written)} shards tokenised in {time.monotonic() - began:.0f} s, {ready} were before;"
        f" {records:,} documents, {short_count(tokens)} tokens, {decimal(size_bytes)}"
    )
    if output is not None:
        print(f"runs read them with: --set reading.token_cache={shlex.quote(str(output))}")
