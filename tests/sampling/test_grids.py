"""Grids show every image, in its place and with its levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from wngen.sampling import grid, save_gif, save_png
from wngen.sampling.grids import GAP, GREY, to_intensity


def tile(picture: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    top, left = row * (height + GAP) + GAP, column * (width + GAP) + GAP
    return picture[top : top + height, left : left + width]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_lies_in_its_place(channels: int):
    images = torch.randint(256, (7, channels, 5, 4), dtype=torch.uint8)
    picture = grid(images, 256, columns=3, scale=1)
    assert picture.shape == (3 * (5 + GAP) + GAP, 3 * (4 + GAP) + GAP, channels)
    for i, image in enumerate(images):
        assert torch.equal(tile(picture, i // 3, i % 3, 5, 4), image.movedim(0, -1))
    assert (tile(picture, 2, 1, 5, 4) == GREY).all()
    assert (picture[:GAP] == GREY).all()
    assert (picture[:, -GAP:] == GREY).all()


def test_pixels_grow_to_squares():
    image = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3)
    picture = grid(image, 256, scale=4)
    shown = tile(picture, 0, 0, 8, 12)[..., 0]
    assert torch.equal(shown, image[0, 0].repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_defaults_are_square_and_large_enough():
    digits = grid(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), 2)
    assert digits.shape == (3 * (84 + GAP) + GAP, 4 * (84 + GAP) + GAP, 1)
    photos = grid(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), 256)
    assert photos.shape == (2 * (64 + GAP) + GAP, 2 * (64 + GAP) + GAP, 3)


@pytest.mark.parametrize("levels", [2, 3, 32, 256])
def test_levels_span_black_to_white(levels: int):
    shown = to_intensity(torch.arange(levels, dtype=torch.uint8), levels).tolist()
    assert (shown[0], shown[-1]) == (0, 255)
    assert shown == [round(i * 255 / (levels - 1)) for i in range(levels)]
    assert to_intensity(torch.tensor([0.5, -1e-6, levels - 1 + 1e-3]), levels).tolist() == [
        round(0.5 * 255 / (levels - 1)),
        0,
        255,
    ]


def test_other_numbers_of_channels_are_shown_side_by_side():
    images = torch.randint(256, (2, 4, 3, 3), dtype=torch.uint8)
    picture = grid(images, 256, columns=1, scale=1)
    assert torch.equal(tile(picture, 1, 0, 3, 12)[..., 0], torch.cat(list(images[1]), dim=1))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels: int, tmp_path: Path):
    picture = torch.randint(256, (9, 8, channels), dtype=torch.uint8)
    save_png(picture, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert image.format == "PNG"
        read = np.asarray(image).reshape(9, 8, channels)
    assert np.array_equal(read, picture.numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_holds_the_frames(channels: int, tmp_path: Path):
    frames = [torch.full((6, 5, channels), value, dtype=torch.uint8) for value in (0, 90, 255)]
    save_gif(frames, tmp_path / "new" / "walk.gif", milliseconds=120)
    with Image.open(tmp_path / "new" / "walk.gif") as image:
        assert (image.format, image.n_frames, image.info["loop"]) == ("GIF", 3, 0)  # type: ignore[attr-defined]
        for i, frame in enumerate(frames):
            image.seek(i)
            assert image.info["duration"] == 120
            assert np.array_equal(np.asarray(image.convert("RGB"))[..., :channels], frame.numpy())


def test_wrong_arguments_are_refused(tmp_path: Path):
    images = torch.ones(2, 1, 3, 3, dtype=torch.uint8)
    for wrong, complaint in (
        ((images.float(), 2), "torch.float32"),
        ((images[0], 2), r"\(1, 3, 3\), wanted uint8 \(N, C, H, W\)"),
        ((images[:0], 2), r"\(0, 1, 3, 3\)"),
        ((images * 2, 2), "the highest level is 2, wanted less than levels=2"),
        ((images, 300), "levels=300"),
        ((images, 2, 0), "columns=0"),
        ((images, 2, 1, -1), "scale=-1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            grid(*wrong)
    frames = [torch.zeros(3, 3, 1, dtype=torch.uint8), torch.zeros(3, 4, 1, dtype=torch.uint8)]
    for sequence in (frames, []):
        with pytest.raises(ValueError, match="frames of one size"):
            save_gif(sequence, tmp_path / "walk.gif")
