"""What a walk keeps is found again where it belongs."""

from __future__ import annotations

import torch
from walking import at, image, pixels_of, rows_of, statically

from wngen.nn import Pointwise, Walk


@statically
def test_a_row_is_stored_for_its_pixels(static):
    layer, x = Pointwise(3, 3), image(3, (4, 5))
    walk = Walk(2, 4, 5, x, static)
    for row in rows_of(walk):
        walk.store(layer, x[:, :, row : row + 1])
        for column in range(5):
            walk.enter_pixel(column)
            assert torch.equal(walk.stored(layer), at(x, row, column))


@statically
def test_pixels_are_kept_at_their_positions(static):
    layer, x = Pointwise(3, 3), image(3, (4, 5))
    walk = Walk(2, 4, 5, x, static)
    pixels = walk.pixels(layer, 3)
    assert not pixels.any()
    for row, column in pixels_of(walk):
        assert int(walk.position) == 5 * row + column
        walk.put(pixels, at(x, row, column))
        assert torch.equal(walk.pick(pixels), at(x, row, column))
    assert torch.equal(walk.pixels(layer, 3), x.flatten(2).transpose(1, 2))
    walk.enter_row(2)
    assert int(walk.position) == 10
