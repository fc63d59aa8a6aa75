"""Counting matrix products, against counting by hand."""

import pytest
import torch
import torch.nn.functional as F

from velora_pretrain.contender import operations_of
from velora_pretrain.matrix_products import counted_operations
from velora_pretrain.recipe import resolve


def counted(function) -> int:
    with counted_operations() as operations:
        function()
    return operations.total


def test_every_kind_of_product_is_counted() -> None:
    a, b, c, v = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7), torch.randn(5)
    assert counted(lambda: a @ b) == 2 * 3 * 5 * 7
    assert counted(lambda: torch.mm(a, b, out=c)) == 2 * 3 * 5 * 7
    assert counted(lambda: c.addmm_(a, b)) == 2 * 3 * 5 * 7
    assert counted(lambda: torch.addmm(c, a, b)) == 2 * 3 * 5 * 7
    assert counted(lambda: a @ v) == 2 * 3 * 5
    assert counted(lambda: torch.randn(2, 3, 4, 5) @ v) == 2 * 24 * 5
    assert counted(lambda: F.linear(torch.randn(2, 4, 5), b.t())) == 2 * 8 * 5 * 7
    assert counted(lambda: a * 2 + a) == 0


def test_causal_attention_is_half_of_two_products_forward_and_five_backward() -> None:
    batch, heads, length, head = 2, 3, 8, 4
    q, k, v = (torch.randn(batch, heads, length, head, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * head

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    assert counted(attend) == 7 * product // 2


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@pytest.mark.parametrize("layers", [(), ("v_proj", "down_proj"), "all"])
def test_a_step_of_full_rank_and_of_compressed_layers_by_hand(layers: object) -> None:
    options = {"size": "60m", "mode": "velora" if layers else "full", "batch.sequences": 6, "batch.micro_batch": 2}
    settings = [f"modes.velora.layers={list(layers) if layers != 'all' else 'all'!r}"] if layers else []
    run = resolve(None, {**options, "batch.sequence_length": 100, "model.num_hidden_layers": 2}, settings)
    tokens, d, i, blocks = 600, 512, 1376, 2
    sizes = {"gate_proj": (d, i), "up_proj": (d, i), "down_proj": (i, d)}
    kept = set(run.modes.velora.projections) if layers else set()
    block = 0
    for siblings in SIBLINGS:
        compressed = [name for name in siblings if name in kept]
        for name in siblings:
            inputs, outputs = sizes.get(name, (d, d))
            # The published sub-tokens: of width 8 for what is d wide, of width 16 for the MLP's product.
            groups = inputs // (16 if name == "down_proj" else 8)
            # forward and dx, and dW, which is (M, N)(N, G) where it is compressed
            block += 2 * tokens * outputs * (2 * inputs + (groups if name in compressed else inputs))
        if compressed:
            block += 2 * tokens * sizes.get(siblings[0], (d, d))[0]  # z, once for all that read one tensor
    head, attention = 6 * tokens * 32_000 * d, 7 * tokens * 100 * d * blocks
    assert operations_of(run) == blocks * block + head + attention


@pytest.mark.slow
@pytest.mark.parametrize(("size", "limit"), [("130m", 1.30), ("350m", 1.38)])
def test_the_limits_of_compressing_all_projections(size: str, limit: float) -> None:
    def operations(**options: object) -> int:
        batch = {"batch.sequences": 4, "batch.micro_batch": 4, "batch.sequence_length": 256}
        return operations_of(resolve(None, {"size": size, **batch, **options}, []))

    ratio = operations(mode="full") / operations(mode="velora", **{"modes.velora.layers": "all"})
    assert ratio == pytest.approx(limit, abs=0.01)


def test_products_of_the_optimizer_are_counted_too() -> None:
    batch = {"size": "9m", "batch.sequences": 1, "batch.micro_batch": 1, "model.num_hidden_layers": 1}
    more = operations_of(resolve(None, {**batch, "mode": "galore"}, [])) - operations_of(resolve(None, batch, []))
    # G Pᵀ and N P, 2 M D r each, of the seven projections of a block
    assert more == (2 * 2 * 32) * (4 * 128 * 128 + 3 * 128 * 352)
