"""Causal attention by its formula, at once and along a walk."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wngen.nn import CausalAttention, Walk

SIZES = [(4, 5), (1, 6), (6, 1), (1, 2), (1, 1)]
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


def inputs(size: tuple[int, int], dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    """Queries of 3 channels, and keys and values of 3 and 4."""
    return torch.randn(2, 3, *size).to(dtype), torch.randn(2, 7, *size).to(dtype)


@each_size
def test_a_pixel_takes_the_weighted_mean_of_those_before(size):
    query, memory = inputs(size)
    attended = CausalAttention(3, 4)(query, memory)
    assert attended.shape == (2, 4, *size)
    queries, keys, values = query.flatten(2), memory[:, :3].flatten(2), memory[:, 3:].flatten(2)
    for image in range(2):
        for p in range(size[0] * size[1]):
            weights = [math.exp(float(queries[image, :, p] @ keys[image, :, j]) / math.sqrt(3)) for j in range(p)]
            wanted = torch.zeros(4, dtype=torch.double)
            for j, weight in enumerate(weights):
                wanted += weight / sum(weights) * values[image, :, j]
            torch.testing.assert_close(attended[image].flatten(1)[:, p], wanted)


@each_size
def test_gradients_reach_the_pixels_before_only(size):
    query, memory = (part.requires_grad_() for part in inputs(size))
    attended = CausalAttention(3, 4)(query, memory).flatten(2)
    count = size[0] * size[1]
    for p in range(count):
        at_query, at_memory = torch.autograd.grad(attended[..., p].sum(), (query, memory), retain_graph=True)
        assert at_query.isfinite().all()
        assert torch.equal(at_memory[:, 3:].flatten(2).abs().sum(dim=(0, 1)) > 0, torch.arange(count) < p)
        # One weight alone is 1 whatever the key.
        assert torch.equal(at_memory[:, :3].flatten(2).abs().sum(dim=(0, 1)) > 0, (torch.arange(count) < p) & (p > 1))
        assert torch.equal(at_query.flatten(2).abs().sum(dim=(0, 1)) > 0, (torch.arange(count) == p) & (p > 1))


@each_size
@pytest.mark.parametrize("static", [False, True])
def test_a_walk_gives_what_forward_gives(size, static):
    query, memory = inputs(size)
    attention = CausalAttention(3, 4)
    wanted = attention(query, memory)
    walk = Walk(2, *size, query, static)
    before = None
    for row in range(size[0]):
        walk.enter_row(row)
        for column in range(size[1]):
            if column:
                walk.enter_pixel(column)
            if before is not None:
                attention.keep(before, walk)  # of the row above the last one, while the row is taken as a whole
            walk.enter_pixel(column)
            here = (slice(None), slice(None), slice(row, row + 1), slice(column, column + 1))
            torch.testing.assert_close(attention.step(query[here], walk), wanted[here], rtol=0, atol=1e-12)
            before = memory[here]


def test_large_scores_stay_finite_in_half_precision():
    query, memory = inputs((4, 5), torch.bfloat16)
    attended = CausalAttention(3, 4)(query * 100, memory * 100)
    wanted = CausalAttention(3, 4)(query.double() * 100, memory.double() * 100)
    assert attended.isfinite().all()
    torch.testing.assert_close(attended.double(), wanted, rtol=0.05, atol=1.0)
