"""Half-seen images, completed pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.decoder import Watch
from wngen.image import ImageSpec
from wngen.model import LikelihoodModel, at_least
from wngen.sampling.grids import GREY, grid, to_intensity


def autoregressive(model: LikelihoodModel) -> AutoregressiveModel:
    """The model, if it draws pixel by pixel.

    Raises:
        TypeError: it does not.
    """
    if not isinstance(model, AutoregressiveModel):
        raise TypeError(f"{type(model).__name__} does not draw pixel by pixel, wanted a model such as PixelCNNPP")
    return model


def upper_rows(spec: ImageSpec, rows: int) -> Tensor:
    """A mask `(H, W)` that gives the upper rows and hides the rest.

    Raises:
        ValueError: it would hide nothing, or rows are negative.
    """
    if not 0 <= rows < spec.height:
        raise ValueError(f"rows={rows}: images have {spec.height} rows, give 0 to {spec.height - 1} of them")
    return (torch.arange(spec.height) < rows)[:, None].expand(-1, spec.width).clone()


def mask_from_png(path: Path | str, spec: ImageSpec) -> Tensor:
    """A mask `(H, W)` from a picture: bright pixels are given, dark ones hidden.

    Raises:
        ValueError: the file is no picture, or of another size than the images.
    """
    try:
        with Image.open(path) as picture:
            intensity = torch.tensor(list(picture.convert("L").tobytes()), dtype=torch.uint8)
            width, height = picture.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if (height, width) != (spec.height, spec.width):
        raise ValueError(f"{path} has {height} x {width} pixels, the images have {spec.height} x {spec.width}")
    return intensity.view(height, width) > 127


@torch.no_grad()
def completions(
    model: LikelihoodModel,
    x: Tensor,
    known: Tensor,
    alternatives: int = 6,
    y: Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    scale: int | None = None,
) -> Tensor:
    """Images in rows: each as it is, what is given of it, and several ways to complete that.

    Args:
        model: an autoregressive one.
        x: `(B, C, H, W)` uint8 levels.
        known: `(H, W)` bool, true where the pixel is given.
        alternatives: completions of each image.
        y: `(B,)` integer classes; only for a conditional model.
        temperature: below 1 gives likelier completions.
        generator: where the seed of the random numbers comes from.
        watch: is shown the images as they grow.
        scale: side of the square that a pixel becomes; see `grid`.

    Returns:
        A picture `(height, width, 1 or 3)` uint8.

    Raises:
        TypeError: a model that does not draw pixel by pixel.
        ValueError: fewer than 1 alternative, or a mask that does not fit or hides nothing.
    """
    model = autoregressive(model)
    at_least(1, alternatives=alternatives)
    copies = repeat(x, "b c h w -> (b a) c h w", a=alternatives)
    labels = None if y is None else y.repeat_interleave(alternatives)
    drawn = model.complete(copies, known, labels, temperature, generator, watch)
    levels = model.spec.levels
    original = to_intensity(x, levels)
    given = torch.where(known.to(x.device), original, GREY)
    shown = rearrange(to_intensity(drawn, levels), "(b a) c h w -> b a c h w", a=alternatives)
    rows = torch.cat([original[:, None], given[:, None], shown], dim=1)
    return grid(rows.flatten(0, 1), 256, columns=alternatives + 2, scale=scale)
