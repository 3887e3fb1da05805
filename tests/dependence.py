"""Networks with random parameters, and the derivatives that tell what depends on what in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

CONTEXT_DIM = 3
Module = TypeVar("Module", bound=nn.Module)


def generic(module: Module, dtype: torch.dtype = torch.float64) -> Module:
    """The module with random parameters, none of them zero, so that no dependence is hidden by chance."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand_like(parameter).add(0.5) * torch.randn_like(parameter).sign())
    return module.to(dtype)


def draw(
    batch_size: int, dim: int, context_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    """Variables and a context."""
    context = torch.randn(batch_size, context_dim, dtype=dtype) if context_dim else None
    return torch.randn(batch_size, dim, dtype=dtype), context


def draw_maps(
    batch_size: int, shape: tuple[int, int, int], context_channels: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    """Variables `(B, *shape)` and a context of the same height and width."""
    context = torch.randn(batch_size, context_channels, *shape[1:], dtype=dtype) if context_channels else None
    return torch.randn(batch_size, *shape, dtype=dtype), context


def jacobian(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """`(..., Z)`, the derivatives of a function at `(1, ...)` of Z elements, whose rows do not know of each other.

    The batch has one copy of `z` for each result, so that one pass back is enough for all of them.
    """
    shape = function(z)[0].shape
    rows = z.detach().expand(shape.numel(), *z.shape[1:]).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(rows).flatten(1).diagonal().sum(), rows)
    return gradient.reshape(*shape, -1)
