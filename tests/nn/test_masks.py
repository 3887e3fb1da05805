from __future__ import annotations

from itertools import pairwise, product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from wngen.nn import MaskedWNLinear, causal_mask, made_degrees, made_mask


def made(degrees: list[Tensor], order: Tensor) -> nn.Sequential:
    """A masked network of one output for each variable."""
    layers: list[nn.Module] = []
    for lower, upper in pairwise(degrees):
        layers += [MaskedWNLinear(made_mask(upper, lower)), nn.Tanh()]
    return nn.Sequential(*layers, MaskedWNLinear(made_mask(order + 1, degrees[-1], strict=True))).double()


def jacobian(network: nn.Module, dim: int) -> Tensor:
    """`(outputs, inputs)`, the largest derivative over a batch."""
    x = torch.randn(16, dim, dtype=torch.double, requires_grad=True)
    y = network(x).sum(dim=0)
    return torch.stack([torch.autograd.grad(unit, x, retain_graph=True)[0].abs().amax(dim=0) for unit in y])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, list[int], Tensor, bool]:
    dim = draw(st.integers(1, 8))
    hidden = draw(st.lists(st.integers(dim, 20), max_size=3))
    order = torch.tensor(draw(st.permutations(range(dim))))
    return dim, hidden, order, draw(st.booleans())


@given(shapes())
def test_an_output_sees_exactly_the_variables_before_its_own(shape):
    dim, hidden, order, context = shape
    network = made(made_degrees(dim, hidden, order, context), order)
    seen = jacobian(network, dim) > 0
    assert torch.equal(seen, order[:, None] > order)


@given(shapes())
def test_a_context_reaches_every_output_through_the_hidden_layers(shape):
    dim, hidden, order, _ = shape
    if not hidden:
        return
    degrees = made_degrees(dim, hidden, order, context=True)
    reached = torch.ones(hidden[0], dtype=torch.bool)  # every unit of the first hidden layer sees the context
    for lower, upper in pairwise(degrees[1:]):
        reached = (made_mask(upper, lower) & reached).any(dim=1)
    assert (made_mask(order + 1, degrees[-1], strict=True) & reached).any(dim=1).all()


@pytest.mark.parametrize("width", [1, 2, 5])
def test_layers_narrower_than_the_input_stay_causal(width):
    order = torch.arange(9)
    seen = jacobian(made(made_degrees(9, [width, width], order, context=False), order), 9) > 0
    assert not (seen & (order[:, None] <= order)).any()


def test_every_degree_has_its_share_of_a_wide_layer():
    _, hidden = made_degrees(8, [700], torch.arange(8), context=False)
    counts = torch.bincount(hidden)[1:]
    assert counts.sum() == 700
    assert counts.min() > 0
    assert torch.equal(hidden, hidden.sort().values)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_a_causal_mask_shows_what_comes_before_and_at_the_centre_what_it_is_told(kernel_size: int, reverse: bool):
    centre = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    mask = causal_mask(centre, kernel_size, reverse)
    assert mask.shape == (2, 3, kernel_size, kernel_size)
    middle = (kernel_size // 2, kernel_size // 2)
    for output, channel, row, column in product(range(2), range(3), range(kernel_size), range(kernel_size)):
        place = (row, column)
        comes_before = place > middle if reverse else place < middle
        wanted = bool(centre[output, channel]) if place == middle else comes_before
        assert bool(mask[output, channel, row, column]) == wanted
