from __future__ import annotations

import copy
import io
import pickle

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from layer_zoo import ZOO, randomized, unit_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wngen.nn import (
    MaskedWNConv2d,
    MaskedWNLinear,
    WeightNormalized,
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose2d,
    WNLinear,
    normalize,
)

GAINS = ["linear", "exponential"]
SHAPES = {"linear": (5, 7), "conv1d": (5, 3, 4), "conv2d": (5, 3, 2, 4), "conv3d": (5, 2, 3, 1, 2)}


@pytest.fixture(params=ZOO)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def random_layer(kind: str, **more: object) -> tuple[WeightNormalized, Tensor]:
    """A layer with random g and bias, and an input for it."""
    make, shape = ZOO[kind]
    return randomized(make(**more)), torch.randn(shape)


def gradients(output: Tensor, layer: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return dict(zip(names, torch.autograd.grad(output, parameters, cotangent), strict=True))


def channels_last(t: Tensor) -> Tensor:
    """The same tensor with the second dimension innermost in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t


# What the weight is


@pytest.mark.parametrize("gain", GAINS)
def test_weight_is_g_v_over_norm_for_each_output_unit(kind, gain):
    layer, _ = random_layer(kind, gain=gain)
    v = layer.v if layer.mask is None else layer.v * layer.mask
    g = layer.g if gain == "linear" else layer.log_g.exp()
    units = zip(unit_weights(layer, layer.weight), unit_weights(layer, v.double()), g.flatten().double(), strict=True)
    for weight, direction, length in units:
        if direction.any():
            expected = length * direction / direction.square().sum().sqrt()
        else:
            expected = torch.zeros_like(direction)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)


def test_g_scales_its_own_output_unit_and_no_other(kind):
    layer, x = random_layer(kind, bias=False)
    channel = -1 if isinstance(layer, WNLinear) else 1
    before = layer(x).movedim(channel, 0)
    for unit in range(before.shape[0]):
        scaled = copy.deepcopy(layer)
        scaled.g.data.view(-1)[unit] *= 3
        expected = before.clone()
        expected[unit] *= 3
        torch.testing.assert_close(scaled(x).movedim(channel, 0), expected)


@given(scale=st.floats(1e-12, 1e12), g=st.floats(-1e6, 1e6))
def test_only_the_direction_of_v_matters(scale, g):
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((3, 1), g)
    weight = normalize(v * scale, lengths, (1,))
    torch.testing.assert_close(weight, normalize(v, lengths, (1,)), rtol=1e-5, atol=1e-36)
    torch.testing.assert_close(weight.norm(dim=1), lengths[:, 0].abs(), rtol=1e-5, atol=1e-18)


@pytest.mark.parametrize("kind", ["masked-linear", "masked-conv2d"])
def test_mask_acts_before_the_norm(kind):
    layer, x = random_layer(kind)
    weight = layer.weight
    assert not weight[layer.mask == 0].any()
    seeing = layer.mask.flatten(1).any(dim=1)
    torch.testing.assert_close(weight.flatten(1).norm(dim=1)[seeing], layer.g.flatten().abs()[seeing])
    grad = gradients(layer(x), layer)["v"]
    assert not grad[layer.mask == 0].any()
    assert grad[layer.mask.bool()].all()


@pytest.mark.parametrize("gain", GAINS)
def test_set_weight(kind, gain):
    layer, _ = random_layer(kind, gain=gain)
    weight = torch.randn_like(layer.v)
    layer.set_weight(weight)
    expected = weight if layer.mask is None else weight * layer.mask
    torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"wanted|wants"):
        layer.set_weight(weight[None])


def test_set_weight_leaves_a_unit_without_weight_able_to_learn(kind):
    layer, x = random_layer(kind)
    sighted = torch.stack([unit.any() for unit in unit_weights(layer, layer.direction)])
    layer.set_weight(torch.zeros_like(layer.v))
    assert not layer.weight.any()
    grad = gradients(layer(x), layer)["g"].flatten()
    assert grad[sighted].all()
    assert not grad[~sighted].any()


# Its gradient


@pytest.mark.parametrize("order", [torch.contiguous_format, "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradient_is_equation_3_and_orthogonal_to_v(shape, order):
    v, grad = torch.randn(shape), torch.randn(shape)
    if order == "channels_last":
        v = channels_last(v)
    v.requires_grad_()
    g = torch.randn(shape[0], *[1] * (len(shape) - 1), requires_grad=True)
    weight = normalize(v, g, tuple(range(1, len(shape))))
    grad_v, grad_g = torch.autograd.grad(weight, (v, g), grad)
    for unit in range(shape[0]):
        v_, g_, grad_ = v[unit].detach().double(), g[unit].item(), grad[unit].double()
        norm = v_.square().sum().sqrt()
        expected_g = (grad_ * v_).sum() / norm
        expected_v = g_ / norm * grad_ - g_ * expected_g / norm**2 * v_
        torch.testing.assert_close(grad_g[unit].sum().double(), expected_g, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_v[unit].double(), expected_v, rtol=1e-5, atol=1e-6)
        assert abs((grad_v[unit].double() * v_).sum()) < 1e-5


def test_gradient_of_every_layer_is_orthogonal_to_v(kind):
    layer, x = random_layer(kind)
    grad = gradients(layer(x), layer)["v"]
    for grad_unit, v in zip(unit_weights(layer, grad), unit_weights(layer, layer.v), strict=True):
        assert abs((grad_unit * v).sum()) < 1e-5 * grad_unit.norm() * v.norm() + 1e-12


@pytest.mark.parametrize("dims", [(1, 2, 3), (0, 2, 3)])
@pytest.mark.parametrize("order", [torch.contiguous_format, "channels_last"])
def test_first_and_second_derivatives(dims, order):
    v = torch.randn(3, 2, 2, 2, dtype=torch.double)
    if order == "channels_last":
        v = channels_last(v)
    g = torch.randn(3 if dims[0] else 1, 1 if dims[0] else 2, 1, 1, dtype=torch.double)
    inputs = v.requires_grad_(), g.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, g: normalize(v, g, dims), inputs)
    assert torch.autograd.gradgradcheck(lambda v, g: normalize(v, g, dims), inputs)


def test_transforms_of_torch_func_see_the_same_function():
    v, g, x = torch.randn(4, 3), torch.randn(4, 1), torch.randn(5, 3)

    def loss(v: Tensor, g: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, normalize(v, g, (1,))).square().sum()

    by_example = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(v, g, x)
    for i in range(5):
        leaves = v.clone().requires_grad_(), g.clone().requires_grad_()
        expected = torch.autograd.grad(loss(*leaves, x[i]), leaves)
        torch.testing.assert_close((by_example[0][i], by_example[1][i]), expected)


# A row of zeros


@pytest.mark.parametrize("order", [torch.contiguous_format, "channels_last"])
@pytest.mark.parametrize("dims", [(1, 2, 3), (0, 2, 3)])
def test_row_of_zeros_gives_weight_0_and_gradient_0(dims, order):
    v = torch.randn(4, 3, 2, 2)
    zero = (1, slice(None)) if dims[0] else (slice(None), 1)
    v[zero] = 0
    v = (channels_last(v) if order == "channels_last" else v).requires_grad_()
    g = torch.randn(4 if dims[0] else 1, 1 if dims[0] else 3, 1, 1, requires_grad=True)
    weight = normalize(v, g, dims)
    grad_v, grad_g = torch.autograd.grad(weight.square().sum() + weight.sum(), (v, g), create_graph=True)
    second = torch.autograd.grad(grad_v.square().sum() + grad_g.square().sum(), (v, g))
    for t in (weight, grad_v, grad_g, *second):
        assert t.isfinite().all()
        assert not t[zero].any()
        assert t.count_nonzero() == t.numel() - t[zero].numel()


def test_layer_with_an_all_masked_unit_trains():
    layer, x = random_layer("masked-linear")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert torch.equal(layer(x)[:, 2], layer.bias[2].expand(len(x)))


# Precision and memory format


@pytest.mark.parametrize("kind", ["masked", "plain", "transposed"])
def test_v_of_a_unit_with_one_input_stays_where_it_is(kind):
    """Its direction is a sign: what gradient it had would be rounding errors, of which Adam makes full steps."""
    layer: WeightNormalized
    if kind == "masked":
        layer = MaskedWNLinear(torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 0]]))
        x, lone = torch.randn(64, 3), [0, 2]
    elif kind == "plain":
        layer, x, lone = WNLinear(1, 3), torch.randn(64, 1), [0, 1, 2]
    else:
        layer, x, lone = WNConvTranspose2d(1, 3, 1), torch.randn(8, 1, 3, 3), [0, 1, 2]
    before = layer.v.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    moved = (layer.v - before).transpose(0, 1 if kind == "transposed" else 0).flatten(1).norm(dim=1)
    assert [i for i, distance in enumerate(moved.tolist()) if distance == 0] == lone
    assert (layer.g != 1).all()  # all of them learn by their length


def test_norm_is_single_precision_under_autocast():
    layer, x = random_layer("linear")
    layer.v.data.mul_(1e-3)
    exact = layer.g.double() * F.normalize(layer.v.double(), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
        assert layer(x).dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1000.0), (torch.float16, 1e-6)])
def test_norm_of_half_precision_parameters_is_single_precision(dtype, scale, dim):
    # 10,000 addends are more than bfloat16 can count to; their squares overflow or vanish in float16.
    v, g = (scale * torch.randn(3, 10_000)).to(dtype), torch.tensor([[1.0], [2.0], [0.5]], dtype=dtype)
    v, g = (t.movedim(1, dim).contiguous().requires_grad_() for t in (v, g))
    weight = normalize(v, g, (dim,))
    assert weight.dtype == dtype
    exact = g.double() * F.normalize(v.double(), dim=dim)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(weight.double(), exact, rtol=1.01 * rounding, atol=torch.finfo(dtype).tiny)
    torch.testing.assert_close(weight.double().norm(dim=dim), g.double().flatten(), rtol=rounding, atol=0)
    for grad in torch.autograd.grad(weight.sum(), (v, g)):
        assert grad.dtype == dtype
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("layer", "order"),
    [
        (WNConv2d(3, 5, 3), torch.channels_last),
        (WNConv3d(3, 5, 3), torch.channels_last_3d),
        (WNConvTranspose2d(3, 5, 3), torch.channels_last),
        (MaskedWNConv2d(3, 5, torch.ones(3, 3).tril()), torch.channels_last),
        (WNConv2d(3, 5, 1), torch.channels_last),
        (WNConv2d(1, 5, 3), torch.channels_last),
        (WNConvTranspose2d(1, 5, 3), torch.channels_last),
    ],
)
def test_channels_last_is_kept(layer, order):
    x = torch.randn(2, layer.in_channels, *[6] * (layer.v.dim() - 2))
    expected = layer(x), gradients(layer(x), layer)
    layer = copy.deepcopy(layer).to(memory_format=order)
    output = layer(x.to(memory_format=order))
    grads = gradients(output, layer)
    assert output.is_contiguous(memory_format=order)
    assert not output.is_contiguous()
    assert layer.weight.stride()[1:] == layer.v.stride()[1:]
    (grad_v,) = torch.autograd.grad(layer.weight, layer.v, torch.ones_like(layer.v))
    assert grad_v.stride()[1:] == layer.v.stride()[1:]
    torch.testing.assert_close((output, grads), expected, rtol=1e-4, atol=1e-5)


# Living with torch


def assert_same_behaviour(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(b(x), a(x), rtol=0, atol=0)
    torch.testing.assert_close(gradients(b(x), b), gradients(a(x), a), rtol=0, atol=0)


@pytest.mark.parametrize("gain", GAINS)
def test_deepcopy_and_pickle(kind, gain):
    layer, x = random_layer(kind, gain=gain)
    layer(x).sum().backward()  # torch's weight norm of old fails from here on
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert_same_behaviour(layer, twin, x)
        before = layer(x)
        twin.v.data.neg_()
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("gain", GAINS)
def test_state_dict_is_v_g_and_bias_and_loads_strictly(kind, gain):
    layer, x = random_layer(kind, gain=gain)
    layer.initialized.fill_(True)
    names = {"v", "g" if gain == "linear" else "log_g", "bias", "initialized"}
    assert set(layer.state_dict()) == names
    fresh = ZOO[kind][0](gain=gain)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert_same_behaviour(layer, fresh, x)
    assert bool(fresh.initialized)
    without = ZOO[kind][0](gain=gain, bias=False)
    with pytest.raises(RuntimeError, match="bias"):
        without.load_state_dict(layer.state_dict(), strict=True)


@pytest.mark.parametrize(("kind", "gain"), [*((kind, "linear") for kind in ZOO), ("linear", "exponential")])
def test_compiles_to_one_graph(kind, gain):
    layer, x = random_layer(kind, gain=gain)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(gradients(compiled(x), layer), gradients(layer(x), layer))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    block = nn.Sequential(
        WNConv2d(3, 4, 3, padding="same"),
        nn.ELU(),
        MaskedWNConv2d(4, 4, torch.ones(3, 3).tril(), gain="exponential"),
        nn.ELU(),
        WNConvTranspose2d(4, 3, 3, padding=1),
    )
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(block(block(x)).square().sum(), [x, *block.parameters()])
    y = checkpoint(block, checkpoint(block, x, use_reentrant=reentrant), use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(tuple(t.grad for t in (x, *block.parameters())), expected, rtol=0, atol=0)


def test_a_layer_used_twice_gets_the_gradients_of_both_uses():
    layer, x = random_layer("conv2d-grouped", bias=False)
    first, second = copy.deepcopy(layer), copy.deepcopy(layer)
    x = x[:, :2]

    def run(a: nn.Module, b: nn.Module) -> Tensor:
        return b(F.elu(a(torch.cat([x, x], dim=1)))[:, :4]).square().sum()

    once = torch.autograd.grad(run(first, second), [first.v, second.v, first.g, second.g])
    twice = torch.autograd.grad(run(layer, layer), [layer.v, layer.g])
    torch.testing.assert_close(twice, (once[0] + once[1], once[2] + once[3]))


def test_step_of_an_exponential_gain_multiplies_g():
    for size in (1e-3, 1.0, 1e3):
        layer = WNLinear(3, 2, gain="exponential")
        layer.set_length(torch.full((2, 1), size))
        optimizer = torch.optim.Adam([layer.log_g], lr=0.01)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        torch.testing.assert_close((layer.length / size).log().abs(), torch.full((2, 1), 0.01), rtol=1e-3, atol=0)


# What transposed convolutions have of their own


@pytest.mark.parametrize("size", [(10, 8), (11, 9), (10, 9)])
def test_transposed_convolution_takes_an_output_size(size):
    layer = randomized(WNConvTranspose2d(4, 3, (3, 2), stride=2, padding=(1, 0)))
    reference = nn.ConvTranspose2d(4, 3, (3, 2), stride=2, padding=(1, 0))
    reference.weight.data, reference.bias.data = layer.weight.detach(), layer.bias.detach()
    x = torch.randn(2, 4, 5, 4)
    if size == (11, 9):
        with pytest.raises(ValueError, match=r"can be \[9, 8\] to \[10, 9\]"):
            layer(x, output_size=size)
    else:
        torch.testing.assert_close(layer(x, output_size=size), reference(x, output_size=size))


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WNLinear(2, 3, gain="cubic"), "gain='cubic'"),
        (lambda: WNLinear(2, 3, mask=torch.ones(2, 3)), r"mask of shape \(2, 3\).*\(3, 2\)"),
        (lambda: MaskedWNLinear(torch.ones(3)), r"wanted \(out_features, in_features\)"),
        (lambda: WNConv1d(3, 4, 3, groups=2), "groups=2"),
        (lambda: WNConvTranspose2d(4, 3, 3, groups=2), "groups=2"),
        (lambda: WNConv2d(3, 4, 3, padding_mode="mirror"), "padding_mode='mirror'"),
        (lambda: WNConv2d(3, 4, 3, padding="full"), "padding='full'"),
        (lambda: WNConv2d(3, 4, 3, padding="same", stride=2), "stride=2"),
        (lambda: WNLinear(2, 3, gain="exponential").set_length(torch.zeros(3, 1)), "exponential gain"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
