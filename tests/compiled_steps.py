"""Trains a few steps of the kinds of model that are named, eager and compiled, and prints how far they lie apart.

A process of its own: the checks of types that the tests install cannot be traced.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import runs
import torch

from velora_pretrain.contender import contender_of, random_batches
from velora_pretrain.nn import llama
from velora_pretrain.recipe import build_run
from velora_pretrain.timing import take_step

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, elementwise": {"memory__recompute": "elementwise"},
    "lora, mlp": {"mode": "lora", "memory__recompute": "mlp"},
    "flora, block": {"mode": "flora", "memory__recompute": "block"},
    "velora": {"mode": "velora"},
    "velora, running average": {"mode": "velora", "modes__velora__init": "running_average"},
    "lora+velora, elementwise": {"mode": "lora+velora", "memory__recompute": "elementwise"},
}
"""Kinds of layers and of recomputation; the modes that are left out have the layers of one of these."""
BROKEN = "full, broken on purpose"


def weights_after(run: Any, steps: int, *, compiles: bool) -> dict[str, torch.Tensor]:
    """Weights and buffers after some steps."""
    contender = contender_of(run, batches=random_batches(run, CPU), device=CPU)
    if compiles:
        torch._dynamo.reset()
        # The backend traces forward and backward and runs the graphs as they are; a break in them is an error.
        contender.model.compile(fullgraph=True, backend="aot_eager")
    for step in range(steps):
        torch.manual_seed(step)
        take_step(contender)
    return {name: value.clone() for name, value in contender.model.state_dict().items()}


def largest_difference(changes: dict[str, Any]) -> float:
    """Between the weights of eager steps and of compiled ones, over the distance that they have moved."""
    settings = {
        "model__num_hidden_layers": 1,
        "modes__velora__layers": "all",
        "modes__lora__dropout": 0.0,
        # Such an eps that the size of the gradients matters, and a rounding near zero is no step of the other sign.
        "optimizer__eps": 0.01,
        **changes,
    }
    values = runs.values(runs.ROOT, runs.ROOT, **settings)
    run = build_run(values, where="test")
    start = weights_after(run, 0, compiles=False)
    eager, compiled = (weights_after(run, 2, compiles=compiles) for compiles in (False, True))
    # Not the buffers: a flag that is raised would be the largest move.
    names = [name for name in eager if name.endswith("weight")]
    pairs = [(start[name].double(), eager[name].double(), compiled[name].double()) for name in names]
    moved = max((b - a).abs().max().item() for a, b, _ in pairs)
    return max((c - b).abs().max().item() for _, b, c in pairs) / moved


def broken_graph() -> str:
    """What becomes of a step whose graph breaks."""
    product = llama._product

    def broken(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return product(gate, up)

    llama._product = broken
    try:
        largest_difference({})
    except torch._dynamo.exc.Unsupported as error:
        return type(error).__name__
    finally:
        llama._product = product
    return "compiled"


def main() -> None:
    found: dict[str, Any] = {}
    for name in sys.argv[1:]:
        found[name] = broken_graph() if name == BROKEN else largest_difference(CASES[name])
        print(name, found[name], file=sys.stderr, flush=True)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
