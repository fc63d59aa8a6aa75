"""The recipes that come with the tool: each loads, and each holds to the published protocol."""

import math
import shlex
from pathlib import Path

import pytest

from velora_pretrain.config import MODES, ModesTable
from velora_pretrain.dimensions import PUBLISHED_STEPS
from velora_pretrain.perplexity import check_comparable
from velora_pretrain.recipe import differences, read_recipe, resolve
from velora_pretrain.setup import check_sharding
from velora_pretrain.variants import plan_cells

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
STEPS = PUBLISHED_STEPS | {"7b": 150_000}


ABLATIONS = {"velora_initialisation": 4, "velora_width": 4, "velora_placement": 12}
"""Variants of each."""
SEVERAL = {"llama_1b_8gpu": ("llama_1b", 8, set()), "llama_7b_2x8gpu": ("llama_7b", 16, {"distributed.sharding"})}
"""For several devices: the recipe that each is but for its launch, the number of devices, and keys that differ."""
COMPARISONS = {"small_comparison": 7, "small_velora": 15, **ABLATIONS}


def test_there_is_one_recipe_per_published_size_the_quickstart_and_comparisons():
    sizes = {f"llama_{size}" for size in STEPS}
    assert {path.stem for path in RECIPES} == {"quickstart", *COMPARISONS, *SEVERAL, *sizes}


@pytest.mark.parametrize(("name", "variants"), COMPARISONS.items())
def test_comparisons_are_of_as_many_runs_as_they_say(name: str, variants: int):
    cells = plan_cells(name, {}, [])
    assert len({cell.variant.label for cell in cells}) == variants
    assert len(cells) == variants * (2 if name == "small_velora" else 3) * 2
    check_comparable({cell.slug: cell.run for cell in cells})


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_hold_to_the_published_protocol(name: str):
    ablation, published = resolve(name, {}, []), resolve("llama_60m", {"mode": "velora"}, [])
    others = ("compare.", "modes.galore.", "modes.lora.", "modes.flora.", "modes.velora.lr")
    assert [key for key in differences(ablation, published) if not key.startswith(others)] == []


@pytest.mark.parametrize("name", SEVERAL)
def test_recipes_for_several_devices_are_those_for_one(name: str):
    base, devices, keys = SEVERAL[name]
    several = resolve(name, {}, [])
    assert differences(several, resolve(base, {"mode": several.mode}, [])).keys() == keys
    assert several.batch.sequences % devices == 0
    if several.distributed.sharding == "full":
        check_sharding(several, devices)
    head = (FOLDER / f"{name}.toml").read_text().partition("\nsize =")[0].replace("\\\n#", "")
    (launch,) = (line.strip("# ") for line in head.splitlines() if "torchrun" in line)
    words = shlex.split(launch)
    sizes = [int(words[place + 1]) for place, word in enumerate(words) if word in ("--nnodes", "--nproc-per-node")]
    assert math.prod(sizes) == devices
    assert words[words.index("--recipe") + 1] == name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("mode", MODES)
def test_every_recipe_loads_in_every_mode(path: Path, mode: str):
    assert resolve(path.stem, {"mode": mode}, []) == resolve(str(path), {"mode": mode}, [])
    if path.stem not in ABLATIONS:
        assert set(read_recipe(path)["modes"]) == set(ModesTable.model_fields)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_shortened_from_the_command_line(path: Path):
    assert resolve(str(path), {"schedule.steps": 5}, []).steps == 5


@pytest.mark.parametrize("size", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_published_protocol(size: str, mode: str):
    run = resolve(f"llama_{size}", {"mode": mode}, [])
    assert (run.size, run.data, run.tokenizer, run.packing) == (size, "c4", "t5-base", "pad")
    assert (run.batch.sequences, run.batch.sequence_length) == (512, 256)
    assert (run.steps, run.warmup_steps) == (STEPS[size], STEPS[size] // 10)
    assert (run.schedule.kind, run.schedule.min_lr_ratio) == ("cosine", 0.1)
    assert (run.optimizer.betas, run.optimizer.eps, run.optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert run.optimizer.clip_norm == (1.0 if size == "7b" else 0.0)
    assert (run.precision, run.evaluation.tokens) == ("bf16", 10_000_000)
    assert run.modes.velora.layers == ("v_proj", "down_proj")
    assert (run.modes.velora.init, run.modes.velora.update) == ("batch_average_once", "dense")


@pytest.mark.parametrize(("size", "groups", "lr"), [("60m", (64, 86), 0.01), ("130m", (64, 64), 0.003)])
def test_published_settings_of_the_mode(size: str, groups: tuple[int, int], lr: float):
    run = resolve(f"llama_{size}", {"mode": "velora"}, [])
    assert run.modes.velora.num_groups == {"v_proj": groups[0], "down_proj": groups[1]}
    assert run.lr == lr


@pytest.mark.parametrize(
    ("size", "rank", "gap", "lr"),
    [("60m", 128, 200, 0.01), ("130m", 256, 200, 0.01), ("1b", 512, 200, 0.01), ("7b", 1024, 500, 0.005)],
)
def test_published_settings_of_the_low_rank_modes(size: str, rank: int, gap: int, lr: float):
    run = resolve(f"llama_{size}", {"mode": "galore"}, [])
    galore, lora, flora = run.modes.galore, run.modes.lora, run.modes.flora
    assert {table.rank for table in (galore, lora, flora)} == {rank}
    assert (galore.scale, galore.update_gap, run.lr) == (0.25, gap, lr)
    assert (lora.alpha, lora.dropout, lora.restart_every) == (32.0, 0.05, 0)
    assert flora.inner == "adafactor"
    without = resolve(None, {"size": size}, [])
    assert without.modes.galore.rank_at(without.llama) == rank


@pytest.mark.parametrize(
    ("size", "figures"),
    [
        ("60m", "33.52 34.88 34.99 34.35 33.76 30.05"),
        ("130m", "25.08 25.36 33.92 25.88 25.29 23.13"),
    ],
)
def test_expected_perplexities_are_in_the_comments(size: str, figures: str):
    comments = [line for line in (FOLDER / f"llama_{size}.toml").read_text().splitlines() if line.startswith("#")]
    assert not [figure for figure in figures.split() if figure not in " ".join(comments)]


def test_quickstart_needs_no_network_and_no_accelerator():
    run = resolve("quickstart", {}, [])
    assert (run.data, run.tokenizer, run.size, run.precision) == ("sample", "bundled", "9m", "fp32")
