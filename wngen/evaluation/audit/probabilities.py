"""Claims of every model with a distribution of its pixels: probabilities that sum to 1."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.distributions import PixelDistribution
from wngen.evaluation.audit.claim import Measured, Skipped, Specimen, claimed, standard_errors
from wngen.image import Batch
from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel
from wngen.noise import Noise
from wngen.precision import full_precision

MOST_PROBABILITIES = 2**23  # of levels of sub-pixels, that are computed for one claim
MOST_VALUES = 512  # of a pixel's channels together
MOST_IMAGES = 4096  # of which each can be looked at
REPEATS = 256
MASS_TOLERANCE = 1e-3  # far above the rounding of single precision


@claimed(
    "The probabilities of a sub-pixel's levels sum to 1",
    "of 1",
    "The likelihood is none: mass is lost or counted twice, as by an edge bin that is off by one.",
    at_most=1e-9,
)
def level_probabilities(specimen: Specimen) -> Measured | None:
    """Largest deviation, at the parameters that the model gives to the images, given the channels before."""
    pixels = _pixels(specimen)
    if pixels is None:
        return None
    distribution, x = pixels
    deviation = (moments(distribution, x, specimen.exact.spec.levels).mass - 1).abs()
    return Measured(float(deviation.max()), f"{deviation.numel():,} sub-pixels of {len(x)} images")


@claimed(
    "The probabilities of a pixel's values sum to 1",
    "of 1",
    "Its channels do not depend on each other as their joint distribution says.",
    at_most=1e-9,
)
@torch.no_grad()
def pixel_probabilities(specimen: Specimen) -> Measured | Skipped | None:
    """Largest deviation, summed over all combinations of the channels' levels."""
    spec = specimen.exact.spec
    # Where the network predicts channels from each other, a pixel's channels are given to it as they are.
    by_channel = isinstance(specimen.exact, AutoregressiveModel) and specimen.exact.by_channel
    if spec.channels == 1 or by_channel or (pixels := _pixels(specimen)) is None:
        return None
    if spec.levels**spec.channels > MOST_VALUES:
        return Skipped(f"{spec.levels:,}^{spec.channels} values of a pixel; channel by channel it was measured")
    distribution, x = pixels
    total = torch.zeros(len(x), spec.height, spec.width, dtype=torch.double, device=x.device)
    for value in itertools.product(range(spec.levels), repeat=spec.channels):
        level = torch.tensor(value, dtype=torch.uint8, device=x.device).view(1, -1, 1, 1).expand_as(x)
        total += distribution.log_prob(level).double().sum(dim=1).exp()
    return Measured(float((total - 1).abs().max()), f"{total.numel():,} pixels, {spec.levels**spec.channels} values")


@claimed(
    "The probabilities of all images sum to 1",
    "of 1",
    "The likelihood is none: it counts some of what it predicts twice, or not at all.",
    at_most=1e-9,
)
@torch.no_grad()
def image_probabilities(specimen: Specimen) -> Measured | None:
    """Deviation of the sum, of an exact model whose images are few enough."""
    x = _every_image(specimen)
    if x is None or not specimen.exact.is_exact:
        return None
    y = None if specimen.y is None else specimen.y[:1].expand(len(x))
    return Measured(float((specimen.exact.log_likelihood(x, y).exp().sum() - 1).abs()), f"{len(x):,} images")


@claimed(
    "Estimated probabilities of all images sum to 1",
    "std. errors",
    "The bound is that of no likelihood: a density of the latents is wrong, as by a log-determinant's sign.",
    at_most=4,
)
@torch.no_grad()
def estimated_image_probabilities(specimen: Specimen) -> Measured | None:
    """Deviation of the sum of p(x, z) / q(z | x), whose expectation is 1 if p and q are densities.

    Of a model with latent variables whose images are few enough; z is drawn from q(z | x), anew for each repetition.
    """
    x, model = _every_image(specimen), specimen.exact
    if x is None or not isinstance(model, LatentVariableModel):
        return None
    y = None if specimen.y is None else specimen.y[:1].expand(len(x))
    index = torch.arange(len(x), device=x.device)
    sums = [
        model.log_likelihood(x, y, 1, Noise(specimen.seed * REPEATS + repeat, index)).exp().sum()
        for repeat in range(REPEATS)
    ]
    total = torch.stack(sums)
    return Measured(abs(standard_errors(total - 1)), f"{len(x):,} images: {float(total.mean()):.4f}")


@dataclass(frozen=True)
class Moments:
    """Sums over the levels of each sub-pixel `(B, C, H, W)`, given the channels before it as they are.

    Attributes:
        mass: of p, which is 1.
        entropy: of -p log p, in nats.
        square: of p log^2 p.
    """

    mass: Tensor
    entropy: Tensor
    square: Tensor


@torch.no_grad()
def moments(distribution: PixelDistribution, x: Tensor, levels: int) -> Moments:
    """Of the distributions of `(B, C, H, W)` levels, by running through all levels that images may have."""
    mass, entropy, square = (torch.zeros(x.shape, dtype=torch.double, device=x.device) for _ in range(3))
    for c in range(x.shape[1]):
        for level in range(levels):
            other = x.clone()
            other[:, c] = level
            log_p = distribution.log_prob(other)[:, c].double()
            p = log_p.exp()
            surprise = torch.special.entr(p)
            mass[:, c] += p
            entropy[:, c] += surprise
            square[:, c] -= torch.where(p > 0, surprise * log_p, 0)
    return Moments(mass, entropy, square)


def pixel_distribution(model: LikelihoodModel, x: Tensor, y: Tensor | None) -> PixelDistribution | None:
    """What a model predicts of the pixels of `(B, C, H, W)` levels; None if it has nothing to show."""
    if isinstance(model, AutoregressiveModel):
        return model.distribution(model.predict(model.spec.scale(x, next(model.parameters()).dtype), y))
    if isinstance(model, LatentVariableModel):
        return model.decode(model.represent(x, y), y)
    return None


@torch.no_grad()
def check_mass(model: LikelihoodModel, batch: Batch) -> None:
    """Refuse a model that gives pixels a density in place of probabilities, before anything is measured.

    Args:
        model: in eval mode.
        batch: one image of it is enough, where the model is.

    Raises:
        ValueError: the levels of a sub-pixel do not have probabilities that sum to 1.
    """
    with full_precision(batch.image.device):
        distribution = pixel_distribution(model, batch.image, batch.label)
        if distribution is None:
            return
        mass = moments(distribution, batch.image, model.spec.levels).mass.flatten()
    worst = float(mass[(mass - 1).abs().argmax()])
    if abs(worst - 1) > MASS_TOLERANCE:
        raise ValueError(
            f"the {model.spec.levels} levels of a sub-pixel have probabilities that sum to {worst:.4g}, wanted 1: a "
            "density at the levels is no probability of them, and its bits per dimension mean nothing as long as the "
            "data is not dequantized. Use a likelihood of levels, such as discretized logistics"
        )


def few_enough(specimen: Specimen, n: int) -> int:
    """At most `n` images, at least one, such that the probabilities of all their levels are not too many."""
    spec = specimen.exact.spec
    return max(1, min(n, MOST_PROBABILITIES // (spec.dims * spec.levels * spec.channels)))


@torch.no_grad()
def _pixels(specimen: Specimen) -> tuple[PixelDistribution, Tensor] | None:
    """The distribution that the model gives to pixels of the images, and these; None if it has none to show."""
    x, y, _ = specimen.first(few_enough(specimen, len(specimen.x)))
    distribution = pixel_distribution(specimen.exact, x, y)
    return None if distribution is None else (distribution, x)


def _every_image(specimen: Specimen) -> Tensor | None:
    spec = specimen.exact.spec
    if spec.dims * math.log(spec.levels) > math.log(MOST_IMAGES) + 1e-9:
        return None
    values = list(itertools.product(range(spec.levels), repeat=spec.dims))
    return torch.tensor(values, dtype=torch.uint8, device=specimen.x.device).view(-1, *spec.shape)
