from __future__ import annotations

import dataclasses
import json
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from wngen import ImageSpec
from wngen.image import Batch


def test_sizes():
    spec = ImageSpec(channels=3, height=32, width=20, levels=256)
    assert spec.shape == (3, 32, 20)
    assert spec.dims == 1920


def test_spec_is_frozen_hashable_and_json_able():
    spec = ImageSpec(1, 28, 28, 2)
    assert {spec: 1}[ImageSpec(1, 28, 28, 2)] == 1
    assert ImageSpec(**json.loads(json.dumps(spec.as_dict()))) == spec
    assert list(spec.as_dict()) == ["channels", "height", "width", "levels"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.levels = 3  # type: ignore[misc]


@pytest.mark.parametrize("spec", [ImageSpec(1, 28, 28, 2), ImageSpec(3, 8, 5, 32), ImageSpec(3, 32, 32, 256)])
def test_the_uniform_distribution_costs_the_levels_bits(spec):
    nats = spec.dims * math.log(spec.levels)
    assert spec.bits_per_dim(nats) == pytest.approx(math.log2(spec.levels))
    per_image = spec.bits_per_dim(torch.full((4,), nats, dtype=torch.float64))
    torch.testing.assert_close(per_image, torch.full((4,), math.log2(spec.levels), dtype=torch.float64))


@given(nats=st.floats(-1e6, 1e6), channels=st.integers(1, 4), side=st.integers(1, 64))
def test_nats_and_bits_per_dim_are_inverse(nats, channels, side):
    spec = ImageSpec(channels, side, side, 256)
    assert spec.nats(spec.bits_per_dim(nats)) == pytest.approx(nats, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 32, 256])
def test_scale_spreads_the_levels_evenly_over_minus_1_to_1(levels):
    spec = ImageSpec(1, 1, levels, levels)
    x = torch.arange(levels, dtype=torch.uint8).view(1, 1, 1, levels)
    y = spec.scale(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.flatten(), torch.linspace(-1, 1, levels), rtol=0, atol=1e-6)
    back = ((y + 1) * (levels - 1) / 2).round().to(torch.uint8)
    assert torch.equal(back, x)


def test_scale_takes_integer_levels_of_the_right_shape_only():
    spec = ImageSpec(1, 4, 4, 2)
    with pytest.raises(TypeError, match=r"uint8 levels 0 to 1, got torch\.float32"):
        spec.scale(torch.zeros(2, 1, 4, 4))
    for shape in [(2, 3, 4, 4), (1, 4, 4), (2, 1, 4, 5)]:
        with pytest.raises(ValueError, match=r"the model wants \(B, 1, 4, 4\)"):
            spec.scale(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 28, 28, 2), "channels=0"),
        ((1, -1, 28, 2), "height=-1"),
        ((1, 28, 0, 2), "width=0"),
        ((1, 28, 28, 1), "levels=1: .* 2 to 256"),
        ((1, 28, 28, 257), "levels=257"),
    ],
)
def test_a_size_that_makes_no_image_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageSpec(*arguments)


def test_a_batch_unpacks_into_image_label_and_index():
    image, label, index = Batch(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None, torch.tensor([3, 1]))
    assert image.shape == (2, 1, 4, 4)
    assert label is None
    assert index.tolist() == [3, 1]
