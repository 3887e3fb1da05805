"""Causal convolutions over images in raster order: at once for training, pixel by pixel for sampling.

A layer's `forward` takes a whole image or, given a `Walk`, the row or the pixel that the walk has reached.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.nn.layers import MaskedWNConv2d, WNConv2d, WNConvTranspose2d


class Walk:
    """A walk over the pixels of a batch of images, and what layers keep of those that were passed.

    Each row is walked twice: as a whole, by layers that see the rows above only, then pixel by pixel. What
    is kept never moves in memory, and with `static` the column is a tensor, so that the step at one pixel can
    be captured as a CUDA graph and replayed at others.

    Args:
        batch: number of images.
        height: rows.
        width: columns.
        like: has the dtype and the device of the activations.
        static: whether columns are addressed by a tensor.

    Attributes:
        row: that the walk has reached.
        column: of the pixel that it has reached.
        by_row: whether the row is taken as a whole.
        position: of the pixel that it has reached, or of the row's first one, in raster order; with `static` a tensor.
    """

    def __init__(self, batch: int, height: int, width: int, like: Tensor, static: bool = False) -> None:
        self.batch, self.height, self.width, self.like, self.static = batch, height, width, like, static
        self.row, self.column, self.by_row = 0, 0, True
        self._index = torch.zeros(1, dtype=torch.long, device=like.device)
        self._position = torch.zeros(1, dtype=torch.long, device=like.device)
        self._rows: dict[nn.Module, Tensor] = {}
        self._stored: dict[nn.Module, Tensor] = {}
        self._pixels: dict[nn.Module, Tensor] = {}
        self._made: dict[Hashable, Tensor] = {}
        self._half: Walk | None = None

    @property
    def half(self) -> Walk:
        """The walk over every second pixel of every second row, which goes along with this one."""
        if self._half is None:
            height, width = -(-self.height // 2), -(-self.width // 2)
            self._half = Walk(self.batch, height, width, self.like, self.static)
        return self._half

    @property
    def on_half(self) -> bool:
        """Whether the row or pixel reached is one that `half` walks over too."""
        return self.row % 2 == 0 and (self.by_row or self.column % 2 == 0)

    @property
    def position(self) -> int | Tensor:
        if self.static:
            return self._position
        return self.row * self.width + (0 if self.by_row else self.column)

    def enter_row(self, row: int) -> None:
        """Go to the next row, or to the first one; rows kept move up."""
        if row:
            for rows in self._rows.values():
                for i in range(rows.shape[1] - 1):
                    rows[:, i] = rows[:, i + 1]
        self.row, self.by_row = row, True
        if self.static:
            self._position.fill_(row * self.width)
        if self._half is not None and self.on_half:
            self._half.enter_row(row // 2)

    def enter_pixel(self, column: int) -> None:
        """Go to a pixel of this row."""
        self.column, self.by_row = column, False
        if self.static:
            self._index.fill_(column)
            self._position.fill_(self.row * self.width + column)
        if self._half is not None and self.on_half:
            self._half.enter_pixel(column // 2)

    # What layers keep

    def rows(self, layer: nn.Module, count: int, channels: int, left: int = 0, right: int = 0) -> Tensor:
        """The last `count` rows that a layer keeps, `(B, count, left + W + right, C)`, at first zeros."""
        if layer not in self._rows:
            self._rows[layer] = self.like.new_zeros(self.batch, count, left + self.width + right, channels)
        return self._rows[layer]

    def write(self, rows: Tensor, values: Tensor, left: int = 0) -> None:
        """Write `values` `(B, C, h, w)` at this pixel, or from the start of this row, into the lowest h of `rows`."""
        values, rows = values.permute(0, 2, 3, 1), rows[:, rows.shape[1] - values.shape[2] :]
        width = values.shape[2]
        if self.static and not self.by_row:
            rows.index_copy_(2, self._columns(left, width), values)
        else:
            start = left if self.by_row else left + self.column
            rows[:, :, start : start + width] = values

    def patches(self, rows: Tensor, width: int, stride: int = 1) -> Tensor:
        """What a kernel of this width sees in `rows` from this pixel on, or all along this row, `(B, n, K)`."""
        if self.by_row:
            return rows.unfold(2, width, stride).permute(0, 2, 1, 4, 3).flatten(2)
        if self.static:
            return rows.index_select(2, self._columns(0, width)).flatten(1)[:, None]
        return rows[:, :, self.column : self.column + width].flatten(1)[:, None]

    def store(self, layer: nn.Module, row: Tensor) -> None:
        """Copy the row `(B, C, 1, W)` that a layer gave to where `stored` finds it."""
        if layer not in self._stored:
            self._stored[layer] = torch.empty_like(row)
        self._stored[layer].copy_(row)

    def stored(self, layer: nn.Module) -> Tensor:
        """Of a layer's stored row the pixel that the walk has reached, `(B, C, 1, 1)`."""
        row = self._stored[layer]
        return row.index_select(3, self._index) if self.static else row[..., self.column : self.column + 1]

    def pixels(self, layer: nn.Module, channels: int) -> Tensor:
        """What a layer keeps of every pixel, `(B, H W, C)`, at first zeros."""
        if layer not in self._pixels:
            self._pixels[layer] = self.like.new_zeros(self.batch, self.height * self.width, channels)
        return self._pixels[layer]

    def put(self, pixels: Tensor, value: Tensor) -> None:
        """Write `value` `(B, C, 1, 1)` at this position of `pixels`."""
        value = value.flatten(2).transpose(1, 2)
        if isinstance(self.position, Tensor):
            pixels.index_copy_(1, self.position, value)
        else:
            pixels[:, self.position : self.position + 1] = value

    def pick(self, pixels: Tensor) -> Tensor:
        """What stands at this position of `pixels`, `(B, C, 1, 1)`."""
        if isinstance(self.position, Tensor):
            return pixels.index_select(1, self.position).transpose(1, 2)[..., None]
        return pixels[:, self.position, :, None, None]

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives when it is first asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _columns(self, left: int, width: int) -> Tensor:
        offsets = self.once((left, width), lambda: torch.arange(left, left + width, device=self.like.device))
        return self._index + offsets


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


def with_ones(x: Tensor) -> Tensor:
    """`(B, C, H, W)` with a channel of ones beside the others: where it is zero, a convolution sees padding."""
    return F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)


def down_shift(x: Tensor) -> Tensor:
    """Move `(B, C, H, W)` down by one row; the first becomes zero."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def right_shift(x: Tensor) -> Tensor:
    """Move `(B, C, H, W)` to the right by one column; the first becomes zero."""
    return F.pad(x[..., :-1], (1, 0))
