"""The configuration: published sizes, derived values, and every combination that is refused with its dotted key."""

import math

import pytest
from pydantic import ValidationError

from velora_pretrain.config import MODES, ModesTable, Run, Section
from velora_pretrain.dimensions import PROJECTIONS, SIZES


@pytest.mark.parametrize(("size", "millions"), [("60m", 58.07), ("130m", 134.11), ("350m", 367.97), ("1b", 1339.08)])
def test_published_sizes_have_their_parameters(size: str, millions: float):
    assert SIZES[size].num_parameters / 1e6 == pytest.approx(millions, abs=0.005)


def test_every_size_of_the_command_line_exists():
    assert list(SIZES) == ["9m", "20m", "35m", "60m", "71m", "100m", "130m", "250m", "350m", "1b", "3b", "7b", "13b"]
    assert all(Run(size=size).llama == dimensions for size, dimensions in SIZES.items())


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"size": "61m"}, "size"),
        ({"size": "9m", "batch": {"sequence_length": 2048}}, "batch.sequence_length"),
        ({"size": "9m", "schedule": {"steps": 10, "warmup_steps": 11}}, "schedule.warmup_steps"),
        ({"size": "9m", "batch": {"sequences": 10, "micro_batch": 3}}, "batch.micro_batch"),
        ({"size": "9m", "model": {"num_attention_heads": 5}}, "model.num_attention_heads"),
        ({"size": "9m", "model": {"num_key_value_heads": 3}}, "model.num_key_value_heads"),
        ({"size": "9m", "optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas"),
        ({"size": "9m", "modes": {"velora": {"layers": []}}}, "modes.velora.layers"),
        (
            {"size": "9m", "mode": "velora", "modes": {"velora": {"num_groups": {"v_proj": 5}}}},
            "modes.velora.num_groups.v_proj",
        ),
        ({"size": "9m", "modes": {"velora": {"layers": "v_proj"}}}, "modes.velora.layers"),
        ({"size": "9m", "modes": {"velora": {"layers": ["v_prj"]}}}, "modes.velora.layers"),
        (
            {"size": "9m", "modes": {"velora": {"init": "running_average", "refresh_every": 5}}},
            "modes.velora.refresh_every",
        ),
        (
            {"size": "9m", "modes": {"velora": {"init": "random", "refresh_every": 5}}},
            "modes.velora.refresh_every",
        ),
        ({"size": "9m", "modes": {"velora": {"refresh": "cycle", "refresh_every": 5}}}, "modes.velora.refresh"),
        ({"size": "9m", "mode": "galore", "modes": {"galore": {"rank": 129}}}, "modes.galore.rank"),
        ({"size": "9m", "mode": "lora+velora", "modes": {"lora": {"rank": 500}}}, "modes.lora.rank"),
        ({"size": "9m", "mode": "flora", "modes": {"flora": {"rank": 500}}}, "modes.flora.rank"),
        (
            {"size": "9m", "mode": "flora+velora", "modes": {"velora": {"num_groups": {"v_proj": 5}}}},
            "modes.velora.num_groups.v_proj",
        ),
        (
            {"size": "9m", "modes": {"lora": {"restart_every": 10, "restart_warmup_steps": 11}}},
            "modes.lora.restart_warmup_steps",
        ),
        ({"size": "9m", "modes": {"velora": {"layers": ["v_proj", "v_proj"]}}}, "modes.velora.layers"),
        ({"size": "9m", "optimizer": {"update": "in_backward", "clip_norm": 1.0}}, "optimizer.update"),
        ({"model": {"hidden_size": 64}}, "model.intermediate_size"),
        ({}, "model.hidden_size"),
    ],
)
def test_impossible_combinations_name_their_key(values: dict, key: str):
    with pytest.raises(ValidationError, match=rf"{key}: "):
        Run.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": True},
        {"seed": 2**63},
        {"seed": "1"},
        {"batch": {"sequences": "512"}},
        {"batch": {"micro_batch": "8"}},
        {"batch": {"micro_batch": True}},
        {"optimizer": {"lr": "0.1"}},
        {"optimizer": {"lr": math.inf}},
        {"optimizer": {"eps": math.nan}},
        {"optimizer": {"weight_decay": math.inf}},
        {"optimizer": {"betas": [0.9, math.nan]}},
        {"optimizer": {"betas": [0.9, "0.99"]}},
        {"checkpoint": {"every_minutes": math.inf}},
        {"modes": {"velora": {"scale": math.inf}}},
        {"modes": {"velora": {"num_groups": {"v_proj": True}}}},
        {"model": {"rope_theta": math.nan}},
    ],
)
def test_numbers_are_numbers_and_finite(values: dict):
    with pytest.raises(ValidationError):
        Run.model_validate({"size": "9m"} | values)


def test_whole_numbers_pass_for_real_ones_and_lists_for_tuples():
    optimizer = {"lr": 1, "betas": [0, 0.5]}
    run = Run.model_validate({"size": "9m", "seed": 2**63 - 1, "optimizer": optimizer})
    assert (run.optimizer.lr, run.optimizer.betas) == (1.0, (0.0, 0.5))
    assert isinstance(run.optimizer.lr, float)


@pytest.mark.parametrize(
    ("mode", "layers", "num_groups", "message"),
    [
        ("velora", ["v_proj"], {"v_proj": 5}, "v_proj: 5 sub-tokens do not divide the width 128 .* example 4 do"),
        ("velora", "all", {"down_proj": 128}, "down_proj: 128 sub-tokens do not divide the width 352 .* example 88 do"),
        ("velora", ["down_proj"], {"down_proj": 88}, None),
        ("velora", ["v_proj"], {"down_proj": 5}, None),
        ("full", ["v_proj"], {"v_proj": 5}, None),
    ],
)
def test_sub_tokens_divide_what_the_compressed_projections_read(
    mode: str, layers: object, num_groups: dict, message: str | None
):
    values = {"size": "9m", "mode": mode, "modes": {"velora": {"layers": layers, "num_groups": num_groups}}}
    if message is None:
        Run.model_validate(values)
    else:
        with pytest.raises(ValidationError, match=rf"modes\.velora\.num_groups\.{message}"):
            Run.model_validate(values)


def test_limits_themselves_are_allowed():
    Run.model_validate({"size": "9m", "batch": {"sequence_length": 1024, "sequences": 9, "micro_batch": 3}})
    Run.model_validate({"size": "9m", "schedule": {"steps": 10, "warmup_steps": 10}})


def test_explicit_dimensions_need_no_size():
    dimensions = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    run = Run.model_validate({"model": dimensions})
    assert (run.llama.num_key_value_heads, run.llama.head_dim, run.name) == (4, 16, "custom-full")


def test_fewer_heads_than_the_size_has_take_their_keys_and_values_along():
    assert Run.model_validate({"size": "60m", "model": {"num_attention_heads": 4}}).llama.num_key_value_heads == 4


@pytest.mark.parametrize(("size", "steps"), [("60m", 10_000), ("130m", 20_000), ("350m", 60_000), ("1b", 100_000)])
def test_steps_are_the_published_ones_and_a_tenth_is_warm_up(size: str, steps: int):
    run = Run(size=size)
    assert (run.steps, run.warmup_steps) == (steps, steps // 10)


def test_a_mode_learning_rate_goes_before_the_common_one():
    values = {"size": "9m", "optimizer": {"lr": 0.5}, "modes": {"velora": {"lr": 0.25}}}
    assert Run.model_validate(values).lr == 0.5
    assert Run.model_validate(values | {"mode": "velora"}).lr == 0.25


def test_all_layers_are_all_projections():
    run = Run.model_validate({"size": "9m", "modes": {"velora": {"layers": "all"}}})
    assert run.modes.velora.projections == PROJECTIONS


def test_a_run_cannot_be_changed_and_its_hash_tells_runs_apart():
    run = Run(size="9m")
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert run.sha256 == Run(size="9m").sha256 != Run(size="9m", seed=1).sha256
    tracked = Run.model_validate({"size": "9m", "tracking": {"trackers": ["wandb"], "project": "mine"}})
    assert run.sha256 == tracked.sha256


def test_every_mode_has_a_table_with_its_learning_rate():
    run = Run(size="9m")
    tables = [run.model_copy(update={"mode": mode}).mode_tables for mode in MODES]
    assert all(table.lr is None for each in tables for table in each.values())
    assert {name for each in tables for name in each} == set(ModesTable.model_fields)


def _tables(table: type[Section]):
    yield table
    for field in table.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _tables(field.annotation)


@pytest.mark.parametrize("table", list(_tables(Run)), ids=lambda table: table.__name__)
def test_every_key_has_help(table: type[Section]):
    assert not [name for name, field in table.model_fields.items() if not field.description]
