from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from layer_zoo import ZOO
from torch import Tensor, nn

from wngen.nn import (
    GatedResidualBlock,
    MaskedWNConv2d,
    MeanOnlyBatchNorm,
    ResidualBlock,
    WeightNormalized,
    WNConv1d,
    WNConv2d,
    WNConvTranspose2d,
    WNGRUCell,
    WNLinear,
    data_dependent_init,
    data_free_init,
    weight_norm,
)

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def outputs(model: nn.Module, *inputs: Tensor, first_use: bool = True) -> dict[str, Tensor]:
    """What every linear and convolutional layer gives out, by channel, at its first use."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, (WeightNormalized, *PLAIN)):
            channel = -1 if isinstance(layer, (WNLinear, nn.Linear)) else 1

            def keep(layer: nn.Module, args: object, y: Tensor, name: str = name, channel: int = channel) -> None:
                seen.setdefault(name, y.detach().movedim(channel, 0).flatten(1))

            hooks.append(layer.register_forward_hook(keep))
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def assert_moments(seen: Tensor, std: float) -> None:
    torch.testing.assert_close(seen.mean(dim=1), torch.zeros(len(seen)), rtol=0, atol=1e-4 * max(std, 1))
    torch.testing.assert_close(seen.std(dim=1, correction=0), torch.full((len(seen),), std), rtol=1e-3, atol=0)


def assert_initialized(model: nn.Module, *inputs: Tensor) -> None:
    layers = dict(model.named_modules())
    seen = outputs(model, *inputs)
    assert seen
    for name, y in seen.items():
        assert_moments(y, getattr(layers[name], "init_scale", 1.0))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, t in state(model).items():
        assert torch.equal(t, expected[name]), name


class Shared(nn.Module):
    """A layer used three times, at different depths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = WNConv2d(1, 4, 3, padding=1)
        self.shared = WNConv2d(4, 4, 3, padding=1)
        self.alias = self.shared
        self.head = WNConv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.shared(F.elu(self.stem(x))))
        return self.head(F.elu(self.alias(F.elu(self.shared(h)))))


class Gated(nn.Module):
    """Gated blocks with a short-cut and labels, up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = WNConv2d(1, 6, 3, padding=1)
        self.first = GatedResidualBlock(6, num_classes=3)
        self.down = WNConv2d(6, 6, 3, stride=2, padding=1)
        self.second = GatedResidualBlock(6, activation=F.elu)
        self.up = WNConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=1, init_scale=0.5)
        self.third = GatedResidualBlock(6, aux_channels=6, dropout=0.5)
        self.causal = MaskedWNConv2d(6, 4, torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.first(self.stem(x), y=y)
        return self.causal(self.third(self.up(self.second(self.down(h))), aux=h))


# Moments


@pytest.mark.parametrize("init_scale", [1.0, 0.1])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("kind", ZOO)
def test_a_second_forward_has_mean_0_and_the_wanted_deviation(kind, gain, init_scale):
    make, shape = ZOO[kind]
    layer = make(gain=gain, init_scale=init_scale)
    x = 3 * torch.randn(shape) + 1
    assert data_dependent_init(layer, x) == [""]
    (seen,) = outputs(layer, x).values()
    varying = seen.std(dim=1) > 0
    assert (~varying).sum() == (1 if kind == "masked-linear" else 0)
    assert_moments(seen[varying], init_scale)


def test_a_deep_residual_network():
    model = nn.Sequential(
        WNConv2d(1, 8, 5, padding=2),
        *(ResidualBlock(8, scale=0.5) for _ in range(6)),
        nn.ELU(),
        WNConv2d(8, 8, 3, stride=2, gain="exponential"),
        *(ResidualBlock(8, dropout=0.3) for _ in range(6)),
        nn.Flatten(),
        WNLinear(8 * 36, 20),
        nn.ReLU(),
        WNLinear(20, 5, init_scale=0.1),
    ).eval()
    x = torch.rand(50, 1, 14, 14)
    touched = data_dependent_init(model, x)
    assert len(touched) == 28
    assert touched == [name for name, layer in model.named_modules() if isinstance(layer, WeightNormalized)]
    assert_initialized(model, x)


def test_a_chain_of_50_layers():
    model = nn.Sequential(*(layer for _ in range(50) for layer in (WNLinear(20, 20), nn.Tanh())))
    x = torch.randn(200, 20)
    data_dependent_init(model, x)
    assert_initialized(model, x)


def test_gated_blocks_with_labels_masks_and_transposed_convolutions():
    model = Gated().eval()
    inputs = torch.rand(64, 1, 8, 8), torch.randint(3, (64,))
    data_dependent_init(model, *inputs)
    # The label's bias is added after the layer, and what the layer gives out is what counts.
    assert_initialized(model, *inputs)


def test_a_shared_layer_is_initialized_at_its_first_use():
    model = Shared()
    x = torch.rand(40, 1, 9, 9)
    assert data_dependent_init(model, x) == ["stem", "shared", "head"]
    assert_initialized(model, x)


def test_layers_that_share_their_weight_are_initialized_once():
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    plain[2].weight = plain[0].weight
    tied = weight_norm(copy.deepcopy(plain), initialized=False)
    x = torch.randn(100, 6)
    for model in (plain, tied):
        assert data_dependent_init(model, x) == ["0", "4"]
        seen = outputs(model, x)
        assert_moments(seen["0"], 1.0)
        assert_moments(seen["4"], 1.0)


def test_the_result_does_not_depend_on_the_weights_lengths_before():
    model = nn.Sequential(WNLinear(5, 7), nn.ReLU(), WNLinear(7, 3)).double()
    twin = copy.deepcopy(model)
    for layer in (twin[0], twin[2]):
        layer.v.data.mul_(torch.rand(len(layer.v), 1) * 30)
        layer.g.data.mul_(0.01)
        layer.bias.data.fill_(4)
    x = torch.randn(50, 5, dtype=torch.double)
    data_dependent_init(model, x)
    data_dependent_init(twin, x)
    torch.testing.assert_close(twin(x), model(x))


def test_layers_without_bias_get_their_deviation():
    layer = WNConv1d(3, 4, 3, bias=False)
    x = torch.randn(20, 3, 9) + 2
    data_dependent_init(layer, x)
    torch.testing.assert_close(layer(x).std(dim=(0, 2), correction=0), torch.ones(4))


@pytest.mark.parametrize("x", [torch.zeros(8, 5), torch.full((8, 5), 3.7), torch.randn(1, 5)])
def test_outputs_that_do_not_vary_keep_the_default(x):
    layer = WNLinear(5, 4)
    data_dependent_init(layer, x)
    assert torch.equal(layer.g, torch.ones(4, 1))
    assert torch.equal(layer.bias, torch.zeros(4))
    assert bool(layer.initialized)


def test_a_unit_that_does_not_vary_does_not_disturb_the_others():
    layer = WNLinear(3, 2, mask=torch.tensor([[1, 1, 0], [0, 0, 1]]))
    x = torch.randn(50, 3)
    x[:, 2] = 5
    data_dependent_init(layer, x)
    assert_moments(layer(x).T[:1], 1.0)
    assert layer.g[1] == 1
    assert layer.bias[1] == 0


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d-grouped", "conv3d", "transposed", "transposed-grouped"])
def test_plain_layers_are_initialized_too(kind):
    ours, shape = ZOO[kind]
    reference = ours()
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    if kind == "linear":
        layer: nn.Module = nn.Linear(6, 5)
    else:
        more = {"output_padding": reference.output_padding} if "transposed" in kind else {}
        arguments = {name: getattr(reference, name) for name in names}
        layer = getattr(nn, type(reference).__name__[2:])(**arguments, **more)
    x = torch.randn(shape) + 1
    names_before = list(layer.state_dict())
    data_dependent_init(layer, x)
    assert_initialized(layer, x)
    assert list(layer.state_dict()) == names_before
    before = state(layer)
    assert data_dependent_init(copy.deepcopy(layer), torch.randn(shape)) == []
    assert data_dependent_init(layer, torch.randn(shape)) == []
    assert_state(layer, before)


def test_mean_only_batch_norm_starts_from_the_mean_of_the_batch():
    model = nn.Sequential(WNConv2d(2, 5, 3, bias=False), MeanOnlyBatchNorm(5), nn.ReLU(), WNConv2d(5, 4, 3))
    x = torch.rand(20, 2, 8, 8)
    assert data_dependent_init(model, x) == ["0", "1", "3"]
    for mode in (False, True):
        model.train(mode)
        assert_moments(model[:2](x).movedim(1, 0).flatten(1), 1.0)
        assert_moments(model(x).movedim(1, 0).flatten(1), 1.0)


def test_recurrent_layers_are_left_alone():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = WNGRUCell(4, 6), WNLinear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x))

    model = Network()
    before = state(model.cell)
    x = torch.randn(30, 4)
    assert data_dependent_init(model, x) == ["head"]
    assert data_free_init(model) == []
    assert_state(model.cell, before)


# Once and for all


def test_it_is_not_repeated():
    model = nn.Sequential(WNConv2d(1, 4, 3), nn.ELU(), WNConv2d(4, 2, 3))
    data_dependent_init(model, torch.rand(20, 1, 8, 8))
    before = state(model)
    loaded = nn.Sequential(WNConv2d(1, 4, 3), nn.ELU(), WNConv2d(4, 2, 3))
    loaded.load_state_dict(model.state_dict())
    for twin in (model, copy.deepcopy(model), loaded):
        assert data_dependent_init(twin, 5 + torch.rand(20, 1, 8, 8)) == []
        assert data_free_init(twin) == []
        assert_state(twin, before)


def test_new_layers_of_an_initialized_network_are_initialized():
    body = nn.Sequential(WNLinear(4, 6), nn.ReLU())
    x = torch.randn(40, 4)
    data_dependent_init(body, x)
    before = state(body)
    model = nn.Sequential(body, WNLinear(6, 3))
    assert data_dependent_init(model, x) == ["1"]
    assert_state(body, before)
    assert_initialized(model, x)


def test_reset_parameters_makes_it_possible_again():
    layer = WNLinear(3, 2)
    data_dependent_init(layer, torch.randn(9, 3))
    layer.reset_parameters()
    assert data_dependent_init(layer, torch.randn(9, 3)) == [""]


# How it runs the network


def test_it_leaves_modes_hooks_and_gradients_as_they_were():
    model = nn.Sequential(WNLinear(4, 50), nn.Dropout(0.5), nn.BatchNorm1d(50), WNLinear(50, 3))
    model[1].eval()
    x = torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        data_dependent_init(model, x)
    assert [module.training for module in model] == [True, False, True, True]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model[2].num_batches_tracked == 0
    model.eval()
    assert_initialized(model, x)


def test_inputs_and_layers_called_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = WNConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, *, image: Tensor, size: tuple[int, int]) -> Tensor:
            return self.layer(x=image, output_size=size)

    model = Named()
    x = torch.randn(10, 2, 4, 4)
    assert data_dependent_init(model, image=x, size=(8, 8)) == ["layer"]
    y = model(image=x, size=(8, 8))
    assert y.shape == (10, 3, 8, 8)
    assert_moments(y.movedim(1, 0).flatten(1), 1.0)


def test_outputs_that_are_not_finite_are_an_error_that_names_the_layer():
    model = nn.Sequential(WNLinear(3, 4), nn.ReLU(), WNLinear(4, 2))
    model[2].v.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="outputs of 2 on this batch are not all finite"):
        data_dependent_init(model, torch.randn(5, 3))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_a_network_without_layers_is_no_error():
    assert data_dependent_init(nn.ReLU(), torch.randn(3)) == []


# Without data


def test_data_free_g_is_the_formula_and_v_orthogonal():
    model = nn.Sequential(
        WNLinear(12, 6), WNConv2d(8, 4, 3, groups=2, gain="exponential"), WNConvTranspose2d(4, 6, 3, stride=2, groups=2)
    )
    for layer in model:
        layer.bias.data.fill_(1)
    assert data_free_init(model, gain=1.5) == ["0", "1", "2"]
    # fan_in / fan_out, in which the kernel and the groups cancel; a stride of 2 x 2 spreads an input over 4 outputs.
    for layer, ratio in zip(model, (12 / 6, 8 / 4, 4 * 4 / 6), strict=True):
        torch.testing.assert_close(layer.length, torch.full_like(layer.length, math.sqrt(1.5 * ratio)))
        assert not layer.bias.any()
        assert bool(layer.initialized)
    for units in (model[0].v, model[1].v.flatten(1)):
        torch.testing.assert_close(units @ units.T, torch.eye(len(units)), rtol=0, atol=1e-5)
    for group in model[2].v.unflatten(0, (2, 2)):
        units = group.transpose(0, 1).flatten(1)
        torch.testing.assert_close(units @ units.T, torch.eye(3), rtol=0, atol=1e-5)


@torch.no_grad()
def test_data_free_init_keeps_the_variance_over_50_relu_layers():
    model = nn.Sequential(*(module for _ in range(50) for module in (WNLinear(512, 512), nn.ReLU())))
    data_free_init(model, gains={"0": 1})
    x = torch.randn(128, 512)
    for module in model:
        x = module(x)
        if isinstance(module, WNLinear):
            assert 1 / 3 < x.square().mean() < 3  # a gain that is off by 5 % would be off by 1.05^50 = 11


@torch.no_grad()
def test_data_free_init_keeps_the_norm_through_changing_widths_and_resolutions():
    model = nn.Sequential(
        WNConv2d(3, 64, 3, padding="same", padding_mode="circular"),
        nn.ReLU(),
        WNConv2d(64, 32, 3, padding="same", padding_mode="circular"),
        nn.ReLU(),
        WNConvTranspose2d(32, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        WNConv2d(64, 128, 3, stride=2),
    )
    data_free_init(model, gains={"0": 1})
    x = torch.randn(16, 3, 16, 16)
    expected = x.square().sum(dim=1).mean()  # the squared norm over channels of a pixel
    for i, module in enumerate(model):
        x = module(x)
        if i % 2 == 0:
            assert 0.5 < x[:, :, 2:-2, 2:-2].square().sum(dim=1).mean() / expected < 2


@torch.no_grad()
def test_data_free_residual_blocks_share_one_units_worth_of_variance():
    blocks = [ResidualBlock(32) for _ in range(20)]
    model = nn.Sequential(WNConv2d(3, 32, 3, padding="same"), nn.Sequential(*blocks))
    data_free_init(model, gains={"0": 1})
    for block in blocks:
        torch.testing.assert_close(block.first.g, torch.full_like(block.first.g, math.sqrt(2)))
        torch.testing.assert_close(block.second.g, torch.full_like(block.second.g, math.sqrt(1 / 20)))
    stem = model[0](torch.randn(8, 3, 16, 16))
    # A block adds at most 2 / 20, where elu is almost linear and takes nothing away: (1 + 2 / 20)^20 < e^2.
    assert 1 < model[1](stem).var() / stem.var() < math.e**2


def test_data_free_gains_go_by_name():
    model = nn.Sequential(WNLinear(4, 4), nn.Sequential(WNLinear(4, 4), WNLinear(4, 4)))
    data_free_init(model, gains={"1.*": 3, "1.1": 5})
    assert [round(layer.g[0].item() ** 2, 4) for layer in (model[0], *model[1])] == [2, 3, 5]
    with pytest.raises(ValueError, match=r"called 'stem'; there are 0, 1\.0, 1\.1"):
        data_free_init(model, gains={"stem": 1})
