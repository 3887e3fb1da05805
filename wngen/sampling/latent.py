"""Pictures through the latent variables: reconstructions, what each layer carries, and ways between images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel, at_least
from wngen.sampling.grids import grid, to_intensity


@torch.no_grad()
def reconstruct(
    model: LikelihoodModel, x: Tensor, y: Tensor | None = None, columns: int = 8, scale: int | None = None
) -> Tensor:
    """Images, and below each of them what the model makes of it from the centre of its posterior.

    The reconstruction is the mean of the pixels' distribution, shown as an intensity: a binary pixel is as bright as
    it is probable.

    Args:
        model: one with latent variables.
        x: `(B, C, H, W)` uint8 levels.
        y: `(B,)` integer classes; only for a conditional model.
        columns: pairs in a row.
        scale: side of the square that a pixel becomes; see `grid`.

    Returns:
        A picture `(height, width, 1 or 3)` uint8.

    Raises:
        TypeError: a model without latent variables.
    """
    model = _latent(model)
    model.check_labels(y, len(x))
    decoded = _decode(model, model.represent(x, y), y)
    columns = min(columns, len(x))
    original = to_intensity(x, model.spec.levels)
    missing = -len(x) % columns
    blank = original.new_zeros(missing, *original.shape[1:])
    rows = [rearrange(torch.cat([part, blank]), "(r c) ... -> r c ...", c=columns) for part in (original, decoded)]
    pairs = rearrange(torch.stack(rows, dim=1), "r pair c ... -> (r pair c) ...")
    return grid(pairs, 256, columns, scale)


@torch.no_grad()
def resample(
    model: LikelihoodModel,
    x: Tensor,
    keep_top: int | Literal["all"],
    alternatives: int = 7,
    y: Tensor | None = None,
    temperature: float | Sequence[float] = 1.0,
    generator: torch.Generator | None = None,
    scale: int | None = None,
) -> Tensor:
    """Images in rows: each as it is, and several others with the same latents in the uppermost stochastic layers.

    Those are the centre of the image's posterior, and the layers below are drawn from the prior given them. What the
    alternatives have in common is what the uppermost layers carry. Images are shown as in `reconstruct`, and are
    reconstructions where all layers are kept.

    Args:
        model: one with latent variables.
        x: `(B, C, H, W)` uint8 levels.
        keep_top: of how many layers the latents are kept.
        alternatives: drawn for each image.
        y: `(B,)` integer classes; only for a conditional model.
        temperature: of the prior; see `LatentVariableModel.prior`.
        generator: where random numbers come from; torch's global generator by default.
        scale: side of the square that a pixel becomes; see `grid`.

    Returns:
        A picture `(height, width, 1 or 3)` uint8.

    Raises:
        TypeError: a model without latent variables.
        ValueError: a negative number of layers or more than there are, or fewer than 1 alternative.
    """
    model = _latent(model)
    model.check_labels(y, len(x))
    at_least(1, alternatives=alternatives)
    depth = len(model.latent_shapes)
    layers = depth if keep_top == "all" else keep_top
    if not 0 <= layers <= depth:
        raise ValueError(f"keep_top={keep_top}: {type(model).__name__} has {depth} layers here, wanted 0 to {depth}")
    kept = _uppermost(model, model.represent(x, y), layers).repeat_interleave(alternatives, dim=0)
    labels = None if y is None else y.repeat_interleave(alternatives)
    z = model.prior(len(kept), labels, temperature, generator, given=kept)
    drawn = rearrange(_decode(model, z, labels), "(b a) ... -> b a ...", a=alternatives)
    return _beside(model, x, drawn, scale)


@torch.no_grad()
def ladder(
    model: LikelihoodModel,
    x: Tensor,
    y: Tensor | None = None,
    temperature: float | Sequence[float] = 0.0,
    generator: torch.Generator | None = None,
    scale: int | None = None,
) -> Tensor:
    """Images in rows: each as it is, and what the model knows of it from none, one, two and at last all of its layers.

    The latents of the uppermost layers are kept, as in `resample`, and those below are, unless a temperature is given,
    at the centre of the prior given them. What one column adds to the one before is what that layer carries.

    Args:
        model: one with latent variables.
        x: `(B, C, H, W)` uint8 levels.
        y: `(B,)` integer classes; only for a conditional model.
        temperature: of the prior; see `LatentVariableModel.prior`.
        generator: where random numbers come from; torch's global generator by default.
        scale: side of the square that a pixel becomes; see `grid`.

    Returns:
        A picture `(height, width, 1 or 3)` uint8.

    Raises:
        TypeError: a model without latent variables.
    """
    model = _latent(model)
    model.check_labels(y, len(x))
    centre = model.represent(x, y)
    kept = [_uppermost(model, centre, layers) for layers in range(len(model.latent_shapes) + 1)]
    steps = [_decode(model, model.prior(len(x), y, temperature, generator, given=given), y) for given in kept]
    return _beside(model, x, torch.stack(steps, dim=1), scale)


@torch.no_grad()
def interpolate(
    model: LikelihoodModel, a: Tensor, b: Tensor, steps: int, y_a: Tensor | None = None, y_b: Tensor | None = None
) -> Tensor:
    """The images on the straight way between the posterior centres of two images.

    Between images of different classes, each end is encoded with its own class. A class has nothing half-way to
    another, so the way is decoded with the class of the nearer end: of `a` up to the middle, and from there of `b`.

    For strips, lay them out by `grid(ways.flatten(0, 1), levels=256, columns=steps)`; for an animation, make a grid of
    each frame of `back_and_forth(ways.transpose(0, 1))`.

    Args:
        model: one with latent variables.
        a: `(B, C, H, W)` uint8 levels, where it starts.
        b: `(B, C, H, W)`, where it ends.
        steps: images on the way, both ends counted, at least 2.
        y_a: `(B,)` integer classes of `a`; only for a conditional model.
        y_b: `(B,)` integer classes of `b`; likewise.

    Returns:
        `(B, steps, C, H, W)` uint8, the means of the pixels' distributions as intensities 0 to 255.

    Raises:
        TypeError: a model without latent variables.
        ValueError: fewer than 2 steps, or `a` and `b` of different sizes.
    """
    model = _latent(model)
    if steps < 2 or a.shape != b.shape:
        shapes = f"images {tuple(a.shape)} and {tuple(b.shape)}, wanted of one shape"
        raise ValueError(f"steps={steps}, wanted at least 2; {shapes}")
    model.check_labels(y_a, len(a))
    model.check_labels(y_b, len(b))
    start, end = model.represent(a, y_a), model.represent(b, y_b)
    images = []
    for i in range(steps):
        z = torch.lerp(start, end, i / (steps - 1))
        images.append(_decode(model, z, y_a if 2 * i < steps else y_b))
    return torch.stack(images, dim=1)


def back_and_forth(frames: Tensor) -> Tensor:
    """`(steps, ...)` frames followed by their way back, without the ends twice: a loop of 2 steps - 2."""
    return torch.cat([frames, frames[1:-1].flip(0)])


def _latent(model: LikelihoodModel) -> LatentVariableModel:
    if not isinstance(model, LatentVariableModel):
        raise TypeError(f"{type(model).__name__} has no latent variables, wanted a model such as ConvVAE")
    return model


def _uppermost(model: LatentVariableModel, z: Tensor, layers: int) -> Tensor:
    """Of latents `(B, Z)` those of the uppermost layers, `(B, Z')`."""
    return z[:, : sum(math.prod(shape) for shape in model.latent_shapes[:layers])]


def _beside(model: LatentVariableModel, x: Tensor, shown: Tensor, scale: int | None) -> Tensor:
    """A picture with a row for each image: itself, and beside it what is shown of it, `(B, columns, C, H, W)`."""
    rows = torch.cat([to_intensity(x, model.spec.levels)[:, None], shown], dim=1)
    return grid(rows.flatten(0, 1), 256, rows.shape[1], scale)


def _decode(model: LatentVariableModel, z: Tensor, y: Tensor | None) -> Tensor:
    return to_intensity(model.decode(z, y).mean, model.spec.levels)
