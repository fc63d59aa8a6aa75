"""What a step keeps, counted by hand for every mode, against what the tracker finds in the real code: to the byte.

At 60m in fp32: D = 512, I = 1376, 8 heads, 8 blocks, 32,000 pieces, rank 128, the published sub-tokens (8 wide for D,
16 for I).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_pretrain.config import MODES, Run
from velora_pretrain.memory import MemoryTracker, MemoryUse
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.prediction import predict_memory
from velora_pretrain.recipe import resolve

FP32 = 4
"""Bytes of a number."""
INPUTS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
"""Projections of a block that read one tensor."""


@dataclass(frozen=True)
class Matrix:
    """A weight (M, D) of a block."""

    name: str
    rows: int
    columns: int
    sub_token: int

    @property
    def numbers(self) -> int:
        return self.rows * self.columns

    @property
    def groups(self) -> int:
        """G, numbers that stand for D."""
        return self.columns // self.sub_token


def matrices(run: Run) -> list[Matrix]:
    """Those of one block."""
    d, i = run.llama.hidden_size, run.llama.intermediate_size
    square = [Matrix(f"{name}_proj", d, d, 8) for name in "qkvo"]
    return [*square, Matrix("gate_proj", i, d, 8), Matrix("up_proj", i, d, 8), Matrix("down_proj", d, i, 16)]


def is_compressed(run: Run, name: str) -> bool:
    return "velora" in run.mode_tables and name in run.modes.velora.projections


def run_of(mode: str, *assignments: str) -> Run:
    return resolve(None, {"size": "60m", "mode": mode}, list(assignments))


def outside_blocks(run: Run) -> Iterator[int]:
    """Sizes of the parameters that are no matrix of a block: embedding, head, norms."""
    c = run.llama
    yield from [c.vocab_size * c.hidden_size] * 2 + [c.hidden_size] * (2 * c.num_hidden_layers + 1)


def weights_by_hand(run: Run) -> int:
    """Numbers in weights: adapters stand beside the frozen ones, and what receives a compressed gradient is one."""
    r, layers = 128, run.llama.num_hidden_layers
    adapters = sum(r * (m.rows + m.columns) for m in matrices(run)) if "lora" in run.mode_tables else 0
    handles = sum(is_compressed(run, m.name) for m in matrices(run))
    return sum(outside_blocks(run)) + layers * (sum(m.numbers for m in matrices(run)) + adapters + handles)


def state_by_hand(run: Run) -> int:
    """Numbers in the optimizer's state between two steps."""
    r, method = 128, next(iter(run.mode_tables))

    def of_plain(numbers: int) -> int:
        return 2 * numbers + 1  # and the count of steps, which PyTorch's kernel wants as a tensor

    def of_matrix(m: Matrix) -> int:
        short, long = sorted((m.rows, m.columns))
        if method == "lora":  # A (r, D) and B (M, r)
            if is_compressed(run, m.name):
                return 2 * r * m.groups + of_plain(m.rows * r)
            return of_plain(r * m.columns) + of_plain(m.rows * r)
        if is_compressed(run, m.name):
            return 2 * m.rows * m.groups
        if method == "galore":
            return r * short + 2 * r * long
        if method == "flora":  # a compressed momentum, and squares of rows and columns
            return r * long + m.rows + m.columns
        return of_plain(m.numbers)

    def of_other(numbers: int) -> int:
        c = run.llama
        if method != "flora":
            return of_plain(numbers)
        return numbers + (c.vocab_size + c.hidden_size if numbers > c.hidden_size else numbers)

    blocks = run.llama.num_hidden_layers * sum(of_matrix(m) for m in matrices(run))
    return blocks + sum(of_other(numbers) for numbers in outside_blocks(run))


@pytest.mark.parametrize("mode", MODES)
def test_weights_and_states_are_the_closed_form(mode: str) -> None:
    run = run_of(mode, "modes.velora.layers=all" if mode == "velora" else "seed=0")
    use = predict_memory(run, 1, accumulates=False)
    assert use.weights_bytes == FP32 * weights_by_hand(run)
    assert use.optimizer_state_bytes == FP32 * state_by_hand(run)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_earlier_micro_batches_are_the_closed_form(mode: str) -> None:
    """When the last loss is taken: compressed gradients are small, and FLoRA sums its own in a subspace."""
    run = run_of(mode)

    def of_matrix(m: Matrix) -> int:
        if "lora" in run.mode_tables:
            return 128 * (m.groups if is_compressed(run, m.name) else m.columns) + m.rows * 128
        if is_compressed(run, m.name):
            return m.rows * m.groups
        return 128 * max(m.rows, m.columns) if "flora" in run.mode_tables else m.numbers

    use = predict_memory(run, 1, accumulates=True)
    blocks = run.llama.num_hidden_layers * sum(of_matrix(m) for m in matrices(run))
    assert use.peak_moment == "loss"
    assert use.gradients_bytes == FP32 * (blocks + sum(outside_blocks(run)))


def saved_by(run: Run, micro_batch: int) -> MemoryUse:
    """The tracker's account when the forward pass is over."""
    with FakeTensorMode():
        mode, model = build_mode(run), Llama(run.llama)
        mode.adapt(model)
        tokens = torch.zeros(micro_batch, run.batch.sequence_length, dtype=torch.int64)
        optimizer = mode.build_optimizer(model)
        mode.before_step(model, optimizer, 1, lambda: None)
        with MemoryTracker(model, optimizer) as tracker:
            loss = model(tokens, tokens)
            tracker.forget_peak()
            use = tracker.use
        del loss
    return use


def kept_by_hand(run: Run, micro_batch: int) -> int:
    """Bytes that the graph keeps from forward to backward; see the tables in nn/llama.py, nn/lora.py, nn/velora.py."""
    c, length = run.llama, run.batch.sequence_length
    tokens, d, i = micro_batch * length, c.hidden_size, c.intermediate_size
    by_name = {m.name: m for m in matrices(run)}
    has_adapters = "lora" in run.mode_tables
    kept = masks = 0  # per token and block, numbers and bytes
    for names in INPUTS:
        compressed = [is_compressed(run, name) for name in names]
        width = by_name[names[0]].columns
        if has_adapters:
            kept += 128 * len(names)  # u, scaled
            masks += width
        # Without adapters the output of the attention, which o_proj reads, is kept by the attention anyway.
        if not all(compressed) and (has_adapters or names != ("o_proj",)):
            kept += width
        kept += by_name[names[0]].groups if any(compressed) else 0
    norms = 2 * (d + 1)
    attention = 4 * d + c.num_attention_heads  # rotated q and k, v, output; logsumexp
    blocks = c.num_hidden_layers * (norms + attention + kept + 2 * i)
    final_norm, loss_gradient = d + 1, d
    head_gradient, tables = c.vocab_size * d, 2 * length * c.head_dim
    indices = 8 * tokens  # of the embedding, int64
    numbers = tokens * (blocks + final_norm + loss_gradient) + head_gradient + tables
    return FP32 * numbers + c.num_hidden_layers * tokens * masks + indices


PLACEMENTS: list[Any] = [["v_proj"], ["v_proj", "down_proj"], ["q_proj", "k_proj", "v_proj"], "all"]


@pytest.mark.parametrize("mode", MODES)
def test_saved_activations_are_the_closed_form(mode: str) -> None:
    run = run_of(mode)
    assert saved_by(run, 64).saved_activations_bytes == kept_by_hand(run, 64)


@pytest.mark.parametrize("layers", PLACEMENTS)
@pytest.mark.parametrize("mode", ["velora", "lora+velora"])
def test_and_for_every_placement(mode: str, layers: Any) -> None:
    run = run_of(mode, f"modes.velora.layers={layers!r}")
    assert saved_by(run, 64).saved_activations_bytes == kept_by_hand(run, 64)


def test_saved_activations_by_kind_of_module_are_the_closed_form() -> None:
    """At full rank: see the table in nn/llama.py; what is saved first is the residual stream, by the norms."""
    run = run_of("full", "model.num_hidden_layers=3")
    c, length = run.llama, run.batch.sequence_length
    n, d, i, layers = 4 * length, c.hidden_size, c.intermediate_size, c.num_hidden_layers
    tables = 2 * length * c.head_dim  # of the rotation, once for all layers
    assert saved_by(run, 4).saved_by_module_bytes == {
        "attention": FP32 * (layers * n * (d + 4 * d + c.num_attention_heads) + tables),
        "mlp": FP32 * layers * n * (d + 3 * i),
        "norms": FP32 * (2 * layers + 1) * n * (d + 1),
        "head": FP32 * (n * d + c.vocab_size * d),
        "embedding": 8 * n,
    }
