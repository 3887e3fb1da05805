"""Pictures of many images: grids as PNG, animations as GIF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between two images
GREY = 96  # their colour, neither black nor white
SMALL = 64  # images of fewer pixels are enlarged to about that many


def grid(images: Tensor, levels: int, columns: int | None = None, scale: int | None = None) -> Tensor:
    """Lay images out row by row, as a picture.

    Args:
        images: `(N, C, H, W)` uint8 levels. One channel is grey, three are red, green and blue; of any other
            number each is shown in grey beside the one before.
        levels: how many there are; the highest becomes 255.
        columns: images in a row; about as many as there are rows by default.
        scale: side of the square that a pixel becomes; by default enough to see small images well.

    Returns:
        `(height, width, 1 or 3)` uint8, 0 to 255.

    Raises:
        ValueError: no images, a level that is too high, or sizes below 1.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, wanted uint8 (N, C, H, W), N at least 1")
    if images.shape[1] not in (1, 3):
        images = rearrange(images, "n c h w -> n 1 h (c w)")
    if not 2 <= levels <= 256 or int(images.max()) >= levels:
        raise ValueError(f"the highest level is {int(images.max())}, wanted less than levels={levels}, itself 2 to 256")
    shown = to_intensity(images, levels).cpu()
    n, channels, height, width = shown.shape
    columns = min(n, math.ceil(math.sqrt(n)) if columns is None else columns)
    scale = math.ceil(SMALL / max(height, width)) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}: both must be at least 1")
    shown = shown.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    down, right = height * scale + GAP, width * scale + GAP
    rows = math.ceil(n / columns)
    picture = torch.full((rows * down + GAP, columns * right + GAP, channels), GREY, dtype=torch.uint8)
    for i, image in enumerate(shown):
        top, left = i // columns * down + GAP, i % columns * right + GAP
        picture[top : top + height * scale, left : left + width * scale] = rearrange(image, "c h w -> h w c")
    return picture


def to_intensity(level: Tensor, levels: int) -> Tensor:
    """Levels 0 to `levels` - 1, integers or their expected values, as the nearest uint8 intensities 0 to 255."""
    return (level.float() * (255 / (levels - 1))).round().clamp(0, 255).to(torch.uint8)


def save_png(picture: Tensor, path: Path | str) -> None:
    """Write a picture `(height, width, 1 or 3)` uint8, making its folder if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _pil(picture).save(path, format="PNG", optimize=True)


def save_gif(frames: Sequence[Tensor], path: Path | str, milliseconds: int = 80) -> None:
    """Write pictures of one size as an animation that repeats forever.

    Args:
        frames: `(height, width, 1 or 3)` uint8 each.
        path: of the file; its folder is made if there is none.
        milliseconds: how long each frame stays.

    Raises:
        ValueError: no frames, or frames of different sizes.
    """
    if len({tuple(frame.shape) for frame in frames}) != 1:
        raise ValueError(f"an animation needs frames of one size, got {[tuple(frame.shape) for frame in frames]}")
    first, *others = [_pil(frame) for frame in frames]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first.save(path, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def _pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture[..., 0] if picture.shape[-1] == 1 else picture).numpy())
