"""What training minimizes: the negative bound, with free bits and KL warm-up where they are asked for.

Objectives are made from a `Bound` and never mixed into it, so what is reported stays the true bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from wngen.model import Bound

FreeBitsGroup = Literal["layer", "channel"]


def objective_nats(
    bound: Bound,
    kl_weight: float = 1.0,
    free_bits: float = 0.0,
    free_bits_per: FreeBitsGroup = "channel",
    average: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> Tensor:
    """The mean over the batch of distortion + kl_weight * rate, each group's rate floored at `free_bits`.

    The floor acts on a group's mean over the batch, so that single images may use less: for each group j
    max(free_bits, mean KL_j). Below it the group adds a constant and has no gradient.

    Args:
        bound: of a batch.
        kl_weight: 1 for the bound itself, less during KL warm-up.
        free_bits: the floor of each group, in nats; 0 for none.
        free_bits_per: whether a group is a stochastic layer or one channel of it.
        average: turns this process's mean of each group into that over all processes, which decides what groups are
            below the floor; gradients are averaged over processes elsewhere.

    Returns:
        A scalar, in nats per image.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), equation 15.
    """
    layers = [kl.mean(dim=0) for kl in bound.kl_nats]
    if free_bits_per == "layer":
        layers = [channels.sum(dim=0, keepdim=True) for channels in layers]
    groups = torch.cat([bound.distortion_nats.new_zeros(0), *layers])
    if free_bits > 0 and len(groups):
        groups = torch.where(average(groups.detach()) > free_bits, groups, free_bits)
    return bound.distortion_nats.mean() + kl_weight * groups.sum()
