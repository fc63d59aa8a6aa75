"""The model against transformers' LlamaForCausalLM."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from velora_pretrain.dimensions import SIZES, LlamaConfig
from velora_pretrain.nn import llama
from velora_pretrain.nn.llama import Llama, RMSNorm, rotary_tables, rotate, swiglu_
from velora_pretrain.nn.loss import IGNORE_INDEX


def random_config(seed: int) -> LlamaConfig:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    key_value_heads = draw(1, 4)
    heads = key_value_heads * draw(1, 4)
    return LlamaConfig(
        vocab_size=draw(50, 150),
        hidden_size=heads * 2 * draw(2, 9),
        intermediate_size=draw(20, 120),
        num_hidden_layers=draw(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=64,
        rope_theta=float(draw(100, 20_000)),
        initializer_range=0.1,
    )


def pair(config: LlamaConfig) -> tuple[Llama, transformers.LlamaForCausalLM]:
    """Our model with the weights of a random one of theirs."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.model_dump(), attn_implementation="eager"))
    ours = Llama(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_batch(config: LlamaConfig, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, :-1] = tokens[:, 1:]
    labels[0, shape[1] // 2 :] = IGNORE_INDEX
    return tokens, labels


@pytest.mark.parametrize("seed", range(8))
def test_logits_and_gradients_equal_transformers(seed: int) -> None:
    config = random_config(seed)
    ours, theirs = pair(config)
    tokens, labels = random_batch(config, 3, 29)
    logits = theirs(tokens).logits
    assert (ours.logits(tokens) - logits).abs().max() < 1e-5

    num_targets = int((labels != IGNORE_INDEX).sum())
    (ours(tokens, labels) / num_targets).backward()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - expected[name].grad).abs().max() < 1e-5, name


def test_some_random_configs_are_grouped_query() -> None:
    configs = [random_config(seed) for seed in range(8)]
    assert {config.num_key_value_heads < config.num_attention_heads for config in configs} == {True, False}


@pytest.mark.parametrize(("size", "millions"), [("60m", 58.07), ("130m", 134.11), ("350m", 367.97), ("1b", 1339.08)])
def test_published_sizes_have_the_published_number_of_parameters(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = Llama(SIZES[size])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == millions
    assert count == SIZES[size].num_parameters


def test_same_seed_gives_the_same_weights_and_the_right_spread() -> None:
    config = SIZES["9m"]
    first, second, other = Llama(config, seed=3), Llama(config, seed=3), Llama(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert torch.equal(first.model.norm.weight, torch.ones(config.hidden_size))


@pytest.mark.parametrize("features", [8, 33])
def test_rms_norm_gradients(features: int) -> None:
    norm = RMSNorm(features, 1e-6).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


def test_rotation_keeps_norms_and_depends_on_distance_only() -> None:
    cosines, sines = rotary_tables(20, 8, 10_000.0, torch.device("cpu"), torch.float64)
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 20, 1, 8) for _ in range(2))
    rotated_q, rotated_k = rotate(q, cosines, sines), rotate(k, cosines, sines)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))
    scores = torch.einsum("bqhd,bkhd->qk", rotated_q, rotated_k)
    torch.testing.assert_close(scores[5, 2], scores[13, 10])
    assert not torch.allclose(scores[5, 2], scores[13, 9])


def test_nothing_sees_the_future() -> None:
    config = random_config(0)
    model = Llama(config, seed=0)
    tokens, _ = random_batch(config, 1, 16)
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % config.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 10:], after[0, 10:])


def test_mixed_precision_is_no_further_from_fp32_than_plain_bf16() -> None:
    config = random_config(1)
    ours, theirs = pair(config)
    tokens, labels = random_batch(config, 2, 24)
    exact = ours(tokens, labels).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ours(tokens, labels)
    assert mixed.dtype == torch.float32
    logits = theirs.bfloat16()(tokens).logits.float()
    naive = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    assert abs(mixed.item() - exact) <= abs(naive - exact) + 1e-3 * exact


@pytest.mark.parametrize("rows", [7, 45])
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_gradients_made_in_pieces_are_autograds(
    rows: int, is_contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "CPU_ELEMENTS", 6 * rows + 5)
    generator = torch.Generator().manual_seed(0)
    x, gate, up, dy = torch.randn(4, 5, 9, 6, generator=generator, dtype=torch.float64)
    if not is_contiguous:
        x, gate, up, dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, gate, up, dy))
    assert llama.rows_at_a_time(x) == rows  # of 45
    x, gate, up = (t.detach().requires_grad_() for t in (x, gate, up))
    norm = RMSNorm(6, 1e-5).double()
    norm.weight.data.copy_(torch.linspace(0.5, 2, 6))
    expected_norm = F.rms_norm(x, (6,), norm.weight, 1e-5)
    for ours, theirs, leaves in (
        (swiglu_(gate * 1, up * 1), F.silu(gate) * up, (gate, up)),
        (norm(x), expected_norm, (x, norm.weight)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        expected = torch.autograd.grad(theirs, leaves, dy)
        torch.testing.assert_close(torch.autograd.grad(ours, leaves, dy), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("has_hooks", [False, True])
def test_a_second_backward_pass_through_swiglu_is_refused(has_hooks: bool) -> None:
    gate, up = torch.randn(2, 3, 4, requires_grad=True)[:].unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() if has_hooks else t, lambda t: t):
        y = swiglu_(gate * 1, up * 1).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_gradient_of_swiglu_takes_no_memory_of_its_own(precision: torch.dtype) -> None:
    """Nothing of gate's size is made beside the two gradients, which take the places of gate and up."""
    gate, up = torch.randn(2, 64, 2**13, dtype=precision).unbind()
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    kept = [leaf * 1 for leaf in leaves]
    product, made = swiglu_(*kept), []
    places = {t.untyped_storage().data_ptr() for t in kept}

    class _Large(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() > gate.numel() // 2:
                made.append(result.untyped_storage().data_ptr())
            return result

    with _Large():
        gradients = torch.autograd.grad(product, kept, torch.ones_like(product))
    ones = made[0]
    assert set(made) <= places | {ones}
    assert {g.untyped_storage().data_ptr() for g in gradients} == places
