"""The conditioners are causal and not blind, of vectors and of maps."""

from __future__ import annotations

import pytest
import torch
from dependence import CONTEXT_DIM, draw, draw_maps, generic, jacobian
from torch import Tensor, nn

from wngen.made import MADE, ConvMADE

Shape = tuple[int, int, int]


def assert_dependence(made: nn.Module, z: Tensor, context: Tensor | None, wanted: Tensor) -> None:
    """Output i has a gradient from variable j where `wanted` `(Z, Z)` says so, nowhere else, and from the context."""
    jacobians = jacobian(lambda z: torch.stack(made(z, context), dim=1).flatten(2), z)  # (outputs, Z, Z)
    for matrix in jacobians:
        assert torch.equal(matrix != 0, wanted)
    if context is not None:
        by_context = jacobian(lambda context: torch.cat(made(z, context), dim=1), context)
        assert by_context.any(dim=-1).all()


def some_steps(made: nn.Module, z: Tensor, context: Tensor | None) -> None:
    """Of an optimizer, which have a gradient for every parameter."""
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack([output.sub(z).square().mean() for output in made(z, context)]).sum().backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in made.parameters())
        optimizer.step()


# Of vectors


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize(("dim", "width"), [(1, 1), (2, 2), (5, 5), (6, 11), (7, 40)])
def test_made_is_causal_and_not_blind(dim: int, width: int, hidden_layers: int, context_dim: int, reverse: bool):
    made = generic(MADE(dim, 2, width, hidden_layers, context_dim, reverse))
    before = torch.ones(dim, dim, dtype=torch.bool).tril(-1)
    before = before.T if reverse else before
    z, context = draw(1, dim, context_dim)
    assert_dependence(made, z, context, before)
    some_steps(made, *draw(16, dim, context_dim))
    assert_dependence(made, z, context, before)


def test_made_stays_causal_under_autocast_and_returns_single_precision():
    made = generic(MADE(5, 2, 16, 1, CONTEXT_DIM), torch.float32)
    z, context = draw(1, 5, CONTEXT_DIM, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert {output.dtype for output in made(z, context)} == {torch.float32}
        assert_dependence(made, z, context, torch.ones(5, 5).tril(-1).bool())


def test_made_refuses_what_would_make_it_blind_or_deaf():
    with pytest.raises(ValueError, match="width=4: wanted at least dim=5"):
        MADE(5, 2, 4, 1)
    with pytest.raises(ValueError, match="hidden_layers=-1"):
        MADE(5, 2, 5, -1)
    z, context = draw(2, 5, CONTEXT_DIM)
    with pytest.raises(ValueError, match="got no context, but the network was built with one"):
        MADE(5, 2, 8, 1, CONTEXT_DIM)(z)
    with pytest.raises(ValueError, match=r"got a context \(2, 3\), but the network was built without"):
        MADE(5, 2, 8, 1)(z, context)


# Of maps


def coordinates(shape: Shape) -> tuple[Tensor, ...]:
    """Channel, row and column of each variable of maps, in the order in which they lie in memory."""
    return tuple(axis.flatten() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))


def order(shape: Shape, reverse: bool) -> Tensor:
    """`(Z,)`, the place of each variable: in raster order, at each place by channel."""
    channels, height, width = shape
    channel, row, column = coordinates(shape)
    place = (row * width + column) * channels + channel
    return channels * height * width - 1 - place if reverse else place


def earlier_within_reach(shape: Shape, convolutions: int, kernel_size: int, reverse: bool) -> Tensor:
    """`(Z, Z)`: which variables a stack of causal convolutions shows to which, by counting the steps between them.

    Of n steps, each reaches as far to the left as to the right if it goes up, and to the left alone if it does not.
    """
    sign = -1 if reverse else 1
    earlier, up, left = (sign * (axis[:, None] - axis) for axis in coordinates(shape))
    reach = kernel_size // 2
    steps_up = up.clamp(max=convolutions)
    is_near = (up <= convolutions * reach) & (left <= convolutions * reach) & (-left <= steps_up * reach)
    is_here = (up == 0) & (left == 0)
    is_before = (up > 0) | ((up == 0) & (left > 0))
    return (is_near & is_before) | (is_here & (earlier > 0))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize(
    ("channels", "width", "size", "kernel_size"),
    [(1, 1, (4, 5), 3), (2, 2, (5, 4), 3), (3, 8, (4, 5), 3), (4, 9, (1, 3), 3), (2, 5, (6, 7), 5), (3, 4, (2, 2), 1)],
)
def test_a_network_of_maps_is_causal_over_space_and_channels_and_not_blind(
    channels: int,
    width: int,
    size: tuple[int, int],
    kernel_size: int,
    hidden_layers: int,
    with_context: bool,
    reverse: bool,
):
    made = generic(ConvMADE(channels, 2, width, hidden_layers, with_context, kernel_size, reverse))
    shape = (channels, *size)
    assert made.context_channels == (width if hidden_layers else 2 * channels)
    wanted = earlier_within_reach(shape, hidden_layers + 1, kernel_size, reverse)
    place = order(shape, reverse)
    assert not (wanted & (place[:, None] <= place)).any()
    z, context = draw_maps(1, shape, made.context_channels if with_context else 0)
    assert_dependence(made, z, context, wanted)
    some_steps(made, *draw_maps(8, shape, made.context_channels if with_context else 0))
    assert_dependence(made, z, context, wanted)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_places_of_variables_come_in_order(reverse: bool):
    for made, z in (
        (MADE(5, 1, 5, 1, reverse=reverse), torch.arange(5)[None]),
        (ConvMADE(3, 1, 3, 1, reverse=reverse), torch.empty(1, 3, 4, 5)),
    ):
        place = order((3, 4, 5), reverse).view(3, 4, 5) if z.dim() == 4 else z[0].flip(0) if reverse else z[0]
        assert [int(place[at]) for at in made.places(z)] == list(range(place.numel()))


@pytest.mark.parametrize("hidden_layers", [0, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_network_of_maps_stays_causal_under_autocast_and_returns_single_precision(hidden_layers: int, reverse: bool):
    made = generic(ConvMADE(3, 2, 6, hidden_layers, with_context=True, reverse=reverse), torch.float32)
    z, context = draw_maps(1, (3, 3, 4), made.context_channels, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert {output.dtype for output in made(z, context)} == {torch.float32}
        assert_dependence(made, z, context, earlier_within_reach((3, 3, 4), hidden_layers + 1, 3, reverse))


def test_a_network_of_maps_refuses_what_would_make_it_blind_or_deaf():
    with pytest.raises(ValueError, match="width=4: wanted at least channels=5"):
        ConvMADE(5, 2, 4, 1)
    ConvMADE(5, 2, 4, 0)  # without hidden layers nothing has that width
    for name, value in {"channels": 0, "hidden_layers": -1, "kernel_size": 4}.items():
        with pytest.raises(ValueError, match=rf"{name}={value}.*wanted"):
            ConvMADE(**({"channels": 2, "outputs": 2, "width": 5, "hidden_layers": 1} | {name: value}))
    z, context = draw_maps(2, (3, 4, 5), 6)
    with pytest.raises(ValueError, match="got no context, but the network was built with one"):
        ConvMADE(3, 2, 6, 1, with_context=True)(z)
    with pytest.raises(ValueError, match=r"got a context \(2, 6, 4, 5\), but the network was built without"):
        ConvMADE(3, 2, 6, 1)(z, context)
