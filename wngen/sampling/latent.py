"""Pictures through the latent variables: reconstructions, and the way from one image to another."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel
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


def _decode(model: LatentVariableModel, z: Tensor, y: Tensor | None) -> Tensor:
    return to_intensity(model.decode(z, y).mean, model.spec.levels)
