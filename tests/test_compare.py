"""Rows of `compare memory`: what they are held against, what fits, several devices, and the picture."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from velora_pretrain.compare import memory_rows
from velora_pretrain.errors import UserError
from velora_pretrain.memory_plot import write_memory_plot
from velora_pretrain.memory_use import CATEGORIES
from velora_pretrain.modes import PUBLISHED_MEMORY_GB
from velora_pretrain.options import parse_bytes
from velora_pretrain.prediction import largest_size, predict, predict_memory
from velora_pretrain.recipe import resolve


def test_a_row_says_what_it_saves_against_full_rank(tiny_run: Callable[..., Any]) -> None:
    small = {"batch__micro_batch": 4, "batch__sequences": 8}
    runs = [tiny_run(**small), tiny_run(memory__recompute="block", optimizer__update="in_backward", **small)]
    plain, block = memory_rows(runs)
    peaks = [predict_memory(run, 4, accumulates=True).peak_bytes for run in runs]
    assert (plain["saving_bytes"], plain["operations_ratio"], plain["measured"]) == (0, 1.0, None)
    assert block["saving_bytes"] == peaks[0] - peaks[1] > 0
    assert block["saving_percent"] == pytest.approx(100 * (1 - peaks[1] / peaks[0]))
    assert 1.0 < block["operations_ratio"] < 4 / 3  # a forward pass again, but not of the head


def test_a_placement_that_saves_nothing_is_named(tiny_run: Callable[..., Any]) -> None:
    layers = (["v_proj"], ["q_proj", "k_proj", "v_proj"])
    only_v, siblings = memory_rows([tiny_run(mode="velora", modes__velora__layers=names) for names in layers])
    assert only_v["notes"] == [
        "v_proj saves no activation: its input is kept for q_proj and k_proj",
        "saves no activations beside full rank with recompute none",
    ]
    assert siblings["notes"] == []


def test_measured_stands_beside_predicted(tiny_run: Callable[..., Any]) -> None:
    (row,) = memory_rows([tiny_run(batch__micro_batch=4)], measure=True)
    assert row["measured"] == row["predicted"]


def test_a_budget_gives_the_largest_micro_batch(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run(batch__sequences=64)
    budget = predict_memory(run, 23, accumulates=True).peak_bytes
    (row,) = memory_rows([run], budget_bytes=budget)
    assert (row["options"]["micro_batch_sequences"], row["fits_budget"]) == (23, True)
    (row,) = memory_rows([run], budget_bytes=budget - 1)
    assert row["options"]["micro_batch_sequences"] == 22
    (row,) = memory_rows([run], budget_bytes=1)
    assert (row["options"]["micro_batch_sequences"], row["fits_budget"]) == (1, False)
    (row,) = memory_rows([run], budget_bytes=2**40)
    assert row["options"]["micro_batch_sequences"] == 64


def test_a_budget_gives_the_largest_size(tiny_run: Callable[..., Any]) -> None:
    like, asked = predict(tiny_run(), 1, accumulates=False), []

    def two_bytes_a_weight(run: Any, micro_batch: int, *, accumulates: bool) -> Any:
        asked.append(run.size)
        return replace(like, memory=replace(like.memory, peak_bytes=2 * run.llama.num_parameters))

    run = resolve(None, {"size": "60m"}, [])
    for budget, size, fits in ((280e6, "130m", True), (1e5, "9m", False), (1e12, "13b", True)):
        asked.clear()
        found, prediction, does = largest_size(
            run, 1, accumulates=True, budget_bytes=int(budget), predict=two_bytes_a_weight
        )
        assert (found.size, does) == (size, fits)
        assert prediction.memory.peak_bytes == 2 * found.llama.num_parameters
        assert len(asked) <= 5


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24 gb", 24 * 10**9), ("1.5k", 1500), ("512MiB", 2**29), ("7", 7), ("2ti", 2**41)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes("--budget", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "24 potatoes", "1e9", "24GiBB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        parse_bytes("--budget", text)


def test_several_devices_are_a_closed_form(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run(batch__micro_batch=2, batch__sequences=16)
    c = run.llama
    (one,), (parallel,), (sharded,) = (
        memory_rows([run], devices=devices, sharding=sharding)
        for devices, sharding in ((1, "none"), (4, "data-parallel"), (4, "sharded"))
    )
    one, parallel, sharded = (row["predicted"] for row in (one, parallel, sharded))
    assert parallel["gradients_bytes"] == one["gradients_bytes"] + 4 * c.num_parameters
    assert parallel["peak_bytes"] == one["peak_bytes"] + 4 * c.num_parameters
    assert sharded["weights_bytes"] == c.num_parameters  # four bytes each, over four devices
    assert sharded["optimizer_state_bytes"] == -(-one["optimizer_state_bytes"] // 4)
    block = 2 * c.hidden_size**2 * (1 + c.num_key_value_heads / c.num_attention_heads)
    block += 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    largest = max(block, c.vocab_size * c.hidden_size)
    assert sharded["temporaries_bytes"] == one["temporaries_bytes"] + 2 * 4 * largest
    for use in (one, parallel, sharded):
        assert sum(use[f"{category}_bytes"] for category in CATEGORIES) == use["peak_bytes"]
    with pytest.raises(UserError, match="in_backward"):
        memory_rows([tiny_run(optimizer__update="in_backward")], devices=2, sharding="data-parallel")


def test_the_published_accountings(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run(batch__micro_batch=2)
    (row,) = memory_rows([run], published=True)
    figures = row["published"]
    # Weights and two moments of two bytes; one count per parameter goes with the moments.
    assert figures["weights_and_states_bf16_gb"] == pytest.approx(6 * run.llama.num_parameters / 1e9, rel=0.01)
    assert figures["one_sequence_peak_gb"] == predict_memory(run, 1, accumulates=False).peak_bytes / 1e9
    assert figures["paper_gb"] is None


def test_published_figures_are_given_for_the_published_settings() -> None:
    from velora_pretrain.modes import build_mode

    def figure(mode: str, *settings: str) -> float | None:
        return build_mode(resolve(None, {"size": "60m", "mode": mode}, list(settings))).published_memory_gb()

    assert [figure(mode) for mode in PUBLISHED_MEMORY_GB["60m"]] == [1.30, 1.27, 0.86, 1.27, 1.18]
    assert figure("velora", "modes.velora.layers=all") is None
    assert figure("galore+velora") is None


def test_the_picture_adds_up_and_is_the_same_every_time(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    use = asdict(predict_memory(tiny_run(), 1, accumulates=False))
    rows = [
        {"mode": mode, "options": {"size": "60m", "recompute": kind}, "predicted": use, "measured": measured}
        for mode, kind, measured in (("full", "none", use), ("velora", "block", None))
    ]
    written = [write_memory_plot(rows, tmp_path / name) for name in ("a", "b")]
    assert [path.name for path in written[0]] == ["memory.png", "memory.svg"]
    assert written[0][1].read_bytes() == written[1][1].read_bytes()
    text = written[0][1].read_text()
    for part in ("saved activations", "optimizer state", "measured peak", "full, recompute none"):
        assert part in text
