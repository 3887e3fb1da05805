"""Models whose likelihood is known in closed form or by an integral on a grid, for chains to find."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import ladder_zoo
import pytest
import torch
from dependence import jacobian
from gaussian_pixels import PIXEL_STD, GaussianPixels
from torch import Tensor
from torch.distributions import MultivariateNormal

from wngen.evaluation.annealing import Annealed, annealed_importance_sampling
from wngen.image import Batch
from wngen.latent import LatentVariableModel
from wngen.models import ConvVAE
from wngen.nn import data_dependent_init
from wngen.noise import Noise

LEAPFROG_STEPS = 4


@dataclass
class Problem:
    """A model, images, and their exact log-likelihood `(B,)`."""

    model: LatentVariableModel
    x: Tensor
    y: Tensor | None
    exact: Tensor

    def batches(self, size: int | None = None) -> list[Batch]:
        index = torch.arange(len(self.x)) * 3  # a subset of a split
        return [
            Batch(self.x[part], None if self.y is None else self.y[part], index[part])
            for part in torch.arange(len(self.x)).split(size or len(self.x))
        ]

    def annealed(self, steps: int, chains: int, size: int | None = None, **changes: Any) -> Annealed:
        options = {"leapfrog_steps": LEAPFROG_STEPS, "chunk": 10_000} | changes
        return annealed_importance_sampling(self.model, self.batches(size), len(self.x), steps, chains, **options)


def evidence(model: LatentVariableModel) -> MultivariateNormal:
    """Of images whose pixels are Gaussian, with a mean that is affine in the prior's noise."""

    def mean(eps: Tensor) -> Tensor:
        return model.decode(model.prior_at(eps)).mean.flatten(1)

    origin = torch.zeros(1, sum(math.prod(shape) for shape in model.latent_shapes), dtype=torch.float64)
    offset, loadings = mean(origin)[0].detach(), jacobian(mean, origin)
    somewhere = torch.randn_like(origin)
    torch.testing.assert_close(mean(somewhere)[0].detach(), offset + loadings @ somewhere[0], rtol=0, atol=1e-9)
    assert torch.linalg.svdvals(loadings).max() > PIXEL_STD  # the latents matter
    return MultivariateNormal(offset, loadings @ loadings.T + PIXEL_STD**2 * torch.eye(len(offset)).double())


def of_gaussian_pixels(model: LatentVariableModel) -> Problem:
    exact = evidence(model)
    x = exact.sample((7,)).round().clamp(0, 15).byte().view(7, *model.spec.shape)
    return Problem(model, x, None, exact.log_prob(x.flatten(1).double()))


def component_analysis(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """Probabilistic principal component analysis (Tipping & Bishop, 1999), as a VAE without nonlinearities."""
    monkeypatch.setattr("wngen.models.conv_vae.elu", lambda x: x)
    sizes = {"height": 3, "width": 2, "latent_dim": 3, "widths": (4,), "blocks": 0, "hidden": 6}
    model = ConvVAE(**sizes, levels=16, likelihood="discretized_logistic", posterior="diagonal").double()
    with torch.no_grad():
        model.decoder.output.g.mul_(6)
        model.decoder.output.bias.fill_(8)
    model.decode = lambda z, y=None: GaussianPixels(model.decoder(z, y)[..., 0])
    return of_gaussian_pixels(model)


def hierarchy(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """The same with two layers of latent variables, the lower of which has a prior that depends on the upper."""
    monkeypatch.setattr("wngen.models.resnet_vae.elu", lambda x: x)
    monkeypatch.setattr("wngen.stochastic.elu", lambda x: x)
    sizes = {"height": 3, "width": 2, "levels": 16, "layers": "2x1, 1x1", "residual_scale": 1.0}
    model = ladder_zoo.tiny(**sizes, posterior="diagonal", likelihood="discretized_logistic")
    for down in model.top_down:
        ladder_zoo.silence(down.first, slice(2, 4), bias=None)
    with torch.no_grad():
        model.output.g.mul_(80)
        model.output.bias.fill_(8)
    model.likelihood = lambda predicted, log_scale: GaussianPixels(predicted)
    return of_gaussian_pixels(model)


def binary(_: pytest.MonkeyPatch | None = None) -> Problem:
    """2 x 2 binary pixels, all sixteen images, two latent variables with an autoregressive prior, and classes."""
    sizes = {"height": 2, "width": 2, "latent_dim": 2, "widths": (4,), "blocks": 1, "hidden": 10, "iaf_width": 8}
    model = ConvVAE(**sizes, prior="autoregressive", posterior="diagonal", num_classes=2).double()
    x = torch.tensor(list(itertools.product([0, 1], repeat=4)), dtype=torch.uint8).view(16, 1, 2, 2)
    y = torch.arange(16) % 2
    data_dependent_init(model, x, y, Noise(7, torch.arange(16)))
    with torch.no_grad():
        model.decoder.output.g.mul_(3)
    return Problem(model, x, y, on_a_grid(model, x, y))


@torch.no_grad()
def on_a_grid(model: ConvVAE, x: Tensor, y: Tensor) -> Tensor:
    """The integral over both latents by the trapezoid rule, `(B,)`."""
    axis = torch.linspace(-9, 9, 181, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    log_mass = model.log_prior(z) + 2 * math.log(axis[1] - axis[0])
    assert log_mass.logsumexp(dim=0).abs() < 1e-6
    decoded = [model.decode(z, torch.full((len(z),), label)) for label in range(2)]
    log_p = [decoded[label].log_prob(image).flatten(1).sum(dim=1) for image, label in zip(x, y.tolist(), strict=True)]
    return (torch.stack(log_p) + log_mass).logsumexp(dim=1)


PROBLEMS = [component_analysis, hierarchy, binary]


def all_accepted(energy_lost: Tensor) -> Tensor:
    return torch.ones_like(energy_lost)
