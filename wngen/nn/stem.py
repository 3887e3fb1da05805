"""Where an image enters a network of causal convolutions: as what lies before each of its pixels."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from wngen.nn.causal import CausalConv2d, down_shift, right_shift
from wngen.nn.walk import Walk


class ShiftedConv2d(CausalConv2d):
    """A convolution of an image that is moved by one row or column, so that a pixel does not see itself.

    The image has a channel of ones beside its own: where that is zero, the convolution sees padding.

    Args:
        channels: of the image.
        filters: feature maps.
        kernel_size: height and width.
        shift: `down` shows a pixel what is above it, to both sides; `right` its left neighbour, and what is above and
            to the left of that.
    """

    def __init__(
        self, channels: int, filters: int, kernel_size: tuple[int, int], shift: Literal["down", "right"]
    ) -> None:
        super().__init__(channels + 1, filters, kernel_size, "down" if shift == "down" else "down_right")
        self.shift = down_shift if shift == "down" else right_shift

    def forward(self, x: Tensor, walk: Walk | None = None) -> Tensor:
        """`(B, C, H, W)` to `(B, filters, H, W)`, or along a walk from the row above it or the pixel on its left."""
        if walk is None:
            return self.shift(super().forward(_with_ones(x)))
        if (walk.row if walk.by_row else walk.column) == 0:  # nothing has been shifted in yet
            return x.new_zeros(len(x), self.conv.out_channels, *x.shape[2:])
        return super().forward(_with_ones(x), walk)


class Stem(nn.Module):
    """The first features of each pixel, from those next to it: the three above it and the one on its left.

    Args:
        channels: of the images.
        filters: feature maps.

    References:
        PixelCNN++ (Salimans et al., 2017), the released code.
    """

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.nearest_above = ShiftedConv2d(channels, filters, (1, 3), "down")
        self.left = ShiftedConv2d(channels, filters, (2, 1), "right")

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, filters, H, W)`."""
        return self.nearest_above(x) + self.left(x)

    def row(self, above: Tensor, walk: Walk) -> None:
        """Take in the row `(B, C, 1, W)` above the one that the walk has reached; `pixel` finds what it gives."""
        walk.store(self, self.nearest_above(above, walk))

    def pixel(self, left: Tensor, walk: Walk) -> Tensor:
        """The features `(B, filters, 1, 1)` of the pixel reached, whose left neighbour is `left` `(B, C, 1, 1)`."""
        return walk.stored(self) + self.left(left, walk)


def _with_ones(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
