"""Causal convolutions over images in raster order: at once for training, pixel by pixel for sampling.

A layer's `forward` takes a whole image or, given a `Walk`, the row or the pixel that the walk has reached.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.nn.convolutions import MaskedWNConv2d, WNConv2d, WNConvTranspose2d
from wngen.nn.walk import Walk


class CausalConv2d(nn.Module):
    """A convolution that sees its own row and rows above it, by padding in place of masks.

    Causality in raster order follows if what it is given at a row, or a pixel, depends on those before only.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width.
        reach: `down` sees as many columns on the right as on the left; `down_right` none on the right.
        stride: 1, or 2 to halve height and width, rounded up.
        init_scale: standard deviation of the outputs that data-dependent init sets.
        mask: of the weight, broadcasts to `(out_channels, in_channels, height, width)`.

    References:
        PixelCNN++ (Salimans et al., 2017), figure 2 and the released code.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        reach: Literal["down", "down_right"] = "down_right",
        stride: int = 1,
        init_scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, width = kernel_size, stride, kernel_size[1]
        self.right = (width - 1) // 2 if reach == "down" else 0
        self.left = width - 1 - self.right
        self.conv = (
            WNConv2d(in_channels, out_channels, kernel_size, stride, init_scale=init_scale)
            if mask is None
            else MaskedWNConv2d(in_channels, out_channels, mask, stride, padding=0, init_scale=init_scale)
        )

    def forward(self, x: Tensor, walk: Walk | None = None) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H', W')`, or one row or pixel at a time along a walk."""
        if walk is not None:
            self.keep(x, walk)
            return self.step(walk)
        return self.conv(F.pad(x, (self.left, self.right, self.kernel_size[0] - 1, 0)))

    def keep(self, x: Tensor, walk: Walk) -> None:
        """Take in a row `(B, C, 1, W)` or a pixel `(B, C, 1, 1)`."""
        walk.write(self._rows(walk), x, self.left)

    def step(self, walk: Walk) -> Tensor:
        """The output at the row or pixel that was taken in last, where a stride does not pass over it."""
        matrix = walk.once(self, lambda: self.conv.weight.permute(0, 2, 3, 1).flatten(1).contiguous())
        patches = walk.patches(self._rows(walk), self.kernel_size[1], self.stride)
        return F.linear(patches, matrix, self.conv.bias).transpose(1, 2)[:, :, None]

    def _rows(self, walk: Walk) -> Tensor:
        return walk.rows(self, self.kernel_size[0], self.conv.in_channels, self.left, self.right)


class Pointwise(nn.Module):
    """A 1 x 1 convolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        mask: of the weight, broadcasts to `(out_channels, in_channels, 1, 1)`.
        init_scale: standard deviation of the outputs that data-dependent init sets.
        autocast: whether autocast may lower its precision. It may not that of a network's last layer: in bf16 the
            location of a pixel's level would be off by half a level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mask: Tensor | None = None,
        init_scale: float = 1.0,
        autocast: bool = True,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.conv = (
            WNConv2d(in_channels, out_channels, 1, init_scale=init_scale)
            if mask is None
            else MaskedWNConv2d(in_channels, out_channels, mask, padding=0, init_scale=init_scale)
        )

    def forward(self, x: Tensor, walk: Walk | None = None) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H, W)`, along a walk by a matrix product, which has less ado."""
        if not self.autocast and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.to(self.conv.weight.dtype), walk)
        if walk is None:
            return self.conv(x)
        return F.linear(x.permute(0, 2, 3, 1), self.conv.weight.flatten(1), self.conv.bias).permute(0, 3, 1, 2)


class CausalConvTranspose2d(nn.Module):
    """Doubles height and width: pixel (i, j) reaches rows 2i and 2i + 1 and columns from 2j on, or around them.

    Args:
        channels: of input and output.
        kernel_width: 3 reaches columns 2j - 1 to 2j + 1, for what sees the rows above only; 2 reaches 2j, 2j + 1.

    References:
        PixelCNN++ (Salimans et al., 2017), the released code.
    """

    def __init__(self, channels: int, kernel_width: Literal[2, 3]) -> None:
        super().__init__()
        around = kernel_width - 2
        self.conv = WNConvTranspose2d(
            channels, channels, (2, kernel_width), stride=2, padding=(0, around), output_padding=(0, around)
        )

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """`(B, C, H', W')` to `(B, C, height, width)`, at most twice as high and wide."""
        return self.conv(x)[:, :, :height, :width]

    def keep(self, x: Tensor, walk: Walk) -> None:
        """Take in a row `(B, C, 1, W')` or a pixel `(B, C, 1, 1)` of the half walk."""
        walk.write(self._rows(walk), self.conv(x))

    def step(self, walk: Walk) -> Tensor:
        """The output at this row or pixel of the walk."""
        rows = self._rows(walk)
        if walk.by_row:
            return rows[:, :1, : walk.width].permute(0, 3, 1, 2)
        return walk.patches(rows[:, :1], 1).transpose(1, 2)[:, :, None]

    def _rows(self, walk: Walk) -> Tensor:
        return walk.rows(self, 2, self.conv.out_channels, right=1)  # one more, as an odd width is cut from an even one


def down_shift(x: Tensor) -> Tensor:
    """Move `(B, C, H, W)` down by one row; the first becomes zero."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def right_shift(x: Tensor) -> Tensor:
    """Move `(B, C, H, W)` to the right by one column; the first becomes zero."""
    return F.pad(x[..., :-1], (1, 0))
