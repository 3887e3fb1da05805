"""Hamiltonian transitions: reversible, true to their target, with the gradients of the densities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from annealing_zoo import LEAPFROG_STEPS, Problem, all_accepted, component_analysis
from dependence import jacobian
from gaussian_pixels import PIXEL_STD
from torch import Tensor
from torch.distributions import MultivariateNormal

from wngen.evaluation.annealing import hamiltonian
from wngen.evaluation.annealing.hamiltonian import ImageLikelihood, leapfrog, transition
from wngen.noise import Noise


@dataclass
class GaussianPosterior:
    """What all chains of the first image of a problem with Gaussian pixels should be distributed as."""

    likelihood: ImageLikelihood
    target: MultivariateNormal

    @classmethod
    def of(cls, problem: Problem, beta: float) -> GaussianPosterior:
        model, x = problem.model, problem.x[:1]
        origin = torch.zeros(1, 3, dtype=torch.float64)
        loadings = jacobian(lambda eps: model.decode(eps).mean.flatten(1), origin)
        precision = torch.eye(3).double() + beta * loadings.T @ loadings / PIXEL_STD**2
        residual = x.flatten().double() - model.decode(origin).mean.flatten().detach()
        mean = torch.linalg.solve(precision, beta * loadings.T @ residual / PIXEL_STD**2)
        likelihood = ImageLikelihood(model, x, None, 100_000, lambda chains: None)
        return cls(likelihood, MultivariateNormal(mean, precision_matrix=precision))

    def surprise(self, eps: Tensor) -> float:
        """Of chains `(R, Z)`: the largest deviation of a first or second moment, in standard errors."""
        white = torch.linalg.solve_triangular(
            self.target.scale_tril, (eps - self.target.mean).T, upper=False
        )  # (Z, R), standard normal
        products = torch.stack([white[i] * white[j] - float(i == j) for i in range(3) for j in range(i + 1)])
        moments = torch.cat([white, products])
        return float((moments.mean(dim=1) / (moments.std(dim=1) / math.sqrt(len(eps)))).abs().max())


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_a_transition_leaves_its_target_as_it_is(beta: float, monkeypatch: pytest.MonkeyPatch):
    chains = 20_000
    posterior = GaussianPosterior.of(component_analysis(monkeypatch), beta)
    shortest = torch.linalg.eigvalsh(posterior.target.covariance_matrix).min().sqrt()

    def after_transitions() -> tuple[Tensor, Tensor]:
        noise = Noise(1, torch.arange(chains))
        at = posterior.likelihood.at(posterior.target.sample((chains,)))
        moved = at
        for _ in range(3):
            step_sizes = (1.3 * shortest).expand(chains)
            moved, probability = transition(posterior.likelihood, moved, beta, step_sizes, noise, LEAPFROG_STEPS)
        assert ((moved.eps - at.eps).norm(dim=1) > 0.5 * shortest).double().mean() > 0.5  # they move
        return moved.eps, probability

    eps, probability = after_transitions()
    assert probability.mean() < 0.97
    assert posterior.surprise(eps) < 4
    monkeypatch.setattr(hamiltonian, "acceptance", all_accepted)
    assert posterior.surprise(after_transitions()[0]) > 8


def test_leapfrog_steps_are_reversible_keep_volume_and_nearly_keep_energy(problem: Problem):
    model, x, y = problem.model, problem.x[:1], None if problem.y is None else problem.y[:1]
    size = sum(math.prod(shape) for shape in model.latent_shapes)
    likelihood = ImageLikelihood(model, x, y, 100, lambda chains: None)
    step_size = torch.full((1, 1), 0.1, dtype=torch.float64)

    def flow(both: Tensor) -> Tensor:
        end, momentum = leapfrog(likelihood, likelihood.at(both[:1]), both[1:], 0.7, step_size, 3)
        return torch.cat([end.eps, momentum])

    start = torch.randn(2, size, dtype=torch.float64)
    end = flow(start)
    turned = torch.cat([end[:1], -end[1:]])
    torch.testing.assert_close(flow(turned) * torch.tensor([[1.0], [-1.0]]), start, rtol=0, atol=1e-10)
    shifts = 1e-5 * torch.eye(2 * size, dtype=torch.float64).view(-1, 2, size)
    rows = [(flow(start + shift) - flow(start - shift)).flatten() / 2e-5 for shift in shifts]
    assert abs(torch.stack(rows).slogdet().logabsdet) < 1e-6
    energies = []
    for steps in (4, 8):
        at, momentum = likelihood.at(start[:1]), start[1:]
        moved, final = leapfrog(likelihood, at, momentum, 0.7, step_size * 0.4 / steps, steps)
        energies.append(float((moved.energy(final, 0.7) - at.energy(momentum, 0.7)).abs()))
    assert energies[0] == pytest.approx(4 * energies[1], rel=0.3)  # an error of second order


def test_the_gradient_and_the_force_are_those_of_the_densities(problem: Problem):
    model, x, y = problem.model, problem.x[:2], None if problem.y is None else problem.y[:2]
    likelihood = ImageLikelihood(model, x, y, 3, lambda chains: None)
    eps = torch.randn(4, sum(math.prod(shape) for shape in model.latent_shapes), dtype=torch.float64)
    at, direction = likelihood.at(eps), torch.randn_like(eps)
    ahead, behind = (likelihood.at(eps + shift * direction) for shift in (1e-5, -1e-5))
    rise = (ahead.log_likelihood - behind.log_likelihood) / 2e-5
    torch.testing.assert_close((at.gradient * direction).sum(dim=1), rise, rtol=1e-5, atol=1e-6)
    still = torch.zeros_like(eps)
    fall = (behind.energy(still, 0.3) - ahead.energy(still, 0.3)) / 2e-5
    torch.testing.assert_close((at.force(0.3) * direction).sum(dim=1), fall, rtol=1e-5, atol=1e-6)
