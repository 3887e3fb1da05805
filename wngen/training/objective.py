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
        average: turns this process's mean into the mean over all of them. It decides which groups are below the
            floor; gradients are averaged over processes elsewhere.

    Returns:
        A scalar, in nats per image.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), equation 15.
    """
    rate = bound.distortion_nats.new_zeros(())
    for kl in bound.kl_nats:
        groups = kl.mean(dim=0)
        groups = groups.sum(dim=0, keepdim=True) if free_bits_per == "layer" else groups
        if free_bits > 0:
            groups = torch.where(average(groups.detach()) > free_bits, groups, free_bits)
        rate = rate + groups.sum()
    return bound.distortion_nats.mean() + kl_weight * rate
