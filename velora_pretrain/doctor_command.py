"""`velora-pretrain doctor`: its options. No logic, and no torch until it has read them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from velora_pretrain.options import RUNS, Device, Json, ToldRecipe, write_json


def doctor(recipe: ToldRecipe = "llama_60m", device: Device = "auto", json_file: Json = None) -> None:
    """Say what this machine can do: devices, speed, what is installed, which sizes fit, how long a recipe takes."""
    from velora_pretrain.recipe import resolve

    run = resolve(recipe, {"device": None if device == "auto" else device}, [])
    console = Console(stderr=True)
    with console.status("starting") as status:
        from velora_pretrain.doctor import examine
        from velora_pretrain.doctor_table import print_examination

        facts = examine(run, recipe=Path(recipe).stem, runs_folder=RUNS, tell=status.update)
    write_json(json_file, facts)
    if json_file != "-":
        print_examination(facts)
