"""Claims of models with latent variables: bounds that are bounds, and rise with the number of samples."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from wngen.evaluation.audit.claim import Measured, Specimen, claimed, standard_errors
from wngen.latent import LatentVariableModel

EXACT_IMAGES = 3
EXACT_SAMPLES = (1, 2, 7)
RISING = (1, 10, 100)
DRAWS = 8
ROUNDING = 1e-9  # nats


@claimed(
    "The importance-weighted bound is of exactly K samples",
    "nats",
    "K is rounded, log K is forgotten, or samples depend on the chunk: the bound is not that of the stated K.",
    at_most=1e-6,
)
@torch.no_grad()
def exact_samples(specimen: Specimen) -> Measured | None:
    """Largest difference from log mean exp of K weights, each computed alone; for several K and chunks."""
    model = specimen.exact
    if not isinstance(model, LatentVariableModel):
        return None
    x, y, noise = specimen.first(EXACT_IMAGES)
    code = model.encode(x, y)
    weights = torch.stack(
        [model.bound(x, code, y, noise.repeat([k])).elbo_nats.double() for k in range(max(EXACT_SAMPLES))]
    )
    chunks = 1, len(x), 3 * len(x) + 1, 1024
    differences = []
    for k in EXACT_SAMPLES:
        wanted = weights[:k].logsumexp(dim=0) - math.log(k)
        for chunk in chunks:
            _, _, noise = specimen.first(EXACT_IMAGES)
            difference = (model.log_likelihood(x, y, k, noise, chunk) - wanted).abs().max()
            differences.append((float(difference.nan_to_num(torch.inf)), f"K = {k}, chunk {chunk}"))
    worst, where = max(differences)
    return Measured(
        worst, f"K = {', '.join(map(str, EXACT_SAMPLES))}, chunks {', '.join(map(str, chunks))}; worst {where}"
    )


@claimed(
    "Bounds rise: ELBO, then K = 1, 10, 100",
    "std. errors",
    "A bound falls with more samples: its weights are not p(x, z) / q(z | x), or log K is counted wrongly.",
    at_least=-4,
)
@torch.no_grad()
def rising_bounds(specimen: Specimen) -> Measured | None:
    """The smallest rise of the mean from one to the next, in standard errors of the paired differences."""
    model = specimen.model
    if not isinstance(model, LatentVariableModel):
        return None
    x, y, noise = specimen.first(len(specimen.x))
    curve = [model(x, y, noise).elbo_nats.double()]
    for k in RISING:
        _, _, noise = specimen.first(len(x))
        curve.append(model.log_likelihood(x, y, k, noise, model.chunk))
    rises = [standard_errors(after - before) for before, after in pairwise(curve)]
    means = ", ".join(f"{float(bound.mean()):.2f}" for bound in curve)
    return Measured(math.nan if any(map(math.isnan, rises)) else min(rises), f"{means} nats")


@claimed(
    "The ELBO is the mean of the log importance weights",
    "std. errors",
    "A divergence in closed form is not that of the densities in the importance weights: one of the two is wrong.",
    at_most=4,
)
@torch.no_grad()
def closed_form(specimen: Specimen) -> Measured | None:
    """Deviation of the forward pass, at the same draws of the latents, over images and draws.

    Where no divergence has a closed form the two are the same, draw by draw.
    """
    model = specimen.exact
    if not isinstance(model, LatentVariableModel):
        return None
    n = len(specimen.x)
    x, y, _ = specimen.first(n)
    code, differences = model.encode(x, y), []
    for k in range(DRAWS):
        noise, again = (specimen.first(n)[2].repeat([k]) for _ in range(2))
        differences.append(model(x, y, noise).elbo_nats - model.bound(x, code, y, again).elbo_nats)
        if k == 0 and float(differences[0].abs().max()) < ROUNDING:
            return Measured(0, f"the same for each draw, of {n} images")
    table = torch.stack(differences)  # (draws, images); how images differ from each other is no error
    deviation, error = table.mean(dim=0).sum(), (table.var(dim=0).sum() / DRAWS).sqrt()
    figure = float(deviation.abs() / error) if error != 0 else torch.inf
    return Measured(figure, f"{DRAWS} draws of {n} images")
