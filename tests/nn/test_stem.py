"""A pixel's first features: of what lies before it, and of nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from walking import assert_same, at, each_size, image, rows_of, statically

from wngen.nn import ShiftedConv2d, Stem, Walk


@each_size
@pytest.mark.parametrize("kernel", [(1, 3), (2, 3)])
@torch.no_grad()
def test_moved_down_a_pixel_has_the_convolution_of_what_is_above_it(size, kernel):
    layer = ShiftedConv2d(3, 4, kernel, "down").double()
    x = image(3, size)
    with_ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    convolved = F.conv2d(F.pad(with_ones, (1, 1, kernel[0] - 1, 0)), layer.conv.weight, layer.conv.bias)
    shifted = layer(x)
    assert_same(shifted[:, :, 1:], convolved[:, :, :-1])
    assert not shifted[:, :, 0].any()


@each_size
@torch.no_grad()
def test_moved_right_a_pixel_has_the_convolution_of_what_is_on_its_left(size):
    layer = ShiftedConv2d(3, 4, (2, 1), "right").double()
    x = image(3, size)
    with_ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    convolved = F.conv2d(F.pad(with_ones, (0, 0, 1, 0)), layer.conv.weight, layer.conv.bias)
    shifted = layer(x)
    assert_same(shifted[..., 1:], convolved[..., :-1])
    assert not shifted[..., 0].any()


@each_size
def test_a_pixel_sees_the_three_above_it_and_the_one_on_its_left(size):
    stem, x = Stem(1, 2).double(), image(1, size).requires_grad_()
    features = stem(x)
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    for row in range(size[0]):
        for column in range(size[1]):
            (gradient,) = torch.autograd.grad(at(features, row, column).sum(), x, retain_graph=True)
            above = (rows == row - 1) & ((columns - column).abs() <= 1)
            on_the_left = (rows == row) & (columns == column - 1)
            assert torch.equal(gradient[0, 0] != 0, above | on_the_left)


@each_size
@statically
@torch.no_grad()
def test_along_a_walk_the_features_are_the_same(size, static):
    stem, x = Stem(3, 4).double(), image(3, size)
    walk, wanted = Walk(2, *size, x, static), stem(x)
    before = F.pad(x, (1, 0, 1, 0))  # zeros where there is no pixel
    for row in rows_of(walk):
        stem.row(before[:, :, row : row + 1, 1:], walk)
        for column in range(size[1]):
            walk.enter_pixel(column)
            assert_same(stem.pixel(at(before, row + 1, column), walk), at(wanted, row, column))


@each_size
@statically
@torch.no_grad()
def test_along_a_walk_by_rows_the_convolution_is_the_same(size, static):
    layer, x = ShiftedConv2d(3, 4, (2, 3), "down").double(), image(3, size)
    walk, wanted = Walk(2, *size, x, static), layer(x)
    before = F.pad(x, (0, 0, 1, 0))
    for row in rows_of(walk):
        assert_same(layer(before[:, :, row : row + 1], walk), wanted[:, :, row : row + 1])
