"""Hamiltonian Monte Carlo in the space of a prior's noise, for many images and chains at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wngen.latent import LatentVariableModel
from wngen.noise import Noise

JITTER = 0.2  # of step sizes, so that no trajectory is a whole period of its target (Neal, 2011, section 3.2)


class Position(NamedTuple):
    """Where chains are, one row for each.

    Attributes:
        eps: `(R, Z)`, in the prior's noise.
        log_likelihood: `(R,)` float64, log p(x | z(eps)).
        gradient: `(R, Z)`, of that in eps.
    """

    eps: Tensor
    log_likelihood: Tensor
    gradient: Tensor

    def energy(self, momentum: Tensor, beta: float) -> Tensor:
        """`(R,)` float64, minus the log density of position and momentum, up to a constant.

        The density of the position is N(eps; 0, 1) p(x | z(eps))^beta.
        """
        gaussian = self.eps.double().square().sum(dim=1) + momentum.double().square().sum(dim=1)
        return 0.5 * gaussian - beta * self.log_likelihood

    def force(self, beta: float) -> Tensor:
        """`(R, Z)`, the gradient of the position's log density."""
        return beta * self.gradient - self.eps


class ImageLikelihood:
    """log p(x | z(eps)) of a batch of images, of each for any number of chains.

    Args:
        model: in eval mode.
        x: `(B, C, H, W)` uint8 levels.
        y: `(B,)` integer classes; only for a conditional model.
        chunk: chains that go through the model at once.
        count: what to call with the number of chains that went through it.
    """

    def __init__(
        self, model: LatentVariableModel, x: Tensor, y: Tensor | None, chunk: int, count: Callable[[int], None]
    ) -> None:
        self.model, self.x, self.y, self.chunk, self.count = model, x, y, chunk, count

    def at(self, eps: Tensor) -> Position:
        """Of noise `(k b, Z)`: the chain changes slowest."""
        log_likelihoods: list[Tensor] = []
        gradients: list[Tensor] = []
        for rows in torch.arange(len(eps), device=eps.device).split(self.chunk):
            image = rows % len(self.x)
            y = None if self.y is None else self.y[image]
            with torch.enable_grad():
                leaf = eps[rows].requires_grad_()
                log_p = self.model.decode(self.model.prior_at(leaf, y), y).log_prob(self.x[image])
                log_likelihood = log_p.double().flatten(1).sum(dim=1)
                gradients += torch.autograd.grad(log_likelihood.sum(), leaf)
            log_likelihoods.append(log_likelihood.detach())
            self.count(len(rows))
        return Position(eps, torch.cat(log_likelihoods), torch.cat(gradients))


def leapfrog(
    likelihood: ImageLikelihood, start: Position, momentum: Tensor, beta: float, step_size: Tensor, steps: int
) -> tuple[Position, Tensor]:
    """Follow the Hamiltonian dynamics: the position and the momentum `(R, Z)` at the end.

    Args:
        likelihood: of the images.
        start: where the chains are.
        momentum: `(R, Z)`.
        beta: exponent of the likelihood.
        step_size: `(R, 1)`.
        steps: how many.
    """
    end, momentum = start, momentum + 0.5 * step_size * start.force(beta)
    for i in range(steps):
        end = likelihood.at(end.eps + step_size * momentum)
        momentum = momentum + (1.0 if i < steps - 1 else 0.5) * step_size * end.force(beta)
    return end, momentum


def acceptance(energy_lost: Tensor) -> Tensor:
    """The probability of Metropolis; a proposal that is not finite is refused."""
    return energy_lost.nan_to_num(nan=-math.inf).clamp(max=0).exp()


def transition(
    likelihood: ImageLikelihood, at: Position, beta: float, step_size: Tensor, noise: Noise, leapfrog_steps: int
) -> tuple[Position, Tensor]:
    """A transition that leaves the density of the positions as it is.

    Args:
        likelihood: of the images.
        at: where the chains are.
        beta: exponent of the likelihood.
        step_size: `(R,)`, before jitter.
        noise: of the chains.
        leapfrog_steps: how many.

    Returns:
        Where they are then, and the probability `(R,)` with which each proposal was accepted.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), section 3.2.
    """
    momentum = noise.normal(at.eps.shape[1]).to(at.eps)
    jittered = step_size * (1 + JITTER * (2 * noise.uniform() - 1))
    end, final = leapfrog(likelihood, at, momentum, beta, jittered[:, None].to(at.eps), leapfrog_steps)
    probability = acceptance(at.energy(momentum, beta) - end.energy(final, beta))
    is_accepted = noise.uniform() < probability
    eps, gradient = (
        torch.where(is_accepted[:, None], new, old) for new, old in ((end.eps, at.eps), (end.gradient, at.gradient))
    )
    return Position(eps, torch.where(is_accepted, end.log_likelihood, at.log_likelihood), gradient), probability
