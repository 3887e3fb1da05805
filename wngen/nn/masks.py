"""Masks that make a network autoregressive."""

from __future__ import annotations

import torch
from torch import Tensor


def made_degrees(dim: int, hidden: list[int], order: Tensor, context: bool) -> list[Tensor]:
    """The degrees of inputs and hidden units: a unit of degree d sees the first d variables in the order.

    Args:
        dim: number of variables.
        hidden: width of each hidden layer.
        order: `(dim,)`, the place of each variable, a permutation of 0 to dim - 1.
        context: whether the hidden units see a context too. Then there are units of degree 0, which see
            nothing else, so that the context reaches the first variable through the hidden layers.

    Returns:
        Degrees of the inputs (1 to dim), then of each hidden layer.

    References:
        MADE: masked autoencoder for distribution estimation (Germain et al., 2015), section 4.
    """
    lowest = 0 if context or dim == 1 else 1
    return [order + 1, *(torch.linspace(lowest, dim - 1, width).round().long() for width in hidden)]


def made_mask(outputs: Tensor, inputs: Tensor, strict: bool = False) -> Tensor:
    """`(len(outputs), len(inputs))`: 1 where an output may see an input.

    Args:
        outputs: degrees of the layer's outputs.
        inputs: degrees of its inputs.
        strict: an output sees only inputs of a lower degree, not of its own: for the last layer.
    """
    return (outputs[:, None] > inputs) if strict else (outputs[:, None] >= inputs)


def causal_mask(centre: Tensor, kernel_size: int, reverse: bool = False) -> Tensor:
    """`(outputs, inputs, kernel_size, kernel_size)`: 1 at the places before the centre in raster order.

    Args:
        centre: `(outputs, inputs)`, which inputs an output may see at its own place.
        kernel_size: odd.
        reverse: whether the order runs from the last place to the first.
    """
    middle = kernel_size // 2
    before = (torch.arange(kernel_size**2) < kernel_size**2 // 2).view(kernel_size, kernel_size)
    mask = (before.flip(0, 1) if reverse else before).repeat(*centre.shape, 1, 1)
    mask[:, :, middle, middle] = centre
    return mask
