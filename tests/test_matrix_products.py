"""Operations of matrix products, predicted for a step, against what the formulas of the layers say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from velora_pretrain.matrix_products import product_operations
from velora_pretrain.prediction import predict

SEQUENCES = 2


def by_hand(run: Any, *, recompute: str = "none") -> int:
    """Full rank: three products per weight and token, and attention's two forward and five backward."""
    c, length = run.llama, run.batch.sequence_length
    tokens, d, i, kv = SEQUENCES * length, c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    mlp, layers = 3 * d * i, c.num_hidden_layers
    block = 2 * d * d + 2 * d * kv + mlp
    attention = SEQUENCES * c.num_attention_heads * length**2 * c.head_dim  # causal: half of a product
    again = {
        "none": 0,
        "elementwise": 0,
        "mlp": 2 * tokens * layers * mlp,
        "block": layers * (2 * tokens * block + 2 * attention),
    }
    return 3 * 2 * tokens * (layers * block + c.vocab_size * d) + 7 * layers * attention + again[recompute]


@pytest.mark.parametrize("recompute", ["none", "elementwise", "mlp", "block"])
def test_full_rank(tiny_run: Callable[..., Any], recompute: str) -> None:
    run = tiny_run(memory__recompute=recompute)
    found = predict(run, SEQUENCES, accumulates=False)
    # A region is made again up to its last tensor that is kept, so its last product (down_proj's) is left out.
    last = 2 * SEQUENCES * 32 * run.llama.num_hidden_layers * run.llama.hidden_size * run.llama.intermediate_size
    assert found.pass_operations == by_hand(run, recompute=recompute) - last * (recompute in ("mlp", "block"))
    assert found.step_operations == 0


def test_compressed_layers_have_smaller_weight_gradients(tiny_run: Callable[..., Any]) -> None:
    groups = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 4) | {"down_proj": 6}
    run = tiny_run(mode="velora", modes__velora__layers="all", modes__velora__num_groups=groups)
    c, tokens = run.llama, SEQUENCES * run.batch.sequence_length
    d, i, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    dense = 2 * d * d + 2 * d * kv + 3 * d * i
    factored = 4 * (2 * d + 2 * kv + 2 * i) + 6 * d
    compression = 3 * d + i  # a product with v for each tensor that is read
    change = 2 * tokens * c.num_hidden_layers * (factored + compression - dense)
    assert predict(run, SEQUENCES, accumulates=False).pass_operations == by_hand(run) + change


@pytest.mark.parametrize("update", ["step", "in_backward"])
def test_projecting_gradients_is_paid_once_per_step(tiny_run: Callable[..., Any], update: str) -> None:
    """GaLore projects each gradient and projects the step back: two products of rank r per matrix."""
    run = tiny_run(mode="galore", modes__galore__rank=4, optimizer__update=update)
    c = run.llama
    d, i, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    elements = c.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * i)
    found = predict(run, SEQUENCES, accumulates=False)
    assert found.step_operations == 2 * 2 * 4 * elements
    assert found.pass_operations == by_hand(run)


def test_torch_counts_the_same() -> None:
    class Ours(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += product_operations(func, args)
            return func(*args, **(kwargs or {}))

    x, w = torch.ones(3, 5, 7, requires_grad=True), torch.ones(9, 7, requires_grad=True)
    with FlopCounterMode(display=False) as theirs, Ours() as ours:
        (F.linear(x, w, torch.ones(9)) @ torch.ones(3, 9, 2)).sum().backward()
    assert ours.total == theirs.get_total_flops() > 0
