from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from PIL import Image
from pixel_zoo import seeded

from wngen.image import ImageSpec
from wngen.models import ConvVAE, PixelCNNPP
from wngen.sampling import Film, autoregressive, completions, draw_samples, mask_from_png, upper_rows, watched
from wngen.sampling.grids import GREY, grid


@pytest.fixture
def model() -> PixelCNNPP:
    torch.manual_seed(0)
    return PixelCNNPP(1, 6, 4, 4, filters=4, blocks=1, scales=2, components=2).eval()


def test_upper_rows():
    spec = ImageSpec(1, 4, 3, 2)
    assert upper_rows(spec, 1).tolist() == [[True] * 3, *[[False] * 3] * 3]
    assert not upper_rows(spec, 0).any()
    for rows in (-1, 4):
        with pytest.raises(ValueError, match=f"rows={rows}: images have 4 rows, give 0 to 3"):
            upper_rows(spec, rows)


def test_a_mask_from_a_picture(tmp_path):
    spec = ImageSpec(3, 2, 3, 256)
    picture = Image.new("L", (3, 2), 0)
    picture.putpixel((2, 0), 255)
    picture.putpixel((0, 1), 128)
    picture.save(tmp_path / "mask.png")
    assert mask_from_png(tmp_path / "mask.png", spec).tolist() == [[False, False, True], [True, False, False]]
    with pytest.raises(ValueError, match="has 2 x 3 pixels, the images have 4 x 4"):
        mask_from_png(tmp_path / "mask.png", ImageSpec(1, 4, 4, 2))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture"):
        mask_from_png(tmp_path / "broken.png", spec)
    with pytest.raises(ValueError, match=r"absent\.png cannot be read"):
        mask_from_png(tmp_path / "absent.png", spec)


def test_completions_stand_beside_what_they_complete(model):
    x = torch.randint(0, 4, (3, 1, 6, 4), dtype=torch.uint8)
    known = upper_rows(model.spec, 3)
    picture = completions(model, x, known, alternatives=5, generator=torch.Generator().manual_seed(0), scale=1)
    assert picture.shape == (3 * 8 + 2, 7 * 6 + 2, 1)
    tiles = picture[2:, 2:, 0].unfold(0, 6, 8).unfold(1, 4, 6)  # (image, column, row, column of it)
    assert torch.equal(tiles[:, 0], (x[:, 0] * 85))
    assert torch.equal(tiles[:, 1, :3], tiles[:, 0, :3])
    assert (tiles[:, 1, 3:] == GREY).all()
    for i in range(2, 7):
        assert torch.equal(tiles[:, i, :3], tiles[:, 0, :3])
    ways = {tuple(tiles[0, i].flatten().tolist()) for i in range(2, 7)}
    assert len(ways) == 5
    again = completions(model, x, known, alternatives=5, generator=torch.Generator().manual_seed(0), scale=1)
    assert torch.equal(picture, again)


def test_what_cannot_be_completed(model):
    x = torch.zeros(1, 1, 6, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="there is nothing to complete"):
        completions(model, x, torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="alternatives=0: wanted at least 1"):
        completions(model, x, upper_rows(model.spec, 3), alternatives=0)
    vae = ConvVAE(1, 6, 4, 2, widths=[4], blocks=0, hidden=8, latent_dim=2, iaf_width=8)
    with pytest.raises(TypeError, match="ConvVAE does not draw pixel by pixel, wanted a model such as PixelCNNPP"):
        completions(vae, x, upper_rows(vae.spec, 3))
    with pytest.raises(TypeError, match="does not draw pixel by pixel"):
        draw_samples(vae, 2, watch=Film(vae.spec))
    assert autoregressive(model) is model


def test_a_film_shows_the_pixels_in_the_order_in_which_they_are_drawn(model):
    film = Film(model.spec, frames=6, columns=2)
    with watched(24, film) as watch:
        images = draw_samples(model, 4, seed=1, watch=watch)
    assert torch.equal(images, draw_samples(model, 4, seed=1))
    assert len(film.frames) == 6
    hidden = [int((frame == GREY).sum()) for frame in film.frames]
    fewer = [a - b for a, b in pairwise(hidden)]
    assert fewer == [fewer[0]] * 5
    assert fewer[0] == 4 * 4 * 11**2  # four more pixels of each of four images, in squares of 11 x 11


def test_a_film_of_completions_shows_what_is_given_from_the_first_frame(model):
    x = torch.randint(0, 4, (2, 1, 6, 4), dtype=torch.uint8)
    known = upper_rows(model.spec, 2)
    known[3, 2] = known[5, 0] = True
    film = Film(model.spec, frames=24)
    complete = model.complete(x, known, generator=seeded(), watch=film)
    assert len(film.frames) == 1 + 14  # one on the way over the rows given, and one for each pixel that is drawn
    place = torch.arange(24).view(6, 4)
    drawn = place[~known].tolist()
    for frame, last in zip(film.frames, [-1, *drawn], strict=True):
        shown = torch.where(known | (place <= last), complete * 85, GREY)
        assert torch.equal(frame, grid(shown, 256))


def test_a_film_of_few_pixels_shows_the_first_chunk_alone():
    model = PixelCNNPP(1, 2, 2, 2, filters=4, blocks=1, scales=1).eval()
    film = Film(model.spec)
    model.sample(5, watch=film, chunk=2)
    assert len(film.frames) == 4
    assert len({frame.shape for frame in film.frames}) == 1
