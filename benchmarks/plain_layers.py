"""The same network without weight normalization: what the benchmarks compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.nn import WeightNormalized, WNConv2d, fold


class MaskedLinear(nn.Linear):
    """`nn.Linear` whose weight is zero where `mask` is.

    Args:
        mask: `(out_features, in_features)`, zero or one.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv2d(nn.Module):
    """A masked `nn.Conv2d` that leaves out the ends of a kernel which the mask hides, like the weight-normalized one.

    Args:
        layer: whose mask, padding, strides and the rest are taken.
        conv: the same function, whose weight and bias are taken.
    """

    mask: Tensor

    def __init__(self, layer: WNConv2d, conv: nn.Conv2d) -> None:
        super().__init__()
        assert layer.mask is not None
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.trim = layer.trim
        self.register_buffer("mask", layer.mask.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` to `(B, out_channels, H', W')`."""
        if self.trim is None:
            weight, padding = self.weight * self.mask, self.padding
        else:
            weight, padding = self.weight[self.trim.seen] * self.mask[self.trim.seen], self.trim.padding
            x = F.pad(x, self.trim.excess) if any(self.trim.excess) else x
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


@torch.no_grad()
def plain_copy(model: nn.Module) -> nn.Module:
    """The same function in plain torch layers that can be trained: masked ones keep their masks.

    `wngen.nn.fold` alone is for inference: it leaves zeros in the weight, which gradients would fill.
    """
    plain = fold(model)
    for name, layer in model.named_modules():
        if isinstance(layer, WeightNormalized) and layer.mask is not None:
            folded = plain.get_submodule(name)
            masked: nn.Module
            if isinstance(layer, WNConv2d):
                assert isinstance(folded, nn.Conv2d)
                masked = MaskedConv2d(layer, folded)
            else:
                assert isinstance(folded, nn.Linear)
                masked = MaskedLinear(layer.mask.clone())
                masked.weight, masked.bias = folded.weight, folded.bias
            plain.set_submodule(name, masked)
    return plain


def add_batch_norm(plain: nn.Module, layers: list[str]) -> None:
    """Let batch norm follow some linear and convolutional layers, in place of their biases.

    Its running moments are averages over all batches since they were last reset.

    Args:
        plain: a network of plain layers.
        layers: their names.
    """
    for name in layers:
        layer = plain.get_submodule(name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        layer.bias = None
        norm: nn.Module
        if isinstance(layer, nn.Linear):
            norm = nn.BatchNorm1d(layer.out_features, momentum=None)
        else:
            norm = nn.BatchNorm2d(layer.out_channels, momentum=None)
        plain.set_submodule(name, nn.Sequential(layer, norm))
