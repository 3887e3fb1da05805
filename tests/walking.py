"""Walks over the pixels of small images, for what takes them one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wngen.nn import Walk

SIZES = [(6, 8), (5, 7), (7, 4), (1, 6), (5, 1), (1, 1)]

each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
statically = pytest.mark.parametrize("static", [False, True])


def pixels_of(walk: Walk) -> Iterator[tuple[int, int]]:
    for row in range(walk.height):
        walk.enter_row(row)
        for column in range(walk.width):
            walk.enter_pixel(column)
            yield row, column


def rows_of(walk: Walk) -> Iterator[int]:
    for row in range(walk.height):
        walk.enter_row(row)
        yield row


def at(x: Tensor, row: int, column: int) -> Tensor:
    return x[:, :, row : row + 1, column : column + 1]


def image(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, channels, *size, dtype=torch.double)


def assert_same(seen: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-12)
