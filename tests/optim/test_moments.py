"""Moments in 8 bits: what rounding costs, what stays wide, and that a step is the dense one between two roundings."""

import sys
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from velora_pretrain.config import MODES
from velora_pretrain.errors import UserError
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.optim.moments import BLOCK_ELEMENTS, SMALLEST_ELEMENTS, keep_moment, load_moment
from velora_pretrain.prediction import predict_memory


@pytest.mark.parametrize(("name", "signed"), [("exp_avg", True), ("exp_avg_sq", False)])
def test_a_moment_in_eight_bits_is_that_of_bitsandbytes(name: str, signed: bool) -> None:
    torch.manual_seed(0)
    value = torch.randn(70, 100) if signed else torch.rand(70, 100).square()
    state: dict[str, Any] = {}
    keep_moment(state, name, value, 8)
    assert state[name].dtype == torch.uint8
    assert state[f"{name}_absmax"].numel() == -(-value.numel() // BLOCK_ELEMENTS)
    theirs, quantised = bnb.quantize_blockwise(value, code=bnb.create_dynamic_map(signed), blocksize=BLOCK_ELEMENTS)
    assert torch.equal(state[name], theirs)
    loaded = load_moment(state, name, value)
    assert torch.equal(loaded, bnb.dequantize_blockwise(theirs, quantised))
    # The table's steps are at most 1/50 of the block's largest value.
    largest = state[f"{name}_absmax"].repeat_interleave(BLOCK_ELEMENTS)[: value.numel()].view_as(value)
    assert ((loaded - value).abs() <= 0.02 * largest).all()


def test_small_tensors_and_wide_states_are_kept_as_they_are() -> None:
    for value, bits in ((torch.randn(SMALLEST_ELEMENTS - 1), 8), (torch.randn(SMALLEST_ELEMENTS), 32)):
        state: dict[str, Any] = {}
        keep_moment(state, "exp_avg", value, bits)
        assert state == {"exp_avg": value}
        assert load_moment(state, "exp_avg", value) is value
    keep_moment(state, "exp_avg", torch.randn(SMALLEST_ELEMENTS), 8)
    assert set(state) == {"exp_avg", "exp_avg_absmax"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_pytorchs_between_two_roundings(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 80).to(dtype))
    weight = parameter.detach().float().clone()
    optimizer = AdamW([parameter], state_bits=8, lr=0.01, weight_decay=0.1)
    m, u = torch.zeros(64, 80), torch.zeros(64, 80)
    for step in range(1, 6):
        parameter.grad = torch.randn(64, 80).to(dtype)
        gradient = parameter.grad.float()
        optimizer.step()
        m, u = 0.9 * m + 0.1 * gradient, 0.999 * u + 0.001 * gradient**2
        weight = weight * (1 - 0.001) - 0.01 * (m / (1 - 0.9**step)) / ((u / (1 - 0.999**step)).sqrt() + 1e-8)
        if dtype == torch.bfloat16:
            weight = weight.to(dtype).float()
        signed, unsigned = bnb.create_dynamic_map(True), bnb.create_dynamic_map(False)
        m = bnb.dequantize_blockwise(*bnb.quantize_blockwise(m, code=signed, blocksize=BLOCK_ELEMENTS))
        u = bnb.dequantize_blockwise(*bnb.quantize_blockwise(u, code=unsigned, blocksize=BLOCK_ELEMENTS))
    # A rounding that falls to the other side of a table's value, or of a bf16's, moves single elements.
    far = (parameter.detach().float() - weight).abs() > (1e-5 if dtype == torch.float32 else 0.02)
    assert far.float().mean() < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_only_the_blocks_matrices_are_rounded(tiny_run: Callable[..., Any], mode: str) -> None:
    settings = {"model__hidden_size": 128, "model__intermediate_size": 256, "model__vocab_size": 128}
    run = tiny_run(mode=mode, optimizer__state_bits=8, modes__lora__rank=64, modes__galore__rank=64, **settings)
    model, built = Llama(run.llama, seed=0), build_mode(run)
    built.adapt(model)
    optimizer = built.build_optimizer(model)
    tokens = torch.randint(0, 120, (2, 16))
    built.before_step(model, optimizer, 1, torch.no_grad()(lambda: model(tokens, tokens)))
    for _ in range(2):
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    names = {id(p): name for name, p in model.named_parameters()}
    rounded = {names[id(p)] for p, state in optimizer.state.items() if "exp_avg_absmax" in state}  # pyright: ignore
    assert rounded
    assert all(".layers." in name for name in rounded)


def test_the_prediction_sees_a_quarter_of_the_moments(tiny_run: Callable[..., Any]) -> None:
    settings = {"model__hidden_size": 128, "model__intermediate_size": 256, "model__num_hidden_layers": 4}
    run = tiny_run(optimizer__state_bits=8, **settings)
    config = run.llama
    use, wide = predict_memory(run, 1, accumulates=False), predict_memory(tiny_run(**settings), 1, accumulates=False)
    in_blocks = sum(p.numel() for name, p in Llama(config).named_parameters() if ".layers." in name and p.ndim == 2)
    saved = 2 * in_blocks * (4 - 1 - 4 / BLOCK_ELEMENTS)
    assert wide.optimizer_state_bytes - use.optimizer_state_bytes == saved


def test_without_the_extra_one_line_says_what_to_install(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    run = tiny_run(optimizer__state_bits=8)
    with pytest.raises(UserError, match=r'optimizer.state_bits: 8 needs .* pip install "velora-pretrain\[eight-bit\]"'):
        build_mode(run).build_optimizer(Llama(run.llama))
