"""Memory: predicted and measured by one tracker, against a closed form."""

import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_pretrain import memory, prediction
from velora_pretrain.config import MODES
from velora_pretrain.measurement import measure_memory
from velora_pretrain.memory import CATEGORIES, MemoryTracker
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.nn.velora import compress_linears, compressed_weights
from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.prediction import choose_micro_batch, predict, predict_by_blocks, predict_memory
from velora_pretrain.recipe import resolve


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_prediction_is_what_the_same_tracker_measures(tiny_run: Callable[..., Any], mode: str, precision: str) -> None:
    run = tiny_run(mode=mode, precision=precision, modes__velora__layers="all")
    predicted = predict_memory(run, 4, accumulates=True)
    assert measure_memory(run, 4, accumulates=True, device=torch.device("cpu")) == asdict(predicted)


@pytest.mark.parametrize("recompute", ["elementwise", "mlp", "block"])
@pytest.mark.parametrize("mode", ["full", "lora+velora"])
def test_and_with_recomputation_and_updates_in_the_backward_pass(
    tiny_run: Callable[..., Any], mode: str, recompute: str
) -> None:
    run = tiny_run(mode=mode, memory__recompute=recompute, optimizer__update="in_backward")
    measured = measure_memory(run, 2, accumulates=False, device=torch.device("cpu"))
    assert measured == asdict(predict_memory(run, 2, accumulates=False))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["9m", "60m"])
@pytest.mark.parametrize("mode", MODES)
def test_predicted_and_measured_agree_at_published_sizes(size: str, mode: str) -> None:
    """In truth to the byte; 3 % is what is promised."""
    run = resolve(None, {"size": size, "mode": mode}, [])
    predicted = predict_memory(run, 4, accumulates=True)
    measured = measure_memory(run, 4, accumulates=True, device=torch.device("cpu"))
    for category in (*CATEGORIES, "peak"):
        expected = getattr(predicted, f"{category}_bytes")
        assert measured[f"{category}_bytes"] == pytest.approx(expected, rel=0.03), category


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("full", {"precision": "bf16"}),
        ("velora", {}),
        ("flora", {}),
        *(pytest.param(mode, {"memory__recompute": "block"}, marks=pytest.mark.slow) for mode in MODES),
    ],
)
def test_two_blocks_say_what_five_need(tiny_run: Callable[..., Any], mode: str, changes: dict[str, Any]) -> None:
    run = tiny_run(mode=mode, model__num_hidden_layers=5, modes__velora__layers="all", **changes)
    found, whole = (asdict(way(run, 4, accumulates=True)) for way in (predict_by_blocks, predict))
    found["memory"].pop("largest_at_peak"), whole["memory"].pop("largest_at_peak")
    assert found == whole


def test_two_blocks_are_not_asked_where_they_cannot_say(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without accumulation gradients grow through the backward pass; and a peak elsewhere may not stay there."""
    run, asked, whole = tiny_run(model__num_hidden_layers=5), [], predict

    def noting(run: Any, micro_batch: int, *, accumulates: bool) -> Any:
        asked.append(run.llama.num_hidden_layers)
        found = whole(run, micro_batch, accumulates=accumulates)
        return replace(found, memory=replace(found.memory, peak_moment="step"))

    monkeypatch.setattr(prediction, "predict", noting)
    assert predict_by_blocks(run, 8, accumulates=False).memory.peak_bytes
    assert asked == [5]
    assert predict_by_blocks(run, 4, accumulates=True).memory.largest_at_peak
    assert asked == [5, 1, 2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["130m", "350m", "1b"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["full", "velora"])
def test_two_blocks_say_what_published_sizes_need(size: str, precision: str, mode: str) -> None:
    run = resolve(None, {"size": size, "precision": precision, "mode": mode}, [])
    for micro_batch in (1, 16):
        found, whole = (way(run, micro_batch, accumulates=True).memory for way in (predict_by_blocks, predict))
        assert found == replace(whole, largest_at_peak=())


@pytest.mark.parametrize("init", ["batch_average_once", "running_average", "svd", "random"])
@pytest.mark.parametrize("update", ["dense", "projected"])
def test_every_initialisation_and_rule_can_be_predicted(tiny_run: Callable[..., Any], init: str, update: str) -> None:
    run = tiny_run(mode="velora", modes__velora__init=init, modes__velora__update=update)
    assert predict_memory(run, 4, accumulates=True).peak_bytes > 0


class Toy(nn.Module):
    """A trunk, and a loss that keeps one tensor and drops a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(10, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(x)
        (hidden @ torch.ones(10, 1000)).sum()
        return hidden.exp().sum()


def test_the_loss_is_apart_and_the_peak_has_a_moment() -> None:
    model, x = Toy(), torch.ones(30, 10)
    optimizer = torch.optim.SGD(model.parameters())
    with MemoryTracker(model, optimizer) as tracker:
        tracker.forget_peak()
        loss = model(x)
        use = tracker.use
        loss.backward()
        del loss
        tracker.forget_peak()
        assert tracker.use.peak_moment == "step"
        big = torch.zeros(10**5)
        assert (tracker.use.peak_moment, tracker.use.temporaries_bytes) == ("step", 4 * 10**5)
        del big
    logits, ones = 4 * 30 * 1000, 4 * 10 * 1000
    assert use.peak_moment == "loss"
    # The sum of the logits is there beside them.
    assert use.loss_bytes == logits + ones + 4 - ones * (use.saved_by_module_bytes.get("head", 0) >= ones)
    first = use.largest_at_peak[0]
    assert (first.category, first.shape, first.dtype, first.count) == ("loss", (30, 1000), "float32", 1)
    assert sum(group.total_bytes for group in use.largest_at_peak) == use.peak_bytes


@pytest.mark.parametrize(("mode", "accumulates"), [("full", True), ("full", False), ("flora", True)])
def test_the_largest_tensors_are_named(
    tiny_run: Callable[..., Any], mode: str, accumulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LARGEST_SHOWN", 100)
    run = tiny_run(mode=mode)
    use = predict_memory(run, 1, accumulates=accumulates)
    origins = {group.origin: group for group in use.largest_at_peak if group.category == "weights"}
    assert origins["model.embed_tokens.weight"].total_bytes == 4 * 128 * 32
    assert origins["model.layers.*.mlp.up_proj.weight"].count == 2
    assert (use.gradients_bytes > 0) == (accumulates or use.peak_moment in ("backward", "step"))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("update", ["dense", "projected"])
@pytest.mark.parametrize("rows", [5, 7, 64, 100], ids=lambda rows: f"{rows} rows at a time")
def test_three_parts_of_a_factored_step_need_what_all_need(
    rows: int, update: Any, rounding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction takes no more of them. 64 rows: in steps of 5 and 7 the last part is smaller."""
    monkeypatch.setattr("velora_pretrain.optim.adamw.UPDATE_ELEMENTS", rows * 32)

    def peak_of_step() -> int:
        model = nn.Sequential(nn.Linear(32, 64, bias=False, dtype=torch.bfloat16))
        compress_linears(model, layers=("0",), num_groups={"0": 4})
        factored = compressed_weights(model)
        optimizer = AdamW(factored, factored=factored, update=update, rounding=rounding)
        for _ in range(2):
            for handle in factored:
                handle.grad = torch.ones(handle.shape, dtype=handle.dtype)
            with MemoryTracker(model, optimizer) as tracker:
                tracker.forget_peak()
                optimizer.step()
        return tracker.use.peak_bytes

    with FakeTensorMode():
        predicted = peak_of_step()
    assert predicted == peak_of_step()


def test_torch_s_own_tracker_finds_the_same_total(tiny_run: Callable[..., Any]) -> None:
    """At full rank, where it works. It counts the tokens too, and not the scalars that Python makes: 1 % of slack."""
    from torch.distributed._tools.mem_tracker import MemTracker

    run = tiny_run(batch__sequence_length=32)
    ours = measure_memory(run, 64, accumulates=False, device=torch.device("cpu"))
    model = Llama(run.llama, seed=0)
    optimizer = build_mode(run).build_optimizer(model)
    tokens = torch.zeros(64, 32, dtype=torch.int64)

    def step() -> None:
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    theirs = MemTracker()
    theirs.track_external(model, optimizer, tokens)
    with theirs:
        step()
    peak = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peak == pytest.approx(ours["peak_bytes"], rel=0.01)


def test_v_alone_saves_nothing_and_all_saves_much() -> None:
    def saved(*layers: str) -> float:
        options = {"size": "60m", "mode": "velora", "modes.velora.layers": list(layers)}
        return predict_memory(resolve(None, options, []), 64, accumulates=False).saved_activations_bytes

    full = predict_memory(resolve(None, {"size": "60m"}, []), 64, accumulates=False).saved_activations_bytes
    assert saved("v_proj") >= full
    assert saved("q_proj", "k_proj", "v_proj") < 0.97 * full
    assert saved("down_proj") < 0.9 * full


def test_weights_gradients_and_states_of_a_known_model() -> None:
    run = resolve(None, {"size": "9m"}, [])
    parameters = run.llama.num_parameters
    use = predict_memory(run, 1, accumulates=True)
    assert use.weights_bytes == 4 * parameters
    assert use.optimizer_state_bytes == pytest.approx(8 * parameters, rel=1e-4)
    assert use.gradients_bytes == 4 * parameters


def test_categories_add_up_to_the_peak() -> None:
    use = asdict(predict_memory(resolve(None, {"size": "9m"}, []), 2, accumulates=False))
    assert sum(use[f"{category}_bytes"] for category in CATEGORIES) == use["peak_bytes"]


def test_a_storage_is_counted_once_and_forgotten_when_it_dies() -> None:
    model = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    with MemoryTracker(model, optimizer) as tracker:
        tracker.forget_peak()
        big = torch.zeros(1000)
        views = [big[:10], big.view(10, 100)]
        assert tracker.use.temporaries_bytes == 4000
        del big, views
        torch.zeros(500)
        tracker.forget_peak()
        assert tracker.use.temporaries_bytes == 0
        assert tracker.use.weights_bytes == 400


def test_what_the_graph_keeps_is_a_saved_activation_unless_it_is_a_weight() -> None:
    model = nn.Linear(10, 10, bias=False)
    with MemoryTracker(model, torch.optim.SGD(model.parameters())) as tracker:
        x = torch.ones(30, 10)
        hidden = model(x * 1.0)
        loss = hidden.square().sum()
        tracker.forget_peak()
        assert tracker.use.saved_activations_bytes == 2 * 30 * 10 * 4
        loss.backward()
        del hidden, loss
        tracker.forget_peak()
        assert tracker.use.saved_activations_bytes == 0
        assert tracker.use.gradients_bytes == 400


def test_a_graph_that_is_dropped_is_gone_at_once() -> None:
    """Also where an operation keeps its own output, which would keep itself alive if the tracker held it."""
    model = nn.Linear(10, 10, bias=False)
    gc.disable()
    try:
        with MemoryTracker(model, torch.optim.SGD(model.parameters())) as tracker:
            kept = model(torch.ones(30, 10)).exp().sum()
            del kept
            tracker.forget_peak()
            assert tracker.use.saved_activations_bytes == 0
    finally:
        gc.enable()


def test_auto_micro_batch_divides_and_fits(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run(batch__micro_batch="auto", batch__sequences=24)
    choose = lambda budget: choose_micro_batch(run, local_sequences=24, device_type="cpu", budget_bytes=budget)  # noqa: E731
    assert choose(2**40) == 24
    needed = predict_memory(run, 24, accumulates=False).peak_bytes
    smaller = choose(needed - 1)
    assert smaller < 24
    assert 24 % smaller == 0
    assert predict_memory(run, smaller, accumulates=True).peak_bytes <= needed - 1
    assert choose(0) == 1
