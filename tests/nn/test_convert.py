from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_zoo import ZOO, randomized
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm

from wngen.nn import (
    WNGRU,
    WNLSTM,
    GatedResidualBlock,
    MaskedWNLinear,
    MeanOnlyBatchNorm,
    WeightNormalized,
    WNConv2d,
    WNConvTranspose2d,
    WNGRUCell,
    WNLinear,
    WNLSTMCell,
    data_dependent_init,
    fold,
    from_torch_state_dict,
    to_torch_state_dict,
    weight_norm,
)

WITHOUT_MASK = [kind for kind in ZOO if "masked" not in kind]
SPELLINGS = ["parametrization", "hook"]


def plain_like(kind: str, **more: object) -> nn.Module:
    """torch's own layer with the settings of ours."""
    ours = ZOO[kind][0]()
    if isinstance(ours, WNLinear):
        return nn.Linear(ours.in_features, ours.out_features, **more)
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
    names += ["output_padding"] if isinstance(ours, WNConvTranspose2d) else ["padding_mode"]
    return getattr(nn, type(ours).__name__[2:])(**{name: getattr(ours, name) for name in names}, **more)


def under_torch_weight_norm(layer: nn.Module, spelling: str, dim: int | None = 0) -> nn.Module:
    """The layer under torch's weight norm, with g of both signs."""
    if spelling == "parametrization":
        torch_weight_norm(layer, dim=dim)
        nn.init.normal_(layer.parametrizations.weight.original0)
    else:
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(layer, dim=dim)
        nn.init.normal_(layer.weight_g)
    return layer


class Network(nn.Module):
    """All that a network may do with its layers: use them twice, share their weights, freeze them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=0)
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        shared = nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")
        self.body = nn.Sequential(shared, nn.BatchNorm2d(4), nn.ReLU(), shared, nn.Conv2d(4, 4, 1, groups=2))
        self.again = self.body[4]
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.stem.weight.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.again(self.body(self.stem(x)))
        size = [2 * side for side in h.shape[2:]]
        h = self.up(h, output_size=size).flatten(2).transpose(1, 2) + self.embedding(y)[:, None]
        return self.head(self.attention(*[self.second(self.first(h).relu())] * 3)[0])


# Plain to ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("kind", WITHOUT_MASK)
def test_weight_norm_does_not_change_the_function(kind, gain, bias):
    layer, x = plain_like(kind, bias=bias), torch.randn(ZOO[kind][1])
    expected = layer(x)
    converted = weight_norm(layer, gain=gain)
    assert type(converted) is type(ZOO[kind][0]())
    torch.testing.assert_close(converted(x), expected, rtol=1e-6, atol=1e-6)


def test_weight_norm_of_a_whole_network():
    model = Network().eval()
    inputs = torch.rand(3, 1, 5, 4), torch.tensor([0, 3, 6])
    expected = model(*inputs)
    assert weight_norm(model) is model
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-6)
    converted = [name for name, layer in model.named_modules() if isinstance(layer, WeightNormalized)]
    assert converted == ["stem", "body.0", "body.4", "up", "first", "second", "head"]
    assert model.body[0] is model.body[3]
    assert model.again is model.body[4]
    assert type(model.attention.out_proj) is type(nn.MultiheadAttention(6, 2).out_proj)
    assert not model.training
    assert not any(module.training for module in model.modules())


def test_weight_norm_keeps_what_is_shared_frozen_or_last():
    model = Network().to(memory_format=torch.channels_last)
    bias = model.up.bias
    weight_norm(model)
    assert model.first.v is model.second.v
    assert model.first.g is model.second.g
    assert model.first.bias is not model.second.bias
    assert model.head.v is not model.embedding.weight
    assert not model.embedding.weight[0].any()
    assert not model.stem.v.requires_grad
    assert not model.stem.g.requires_grad
    assert model.up.v.requires_grad
    assert model.up.bias is bias
    assert model.up.v.is_contiguous(memory_format=torch.channels_last)
    assert not model.up.v.is_contiguous()


def test_gradients_flow_to_g_and_v_after_weight_norm_also_from_a_unit_without_weight():
    layer = nn.Linear(4, 3)
    layer.weight.data[1] = 0
    converted = weight_norm(layer)
    assert not converted.weight[1].any()
    converted(torch.randn(9, 4)).square().sum().backward()
    assert converted.g.grad.all()
    assert converted.v.grad[[0, 2]].all()
    with pytest.raises(ValueError, match="layer '1': an exponential gain cannot hold g = 0"):
        weight_norm(nn.Sequential(nn.ReLU(), layer), gain="exponential")


def test_data_dependent_init_passes_over_a_trained_network_only():
    x = torch.randn(50, 4) + 3
    trained = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    fresh = weight_norm(copy.deepcopy(trained), initialized=False)
    expected = trained(x)
    weight_norm(trained)
    assert data_dependent_init(trained, x) == []
    torch.testing.assert_close(trained(x), expected, rtol=1e-6, atol=1e-6)
    assert data_dependent_init(fresh, x) == ["0", "2"]
    torch.testing.assert_close(fresh(x).std(dim=0, correction=0), torch.ones(2))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_weight_norm_refuses_what_is_reparametrized_already(spelling):
    model = nn.Sequential(nn.Linear(3, 3), under_torch_weight_norm(nn.Linear(3, 4), spelling))
    with pytest.raises(ValueError, match="layer '1' is computed from other parameters"):
        weight_norm(model)
    assert type(model[0]) is nn.Linear


def test_weight_norm_leaves_subclasses_alone():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(3, 3))
    assert weight_norm(model)[0] is model[0]
    assert type(model[0]) is Doubled


# Ours to plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("kind", ZOO)
def test_fold_gives_the_plain_layer_with_the_same_outputs(kind, gain, bias):
    make, shape = ZOO[kind]
    layer, x = randomized(make(gain=gain, bias=bias)), torch.randn(shape)
    plain = fold(layer)
    assert type(plain).__module__.startswith("torch.nn")
    assert {name for name, _ in plain.named_parameters()} == ({"weight", "bias"} if bias else {"weight"})
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [WNLSTM, WNGRU, WNLSTMCell, WNGRUCell])
def test_fold_recurrent_layers(make, bias):
    layer = make(3, 4, bias=bias, **({"batch_first": True} if make in (WNLSTM, WNGRU) else {}))
    x = torch.randn(5, 6, 3) if make in (WNLSTM, WNGRU) else torch.randn(5, 3)
    for part in (layer.ih, layer.hh):
        randomized(part)
    plain = fold(layer)
    assert type(plain).__module__.startswith("torch.nn")
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=1e-6)


def test_fold_leaves_the_network_and_the_random_numbers_alone():
    model = nn.Sequential(WNConv2d(1, 6, 3), nn.Dropout(0.5), nn.Sequential(WNConv2d(6, 6, 1), nn.ReLU())).eval()
    model.append(model[2][0])
    x = torch.rand(4, 1, 6, 6)
    data_dependent_init(model, x)
    state = torch.random.get_rng_state()
    plain = fold(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(model[0], WNConv2d)
    assert not any(isinstance(module, WeightNormalized) for module in plain.modules())
    assert plain[2][0] is plain[3]
    assert not any(module.training for module in plain.modules())
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-6)
    plain[0].weight.data.zero_()
    plain[0].bias.data.zero_()
    assert model(x).std() > 0.1


def test_fold_of_gated_blocks_and_batch_norm():
    model = nn.ModuleDict({"block": GatedResidualBlock(4, aux_channels=4), "norm": MeanOnlyBatchNorm(4)}).eval()
    x, aux = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    plain = fold(model)
    torch.testing.assert_close(plain["block"](x, aux), model["block"](x, aux), rtol=0, atol=1e-6)
    assert isinstance(plain["norm"], MeanOnlyBatchNorm)


def test_fold_leaves_subclasses_alone():
    class Shifted(WNConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 0)))

    model = nn.Sequential(Shifted(1, 2, 2))
    assert type(fold(model)[0]) is Shifted


@pytest.mark.parametrize("kind", WITHOUT_MASK)
def test_folding_takes_weight_norm_back(kind):
    layer = plain_like(kind)
    plain = fold(weight_norm(copy.deepcopy(layer)))
    assert repr(plain) == repr(layer)
    torch.testing.assert_close(plain.state_dict(), layer.state_dict(), rtol=1e-6, atol=0)


# State dicts


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ZOO)
def test_state_dict_goes_to_torch(kind, spelling, gain):
    make, shape = ZOO[kind]
    layer, x = randomized(make(gain=gain)), torch.randn(shape)
    reference = under_torch_weight_norm(fold(layer), spelling)
    nn.init.normal_(reference.bias)
    reference.load_state_dict(to_torch_state_dict(layer, spelling), strict=True)
    torch.testing.assert_close(reference(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", WITHOUT_MASK)
def test_state_dict_comes_from_torch(kind, spelling, dim, gain):
    make, shape = ZOO[kind]
    reference, x = under_torch_weight_norm(plain_like(kind), spelling, dim), torch.randn(shape)
    layer = make(gain=gain)
    before = copy.deepcopy(layer.state_dict())
    state = from_torch_state_dict(layer, reference.state_dict())
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.load_state_dict(state, strict=True)
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-5, atol=1e-6)
    assert bool(layer.initialized)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", WITHOUT_MASK)
def test_state_dict_survives_the_way_there_and_back(kind, spelling):
    layer = randomized(ZOO[kind][0]())
    layer.initialized.fill_(True)
    back = from_torch_state_dict(layer, to_torch_state_dict(layer, spelling, transposed_dim=1))
    if kind == "transposed-grouped":  # where torch has one norm for all groups together
        expected = layer.weight
        layer.load_state_dict(back)
        torch.testing.assert_close(layer.weight, expected)
    else:
        torch.testing.assert_close(back, dict(layer.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["transposed", "transposed-grouped"])
def test_transposed_convolution_normalized_over_dim_1_in_torch(kind):
    make, shape = ZOO[kind]
    layer, x = randomized(make()), torch.randn(shape)
    reference = under_torch_weight_norm(fold(layer), "parametrization", dim=1)
    reference.load_state_dict(to_torch_state_dict(layer, transposed_dim=1), strict=True)
    torch.testing.assert_close(reference(x), layer(x))


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("kind", ["masked-linear", "masked-conv2d"])
def test_masked_layers_keep_their_function(kind, gain):
    make, shape = ZOO[kind]
    layer, x = randomized(make(gain=gain)), torch.randn(shape)
    twin = make(gain=gain)
    twin.load_state_dict(from_torch_state_dict(twin, to_torch_state_dict(layer)), strict=True)
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-6)


def test_a_mask_that_was_applied_after_the_norm():
    layer = MaskedWNLinear(torch.tensor([[1, 0, 1], [0, 1, 1]]))
    reference = torch_weight_norm(nn.Linear(3, 2))
    layer.load_state_dict(from_torch_state_dict(layer, reference.state_dict()), strict=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), F.linear(x, layer.mask * reference.weight, reference.bias))


def test_layers_without_weight_norm_and_other_parts_of_a_network():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3)))
    plain[1].running_mean.normal_()
    model = nn.Sequential(WNConv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), WNConv2d(4, 2, 3)))
    model.load_state_dict(from_torch_state_dict(model, plain.state_dict()), strict=True)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (WNLSTM, nn.LSTM, ("weight_ih_l0", "weight_hh_l0")),
        (WNGRU, nn.GRU, ("weight_ih_l0", "weight_hh_l0")),
        (WNLSTMCell, nn.LSTMCell, ("weight_ih", "weight_hh")),
        (WNGRUCell, nn.GRUCell, ("weight_ih", "weight_hh")),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's hook form is deprecated
def test_state_dicts_of_recurrent_layers(ours, theirs, names, spelling):
    reference, layer = theirs(3, 4), ours(3, 4)
    for name in names:
        (torch_weight_norm if spelling == "parametrization" else nn.utils.weight_norm)(reference, name)
    x = torch.randn(5, 2, 3) if ours in (WNLSTM, WNGRU) else torch.randn(2, 3)
    layer.load_state_dict(from_torch_state_dict(layer, reference.state_dict()), strict=True)
    torch.testing.assert_close(layer(x), reference(x))
    back = to_torch_state_dict(layer, spelling)
    torch.testing.assert_close(back, dict(reference.state_dict()), rtol=0, atol=0)


def test_a_layer_in_two_places():
    shared = randomized(WNLinear(3, 3))
    shared.initialized.fill_(True)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    state = to_torch_state_dict(model)
    assert sorted(key for key in state if key.endswith("original1")) == [
        "0.parametrizations.weight.original1",
        "2.parametrizations.weight.original1",
    ]
    twin = copy.deepcopy(model)
    nn.init.normal_(twin[0].v)
    twin.load_state_dict(from_torch_state_dict(twin, state), strict=True)
    torch.testing.assert_close(twin.state_dict(), model.state_dict())


def test_an_all_masked_unit_is_not_nan_in_torch():
    layer = MaskedWNLinear(torch.tensor([[1, 1], [0, 0]]))
    state = to_torch_state_dict(layer)
    assert state["parametrizations.weight.original0"].tolist() == [[1], [0]]
    assert state["parametrizations.weight.original1"][1].all()


def test_what_is_wrong_with_a_state_dict_is_said():
    model = nn.Sequential(nn.ReLU(), WNLinear(2, 3))
    with pytest.raises(ValueError, match=r"no weight for layer '1'.*original1, 1\.weight_v, 1\.weight"):
        from_torch_state_dict(model, {"1.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"layer '1': v is \(2, 3\), wanted \(3, 2\)"):
        from_torch_state_dict(model, {"1.weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="spelling='old'"):
        to_torch_state_dict(model, "old")  # type: ignore[arg-type]
