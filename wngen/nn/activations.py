"""The exponential linear unit and its two-sided form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wngen.nn.tracing import being_traced


class _FastELU(torch.autograd.Function):
    """exp(x) - 1 in single precision stands for expm1, which torch evaluates one element at a time on CPUs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        y = _elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.addcmul(grad, grad, y.clamp(max=0))


def elu(x: Tensor) -> Tensor:
    """x where positive, exp(x) - 1 elsewhere (Clevert et al., 2016); on a CPU several times faster than torch's."""
    if x.device.type != "cpu" or being_traced():
        return F.elu(x)
    return _FastELU.apply(x) if torch.is_grad_enabled() and x.requires_grad else _elu(x)


def _elu(x: Tensor) -> Tensor:
    exponential = x.clamp(max=0).to(torch.promote_types(x.dtype, torch.float32)).exp_().sub_(1)
    return torch.maximum(x, exponential.to(x.dtype))


class _FastConcatELU(torch.autograd.Function):
    """One exponential serves both halves: of x and -x it is the negative one that it is wanted of."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        y = _concat_elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x, of_minus_x = torch.addcmul(grad, grad, y.clamp(max=0)).chunk(2, dim=1)
        return of_x - of_minus_x


def concat_elu(x: Tensor) -> Tensor:
    """elu of x and of -x, side by side: `(B, C, ...)` to `(B, 2C, ...)` (PixelCNN++, Salimans et al. 2017)."""
    if x.device.type != "cpu" or being_traced():
        return F.elu(torch.cat([x, -x], dim=1))
    return _FastConcatELU.apply(x) if torch.is_grad_enabled() and x.requires_grad else _concat_elu(x)


def _concat_elu(x: Tensor) -> Tensor:
    negative = x.abs().neg_().to(torch.promote_types(x.dtype, torch.float32)).exp_().sub_(1).to(x.dtype)
    return torch.cat([torch.maximum(x, negative), torch.maximum(-x, negative)], dim=1)
