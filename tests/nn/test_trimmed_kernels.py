"""Convolutions leave out the ends of a kernel that a mask hides from all units, and nothing changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_zoo import randomized
from torch import Tensor, nn

from wngen.nn import MaskedWNConv2d, WNConv1d, WNConv2d, WNConv3d, causal_mask, fold

KERNEL = (4, 5)
HIDDEN = {  # rows at the top and at the bottom, columns on the left and on the right
    "below": (0, 2, 0, 0),
    "above": (1, 0, 0, 0),
    "beside": (0, 0, 1, 2),
    "around": (1, 1, 1, 1),
    "corner": (2, 0, 0, 3),
    "nothing": (0, 0, 0, 0),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "same": {"padding": "same"},
    "same, dilated, grouped": {"padding": "same", "dilation": (2, 1), "groups": 2},
    "valid": {"padding": "valid"},
    "strided": {"padding": (3, 1), "stride": (2, 3)},
    "strided, dilated": {"padding": 1, "stride": 2, "dilation": (1, 2)},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular", "dilation": (2, 1)},
    "replicate": {"padding": (4, 1), "padding_mode": "replicate", "groups": 2},
}


def mask_that_hides(above: int, below: int, left: int, right: int, inputs: int) -> Tensor:
    """`(6, inputs, *KERNEL)`, some zeros elsewhere too."""
    mask = torch.rand(6, inputs, *KERNEL) < 0.7
    seen = torch.zeros(KERNEL, dtype=torch.bool)
    seen[above : KERNEL[0] - below, left : KERNEL[1] - right] = True
    return mask & seen


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # of torch's own layer
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_output_and_gradients_are_those_of_the_whole_kernel(
    settings: dict[str, Any], hidden: tuple[int, int, int, int], order: torch.memory_format
):
    mask = mask_that_hides(*hidden, inputs=4 // settings.get("groups", 1))
    layer = randomized(WNConv2d(4, 6, KERNEL, **settings, mask=mask, dtype=torch.double)).to(memory_format=order)
    assert (layer.trim is not None) == any(hidden)
    plain = fold(layer)
    assert type(plain) is nn.Conv2d
    x = torch.randn(3, 4, 13, 12, dtype=torch.double).contiguous(memory_format=order).requires_grad_()
    output, expected = layer(x), plain(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert output.is_contiguous(memory_format=order)
    cotangent = torch.randn_like(expected)
    by_x, by_weight, by_bias = torch.autograd.grad(expected, (x, plain.weight, plain.bias), cotangent)
    by_v, by_g = torch.autograd.grad(layer.weight, (layer.v, layer.g), by_weight)
    grads = torch.autograd.grad(output, (x, layer.v, layer.g, layer.bias), cotangent)
    torch.testing.assert_close(grads, (by_x, by_v, by_g, by_bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "rank"), [(WNConv1d, 1), (WNConv3d, 3)])
def test_in_any_number_of_dimensions(kind: Any, rank: int):
    mask = torch.zeros(3, 2, *[5] * rank)
    mask[(..., *[slice(1, 3)] * rank)] = 1
    layer = randomized(kind(2, 3, 5, padding="same", mask=mask, dtype=torch.double))
    assert layer.weight[layer.trim.seen].shape == (3, 2, *[2] * rank)
    x = torch.randn(2, 2, *[6] * rank, dtype=torch.double)
    torch.testing.assert_close(layer(x), fold(layer)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_of_a_causal_kernel_two_rows_of_three_are_left(reverse: bool):
    layer = MaskedWNConv2d(2, 3, causal_mask(torch.ones(3, 2), 3, reverse))
    assert layer.trim is not None
    assert layer.weight[layer.trim.seen].shape == (3, 2, 2, 3)
    assert layer.weight.shape == layer.v.shape == (3, 2, 3, 3)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision(autocast: bool):
    layer = randomized(MaskedWNConv2d(3, 4, causal_mask(torch.ones(4, 3), 3)))
    x = torch.randn(2, 3, 6, 5)
    exact = fold(layer).double()(x.double())
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
    else:
        output = layer.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=0.05)


def test_a_mask_that_hides_everything_leaves_the_bias():
    layer = randomized(MaskedWNConv2d(3, 4, torch.zeros(3, 3)))
    expected = layer.bias[None, :, None, None].expand(2, -1, 6, 5)
    assert torch.equal(layer(torch.randn(2, 3, 6, 5)), expected)


@pytest.mark.parametrize("padding", ["same", 0, (0, 3)])
def test_without_data_only_the_shape_is_known_and_the_same(padding: Any):
    mask, x = causal_mask(torch.ones(4, 3), 3), torch.randn(2, 3, 6, 5)
    meta = WNConv2d(3, 4, 3, padding=padding, mask=mask, device="meta")
    assert meta(x.to("meta")).shape == MaskedWNConv2d(3, 4, mask, padding=padding)(x).shape


def test_an_input_smaller_than_the_whole_kernel_is_refused_as_ever():
    layer = MaskedWNConv2d(3, 4, causal_mask(torch.ones(4, 3), 5), padding=0)
    assert layer(torch.randn(2, 3, 5, 5)).shape == (2, 4, 1, 1)
    with pytest.raises(RuntimeError, match="size"):
        layer(torch.randn(2, 3, 4, 5))


def test_it_can_be_exported():
    layer = randomized(MaskedWNConv2d(3, 4, causal_mask(torch.ones(4, 3), 3)))
    x = torch.randn(2, 3, 6, 5)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
