"""VeLoRA against its dense formula, by hand in float64, and as a stranger would use it."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from velora_pretrain.dimensions import LlamaConfig
from velora_pretrain.errors import UserError
from velora_pretrain.nn.direction import Direction, directions_of, move_running_averages
from velora_pretrain.nn.llama import Llama, project
from velora_pretrain.nn.velora import (
    VeLoRALinear,
    compress,
    compress_linears,
    compressed_weights,
    default_num_groups,
    expand,
)

N, D, M, G = 14, 12, 5, 4


@pytest.fixture(autouse=True)
def double() -> object:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unit(width: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(width), dim=0)


def make_layer(*, bias: bool = False, scale: float = 1.0, v: torch.Tensor | None = None) -> VeLoRALinear:
    direction = Direction(D, G, dtype=torch.float64)
    direction.vector.copy_(unit(D // G) if v is None else v)
    direction.is_ready = True
    return VeLoRALinear(nn.Linear(D, M, bias=bias), direction, scale=scale)


def dense_gradient(x: torch.Tensor, dy: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The paper's formula, element by element: dW = dyᵀ x̂, x̂[n, g·s+j] = z[n, g] v[j]."""
    s = v.numel()
    x_hat = torch.zeros_like(x)
    for g in range(x.shape[1] // s):
        z = x[:, g * s : (g + 1) * s] @ v
        x_hat[:, g * s : (g + 1) * s] = z[:, None] * v[None, :]
    return dy.t() @ x_hat


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool, scale: float) -> None:
    layer = make_layer(bias=bias, scale=scale)
    x, dy = torch.randn(2, N // 2, D, requires_grad=True), torch.randn(2, N // 2, M)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.weight, rtol=1e-14, atol=1e-15)
    v = layer.direction.vector
    expected = scale * dense_gradient(x.detach().flatten(0, 1), dy.flatten(0, 1), v)
    assert layer.coefficients.grad is not None
    assert layer.coefficients.grad.shape == (M, G)
    torch.testing.assert_close(expand(layer.coefficients.grad, v), expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(layer.coefficients.grad.norm(), expected.norm())
    assert layer.weight.grad is None
    if bias:
        torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))


def test_inputs_along_v_give_the_exact_gradient() -> None:
    layer = make_layer()
    v = layer.direction.vector
    x = expand(torch.randn(N, G), v)
    dy = torch.randn(N, M)
    layer(x).backward(dy)
    torch.testing.assert_close(expand(layer.coefficients.grad, v), dy.t() @ x, rtol=1e-13, atol=1e-14)


def test_coefficients_are_the_derivative_of_the_loss_along_v() -> None:
    """C is dL/dP of W(P) = W₀ + P ⊗ v, when the layer is the last to read x: autograd of that function says so."""
    layer = make_layer()
    v, x, dy = layer.direction.vector, torch.randn(N, D), torch.randn(N, M)
    layer(x).backward(dy)
    p = torch.zeros(M, G, requires_grad=True)
    nn.functional.linear(x, layer.weight + expand(p, v)).backward(dy)
    torch.testing.assert_close(layer.coefficients.grad, p.grad, rtol=1e-13, atol=1e-14)


class _Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.outputs: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products.append((tuple(args[0].shape), tuple(args[1].shape)))
        if isinstance(result, torch.Tensor):
            self.outputs.append(tuple(result.shape))
        return result


def test_backward_never_rebuilds_the_input() -> None:
    layer = make_layer()
    x = torch.randn(N, D, requires_grad=True)
    y = layer(x)
    with _Shapes() as seen:
        y.backward(torch.randn(N, M))
    assert ((M, N), (N, G)) in seen.products
    assert ((M, N), (N, D)) not in seen.products
    assert (M, D) not in seen.outputs


def saved_bytes(run: Callable[[], object], *, but: set[int]) -> int:
    """Bytes kept for the backward pass, once per storage, without the storages named in `but`."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in but:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = run()
    assert keep_alive is not None
    return sum(kept.values())


def test_siblings_keep_one_compressed_input() -> None:
    parent = nn.ModuleDict({name: nn.Linear(D, M, bias=False) for name in ("q_proj", "k_proj", "v_proj")})
    layers = compress_linears(parent, layers=("q_proj", "k_proj", "v_proj"), num_groups=dict.fromkeys(parent, G))
    assert len(directions_of(parent)) == 1
    x = torch.randn(N, D, requires_grad=True)
    parent["q_proj"](x)  # sets v
    constants = {t.untyped_storage().data_ptr() for t in [*parent.parameters(), *parent.buffers()]}
    assert saved_bytes(lambda: project(x, *layers), but=constants) == N * G * x.element_size()
    together = project(x, *layers)
    gradients = torch.autograd.grad(sum(y.square().sum() for y in together), [x, *(m.coefficients for m in layers)])
    alone = [layer(x) for layer in layers]
    expected = torch.autograd.grad(sum(y.square().sum() for y in alone), [x, *(m.coefficients for m in layers)])
    torch.testing.assert_close(gradients, expected, rtol=1e-13, atol=1e-13)


def test_accumulation_adds_compressed_gradients() -> None:
    layer = make_layer()
    x, dy = torch.randn(N, D), torch.randn(N, M)
    layer(x).backward(dy)
    whole = layer.coefficients.grad.clone()
    layer.zero_grad()
    for rows in (slice(0, 5), slice(5, N)):
        layer(x[rows]).backward(dy[rows])
    torch.testing.assert_close(layer.coefficients.grad, whole, rtol=1e-13, atol=1e-14)


def test_first_batch_mean() -> None:
    layer = VeLoRALinear(nn.Linear(D, M), Direction(D, G, dtype=torch.float64))
    x = torch.randn(N, D) + 0.3
    layer(x)
    mean = x.view(N * G, D // G).mean(0)
    torch.testing.assert_close(layer.direction.vector, mean / mean.norm())
    layer(torch.randn(N, D))
    torch.testing.assert_close(layer.direction.vector, mean / mean.norm())


def test_svd_direction_is_the_top_right_singular_vector() -> None:
    layer = VeLoRALinear(nn.Linear(D, M), Direction(D, G, init="svd", dtype=torch.float64))
    x = torch.randn(N, D) * torch.linspace(1, 2, D)
    layer(x)
    top = torch.linalg.svd(x.view(N * G, D // G))[2][0]
    assert torch.minimum((layer.direction.vector - top).norm(), (layer.direction.vector + top).norm()) < 1e-10
    assert layer.direction.vector[layer.direction.vector.abs().argmax()] > 0


def test_running_average_moves_with_every_step() -> None:
    layer = VeLoRALinear(nn.Linear(D, M), Direction(D, G, init="running_average", dtype=torch.float64))
    first, second = torch.randn(N, D) + 0.3, torch.randn(N, D) - 0.1
    normal = lambda x: nn.functional.normalize(x.view(-1, D // G).mean(0), dim=0)  # noqa: E731
    layer(first)
    torch.testing.assert_close(layer.direction.vector, normal(first))
    layer(second)
    torch.testing.assert_close(layer.direction.vector, normal(first))
    move_running_averages(layer)
    expected = nn.functional.normalize(0.9 * normal(first) + 0.1 * normal(second), dim=0)
    torch.testing.assert_close(layer.direction.vector, expected)
    with torch.no_grad():
        layer(first)
    assert layer.direction.statistics.abs().max() == 0


def test_random_direction_is_seeded_and_needs_no_data() -> None:
    make = lambda seed: compress_linears(nn.ModuleDict({"v_proj": nn.Linear(D, M)}), layers=("v_proj",), init="random",  # noqa: E731
                                         num_groups={"v_proj": G}, seed=seed)[0].direction  # fmt: skip
    assert torch.equal(make(1).vector, make(1).vector)
    assert not torch.equal(make(1).vector, make(2).vector)
    torch.testing.assert_close(make(1).vector.norm(), torch.tensor(1.0))
    assert make(1).is_ready


def test_a_basis_is_that_of_the_right_singular_vectors() -> None:
    """Each with its largest entry above zero, in the order of the singular values; `turn` goes round."""
    direction = Direction(D, G, init="svd", keeps_basis=True, dtype=torch.float64)
    x = torch.randn(N, D) * torch.linspace(1, 2, D)
    direction.observing = True
    direction.watch(x[: N // 2])
    direction.watch(x[N // 2 :])
    direction.take()
    expected = torch.linalg.svd(x.view(N * G, D // G))[2]
    expected = expected * torch.stack([row[row.abs().argmax()].sign() for row in expected])[:, None]
    for number in range(2 * len(expected)):
        direction.turn(number)
        torch.testing.assert_close(direction.vector, expected[number % len(expected)])
    assert direction.basis is not None
    before = direction.basis.clone()
    assert torch.equal(direction.to(torch.bfloat16).basis, before)


def test_gathered_over_micro_batches_it_is_the_direction_of_the_whole_batch() -> None:
    x = torch.randn(N, D) + 0.2
    whole = VeLoRALinear(nn.Linear(D, M), Direction(D, G, dtype=torch.float64))
    whole(x)
    parts = VeLoRALinear(nn.Linear(D, M), Direction(D, G, dtype=torch.float64))
    parts.direction.observing = True
    for rows in x.split(3):
        parts(rows)
    parts.direction.observing = False
    parts.direction.take()
    torch.testing.assert_close(parts.direction.vector, whole.direction.vector, rtol=1e-13, atol=0)


def test_state_dict_holds_weight_v_and_flag_and_nothing_else() -> None:
    layer = make_layer()
    assert set(layer.state_dict()) == {"weight", "direction.vector", "direction.ready"}
    layer(torch.randn(N, D))
    layer.direction.ready.fill_(True)
    fresh = VeLoRALinear(nn.Linear(D, M, bias=False), Direction(D, G, dtype=torch.float64))
    fresh.load_state_dict(layer.state_dict())
    assert fresh.direction.is_ready
    assert torch.equal(fresh.direction.vector, layer.direction.vector)
    before = fresh.direction.vector.clone()
    fresh(torch.randn(N, D))
    assert torch.equal(fresh.direction.vector, before)


def test_the_handle_takes_no_memory_and_casts_leave_v_alone() -> None:
    layer = VeLoRALinear(nn.Linear(D, M, dtype=torch.float32), Direction(D, G))
    layer.direction.vector.copy_(unit(D // G))
    before = layer.direction.vector.clone()
    layer = layer.to(torch.bfloat16)
    assert layer.coefficients.untyped_storage().nbytes() == 4
    assert layer.coefficients.dtype == torch.float32
    assert torch.equal(layer.direction.vector, before)
    layer.direction.is_ready = True
    layer(torch.randn(N, D, dtype=torch.bfloat16)).sum().backward()
    assert layer.coefficients.grad.dtype == torch.float32


def test_bf16_gradient_is_no_worse_than_the_naive_bf16_gradient() -> None:
    layer = make_layer()
    v = layer.direction.vector
    x, dy = torch.randn(64, D), torch.randn(64, M)
    exact = dense_gradient(x, dy, v)
    x16, dy16, v16 = x.bfloat16(), dy.bfloat16(), v.bfloat16()
    naive = dense_gradient(x16, dy16, v16).double()
    layer = layer.to(torch.bfloat16)
    layer(x16).backward(dy16)
    ours = expand(layer.coefficients.grad.double(), v)
    assert (ours - exact).norm() <= (naive - exact).norm()


@pytest.mark.parametrize(("features", "groups"), [(512, 32), (1376, 86), (2736, 171), (5461, 127), (13, 1)])
def test_default_sub_tokens_are_near_sixteen_wide(features: int, groups: int) -> None:
    assert default_num_groups(features) == groups


def test_groups_that_do_not_divide_are_refused() -> None:
    model = Llama(LlamaConfig(hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=2, vocab_size=50))  # fmt: skip
    with pytest.raises(UserError, match=r"modes\.velora\.num_groups\.v_proj: 5 sub-tokens do not divide the width 32"):
        compress_linears(model, num_groups={"v_proj": 5})
    with pytest.raises(UserError, match=r"modes\.velora\.layers: no linear layer of the model is named w_proj"):
        compress_linears(model, layers=("w_proj",))


def test_a_hugging_face_model_trains_with_it() -> None:
    torch.set_default_dtype(torch.float32)
    from velora_pretrain.optim.adamw import AdamW

    config = transformers.LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 60, (4, 16))
    before = model(tokens).logits
    layers = compress_linears(
        model, layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    assert len(layers) == 14
    assert torch.equal(model(tokens).logits, before)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trainable, factored=compressed_weights(model), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # The handle is no part of what is saved: a plain model takes the weights.
    plain = transformers.LlamaForCausalLM(config)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(".direction." in name for name in unexpected)


def test_compress_is_one_number_per_sub_token() -> None:
    x, v = torch.randn(2, 3, D), unit(D // G)
    torch.testing.assert_close(compress(x, v), torch.einsum("bngs,s->bng", x.view(2, 3, G, D // G), v))


def test_of_an_adapter_in_a_projections_place_the_inner_layer_is_compressed() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(D, 2, bias=False), nn.Linear(2, M, bias=False)

    parent = nn.ModuleDict({"q_proj": Adapter(), "v_proj": Adapter(), "o_proj": Adapter()})
    groups = {"q_proj": G, "v_proj": G, "o_proj": 3}
    layers = compress_linears(parent, layers=("q_proj", "v_proj", "o_proj"), num_groups=groups)
    assert layers == [adapter.lora_A for adapter in parent.values()]
    assert [tuple(layer.coefficients.shape) for layer in layers] == [(2, G), (2, G), (2, 3)]
    assert layers[0].direction is layers[1].direction
    assert layers[0].direction is not layers[2].direction
    assert all(type(adapter.lora_B) is nn.Linear for adapter in parent.values())
    with pytest.raises(UserError, match="is named lora_B"):
        compress_linears(nn.ModuleDict({"lora_B": nn.ReLU()}), layers=("lora_B",))
