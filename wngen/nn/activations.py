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
        exponential = x.clamp(max=0).to(torch.promote_types(x.dtype, torch.float32)).exp_().sub_(1)
        y = F.relu(x).add_(exponential.to(x.dtype))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.addcmul(grad, grad, y.clamp(max=0))


def elu(x: Tensor) -> Tensor:
    """x where positive, exp(x) - 1 elsewhere (Clevert et al., 2016); on a CPU several times faster than torch's."""
    return _FastELU.apply(x) if x.device.type == "cpu" and not being_traced() else F.elu(x)


def concat_elu(x: Tensor) -> Tensor:
    """elu of x and of -x, side by side: `(B, C, ...)` to `(B, 2C, ...)` (PixelCNN++, Salimans et al. 2017)."""
    return elu(torch.cat([x, -x], dim=1))
