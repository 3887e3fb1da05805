"""Convolutions with weight normalization, also masked and transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from wngen.nn.layers import Gain, WeightNormalized
from wngen.nn.normalization import at_least_single, normalize

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def _tuple(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


class _Trim(NamedTuple):
    """How a convolution leaves out the ends of a kernel that a mask hides from all units."""

    seen: tuple[Any, ...]  # what is left of the weight
    padding: tuple[int, ...]  # of both sides alike
    excess: list[int]  # what one side has more than the other, or less than nothing, as `F.pad` wants it


class _WNConv(WeightNormalized):
    """Convolution over `rank` dimensions of space; the weight is `(out, in / groups, *kernel)`."""

    rank: int
    trim: _Trim | None  # made of the mask that the layer is built with

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same", "valid"] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        gain: Gain = "linear",
        init_scale: float = 1.0,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        if padding_mode not in get_args(PaddingMode):
            raise ValueError(f"padding_mode={padding_mode!r}: wanted one of {', '.join(get_args(PaddingMode))}")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding={padding!r}: wanted a number, 'same' or 'valid'")
        if padding == "same" and set(_tuple(stride, self.rank)) != {1}:
            raise ValueError(f"padding='same' keeps the size, stride={stride} does not: give the padding as a number")
        kernel = _tuple(kernel_size, self.rank)
        shape, dims = (out_channels, in_channels // groups, *kernel), tuple(range(1, self.rank + 2))
        super().__init__(shape, dims, out_channels, bias, gain, init_scale, mask, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.dilation = _tuple(stride, self.rank), _tuple(dilation, self.rank)
        self.padding = padding if isinstance(padding, str) else _tuple(padding, self.rank)
        self.groups, self.padding_mode = groups, padding_mode
        self.trim = self._trimming()

    @property
    def fan_ratio(self) -> float:
        return self.in_channels / self.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, ...)` to `(B, out_channels, ...)`."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._padding_by_side(), mode=self.padding_mode), (0,) * self.rank
        if self.trim is None:
            weight = self.weight
        else:
            assert self.mask is not None
            direction = self._direction(self.v[self.trim.seen], self.mask[self.trim.seen])
            weight, padding = normalize(direction, self.length, self.dims), self.trim.padding
            x = F.pad(x, self.trim.excess) if any(self.trim.excess) else x
        return convolve(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _trimming(self) -> _Trim | None:
        """What the mask leaves to be trimmed; None if there is nothing."""
        if self.mask is None or self.mask.is_meta or not bool(self.mask.any()):
            return None
        seen: list[Any] = [...]
        sides = [0] * (2 * self.rank) if self.padding_mode != "zeros" else self._padding_by_side()
        for dim, (size, dilation) in enumerate(zip(self.kernel_size, self.dilation, strict=True)):
            taps = self.mask.movedim(dim + 2, 0).flatten(1).any(dim=1).nonzero()
            first, last = int(taps[0]), int(taps[-1])
            seen.append(slice(first, last + 1))
            left = 2 * (self.rank - 1 - dim)
            sides[left] -= dilation * first
            sides[left + 1] -= dilation * (size - 1 - last)
        if self.mask[tuple(seen)].shape == self.mask.shape:
            return None
        both = [max(0, min(pair)) for pair in zip(sides[::2], sides[1::2], strict=True)]
        excess = [side - both[i // 2] for i, side in enumerate(sides)]
        return _Trim(tuple(seen), tuple(reversed(both)), excess)

    def _padding_by_side(self) -> list[int]:
        """Padding as `F.pad` wants it: last dimension first, two sides each."""
        sides = []
        for dim in reversed(range(self.rank)):
            if self.padding == "same":
                total = self.dilation[dim] * (self.kernel_size[dim] - 1)
                sides += [total // 2, total - total // 2]
            else:
                sides += [0 if self.padding == "valid" else int(self.padding[dim])] * 2
        return sides

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, gain={self.gain}"
        )


class WNConv1d(_WNConv):
    """`nn.Conv1d` with weight normalization, one norm per output channel; arguments as there."""

    rank = 1


class WNConv2d(_WNConv):
    """`nn.Conv2d` with weight normalization, one norm per output channel; arguments as there."""

    rank = 2


class WNConv3d(_WNConv):
    """`nn.Conv3d` with weight normalization, one norm per output channel; arguments as there."""

    rank = 3


class MaskedWNConv2d(WNConv2d):
    """A convolution whose weight is zero where `mask` is, normalized over what is left.

    Rows and columns at the ends of the kernel that the mask hides from all units, such as those after the centre in
    raster order, are not computed.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        mask: zero or one, broadcasts to `(out_channels, in_channels, kernel_height, kernel_width)` and has
            the kernel's two sizes itself.
        stride: step between neighbouring outputs.
        padding: zeros added on each side; `same` keeps height and width.
        bias: whether to add a learned bias.
        gain: `linear` or `exponential` parameterization of g.
        init_scale: standard deviation of the outputs that data-dependent init sets.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mask: Tensor,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same", "valid"] = "same",
        bias: bool = True,
        gain: Gain = "linear",
        init_scale: float = 1.0,
    ) -> None:
        kernel = tuple(mask.shape[-2:])
        super().__init__(
            in_channels, out_channels, kernel, stride, padding, bias=bias, gain=gain, init_scale=init_scale, mask=mask
        )


class WNConvTranspose2d(WeightNormalized):
    """`nn.ConvTranspose2d` with weight normalization, one norm per *output* channel; arguments as there.

    The weight is `(in, out / groups, kernel_height, kernel_width)`; the norm of an output channel runs over
    the inputs of its own group and the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        gain: Gain = "linear",
        init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        kernel = _tuple(kernel_size, 2)
        shape = (in_channels, out_channels // groups, *kernel)
        super().__init__(shape, (0, 2, 3), out_channels, bias, gain, init_scale, None, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.padding = _tuple(stride, 2), _tuple(padding, 2)
        self.output_padding, self.dilation, self.groups = _tuple(output_padding, 2), _tuple(dilation, 2), groups

    def weight_of_length(self, g: Tensor) -> Tensor:
        by_group = self.direction.unflatten(0, (self.groups, -1))  # (groups, in / groups, out / groups, height, width)
        return normalize(by_group, g.view(self.groups, 1, -1, 1, 1), (1, 3, 4)).flatten(0, 1)

    def norm(self, weight: Tensor) -> Tensor:
        by_group = weight.unflatten(0, (self.groups, -1))
        norm = torch.linalg.vector_norm(by_group, dim=(1, 3, 4), dtype=at_least_single(weight.dtype))
        return self.per_unit(norm.flatten())

    @property
    def fan_ratio(self) -> float:
        # An output sees one in so many taps of the kernel as the stride has steps.
        return math.prod(self.stride) * self.in_channels / self.out_channels

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """`(B, in_channels, H, W)` to `(B, out_channels, H', W')`.

        Args:
            x: the input.
            output_size: H' and W', one of those that a stride leaves open, instead of `output_padding`.

        Raises:
            ValueError: an output size that cannot be had.
        """
        padding = self.output_padding if output_size is None else self._padding_for(x, output_size)
        return F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )

    def _padding_for(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """The output padding that gives an output of this height and width."""
        least = [
            (x.shape[dim - 2] - 1) * self.stride[dim]
            - 2 * self.padding[dim]
            + self.dilation[dim] * (self.kernel_size[dim] - 1)
            + 1
            for dim in range(2)
        ]
        padding = tuple(wanted - size for wanted, size in zip(output_size[-2:], least, strict=True))
        if not all(0 <= extra < step for extra, step in zip(padding, self.stride, strict=True)):
            most = [size + step - 1 for size, step in zip(least, self.stride, strict=True)]
            raise ValueError(f"output_size={tuple(output_size)}: height and width can be {least} to {most}")
        return padding

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, output_padding={self.output_padding}, gain={self.gain}"
        )
