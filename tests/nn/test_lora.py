"""LoRA and its restarts against PEFT, by hand in float64, and in the whole model."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from runs import MODEL
from torch import nn

from velora_pretrain import checkpoint
from velora_pretrain.dimensions import PROJECTIONS, LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.nn.llama import Llama, project
from velora_pretrain.nn.lora import LoRALinear, adapt_linears, adapter_parameters, merge_and_restart
from velora_pretrain.nn.recompute import Recompute
from velora_pretrain.nn.velora import VeLoRALinear, compress_linears
from velora_pretrain.optim.adamw import AdamW

N, D, M, R = 14, 12, 5, 3
CONFIG = LlamaConfig(**MODEL)
TOKENS = torch.randint(0, CONFIG.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_layer(*, bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> LoRALinear:
    """With a B that is not zero, so that every term of the gradients is there."""
    generator = torch.Generator().manual_seed(3)
    linear = nn.Linear(D, M, bias=bias, dtype=dtype)
    layer = LoRALinear(linear, rank=R, alpha=7.0, dropout=dropout, generator=generator)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def make_model(*, dropout: float = 0.0, is_trained: bool = True, seed: int = 5) -> Llama:
    model = Llama(CONFIG, seed=0)
    for layer in adapt_linears(model, layers=PROJECTIONS, rank=R, alpha=2.0, dropout=dropout, seed=seed):
        if is_trained:
            nn.init.normal_(layer.lora_B.weight, std=0.05)
    return model


# What it computes


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_equals_pefts(bias: bool) -> None:
    ours = make_layer(bias=bias)
    holder = nn.ModuleDict({"q_proj": copy.deepcopy(nn.Linear(D, M, bias=bias, dtype=torch.float64))})
    theirs = peft.get_peft_model(holder, peft.LoraConfig(r=R, lora_alpha=7, target_modules=["q_proj"]))
    layer = theirs.base_model.model["q_proj"]
    state = {f"base_layer.{name}": value for name, value in ours.named_parameters() if "lora" not in name}
    state |= {name.replace(".weight", ".default.weight"): p for name, p in ours.named_parameters() if "lora" in name}
    layer.double().load_state_dict(state)

    x, dy = torch.randn(2, N, D, dtype=torch.float64, requires_grad=True), torch.randn(2, N, M, dtype=torch.float64)
    y, expected = ours(x), layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    gradients = torch.autograd.grad(y, (x, ours.lora_A.weight, ours.lora_B.weight), dy)
    parameters = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters, dy), rtol=1e-13, atol=1e-13)


def test_the_model_equals_pefts() -> None:
    ours = make_model()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.model_dump()))
    theirs.load_state_dict(Llama(CONFIG, seed=0).state_dict())
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=R, lora_alpha=2, target_modules=list(PROJECTIONS)))
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): p
        for name, p in adapted.named_parameters()
        if "lora_" in name
    }
    own = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    assert own.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(own[name])
    expected, logits = adapted(TOKENS).logits, ours.logits(TOKENS)
    assert (logits - expected).abs().max() < 1e-5
    dy = torch.randn_like(logits)
    logits.backward(dy)
    expected.backward(dy)
    for name, parameter in parameters.items():
        assert own[name].grad is not None, name
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool) -> None:
    layer = make_layer(bias=bias)
    x = torch.randn(2, N // 2, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert names == [*(["bias"] if bias else []), "lora_A.weight", "lora_B.weight"]
    trained = [layer.get_parameter(name) for name in names]

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *trained))


def test_dropout_by_hand() -> None:
    """The mask is read off from what is kept; forward and backward are the formulas with it."""
    layer = make_layer(dropout=0.4)
    x, dy = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randn(N, M, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    mask = next(t for t in kept if t.dtype == torch.bool).double() / 0.6
    assert 0 < (mask == 0).sum() < mask.numel()
    w, a, b, scale = layer.weight, layer.lora_A.weight, layer.lora_B.weight, 7.0 / R
    dropped = mask * x
    close = lambda ours, hand: torch.testing.assert_close(ours, hand, rtol=1e-13, atol=1e-13)  # noqa: E731
    close(y, x @ w.T + scale * dropped @ a.T @ b.T)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    close(db, scale * dy.T @ (dropped @ a.T))
    close(da, scale * (dy @ b).T @ dropped)
    close(dx, dy @ w + mask * (scale * dy @ b @ a))


def test_dropout_has_its_rate_and_the_seed_of_torch() -> None:
    layer = make_layer(dropout=0.25, dtype=torch.float32)
    x = torch.ones(4_000, D)

    def dropped() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with layer.lora_A.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            layer(x)
        return seen[0]

    torch.manual_seed(1)
    first, second = dropped(), dropped()
    torch.manual_seed(1)
    assert torch.equal(dropped(), first)
    assert not torch.equal(first, second)
    assert first.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    # 48,000 draws: a standard deviation is 0.002.
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    layer.eval()
    assert dropped() is x


def test_siblings_equal_layers_alone() -> None:
    layers = [make_layer(bias=bias) for bias in (False, True, False)]
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    together, alone = project(x, *layers), [layer(x) for layer in layers]
    gradients, expected = (torch.autograd.grad(sum(y.square().sum() for y in ys), inputs) for ys in (together, alone))
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


# The model at the start


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_start_is_the_plain_model_bitwise(dropout: float) -> None:
    plain, model = Llama(CONFIG, seed=0), make_model(dropout=dropout, is_trained=False)
    assert torch.equal(model.logits(TOKENS), plain.logits(TOKENS))


def test_only_adapters_embeddings_norms_and_head_are_trained() -> None:
    model = make_model()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"model.layers.{block}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}.weight"
        for block in range(CONFIG.num_hidden_layers)
        for name in PROJECTIONS
    }
    model(TOKENS, TOKENS).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen
    adapters = {name for name, p in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(frozen)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in adapter_parameters(model)} == adapters


def test_draws_are_kaiming_uniform_seeded_and_different_in_every_layer() -> None:
    def draws(seed: int) -> list[torch.Tensor]:
        return [layer.lora_A.weight for layer in make_model(seed=seed).modules() if isinstance(layer, LoRALinear)]

    first = draws(1)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(1), strict=True))
    values = [tuple(a.flatten().tolist()[:5]) for a in [*first, *draws(2)]]
    assert len(set(values)) == len(values) == 28
    wide = LoRALinear(nn.Linear(400, 7), rank=50, alpha=1.0, generator=torch.Generator().manual_seed(0)).lora_A.weight
    assert wide.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert wide.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_the_global_generator_is_left_alone() -> None:
    model = Llama(CONFIG, seed=0)
    before = torch.get_rng_state()
    adapt_linears(model, layers=PROJECTIONS, rank=R, alpha=2.0, dropout=0.1)
    merge_and_restart(model, seed=0, step=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rank_above_a_layers_is_used_as_it_stands() -> None:
    model = Llama(CONFIG, seed=0)
    layers = adapt_linears(model, layers=["k_proj"], rank=20, alpha=2.0)
    assert [tuple(layer.lora_B.weight.shape) for layer in layers] == [(16, 20)] * 2


def test_a_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"modes\.lora: no linear layer of the model is named w_proj"):
        adapt_linears(Llama(CONFIG), layers=["q_proj", "w_proj"], rank=R, alpha=2.0)


# What it keeps for the backward pass


def kept_for_backward(run: Callable[[], object], *, but: set[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what is kept, once per storage, without the storages named in `but`."""
    kept: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), (tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = run()
    assert keep_alive is not None
    return sorted((value for key, value in kept.items() if key not in but), key=str)


def storages(*modules: nn.Module) -> set[int]:
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_siblings_keep_one_dropped_input_one_mask_and_their_u(dropout: float, is_mixed: bool) -> None:
    layers = [make_layer(dropout=dropout, dtype=torch.float32) for _ in range(3)]
    x = torch.randn(N, D, requires_grad=True)

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            return project(x, *layers)

    kept = kept_for_backward(run, but=storages(*layers))
    dtype = torch.bfloat16 if is_mixed else torch.float32
    mask = [((N, D), torch.bool)] if dropout else []
    # Autocast keeps a narrow copy of each A and B; there is none of the frozen weights.
    narrow = [((D, R), dtype), ((R, M), dtype)] * 3 if is_mixed else []
    assert kept == sorted([((N, D), dtype), *mask, *[((N, R), dtype)] * 3, *narrow], key=str)
    # With dropout the one (N, D) is the dropped input, and x is kept by nobody.
    kept = kept_for_backward(run, but=storages(*layers) | {x.untyped_storage().data_ptr()})
    assert ((N, D), dtype) in kept or (not dropout and not is_mixed)


def test_a_frozen_layer_without_its_adapter_keeps_its_weight_alone() -> None:
    layer = make_layer(dtype=torch.float32)
    layer.lora_A.weight.requires_grad_(False)
    layer.lora_B.weight.requires_grad_(False)
    x = torch.randn(N, D, requires_grad=True)
    assert kept_for_backward(lambda: layer(x), but=storages(layer)) == []


@pytest.mark.parametrize("recompute", ["elementwise", "mlp", "block"])
def test_what_is_recomputed_drops_the_same(recompute: Recompute) -> None:
    def gradients(recompute: Recompute) -> list[torch.Tensor]:
        model = Llama(CONFIG, seed=0, recompute=recompute)
        for layer in adapt_linears(model, layers=PROJECTIONS, rank=R, alpha=2.0, dropout=0.3):
            nn.init.ones_(layer.lora_B.weight)
        torch.manual_seed(7)
        return list(torch.autograd.grad(model(TOKENS, TOKENS), [p for p in model.parameters() if p.requires_grad]))

    torch.testing.assert_close(gradients(recompute), gradients("none"), rtol=0, atol=0)


# Beside VeLoRA


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compressed_siblings_keep_one_z(dropout: float) -> None:
    parent = nn.ModuleDict({name: make_layer(dropout=dropout) for name in ("q_proj", "k_proj", "v_proj")})
    groups = 4
    inner = compress_linears(parent, layers=tuple(parent), num_groups=dict.fromkeys(parent, groups))
    assert [type(layer.lora_A) for layer in parent.values()] == [VeLoRALinear] * 3
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    project(x, *parent.values())  # sets v
    assert len({layer.direction for layer in inner}) == 1
    assert inner[0].direction.vector.norm() > 0

    kept = kept_for_backward(lambda: project(x, *parent.values()), but=storages(parent))
    mask = [((N, D), torch.bool)] if dropout else []
    assert kept == sorted([((N, groups), x.dtype), *mask, *[((N, R), x.dtype)] * 3], key=str)


def test_compressed_adapter_gradients_by_hand() -> None:
    parent = nn.ModuleDict({name: make_layer() for name in ("q_proj", "k_proj", "v_proj")})
    compress_linears(parent, layers=tuple(parent), num_groups=dict.fromkeys(parent, 4))
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    dys = [torch.randn(N, M, dtype=torch.float64) for _ in parent]
    torch.autograd.backward(project(x, *parent.values()), dys)
    close = lambda ours, hand: torch.testing.assert_close(ours, hand, rtol=1e-13, atol=1e-13)  # noqa: E731
    dx, scale = torch.zeros_like(x), 7.0 / R
    for layer, dy in zip(parent.values(), dys, strict=True):
        a, b, v = layer.lora_A.weight, layer.lora_B.weight, layer.lora_A.direction.vector
        z = (x.unflatten(1, (4, D // 4)) * v).sum(-1)
        close(layer.lora_A.coefficients.grad, (scale * dy @ b).T @ z)
        close(layer.lora_B.weight.grad, scale * dy.T @ (x @ a.T))
        dx += dy @ layer.merged()
        assert a.grad is None
        assert layer.weight.grad is None
    close(x.grad, dx)


# State dicts


def perturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if 0 not in parameter.stride():  # a handle of compressed gradients, always zero
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_checkpoint_of_it_is_a_plain_model_and_comes_back_bitwise(is_compressed: bool) -> None:
    def adapted(seed: int) -> Llama:
        model = make_model(seed=seed)
        if is_compressed:
            compress_linears(model, layers=PROJECTIONS, init="random", seed=seed)
        return model

    model, again = adapted(1), perturbed(adapted(2))
    weights, own = checkpoint.split_state(model, CONFIG)
    plain = Llama(CONFIG)
    plain.load_state_dict(weights, strict=True)
    torch.testing.assert_close(plain.logits(TOKENS), model.logits(TOKENS), rtol=1e-5, atol=1e-6)
    # As checkpoint.restore does.
    state = weights | {name.removeprefix("model."): t for name, t in own.items()}
    again.load_state_dict(state, strict=True)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(model.logits(TOKENS), again.logits(TOKENS))


def test_the_merged_weight_is_rounded_once() -> None:
    layer = make_layer(dtype=torch.float32).bfloat16()
    w, a, b = (p.double() for p in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    expected = (w + layer.scaling * b @ a).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = layer.state_dict()["weight"]
    assert merged.dtype == torch.bfloat16
    # From fp32 a sum may lie on the other side of a half; none does here.
    assert torch.equal(merged, expected)
    assert torch.equal(layer.state_dict()["base_weight"], layer.weight)


def test_a_merged_weight_is_never_taken_for_the_base() -> None:
    layer = make_layer()
    state = layer.state_dict()
    del state["base_weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "base_weight"'):
        layer.load_state_dict(state)


# Restarts


def test_a_restart_keeps_the_function() -> None:
    model = make_model()
    before, merged = model.logits(TOKENS), model.state_dict()
    parameters = dict(model.named_parameters())
    old = {name: p.clone() for name, p in parameters.items()}
    merge_and_restart(model, seed=1, step=10)
    torch.testing.assert_close(model.logits(TOKENS), before, rtol=1e-5, atol=1e-6)
    # The weights are the merged ones of the state dict; the parameters are the same objects: an optimizer has them.
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        if "lora_A" in name:
            assert not torch.equal(parameter, old[name])
        elif "lora_B" in name:
            assert parameter.abs().max() == 0
        else:
            assert torch.equal(parameter, merged[name])
    assert all(torch.equal(t, merged[name]) for name, t in model.state_dict().items() if name.endswith("proj.weight"))


def test_the_draws_of_a_restart_depend_on_seed_and_step_alone() -> None:
    def draw(seed: int, step: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        model = make_model(seed=noise)
        merge_and_restart(model, seed=seed, step=step)
        return torch.cat([p.flatten() for p in adapter_parameters(model)])

    assert torch.equal(draw(1, 10, noise=0), draw(1, 10, noise=1))
    assert not torch.equal(draw(1, 10, noise=0), draw(1, 20, noise=0))
    assert not torch.equal(draw(1, 10, noise=0), draw(2, 10, noise=0))
    # Each layer's is its own, as at the start.
    model = make_model()
    merge_and_restart(model, seed=1, step=10)
    starts = [tuple(p.detach().flatten()[:5].tolist()) for name, p in model.named_parameters() if "lora_A" in name]
    assert len(set(starts)) == len(starts) == 7 * CONFIG.num_hidden_layers


def test_restarts_reach_a_rank_above_r() -> None:
    layer = make_layer()
    start = layer.weight.clone()
    for step in range(2):
        nn.init.normal_(layer.lora_B.weight)
        merge_and_restart(layer, seed=0, step=step)
    assert torch.linalg.matrix_rank(layer.weight - start) == min(2 * R, M)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_it_learns_through_a_restart(is_compressed: bool) -> None:
    from velora_pretrain.nn.velora import compressed_weights

    model = make_model(dropout=0.05, is_trained=False)
    if is_compressed:
        compress_linears(model, layers=PROJECTIONS)
    base = model.model.layers[0].mlp.up_proj.weight.clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, factored=compressed_weights(model), lr=1e-2)
    losses = []
    for step in range(1, 31):
        loss = model(TOKENS, TOKENS.roll(-1, 1)) / TOKENS.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 15:
            assert torch.equal(model.model.layers[0].mlp.up_proj.weight, base)
            merge_and_restart(model, seed=0, step=step)
            assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base)
    assert losses[-1] < 0.5 * losses[0]
