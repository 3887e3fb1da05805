"""One weight-normalized layer of every kind, and the shape of an input for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wngen.nn import (
    MaskedWNConv2d,
    MaskedWNLinear,
    WeightNormalized,
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose2d,
    WNLinear,
)


def _linear_mask() -> Tensor:
    """Some of each unit's inputs; none of unit 2's."""
    mask = torch.ones(5, 6)
    mask[0, 3:] = 0
    mask[1, ::2] = 0
    mask[2] = 0
    return mask


def _causal_mask() -> Tensor:
    """The pixels before the centre of a 3 x 3 kernel in raster order."""
    return torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


ZOO: dict[str, tuple[Callable[..., WeightNormalized], tuple[int, ...]]] = {
    "linear": (lambda **more: WNLinear(6, 5, **more), (64, 6)),
    "linear-of-sequences": (lambda **more: WNLinear(6, 5, **more), (16, 3, 6)),
    "masked-linear": (lambda **more: MaskedWNLinear(_linear_mask(), **more), (64, 6)),
    "conv1d": (lambda **more: WNConv1d(4, 6, 3, padding=2, dilation=2, groups=2, **more), (8, 4, 11)),
    "conv2d": (lambda **more: WNConv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), **more), (8, 3, 7, 6)),
    "conv2d-grouped": (lambda **more: WNConv2d(4, 6, 3, groups=2, padding="same", **more), (8, 4, 6, 5)),
    "conv2d-1x1": (lambda **more: WNConv2d(4, 3, 1, **more), (8, 4, 5, 5)),
    "conv2d-reflect": (lambda **more: WNConv2d(3, 4, 3, padding=1, padding_mode="reflect", **more), (8, 3, 6, 5)),
    "conv2d-circular": (
        lambda **more: WNConv2d(3, 4, (2, 3), padding="same", padding_mode="circular", dilation=(1, 2), **more),
        (8, 3, 6, 7),
    ),
    "masked-conv2d": (lambda **more: MaskedWNConv2d(3, 4, _causal_mask(), **more), (8, 3, 6, 5)),
    "conv3d": (lambda **more: WNConv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), **more), (8, 2, 4, 5, 3)),
    "transposed": (
        lambda **more: WNConvTranspose2d(4, 3, (3, 2), stride=2, padding=1, output_padding=1, **more),
        (8, 4, 5, 4),
    ),
    "transposed-grouped": (lambda **more: WNConvTranspose2d(4, 6, (2, 3), groups=2, dilation=2, **more), (8, 4, 4, 5)),
}


def unit_weights(layer: WeightNormalized, weight: Tensor) -> Iterator[Tensor]:
    """The part of a weight that makes each output unit, found without the layer's own arithmetic."""
    if not isinstance(layer, WNConvTranspose2d):
        yield from weight
        return
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for unit in range(layer.out_channels):
        group = unit // outputs
        yield weight[group * inputs : (group + 1) * inputs, unit % outputs]


def randomized(layer: Any) -> Any:
    """The layer with g of both signs where it may have them, and biases."""
    torch.manual_seed(1)
    with torch.no_grad():
        layer.gain_parameter.normal_()
        if layer.bias is not None:
            layer.bias.normal_()
    return layer
