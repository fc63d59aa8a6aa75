"""`compile`: every mode's forward and backward pass is one graph, and gives the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from velora_pretrain.contender import contender_of, random_batches
from velora_pretrain.timing import take_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


def weights_after(run: Any, steps: int, *, compiled_from: int | None) -> dict[str, torch.Tensor]:
    """Weights after some steps, of which those from a number on, counted from 1, are compiled."""
    contender = contender_of(run, batches=random_batches(run, CPU), device=CPU)
    for step in range(1, steps + 1):
        if step == compiled_from:
            # The backend that traces forward and backward and runs the graphs as they are: a break is an error.
            contender.model.compile(fullgraph=True, backend="aot_eager")
        torch.manual_seed(step)
        take_step(contender)
    return {name: value.clone() for name, value in contender.model.state_dict().items()}


@pytest.mark.parametrize(
    ("mode", "recompute", "changes"),
    [
        ("full", "none", {}),
        ("full", "elementwise", {}),
        ("lora", "mlp", {}),
        ("flora", "block", {}),
        ("velora", "none", {"modes__velora__init": "running_average"}),
        ("velora", "block", {}),
        ("lora+velora", "none", {}),
    ],
)
def test_a_step_is_one_graph_and_gives_the_same_weights(
    tiny_run: Callable[..., Any], mode: str, recompute: str, changes: dict[str, Any]
) -> None:
    run = tiny_run(
        mode=mode,
        memory__recompute=recompute,
        model__num_hidden_layers=1,
        modes__velora__layers="all",
        modes__lora__dropout=0.0,
        # A large eps, so that a rounding of a gradient near zero is no step of the other sign.
        optimizer__eps=1.0,
        **changes,
    )
    eager = weights_after(run, 3, compiled_from=None)
    compiled = weights_after(run, 3, compiled_from=1)
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-6)


def test_a_graph_that_breaks_is_an_error(tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(model__num_hidden_layers=1)
    monkeypatch.setattr("velora_pretrain.nn.llama._product", lambda gate, up: torch._dynamo.graph_break() or gate * up)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        weights_after(run, 1, compiled_from=1)
