"""What a comparison trains: how variants, learning rates and seeds are read, and the runs that follow from them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from velora_pretrain.errors import UserError
from velora_pretrain.recipe import differences
from velora_pretrain.variants import Variant, parse_rates, parse_variants, plan_cells


def test_variants_are_modes_with_settings():
    assert parse_variants(
        "full, velora[layers=all,update=projected] ,galore+velora[galore.rank=4,velora.layers=all]"
    ) == [
        Variant(label="full", mode="full"),
        Variant(
            label="velora[layers=all,update=projected]",
            mode="velora",
            assignments=("modes.velora.layers=all", "modes.velora.update=projected"),
        ),
        Variant(
            label="galore+velora[galore.rank=4,velora.layers=all]",
            mode="galore+velora",
            assignments=("modes.galore.rank=4", "modes.velora.layers=all"),
        ),
    ]


def test_commas_in_lists_and_tables_separate_nothing():
    text = "velora[layers=['q_proj','k_proj'],num_groups={q_proj=2,k_proj=4},scale=0.5],full"
    cells = plan_cells("quickstart", {}, [], modes=text)
    table = cells[0].run.modes.velora
    assert (table.layers, table.num_groups, table.scale) == (("q_proj", "k_proj"), {"q_proj": 2, "k_proj": 4}, 0.5)
    assert [cell.run.mode for cell in cells] == ["velora", "full"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("velora[layers=all", "a bracket is not closed"),
        ("velora]layers=all[", "closed that was not opened"),
        ("velora[layers=all]x", "write it as MODE"),
        ("velora=all", "write it as MODE"),
        ("velora[layers]", "'layers' is no setting"),
        ("velora[=all]", "'=all' is no setting"),
        ("velora[layers=]", "is no setting"),
        ("velora[]", "nothing stands there"),
        ("full,,velora", "nothing stands between two commas"),
        ("", "nothing stands there"),
        ("velra", "did you mean 'velora'"),
        ("full,velora,full", "full is given twice"),
        ("galore+velora[rank=4]", "galore.rank or velora.rank"),
        ("velora[lr=0.1]", "--learning-rates"),
        ("galore+velora[galore.lr=0.1]", "--learning-rates"),
    ],
)
def test_a_variant_that_is_not_understood(text: str, part: str):
    with pytest.raises(UserError, match=re.escape(part)):
        parse_variants(text)


def test_rates_of_a_label_go_before_those_of_its_mode_and_of_all():
    variants = parse_variants("full,velora,velora[layers=all],velora[scale=2]")
    rates = parse_rates(["1e-3,2e-3", "velora:3e-3,4", "velora[scale=2]: 5,6"], variants)
    assert rates == {
        "full": [1e-3, 2e-3],
        "velora": [3e-3, 4.0],
        "velora[layers=all]": [3e-3, 4.0],
        "velora[scale=2]": [5.0, 6.0],
    }
    assert parse_rates([], variants)["full"] == []


@pytest.mark.parametrize(
    ("texts", "part"),
    [
        (["1e-3,fast"], "'fast' is not a number"),
        (["1e-3,"], "'' is not a number"),
        (["1e-3,0.001"], "0.001 is given twice"),
        (["1", "2"], "rates of all are given twice"),
        (["full:1", "full:2"], "rates of full are given twice"),
        (["velra:1"], "did you mean 'velora'"),
    ],
)
def test_rates_that_are_not_understood(texts: list[str], part: str):
    with pytest.raises(UserError, match=re.escape(part)):
        parse_rates(texts, parse_variants("full,velora"))


def test_cells_differ_only_in_what_is_compared(tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('size = "9m"\nseed = 5\n[modes.velora]\nlr = 0.5\nlayers = "all"\n')
    cells = plan_cells(
        str(recipe),
        {"schedule.steps": 7},
        ["batch.micro_batch=4"],
        modes="full,velora[update=projected]",
        learning_rates=["1e-3,2e-3"],
        seeds="0,1",
    )
    assert [(cell.variant.label, cell.learning_rate, cell.seed) for cell in cells] == [
        (label, rate, seed)
        for seed in (0, 1)
        for label in ("full", "velora[update=projected]")
        for rate in (1e-3, 2e-3)
    ]
    for cell in cells:
        # Given rates go before the recipe's own of the mode; the text is that of the recipe's seed.
        assert (cell.run.lr, cell.run.seed, cell.run.shuffle_seed) == (cell.learning_rate, cell.seed, 5)
        assert (cell.run.steps, cell.run.batch.micro_batch, cell.run.modes.velora.layers) == (7, 4, "all")
        others = {key for other in cells for key in differences(cell.run, other.run)}
        assert others == {"mode", "optimizer.lr", "seed", "modes.velora.update"}


@pytest.mark.parametrize("table", ["modes.galore={lr=0.5}", "modes={galore={lr=0.5}}"])
def test_a_rate_within_a_table_does_not_go_before_the_cells(table: str):
    with pytest.raises(UserError, match="cells differ in mode, learning rate and seed"):
        plan_cells("quickstart", {}, [table], modes="galore", learning_rates=["1e-3,2e-3"])


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        ("velora[layers=al]", "modes.velora.layers: give a list of projections"),
        ("galore[rank=big]", "modes.galore.rank: input should be a valid integer"),
        ("velora[refresh_moments=reset]", "modes.velora.refresh_moments: modes.velora.refresh_every is 0"),
        ("galore+velora[velora.block_lr_ratio=2]", "modes.velora.block_lr_ratio: in mode galore+velora the learning"),
    ],
)
def test_a_wrong_setting_names_its_variant(variant: str, problem: str):
    with pytest.raises(UserError, match=re.escape(f"--modes {variant}: {problem}")):
        plan_cells("quickstart", {}, [], modes=f"full,{variant}")


def test_a_recipe_says_what_it_compares_and_options_go_before_it():
    cells = plan_cells("small_comparison", {}, [])
    assert {cell.seed for cell in cells} == {0, 1}
    assert {cell.learning_rate for cell in cells if cell.variant.label == "galore"} == {0.004, 0.008, 0.016}
    cells = plan_cells("small_comparison", {}, [], modes="full,lora", learning_rates=["0.1"], seeds="7")
    assert [(cell.variant.label, cell.learning_rate, cell.seed) for cell in cells] == [
        ("full", 0.1, 7),
        ("lora", 0.1, 7),
    ]


def test_without_rates_and_seeds_the_recipe_has_them(tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('size = "9m"\nseed = 5\n[optimizer]\nlr = 0.25\n[modes.velora]\nlr = 0.5\n')
    cells = plan_cells(str(recipe), {}, [], modes="full,velora")
    assert [(cell.run.lr, cell.learning_rate, cell.seed) for cell in cells] == [(0.25, 0.25, 5), (0.5, 0.5, 5)]


def test_an_order_of_its_own_is_kept():
    cells = plan_cells("quickstart", {}, ["reading.shuffle_seed=9"], modes="full", seeds="1,2")
    assert {cell.run.shuffle_seed for cell in cells} == {9}


def test_a_slug_is_a_folder_name():
    text = "velora[layers=['q_proj', 'k_proj'], num_groups={q_proj=2}],galore+velora[velora.layers=all]"
    cells = plan_cells("quickstart", {}, [], modes=text, learning_rates=["1e-5"], seeds="3")
    assert [cell.slug for cell in cells] == [
        "velora-layers=-q_proj-k_proj-num_groups=-q_proj=2-lr1e-05-seed3",
        "galore+velora-velora.layers=all-lr1e-05-seed3",
    ]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"modes": "velora[layer=all]"}, "modes.velora.layer: no such key; did you mean 'modes.velora.layers'"),
        ({"modes": "full[rank=3]"}, "modes.full.rank: no such key"),
        ({"learning_rates": ["1,2", "velora:3"]}, "full has 2 and velora has 1"),
        ({"learning_rates": ["full:1,2"]}, "full has 2 and velora has 1"),
        ({"learning_rates": ["-1"]}, "optimizer.lr"),
        ({"seeds": "0,x"}, "'x' is not a whole number"),
        ({"seeds": "0,0"}, "0 is given twice"),
        ({"seeds": "-1"}, "seed: "),
        ({"assignments": ["seed=1"]}, "by --seeds"),
        ({"assignments": ["mode=full"]}, "by --modes"),
        ({"assignments": ["optimizer.lr=1"]}, "by --learning-rates"),
        ({"assignments": ["modes.velora.lr=1"]}, "by --learning-rates"),
        ({"learning_rates": ["1e-3,1.0000001e-3"]}, "run folders: full-lr0.001-seed0 is given twice"),
    ],
)
def test_a_comparison_that_is_refused(changes: dict[str, object], part: str):
    given: dict[str, object] = {"assignments": [], "modes": "full,velora", **changes}
    with pytest.raises(UserError, match=re.escape(part)) as raised:
        plan_cells("quickstart", {}, given.pop("assignments"), **given)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(raised.value)


def test_help_and_mistakes_do_without_torch(tmp_path: Path):
    commands = ["--help", "--recipe quickstart --modes velora[layer=all]", "--recipe quickstart --modes full[", ""]
    code = f"""
import sys
from velora_pretrain import cli
for command in {commands}:
    try:
        cli.main(["compare", "perplexity", *command.split()])
    except SystemExit as ended:
        print("status", ended.code, sorted({{"torch", "datasets", "numpy", "matplotlib"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "COLUMNS": "200"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    ends = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert ends == ["status 0 []", "status 2 []", "status 2 []", "status 2 []"]
    assert done.stderr.count("error: ") == done.stderr.count("\n") == 3
    assert "MODE[KEY=VALUE,KEY=VALUE]" in done.stdout  # which the help's markup could swallow
    options = "recipe size modes learning-rates seeds steps data tokenizer run-dir jobs set json plot"
    for option in options.split():
        assert f"--{option} " in done.stdout
