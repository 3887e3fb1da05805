"""Claims of every model: numbers that are numbers, and probabilities that are none above 1."""

from __future__ import annotations

import torch
from torch import Tensor

from wngen.evaluation.audit.claim import Measured, Specimen, claimed
from wngen.noise import Noise

IMPORTANCE_SAMPLES = 4


@claimed(
    "All weights are finite",
    "numbers",
    "The weights are damaged; every figure of this model is void.",
    at_most=0,
)
def finite_weights(specimen: Specimen) -> Measured:
    """Parameters and buffers that are NaN or infinite."""
    state = specimen.model.state_dict()
    broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in state.items()}
    worst = next((f"first in {name}" for name, count in broken.items() if count), "")
    return Measured(sum(broken.values()), worst or f"of {sum(t.numel() for t in state.values()):,}")


@claimed(
    "All layers are initialized from data",
    "layers",
    "Data-dependent init never ran, or did not reach these layers: they still have the scale that they were made with.",
    at_most=0,
)
def initialized(specimen: Specimen) -> Measured | None:
    """Layers whose `initialized` buffer says no."""
    marks = {name: bool(mark) for name, mark in specimen.model.named_buffers() if name.endswith("initialized")}
    if not marks:
        return None
    missing = [name.removesuffix(".initialized") for name, mark in marks.items() if not mark]
    return Measured(len(missing), f"first of them {missing[0]}" if missing else f"of {len(marks)}")


@claimed(
    "Every image has a finite log-likelihood",
    "images",
    "Some image has probability 0, or no number at all: averages over images are void.",
    at_most=0,
)
def finite_likelihoods(specimen: Specimen) -> Measured:
    """Of the given images, and of unlikely ones."""
    nats = _log_likelihoods(specimen)
    return Measured(int((~nats.isfinite()).sum()), f"of {len(nats)}, among them black, white, checkered and noise")


@claimed(
    "No image is more probable than 1",
    "nats",
    "A density is taken for a probability, or the probabilities of all images sum to more than 1.",
    at_most=0,
)
def at_most_certain(specimen: Specimen) -> Measured:
    """The largest log-likelihood of the same images."""
    return Measured(float(_log_likelihoods(specimen).max()), "largest log-likelihood, or bound on it")


@claimed(
    "The forward pass and `log_likelihood` agree",
    "nats",
    "Training and evaluation measure different likelihoods.",
    at_most=1e-6,
)
@torch.no_grad()
def agreement(specimen: Specimen) -> Measured | None:
    """Largest difference over the images, of an exact model."""
    model = specimen.exact
    if not model.is_exact:
        return None
    x, y, noise = specimen.first(len(specimen.x))
    difference = model(x, y, noise).elbo_nats - model.log_likelihood(x, y)
    return Measured(float(difference.abs().max()), f"{len(x)} images")


def unlikely(specimen: Specimen) -> Tensor:
    """Images that no data set has: all black, all white, a checkerboard, and two of noise."""
    spec = specimen.model.spec
    black = specimen.x.new_zeros(1, *spec.shape)
    rows, columns = (torch.arange(n, device=black.device) for n in (spec.height, spec.width))
    checkered = ((rows[:, None] + columns) % 2 * (spec.levels - 1)).to(torch.uint8).expand_as(black)
    return torch.cat([black, black + (spec.levels - 1), checkered, specimen.levels(2)])


def _log_likelihoods(specimen: Specimen) -> Tensor:
    """`(N,)`, in the model's own precision: of the forward pass and of `log_likelihood`."""

    def measure() -> Tensor:
        odd = unlikely(specimen)
        _, labels = specimen.repeated(len(odd))
        x = torch.cat([specimen.x, odd])
        y = None if specimen.y is None or labels is None else torch.cat([specimen.y, labels])
        index = torch.arange(len(x), device=x.device)
        with torch.no_grad():
            elbo = specimen.model(x, y, Noise(specimen.seed, index)).elbo_nats.double()
            best = specimen.model.log_likelihood(x, y, IMPORTANCE_SAMPLES, Noise(specimen.seed, index), chunk=32)
        return torch.cat([elbo, best])

    return specimen.once("log-likelihoods", measure)
