"""Causal convolutions against plain ones with explicit padding, and along a walk against themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from walking import assert_same, at, each_size, image, pixels_of, rows_of, statically

from wngen.nn import (
    CausalConv2d,
    CausalConvTranspose2d,
    MaskedWNConv2d,
    Pointwise,
    Walk,
    data_dependent_init,
    down_shift,
    right_shift,
)

KERNELS = [  # height, width, reach, then the zeros on the left and on the right
    (2, 3, "down", 1, 1),
    (3, 7, "down", 3, 3),
    (1, 3, "down", 1, 1),
    (2, 2, "down_right", 1, 0),
    (2, 1, "down_right", 0, 0),
    (1, 4, "down_right", 3, 0),
]

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "{}x{}-{}".format(*kernel))


# At once


@each_size
@each_kernel
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_causal_convolution_is_a_padded_one(size, kernel, stride):
    height, width, reach, left, right = kernel
    layer = CausalConv2d(3, 4, (height, width), reach, stride).double()
    x = image(3, size)
    padded = torch.zeros(2, 3, size[0] + height - 1, size[1] + left + right, dtype=torch.double)
    padded[:, :, height - 1 :, left : left + size[1]] = x
    wanted = F.conv2d(padded, layer.conv.weight, layer.conv.bias, stride)
    assert wanted.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
    assert_same(layer(x), wanted)


@each_kernel
def test_an_output_sees_its_own_row_and_those_above(kernel):
    height, width, reach, left, right = kernel
    layer = CausalConv2d(1, 1, (height, width), reach).double()
    x = image(1, (9, 15)).requires_grad_()
    (gradient,) = torch.autograd.grad(at(layer(x), 5, 7).sum(), x)
    seen = torch.zeros(9, 15, dtype=torch.bool)
    seen[5 - height + 1 : 6, 7 - left : 8 + right] = True
    assert torch.equal(gradient[0, 0] != 0, seen)


@torch.no_grad()
def test_a_mask_takes_taps_away():
    mask = torch.ones(4, 3, 1, 2)
    mask[:2, 1:, :, -1] = 0
    layer = CausalConv2d(3, 4, (1, 2), mask=mask).double()
    assert isinstance(layer.conv, MaskedWNConv2d)
    assert (layer.conv.weight[:2, 1:, :, -1] == 0).all()
    x = image(3, (4, 5))
    assert_same(layer(x), F.conv2d(F.pad(x, (1, 0)), layer.conv.weight, layer.conv.bias))


@each_size
@pytest.mark.parametrize("width", [2, 3])
@torch.no_grad()
def test_growing_is_a_sum_over_what_reaches_a_pixel(size, width):
    """Pixel (i, j) reaches rows 2i and 2i + 1, and columns 2j and 2j + 1 or, by a wider kernel, 2j - 1 to 2j + 1."""
    layer = CausalConvTranspose2d(3, width).double()
    half = -(-size[0] // 2), -(-size[1] // 2)
    x = image(3, half)
    first = 0 if width == 2 else -1
    wanted = torch.zeros(2, 3, *size, dtype=torch.double) + layer.conv.bias[:, None, None]
    for i in range(half[0]):
        for j in range(half[1]):
            for row in range(2):
                for column in range(width):
                    to = 2 * i + row, 2 * j + first + column
                    if to[0] < size[0] and 0 <= to[1] < size[1]:
                        wanted[:, :, to[0], to[1]] += x[:, :, i, j] @ layer.conv.weight[:, :, row, column]
    assert_same(layer(x, *size), wanted)


def test_shifts_move_an_image_and_fill_with_zeros():
    x = image(2, (4, 5))
    down, right = down_shift(x), right_shift(x)
    assert torch.equal(down[:, :, 1:], x[:, :, :-1])
    assert torch.equal(right[..., 1:], x[..., :-1])
    assert not down[:, :, 0].any()
    assert not right[..., 0].any()
    one = image(2, (1, 1))
    assert not down_shift(one).any()
    assert not right_shift(one).any()


def test_init_scales_reach_the_layers():
    x = image(3, (6, 7)).repeat(8, 1, 1, 1) + image(3, (6, 7)).repeat(8, 1, 1, 1).roll(1, 0)
    mask = torch.ones(4, 3, 1, 1)
    for layer in (
        CausalConv2d(3, 4, (2, 3), "down", init_scale=0.3),
        CausalConv2d(3, 4, (1, 1), mask=mask, init_scale=0.3),
        Pointwise(3, 4, init_scale=0.3),
        Pointwise(3, 4, mask, init_scale=0.3),
    ):
        data_dependent_init(layer.double(), x)
        std, mean = torch.std_mean(layer(x).transpose(0, 1).flatten(1), dim=1, correction=0)
        assert_same(mean, torch.zeros_like(mean))
        assert_same(std, torch.full_like(std, 0.3))


# Along a walk


@each_size
@each_kernel
@statically
@torch.no_grad()
def test_a_walk_by_pixels_gives_what_forward_gives(size, kernel, static):
    height, width, reach, _, right = kernel
    layer = CausalConv2d(3, 4, (height, width), reach).double()
    x = image(3, size)
    walk, wanted = Walk(2, *size, x, static), layer(x)
    if right:  # what is on the right is known by whole rows only
        for row in rows_of(walk):
            assert_same(layer(x[:, :, row : row + 1], walk), wanted[:, :, row : row + 1])
    else:
        for row, column in pixels_of(walk):
            assert_same(layer(at(x, row, column), walk), at(wanted, row, column))


@each_size
@statically
@torch.no_grad()
def test_a_value_taken_in_twice_counts_once(size, static):
    """As the decoder does for each channel of a pixel, and a captured step when it is warmed up."""
    layer = CausalConv2d(3, 4, (2, 2)).double()
    x = image(3, size)
    walk, wanted = Walk(2, *size, x, static), layer(x)
    for row, column in pixels_of(walk):
        layer(torch.full_like(at(x, row, column), 9.0), walk)
        assert_same(layer(at(x, row, column), walk), at(wanted, row, column))


@each_size
@statically
@torch.no_grad()
def test_a_walk_by_pixels_through_half_the_resolution(size, static):
    shrink, grow = CausalConv2d(3, 4, (2, 2), stride=2).double(), CausalConvTranspose2d(4, 2).double()
    x = image(3, size)
    half = shrink(x)
    wanted = grow(half, *size)
    walk = Walk(2, *size, x, static)
    assert (walk.half.height, walk.half.width) == half.shape[2:]
    for row, column in pixels_of(walk):
        shrink.keep(at(x, row, column), walk)
        if walk.on_half:
            assert (row % 2, column % 2) == (0, 0)
            assert (walk.half.row, walk.half.column) == (row // 2, column // 2)
            inner = shrink.step(walk)
            assert_same(inner, at(half, row // 2, column // 2))
            grow.keep(inner, walk)
        assert_same(grow.step(walk), at(wanted, row, column))


@each_size
@statically
@torch.no_grad()
def test_a_walk_by_rows_through_half_the_resolution(size, static):
    shrink, grow = CausalConv2d(3, 4, (2, 3), "down", stride=2).double(), CausalConvTranspose2d(4, 3).double()
    x = image(3, size)
    half = shrink(x)
    wanted = grow(half, *size)
    walk = Walk(2, *size, x, static)
    for row in rows_of(walk):
        shrink.keep(x[:, :, row : row + 1], walk)
        assert walk.on_half == (row % 2 == 0)
        if walk.on_half:
            inner = shrink.step(walk)
            assert_same(inner, half[:, :, row // 2 : row // 2 + 1])
            grow.keep(inner, walk)
        assert_same(grow.step(walk), wanted[:, :, row : row + 1])


@statically
@torch.no_grad()
def test_a_pointwise_layer_takes_rows_and_pixels(static):
    layer = Pointwise(3, 4).double()
    x = image(3, (4, 5))
    walk, wanted = Walk(2, 4, 5, x, static), layer(x)
    assert_same(wanted, F.conv2d(x, layer.conv.weight, layer.conv.bias))
    for row in rows_of(walk):
        assert_same(layer(x[:, :, row : row + 1], walk), wanted[:, :, row : row + 1])
    for row, column in pixels_of(walk):
        assert_same(layer(at(x, row, column), walk), at(wanted, row, column))


def test_a_last_layer_keeps_its_precision_under_autocast():
    layer, x = Pointwise(8, 3, autocast=False), torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, lowered = layer(x.bfloat16()), Pointwise(8, 3)(x)
        along = layer(x.bfloat16()[..., :1, :1], Walk(2, 4, 4, x))
    assert y.dtype == along.dtype == torch.float32
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x.bfloat16().float()), rtol=0, atol=0)
    torch.testing.assert_close(along, y[..., :1, :1])
