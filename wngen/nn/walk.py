"""Where a walk over the pixels has got to, and what layers keep of those it has passed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn


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
        """Copy the row `(B, C, 1, W)` that a layer gave, which keeps no rows itself, to where `stored` finds it."""
        self.write(self.rows(layer, 1, row.shape[1]), row)

    def stored(self, layer: nn.Module) -> Tensor:
        """Of a layer's stored row the pixel that the walk has reached, `(B, C, 1, 1)`."""
        row = self._rows[layer]
        pixel = row.index_select(2, self._index) if self.static else row[:, :, self.column : self.column + 1]
        return pixel.permute(0, 3, 1, 2)

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
