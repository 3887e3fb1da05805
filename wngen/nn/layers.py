"""Linear and convolutional layers with weight normalization: weight = g v / ||v||, one g per output unit.

A simple reparameterization to accelerate training of deep neural networks (Salimans & Kingma, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.nn.tracing import being_traced

Gain = Literal["linear", "exponential"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def normalize(v: Tensor, g: Tensor, dims: tuple[int, ...]) -> Tensor:
    """g v / ||v||, the norm taken over `dims` in at least single precision (equation 2).

    A row of zeros gives a weight of zeros and no gradient, where the formula has 0 / 0. No constant is
    added to the norm, so ||weight|| = |g| holds exactly.

    Args:
        v: the direction, of any length.
        g: the length, 1 along each of `dims`.
        dims: all dimensions of `v` but the output units'.

    Returns:
        The weight in the memory format of `v`.
    """
    if v.dtype.itemsize < 4:
        return normalize(v.float(), g.float(), dims).to(v.dtype)
    if v.numel() and dims == _all_but_first(v) and (v.is_cpu or v.is_cuda) and not being_traced():
        return _Normalize.apply(v, g)
    return v * (g / _norm_or_infinity(v, dims))


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _all_but_first(v: Tensor) -> tuple[int, ...]:
    return tuple(range(1, v.dim()))


def _norm_or_infinity(v: Tensor, dims: tuple[int, ...]) -> Tensor:
    """||v|| over `dims`, which are kept; infinity for a row of zeros, so that what is divided by it vanishes."""
    square = v.square().sum(dims, keepdim=True)  # vector_norm's second derivative is NaN at 0
    return square.masked_fill(square == 0, math.inf).sqrt()


class _Normalize(torch.autograd.Function):
    """`normalize` over all dimensions but the first, by torch's fused kernels: less than half the time.

    They give NaN for a row of zeros, take contiguous tensors only, and are wrong in their second derivative.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        weight, norm = torch._weight_norm_interface(_rows(v, v), g, 0)
        # A GPU would have to be waited for to tell whether there is a row of zeros.
        if norm.is_cuda or not norm.min():
            zero = norm == 0
            weight.masked_fill_(zero, 0)
            norm.masked_fill_(zero, math.inf)
        ctx.save_for_backward(v, g, norm)
        return _from_rows(weight, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, g, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # equation 3, where its own gradient is wanted
            dims = _all_but_first(v)
            norm = _norm_or_infinity(v, dims)
            grad_g = (grad * v).sum(dims, keepdim=True) / norm
            return g / norm * grad - g * grad_g / norm**2 * v, grad_g
        backward = torch.ops.aten._weight_norm_interface_backward.default
        grad_v, grad_g = backward(_rows(grad, v), _rows(v, v), g, norm, 0)
        return _from_rows(grad_v, v), grad_g


def _rows(t: Tensor, v: Tensor) -> Tensor:
    """`t` in such an order of dimensions that it is contiguous if it has the memory format of `v`."""
    return (t if v.is_contiguous() else t.movedim(1, -1)).contiguous()


def _from_rows(t: Tensor, v: Tensor) -> Tensor:
    """What `_rows` gives, back in the order of `v`."""
    if not v.is_contiguous():
        return t.movedim(-1, 1)
    # With one input channel, or a 1 x 1 kernel, the strides alone tell channels_last from the usual format.
    return t if t.stride() == v.stride() else t.as_strided(v.shape, v.stride())


class WeightNormalized(nn.Module):
    """What all weight-normalized layers share: the parameters `v`, `g` and `bias`, and the weight made of them.

    With `gain="exponential"` the parameter is `log_g`, and there is no `g`.

    Args:
        shape: of the weight.
        dims: the dimensions over which the norm runs, all but the output units'.
        out_features: length of the bias.
        bias: whether there is one.
        gain: `linear` keeps g itself as a parameter, `exponential` its logarithm `log_g`, so that g stays
            positive and an optimizer's step multiplies it.
        init_scale: standard deviation of the pre-activations that data-dependent init sets.
        mask: zeros where the weight is to be zero; it broadcasts to `shape` and acts before the norm.

    Raises:
        ValueError: an unknown gain, or a mask that does not fit.
    """

    v: nn.Parameter
    g: nn.Parameter
    log_g: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor | None
    lone: Tensor | None  # which units have a single input
    initialized: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        dims: tuple[int, ...],
        out_features: int,
        bias: bool,
        gain: Gain,
        init_scale: float,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gain not in ("linear", "exponential"):
            raise ValueError(f"gain={gain!r}: wanted 'linear' or 'exponential'")
        self.dims, self.gain, self.init_scale = dims, gain, init_scale
        self.v = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        length = [1 if dim in dims else out_features for dim in range(len(shape))]
        g = nn.Parameter(torch.empty(*length, device=device, dtype=dtype))
        self.register_parameter("g" if gain == "linear" else "log_g", g)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        if mask is not None:
            try:
                mask = mask.to(self.v).expand(*shape).clone()
            except RuntimeError:
                raise ValueError(
                    f"a mask of shape {tuple(mask.shape)} does not broadcast to the weight's {tuple(shape)}"
                ) from None
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("lone", self._units_of_one_input(out_features), persistent=False)
        # Persistent, so that neither a resumed run nor a released model is ever initialized again.
        self.register_buffer("initialized", torch.tensor(False, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """v from N(0, 0.05^2) as in the paper, g = 1 and bias = 0, not yet initialized from data."""
        nn.init.normal_(self.v, std=0.05)
        nn.init.constant_(self.gain_parameter, 1 if self.gain == "linear" else 0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.initialized.fill_(False)

    @property
    def gain_parameter(self) -> nn.Parameter:
        """`g` or `log_g`, whichever there is."""
        return self.g if self.gain == "linear" else self.log_g

    @property
    def length(self) -> Tensor:
        """g, the norm of each output unit's weight, 1 along the dimensions it is taken over."""
        return self.g if self.gain == "linear" else self.log_g.exp()

    def _units_of_one_input(self, out_features: int) -> Tensor | None:
        """Which there are, in a shape that goes with v's; None if there are none."""
        if self.mask is None:
            return torch.ones((), dtype=torch.bool, device=self.v.device) if self.v.numel() == out_features else None
        if self.mask.is_meta:
            return None
        lone = (self.mask != 0).sum(self.dims, keepdim=True) == 1
        return lone if bool(lone.any()) else None

    @property
    def direction(self) -> Tensor:
        """v, or v under the mask.

        That of a unit with a single input is a sign, and cannot turn. Its v has no gradient but rounding errors, which
        Adam would magnify to full steps, until the sign jumps; so it gets none.
        """
        v = self.v if self.lone is None else torch.where(self.lone, self.v.detach(), self.v)
        return v if self.mask is None else v * self.mask

    @property
    def weight(self) -> Tensor:
        """The effective weight g v / ||v||."""
        return self.weight_of_length(self.length)

    def weight_of_length(self, g: Tensor) -> Tensor:
        """The weight for another g, of the same shape."""
        return normalize(self.direction, g, self.dims)

    def norm(self, weight: Tensor) -> Tensor:
        """The norm of each output unit's weight, in the shape of g."""
        return torch.linalg.vector_norm(weight, dim=self.dims, keepdim=True, dtype=_at_least_single(weight.dtype))

    @torch.no_grad()
    def set_length(self, g: Tensor) -> None:
        """Set g, whichever way it is parameterized.

        Raises:
            ValueError: a negative or zero length for an exponential gain.
        """
        if self.gain == "linear":
            self.g.copy_(g)
        elif bool((g > 0).all()):
            self.log_g.copy_(g.log())
        else:
            raise ValueError(f"an exponential gain cannot hold g = {g.min():.3g}: use gain='linear'")

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Choose v and g such that the effective weight is this one, as far as the mask lets it through.

        A row of zeros gets g = 0 and keeps its direction, so that it can still learn.

        Raises:
            ValueError: another shape, or a row of zeros for an exponential gain.
        """
        if weight.shape != self.v.shape:
            raise ValueError(f"the weight has shape {tuple(weight.shape)}, the layer wants {tuple(self.v.shape)}")
        norm = self.norm(weight)
        if self.mask is not None:
            weight = weight * self.mask
            norm = torch.where(self.norm(self.mask) > 0, self.norm(weight), self.length)
        self.set_length(norm)
        self.v.copy_(weight + self.weight_of_length((norm == 0).to(self.v.dtype)))

    @property
    def fan_ratio(self) -> float:
        """fan_in / fan_out: the numbers of inputs that an output sees, and of outputs that see an input."""
        raise NotImplementedError

    def per_unit(self, values: Tensor) -> Tensor:
        """Values of the output units `(out,)` in the shape of g."""
        return values.view_as(self.gain_parameter)


class WNLinear(WeightNormalized):
    """`nn.Linear` with weight normalization.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether to add a learned bias.
        gain: `linear` or `exponential` parameterization of g.
        init_scale: standard deviation of the outputs that data-dependent init sets.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gain: Gain = "linear",
        init_scale: float = 1.0,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), (1,), out_features, bias, gain, init_scale, mask, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @property
    def fan_ratio(self) -> float:
        return self.in_features / self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, gain={self.gain}"


class MaskedWNLinear(WNLinear):
    """A linear layer whose weight is zero where `mask` is, normalized over what is left.

    Args:
        mask: `(out_features, in_features)`, zero or one.
        bias: whether to add a learned bias.
        gain: `linear` or `exponential` parameterization of g.
        init_scale: standard deviation of the outputs that data-dependent init sets.
    """

    def __init__(self, mask: Tensor, bias: bool = True, gain: Gain = "linear", init_scale: float = 1.0) -> None:
        if mask.dim() != 2:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, wanted (out_features, in_features)")
        super().__init__(mask.shape[1], mask.shape[0], bias, gain, init_scale, mask)


def _tuple(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


class _WNConv(WeightNormalized):
    """Convolution over `rank` dimensions of space; the weight is `(out, in / groups, *kernel)`."""

    rank: int

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

    @property
    def fan_ratio(self) -> float:
        return self.in_channels / self.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, ...)` to `(B, out_channels, ...)`."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        if self.padding_mode == "zeros":
            return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = F.pad(x, self._padding_by_side(), mode=self.padding_mode)
        return convolve(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

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
        norm = torch.linalg.vector_norm(by_group, dim=(1, 3, 4), dtype=_at_least_single(weight.dtype))
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
