"""Samples follow from a seed, and show all classes or one."""

from __future__ import annotations

import pytest
import torch

from wngen.models import ConvVAE, PixelCNNPP, ResNetVAE
from wngen.sampling import draw_samples


def model(num_classes: int | None = None) -> ConvVAE:
    return ConvVAE(1, 6, 5, 2, latent_dim=3, widths=(4,), blocks=1, hidden=8, iaf_width=8, num_classes=num_classes)


def test_they_are_those_of_a_generator_with_the_seed():
    vae = model()
    samples = draw_samples(vae, 9, temperature=0.7, seed=3)
    assert torch.equal(samples, vae.sample(9, None, 0.7, torch.Generator().manual_seed(3)))
    assert not torch.equal(samples, draw_samples(vae, 9, temperature=0.7, seed=4))


def test_all_classes_in_turn_or_one():
    vae = model(num_classes=3)
    for label, classes in ((None, [0, 1, 2, 0, 1]), (2, [2] * 5)):
        expected = vae.sample(5, torch.tensor(classes), generator=torch.Generator().manual_seed(0))
        assert torch.equal(draw_samples(vae, 5, label=label), expected)


def test_a_class_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="label=0: this model is not conditioned on classes"):
        draw_samples(model(), 2, label=0)
    for label in (-1, 3):
        with pytest.raises(ValueError, match=f"label={label}: the model knows the classes 0 to 2"):
            draw_samples(model(num_classes=3), 2, label=label)


def test_each_layer_has_its_temperature():
    vae = ResNetVAE(1, 6, 5, 2, "6x1, 3x2", (4,), 2, iaf_layers=0)
    for temperature in ([0.9, 0.5, 0.0], 0.5):
        expected = vae.sample(4, None, temperature, torch.Generator().manual_seed(0))
        assert torch.equal(draw_samples(vae, 4, temperature), expected)
    with pytest.raises(ValueError, match=r"temperature=\[1, 1\].* one for each of 3 layers"):
        draw_samples(vae, 4, [1, 1])
    pixels = PixelCNNPP(1, 6, 5, 2, filters=4, blocks=1, scales=1)
    with pytest.raises(ValueError, match=r"temperature=\[1, 1\]: PixelCNNPP has no latent variables"):
        draw_samples(pixels, 4, [1, 1])
