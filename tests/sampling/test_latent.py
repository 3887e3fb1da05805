"""Pictures through latents are the decoder's means, at the posterior's centres and at what the prior adds to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wngen.image import ImageSpec
from wngen.model import LikelihoodModel
from wngen.models import ConvVAE, ResNetVAE
from wngen.sampling import back_and_forth, interpolate, ladder, reconstruct, resample
from wngen.sampling.grids import GAP

HEIGHT, WIDTH = 6, 5


def model(levels: int = 2, num_classes: int | None = None) -> ConvVAE:
    small = {"latent_dim": 3, "widths": (4,), "blocks": 1, "hidden": 8, "iaf_width": 8}
    return ConvVAE(1, HEIGHT, WIDTH, levels, num_classes=num_classes, **small).eval()  # type: ignore[arg-type]


def layered(num_classes: int | None = None) -> ResNetVAE:
    """Two layers of 3 x 3, three of 6 x 5; parameters so large that each layer changes the image visibly."""
    vae = ResNetVAE(1, HEIGHT, WIDTH, 2, "6x3, 3x2", (4,), 2, iaf_layers=0, residual_scale=1.0, num_classes=num_classes)
    for name, parameter in vae.named_parameters():
        if name.endswith(".bias") and "flow" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for layer in vae.top_down:
        torch.nn.init.constant_(layer.second.g, 3.0)
    torch.nn.init.constant_(vae.output.g, 5.0)
    return vae.eval()


def images(n: int, levels: int = 2) -> Tensor:
    return torch.randint(levels, (n, 1, HEIGHT, WIDTH), dtype=torch.uint8)


def tile(picture: Tensor, row: int, column: int) -> Tensor:
    top, left = row * (HEIGHT + GAP) + GAP, column * (WIDTH + GAP) + GAP
    return picture[top : top + HEIGHT, left : left + WIDTH, 0]


@torch.no_grad()
def means(vae: ConvVAE, z: Tensor, y: Tensor | None = None) -> Tensor:
    levels = vae.spec.levels
    return (vae.decode(z, y).mean * 255 / (levels - 1)).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("levels", [2, 256])
def test_a_reconstruction_lies_below_its_image(levels: int):
    vae, x = model(levels), images(5, levels)
    with torch.no_grad():
        expected = means(vae, vae.represent(x))
    picture = reconstruct(vae, x, columns=3, scale=1)
    assert picture.shape == (4 * (HEIGHT + GAP) + GAP, 3 * (WIDTH + GAP) + GAP, 1)
    for i in range(5):
        assert torch.equal(tile(picture, 2 * (i // 3), i % 3), x[i, 0] * (255 // (levels - 1)))
        assert torch.equal(tile(picture, 2 * (i // 3) + 1, i % 3), expected[i, 0])


def test_the_way_leads_straight_from_one_centre_to_the_other():
    vae, a, b = model(), images(4), images(4)
    way = interpolate(vae, a, b, steps=5)
    assert way.shape == (4, 5, 1, HEIGHT, WIDTH)
    with torch.no_grad():
        start, end = vae.represent(a), vae.represent(b)
    for i in range(5):
        expected = means(vae, start + (end - start) * i / 4)
        assert (way[:, i].int() - expected.int()).abs().max() <= 1  # a mean that lies half-way may round either way
    assert torch.equal(way[:, 0], means(vae, start))
    assert torch.equal(way[:, -1], means(vae, end))
    assert not torch.equal(way[:, 0], way[:, -1])


def test_there_and_back_makes_a_loop():
    frames = torch.arange(8).view(4, 2)
    assert back_and_forth(frames)[:, 0].tolist() == [0, 2, 4, 6, 4, 2]
    assert back_and_forth(frames)[:, 1].tolist() == [1, 3, 5, 7, 5, 3]
    assert back_and_forth(frames[:2])[:, 0].tolist() == [0, 2]


def test_a_conditional_model_needs_its_classes():
    vae, x, y = model(num_classes=3), images(4), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        expected = means(vae, vae.represent(x, y), y)
    assert torch.equal(tile(reconstruct(vae, x, y, columns=4, scale=1), 1, 2), expected[2, 0])
    for call in (lambda: reconstruct(vae, x), lambda: interpolate(vae, x, x, 3), lambda: interpolate(vae, x, x, 3, y)):
        with pytest.raises(ValueError, match="conditioned on 3 classes"):
            call()


@pytest.mark.parametrize("steps", [2, 4, 5])
def test_each_end_of_the_way_has_its_own_class(steps: int):
    vae, a, b = model(num_classes=3), images(4), images(4)
    y_a, y_b = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    for label in (vae.encoder.label, vae.decoder.label):
        torch.nn.init.normal_(label.weight, std=3)  # classes that differ visibly
    way = interpolate(vae, a, b, steps, y_a, y_b)
    with torch.no_grad():
        start, end = vae.represent(a, y_a), vae.represent(b, y_b)
    for i in range(steps):
        y = y_a if i <= (steps - 1) / 2 else y_b
        expected = means(vae, torch.lerp(start, end, i / (steps - 1)), y)
        assert torch.equal(way[:, i], expected)
    assert not torch.equal(way[:, -1], means(vae, end, y_a))
    assert torch.equal(way[:, 0], interpolate(vae, b, a, steps, y_b, y_a)[:, -1])


def test_nothing_is_random_and_no_gradient_is_kept():
    vae, x = model(), images(4)
    state = torch.get_rng_state()
    assert torch.equal(reconstruct(vae, x), reconstruct(vae, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in vae.parameters())


def rows_of(picture: Tensor, rows: int, columns: int) -> Tensor:
    assert picture.shape == (rows * (HEIGHT + GAP) + GAP, columns * (WIDTH + GAP) + GAP, 1)
    return torch.stack([torch.stack([tile(picture, i, j) for j in range(columns)]) for i in range(rows)])


def test_all_layers_kept_give_the_reconstruction():
    vae, x = layered(), images(3)
    expected = rows_of(reconstruct(vae, x, columns=3, scale=1), 2, 3)
    for keep_top in ("all", 5):
        shown = rows_of(resample(vae, x, keep_top, alternatives=2, scale=1), 3, 3)
        assert torch.equal(shown[:, 0], expected[0])
        assert torch.equal(shown[:, 1], expected[1])
        assert torch.equal(shown[:, 2], expected[1])


@torch.no_grad()
def test_no_layer_kept_gives_the_priors_means():
    vae, x = layered(), images(3)
    shown = rows_of(resample(vae, x, 0, 4, generator=torch.Generator().manual_seed(1), scale=1), 3, 5)
    expected = means(vae, vae.prior(12, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(shown[:, 1:], expected.view(3, 4, HEIGHT, WIDTH))
    assert not torch.equal(shown[:, 1:], means(vae, vae.prior(12)).view(3, 4, HEIGHT, WIDTH))


@torch.no_grad()
def test_alternatives_share_the_latents_that_are_kept_and_no_others(monkeypatch: pytest.MonkeyPatch):
    vae, x = layered(), images(3)
    seen: list[Tensor] = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, y: seen.append(z) or decode(z, y))
    picture = resample(vae, x, 3, 4, scale=1)
    kept = 2 * (9 + 9) + 2 * 30
    (z,) = (part.view(3, 4, -1) for part in seen)
    assert torch.equal(z[:, :, :kept], vae.represent(x)[:, None, :kept].expand(3, 4, kept))
    assert not torch.isclose(z[:, 0, kept:], z[:, 1, kept:]).any()
    shown = rows_of(picture, 3, 5)
    assert all(len({tuple(image.flatten().tolist()) for image in row}) == 5 for row in shown)


def test_cold_layers_do_not_vary():
    """Each layer takes its own temperature, the topmost first."""
    vae, x = layered(), images(2)
    cold = rows_of(resample(vae, x, 3, 3, temperature=[1, 1, 1, 0, 0], scale=1), 2, 4)
    assert torch.equal(cold[:, 1], cold[:, 3])
    warm = rows_of(resample(vae, x, 3, 3, temperature=[0, 0, 0, 0, 1], scale=1), 2, 4)
    assert not torch.equal(warm[:, 1], warm[:, 3])


@torch.no_grad()
def test_a_ladder_climbs_from_the_priors_centre_to_the_reconstruction():
    vae, x = layered(), images(3)
    shown = rows_of(ladder(vae, x, scale=1), 3, 7)
    assert torch.equal(shown[:, 0], x[:, 0] * 255)
    assert torch.equal(shown[:, 1], means(vae, vae.prior(3, temperature=0.0))[:, 0])
    for keep_top in range(6):
        rung = rows_of(resample(vae, x, keep_top, 1, temperature=0.0, scale=1), 3, 2)
        assert torch.equal(shown[:, 1 + keep_top], rung[:, 1])
    assert torch.equal(shown[:, 6], rows_of(reconstruct(vae, x, columns=3, scale=1), 2, 3)[1])
    assert all(not torch.equal(shown[:, i], shown[:, i + 1]) for i in range(1, 6))


@torch.no_grad()
def test_variations_are_of_the_images_class():
    vae, x, y = layered(num_classes=3), images(3), torch.tensor([0, 2, 1])
    torch.nn.init.normal_(vae.top_label.weight, std=3)
    z = vae.represent(x, y)
    for picture in (resample(vae, x, "all", 1, y, scale=1), ladder(vae, x, y, scale=1)):
        assert torch.equal(tile(picture, 1, picture.shape[1] // (WIDTH + GAP) - 1), means(vae, z, y)[1, 0])
    with pytest.raises(ValueError, match="conditioned on 3 classes"):
        ladder(vae, x)


def test_layers_that_there_are_not_cannot_be_kept():
    vae, x = layered(), images(2)
    for keep_top in (-1, 6):
        with pytest.raises(ValueError, match=f"keep_top={keep_top}: ResNetVAE has 5 layers here, wanted 0 to 5"):
            resample(vae, x, keep_top)
    with pytest.raises(ValueError, match="alternatives=0: wanted at least 1"):
        resample(vae, x, 1, alternatives=0)
    with pytest.raises(ValueError, match="one for each of 5 layers"):
        resample(vae, x, 1, temperature=[1, 1])


def test_a_model_without_latent_variables_is_refused():
    class Exact(LikelihoodModel):
        is_exact = True
        forward = log_likelihood = sample = None  # type: ignore[assignment]

    exact, x = Exact(ImageSpec(1, HEIGHT, WIDTH, 2)), images(2)
    calls = (
        lambda: reconstruct(exact, x),
        lambda: interpolate(exact, x, x, 2),
        lambda: resample(exact, x, 1),
        lambda: ladder(exact, x),
    )
    for call in calls:
        with pytest.raises(TypeError, match="Exact has no latent variables"):
            call()


def test_wrong_arguments_are_refused():
    vae, x = model(), images(4)
    with pytest.raises(ValueError, match="steps=1, wanted at least 2"):
        interpolate(vae, x, x, 1)
    with pytest.raises(ValueError, match=r"\(4, 1, 6, 5\) and \(3, 1, 6, 5\), wanted of one shape"):
        interpolate(vae, x, x[:3], 2)
