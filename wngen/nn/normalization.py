"""The weight g v / ||v||, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wngen.nn.tracing import being_traced


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


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or single precision if that is more."""
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
