"""From recipe, options and assignments to a run: precedence, round trip, and one clear line for each mistake."""

from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from velora_pretrain.config import MODES, Run
from velora_pretrain.dimensions import SIZES
from velora_pretrain.errors import UserError
from velora_pretrain.recipe import apply_override, build_run, differences, find_recipe, read_recipe, resolve
from velora_pretrain.records import RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('size = "9m"\nseed = 3\n[optimizer]\nlr = 0.1\n[modes.velora]\nlr = 0.2\n')
    return path


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*arguments)  # pyright: ignore[reportArgumentType]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_assignments_go_before_options_and_options_before_the_recipe(recipe: Path):
    assert resolve(str(recipe), {}, []).seed == 3
    assert resolve(str(recipe), {"seed": 4, "size": None}, []).seed == 4
    assert resolve(str(recipe), {"seed": 4}, ["seed=5"]).seed == 5


def test_a_learning_rate_option_holds_for_the_mode_too(recipe: Path):
    assert resolve(str(recipe), {"mode": "velora"}, []).lr == 0.2
    assert resolve(str(recipe), {"mode": "velora", "optimizer.lr": 0.3}, []).lr == 0.3


def test_an_assigned_learning_rate_holds_for_the_mode_too(recipe: Path):
    velora = {"mode": "velora"}
    assert resolve(str(recipe), velora, ["optimizer.lr=0.3"]).lr == 0.3
    assert resolve(str(recipe), velora, ["optimizer={lr=0.3}"]).lr == 0.3
    assert resolve(str(recipe), velora, ["optimizer.lr=0.3", "modes.velora.lr=0.4"]).lr == 0.4
    assert resolve(str(recipe), velora, ["modes.velora.lr=0.4", "optimizer.lr=0.3"]).lr == 0.4
    assert resolve(str(recipe), velora, ["optimizer.eps=1e-6"]).lr == 0.2


@pytest.mark.parametrize(
    ("options", "assignments"),
    [({"batch.sequences": 8}, []), ({}, ["batch.sequences=8"]), ({}, ["batch={sequences=8}"])],
)
def test_a_given_batch_decides_the_micro_batch_anew(options: dict, assignments: list[str]):
    assert resolve("quickstart", options, assignments).batch.micro_batch == "auto"
    assert resolve("quickstart", {**options, "batch.micro_batch": 4}, []).batch.micro_batch == 4
    assert resolve("quickstart", {}, []).batch.micro_batch == 16


def test_a_recorded_run_stays_as_recorded(recipe: Path):
    recipe.write_text(recipe.read_text() + "[batch]\nsequences = 16\nmicro_batch = 4\n")
    run = resolve(str(recipe), {"mode": "velora", "batch.sequences": 16, "optimizer.lr": 0.1}, [], recorded=True)
    assert (run.batch.micro_batch, run.lr) == (4, 0.2)


def test_a_recipes_sub_tokens_of_other_projections_are_not_used():
    run = resolve("llama_60m", {"mode": "velora"}, ['modes.velora.layers=["v_proj"]'])
    assert run.modes.velora.projections == ("v_proj",)


@pytest.mark.parametrize("assignment", ["modes.velora.num_groups.q_proj=8", "modes.velora.num_groups={q_proj=8}"])
@pytest.mark.parametrize("layers", [None, '["v_proj"]'])
@pytest.mark.parametrize("mode", MODES)
def test_sub_tokens_given_for_other_projections_are_refused(assignment: str, layers: str | None, mode: str):
    assignments = [assignment] + ([f"modes.velora.layers={layers}"] if layers else [])
    message = refusal("llama_60m", {"mode": mode}, assignments)
    assert message.startswith("command line: modes.velora.num_groups.q_proj: "), message
    assert "modes.velora.layers" in message
    resolve("llama_60m", {"mode": mode}, [assignment, "modes.velora.layers=all"])


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("modes.velora.layers=all", "all"),
        ('modes.velora.layers = ["q_proj", "o_proj"]', ("q_proj", "o_proj")),
        ("modes.velora.layers=['up_proj']", ("up_proj",)),
    ],
)
def test_an_assigned_value_is_toml_or_else_a_bare_word(assignment: str, value: object):
    assert resolve(None, {"size": "9m"}, [assignment]).modes.velora.layers == value


def test_an_assigned_value_may_hold_an_equals_sign():
    assert resolve(None, {"size": "9m"}, ["data=https://host/file.jsonl?key=1"]).data == "https://host/file.jsonl?key=1"


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr: no such key; did you mean 'optimizer.lr'? "]),
        ("optimiser.lr=1", ["optimiser: no such key; did you mean 'optimizer'? "]),
        ("modes.velora.layer=all", ["modes.velora.layer: no such key; did you mean 'modes.velora.layers'? "]),
        ("modes.galoree.rank=1", ["modes.galoree: no such key; did you mean 'modes.galore'? "]),
        ("lr=1", ["lr: no such key; did you mean 'optimizer.lr'? "]),
        ("optimizer.steps=1", ["optimizer.steps: no such key; did you mean 'schedule.steps'? "]),
        ("evaluation.step=1", ["evaluation.step: no such key; did you mean 'schedule.steps'? "]),
        ("every_steps=1", ["did you mean 'evaluation.every_steps' or 'checkpoint.every_steps'? "]),
        ("modes.full.rank=1", ["did you mean 'modes.galore.rank' or 'modes.lora.rank' or 'modes.flora.rank'? "]),
        ("zzz=1", ["zzz: no such key; see the recipes for the keys"]),
        ("tracking.trackers=['tensorbord']", ["tracking.trackers: ", "did you mean 'tensorboard'? "]),
        ("tracking.trackers=['wandb', 'wandb']", ["tracking.trackers: a tracker is named twice"]),
        ("tracking.project=''", ["tracking.project: "]),
        ("memory.recompute=elementwize", ["memory.recompute: ", "did you mean 'elementwise'? "]),
        ("schedule.steps=ten", ["schedule.steps: ", "integer", "'ten'"]),
        ("schedule.steps=-1", ["schedule.steps: ", "greater than 0", "-1"]),
        ("batch.sequence_length=1", ["batch.sequence_length: ", "2"]),
        ("optimizer.lr=0", ["optimizer.lr: "]),
        ("modes.velora.num_groups.v_proj=x", ["modes.velora.num_groups.v_proj: ", "'x'"]),
        ("modes.velora.layers=['z_proj']", ["modes.velora.layers", "z_proj"]),
        ("batch=3", ["batch: input should be a valid table (got 3)"]),
        ("size=61m", ["size: '61m' is not a size; did you mean '60m'? "]),
        ("mode=VELORA+LoRA", ["mode: ", "did you mean 'lora+velora'? "]),
        ("mode=velra", ["mode: ", "'full'", "'velora'", "'velra'", "did you mean 'velora'? "]),
        ("modes.velora.layers=v_proj", ["modes.velora.layers: ", 'a list of projections, or "all"', "'v_proj'"]),
        ("modes.velora.layers=['v_prj']", ["modes.velora.layers: 'v_prj'", "did you mean 'v_proj'? "]),
        ("modes.velora.num_groups.v_prj=8", ["modes.velora.num_groups.v_prj: ", "did you mean 'v_proj'? "]),
        ("batch.micro_batch=x", ["batch.micro_batch: input should be a valid integer, or 'auto' (got 'x')"]),
        ("mode=zzz", ["mode: input should be 'full', 'galore', ", "or 'lora+velora' (got 'zzz')"]),
        ("optimizer.betas=0.9", ["optimizer.betas: ", "a valid list"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas: too few values"]),
        ("optimizer.betas=[0.9, 0.9, 0.9]", ["optimizer.betas: list should have at most 2 items"]),
        ("optimizer.lr=inf", ["optimizer.lr: ", "finite"]),
        ("seed=9223372036854775808", ["seed: ", "less than"]),
        ("precision=fp8", ["precision: ", "'bf16'", "'fp8'"]),
        ("seed", ["--set seed", "dotted.key=value"]),
        ("=1", ["--set =1", "dotted.key=value"]),
        ("seed.x=1", ["seed: "]),
        ("size.x=1", ["size.x: size is a value, not a table"]),
    ],
)
def test_a_mistake_is_one_line_with_its_dotted_key(assignment: str, parts: list[str]):
    message = refusal(None, {"size": "9m"}, [assignment])
    assert not [part for part in parts if part not in message], message


def test_a_mistake_in_a_recipe_names_the_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('size = "9m"\n[optimizer]\nmomentum = 0.9\n')
    assert f"{path}: optimizer.momentum: no such key" in refusal(str(path), {}, [])


@pytest.mark.parametrize(
    ("options", "assignments", "place"),
    [
        ({"tracking.trackers": ["wandbb"]}, [], "command line: tracking.trackers: "),
        ({}, ["optimizer.lrr=1"], "command line: optimizer.lrr: "),
        ({}, ["optimiser.lr=1"], "command line: optimiser: "),
        ({}, ["modes.velora={layer='all'}"], "command line: modes.velora.layer: "),
        ({"size": "61m"}, [], "command line: size: "),
        ({"seed": 5}, [], "mine.toml: optimizer.momentum: "),
        ({}, ["optimizer.eps=1"], "mine.toml: optimizer.momentum: "),
    ],
)
def test_a_mistake_that_was_given_is_not_the_recipes(tmp_path: Path, options: dict, assignments: list[str], place: str):
    path = tmp_path / "mine.toml"
    path.write_text('size = "9m"\n' + ("[optimizer]\nmomentum = 0.9\n" if "mine" in place else ""))
    message = refusal(str(path), options, assignments)
    assert message.removeprefix(f"{tmp_path}/").startswith(place)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'size = "9m"\nseed = = 3\n', "line 2"),
        (b"\xff\xfe", "not a TOML recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes, part: str):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    message = refusal(str(path), {}, [])
    assert str(path) in message
    assert part in message


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.toml: no such recipe"):
        read_recipe(tmp_path / "none.toml")


def test_recipes_are_found_by_name_and_path_and_a_misspelt_one_gets_a_hint(recipe: Path):
    assert find_recipe(str(recipe)) == recipe
    assert find_recipe("llama_60m").name == "llama_60m.toml"
    message = refusal("lama_60m", {}, [])
    assert "did you mean 'llama_60m'" in message
    assert "quickstart" in message


def test_differences_name_dotted_keys_and_both_values():
    left = build_run({"size": "9m"}, where="left")
    right = build_run({"size": "9m", "optimizer": {"lr": 0.5}, "modes": {"velora": {"layers": "all"}}}, where="right")
    assert differences(left, left) == {}
    assert differences(left, right) == {
        "optimizer.lr": (0.001, 0.5),
        "modes.velora.layers": (["v_proj", "down_proj"], "all"),
    }


@given(
    size=st.sampled_from(list(SIZES)),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**40),
    lr=st.floats(1e-30, 1e3),
    steps=st.integers(1, 10**9),
    layers=st.sampled_from(["all", ["q_proj"], ["v_proj", "down_proj"]]),
)
def test_a_run_survives_toml(
    size: str, mode: str, seed: int, lr: float, steps: int, layers: object, tmp_path_factory: pytest.TempPathFactory
):
    values = {"size": size, "mode": mode, "seed": seed, "optimizer": {"lr": lr}, "schedule": {"steps": steps}}
    run = Run.model_validate(values | {"modes": {"velora": {"layers": layers}}})
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.write_run(run)
    assert folder.read_run() == run
    assert resolve(str(folder.config), {}, []) == run


@given(value=st.recursive(st.integers() | st.booleans() | st.text("abc xyz", min_size=1), st.lists, max_leaves=4))
def test_any_toml_value_can_be_assigned(value: object):
    values: dict = {}
    text = tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
    apply_override(values, f"a.b={text}")
    assert values == {"a": {"b": value}}
