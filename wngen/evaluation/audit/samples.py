"""Claims on what a model draws: images, and as probable as it says."""

from __future__ import annotations

import torch
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.distributions import PixelDistribution
from wngen.evaluation.audit.claim import Measured, Specimen, claimed
from wngen.evaluation.audit.probabilities import few_enough, moments
from wngen.latent import LatentVariableModel
from wngen.noise import Noise

DRAWN = 16
IMPORTANCE_SAMPLES = 8
BRIGHTNESS = 256


@claimed(
    "Samples are images",
    "faults",
    "What is drawn is of another shape or type, or of levels that no image has.",
    at_most=0,
)
def sample_form(specimen: Specimen) -> Measured:
    """Wrong shape or dtype, and sub-pixels out of range."""
    drawn, spec = _samples(specimen), specimen.model.spec
    level = drawn.double()  # of uint8 none would be below 256
    outside = ~((level >= 0) & (level < spec.levels))
    faults = int(drawn.shape != (DRAWN, *spec.shape)) + int(drawn.dtype != torch.uint8) + int(outside.sum())
    kind = str(drawn.dtype).removeprefix("torch.")
    return Measured(faults, f"{' x '.join(map(str, drawn.shape))} {kind}, levels {drawn.min()} to {drawn.max()}")


@claimed(
    "Samples are as surprising as the model expects",
    "std. errors",
    "What `sample` draws does not follow the distributions that the likelihood is made of.",
    at_most=4,
)
@torch.no_grad()
def surprise(specimen: Specimen) -> Measured | None:
    """Deviation of -log p of drawn pixels from the entropies of their distributions, given all that they depend on.

    Of an autoregressive model a drawn image's -log p(x) and the sum of its pixels' conditional entropies have the same
    expectation, and their difference the sum of the pixels' variances, as it is a martingale: so the standard error is
    known and not estimated. Of a model with latent variables the same is true of pixels given latents from the prior.
    """
    model = specimen.exact
    if isinstance(model, AutoregressiveModel):
        x = _samples(specimen)[: few_enough(specimen, DRAWN)]
        _, y = specimen.repeated(len(x))
        distribution = model.distribution(model.predict(model.spec.scale(x, torch.double), y))
    elif isinstance(model, LatentVariableModel):
        distribution, x, _ = _simulated(specimen, model, few_enough(specimen, DRAWN))
    else:
        return None
    sums = moments(distribution, x, model.spec.levels)
    nats, expected = -distribution.log_prob(x).double(), sums.entropy
    variance = (sums.square - expected.square()).clamp(min=0).sum()
    difference, per_image = (nats - expected).sum(), len(x)
    detail = f"{nats.sum() / per_image:.2f} against {expected.sum() / per_image:.2f} nats, {len(x)} images"
    if variance == 0:  # nothing is random
        return Measured(0.0 if difference == 0 else torch.inf, detail)
    return Measured(float(difference.abs() / variance.sqrt()), detail)


@claimed(
    "Samples are as bright as latents from the prior decode to",
    "std. errors",
    "`sample` draws other latents than `prior`, or other pixels than `decode` says.",
    at_most=4,
)
@torch.no_grad()
def brightness(specimen: Specimen) -> Measured | None:
    """Deviation of the mean level of samples from the mean expected level, of independent latents."""
    model = specimen.exact
    if not isinstance(model, LatentVariableModel):
        return None
    _, y = specimen.repeated(BRIGHTNESS)
    drawn = specimen.model.sample(BRIGHTNESS, y, generator=specimen.generator(1)).double().flatten(1).mean(dim=1)
    _, _, expected = _simulated(specimen, model, BRIGHTNESS)
    error = ((drawn.var() + expected.var()) / BRIGHTNESS).sqrt()
    difference = drawn.mean() - expected.mean()
    detail = f"levels {drawn.mean():.4f} against {expected.mean():.4f}, {BRIGHTNESS} images each"
    if error == 0:
        return Measured(0.0 if difference.abs() < 1e-9 else torch.inf, detail)
    return Measured(float(difference.abs() / error), detail)


@claimed(
    "Drawn images' bound stays below their likelihood given z",
    "std. errors",
    "The bound is too good: the images that a model draws cannot be likelier than their true latents make them.",
    at_most=4,
)
@torch.no_grad()
def simulated_bound(specimen: Specimen) -> Measured | None:
    """How far the mean bound of drawn images lies above that of log p(x | z), with the z that they were drawn from.

    Over the model's own (x, z), E log p(x | z) - E log p(x) is the information that latents have of images, which is
    not negative, and no bound is above log p(x) in expectation.
    """
    model = specimen.exact
    if not isinstance(model, LatentVariableModel):
        return None
    distribution, x, _ = _simulated(specimen, model, DRAWN)
    _, y = specimen.repeated(DRAWN)
    given = distribution.log_prob(x).double().flatten(1).sum(dim=1)
    noise = Noise(specimen.seed, torch.arange(DRAWN, device=x.device))
    bound = model.log_likelihood(x, y, IMPORTANCE_SAMPLES, noise)
    gap = bound - given
    if not bool(gap.isfinite().all()):
        return Measured(torch.nan, "not finite")
    error = gap.std() / DRAWN**0.5
    excess = float(gap.mean() / error) if error > 0 else 0.0 if gap.mean() <= 1e-9 else torch.inf
    return Measured(
        excess, f"{bound.mean():.2f} below {given.mean():.2f} nats, K = {IMPORTANCE_SAMPLES}, {DRAWN} images"
    )


def _samples(specimen: Specimen) -> Tensor:
    """Drawn as a user draws them: by `sample`, in the model's own precision."""

    def draw() -> Tensor:
        _, y = specimen.repeated(DRAWN)
        return specimen.model.sample(DRAWN, y, generator=specimen.generator())

    return specimen.once("samples", draw)


def _simulated(specimen: Specimen, model: LatentVariableModel, n: int) -> tuple[PixelDistribution, Tensor, Tensor]:
    """Distributions given latents of the prior, images drawn from them, and their expected mean levels `(n,)`."""
    _, y = specimen.repeated(n)
    generator = specimen.generator(2)
    distribution = model.decode(model.prior(n, y, generator=generator).double(), y)
    return distribution, distribution.sample(generator), distribution.mean.double().flatten(1).mean(dim=1)
