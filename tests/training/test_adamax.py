"""Tests of the compiled Adamax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wngen.training import adamax
from wngen.training.adamax import CompiledAdamax


def parameters() -> list[Tensor]:
    """A matrix, a weight of a convolution with channels last, and a vector, in double precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 5), (4, 3, 3, 3), (7,)
    matrix, conv, vector = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.requires_grad_() for t in (matrix, conv.contiguous(memory_format=torch.channels_last), vector)]


def take_steps(optimizer: torch.optim.Optimizer, weights: list[Tensor], numbers: range) -> None:
    """Steps of other sizes, by gradients that depend on the number of the step alone; every third leaves one out."""
    for number in numbers:
        generator = torch.Generator().manual_seed(1 + number)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        for i, p in enumerate(weights):
            grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
            p.grad = None if i == 2 and number % 3 == 2 else grad.contiguous(memory_format=layout)
        optimizer.step()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each compilation; what is compiled runs operation by operation, without a C++ compiler."""
    counted: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        counted.append(len(inputs))
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(adamax.torch, "compile", lambda f, **options: compiled(f, backend=backend, **options))
    torch._dynamo.reset()
    return counted


def test_it_follows_torch(compilations: list[int]) -> None:
    ours, theirs = parameters(), parameters()
    take_steps(CompiledAdamax(ours, betas=(0.8, 0.95)), ours, range(8))
    take_steps(torch.optim.Adamax(theirs, betas=(0.8, 0.95), foreach=False), theirs, range(8))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert compilations


def test_a_schedule_has_nothing_compiled_again(compilations: list[int]) -> None:
    weights = parameters()
    optimizer = CompiledAdamax(weights)
    take_steps(optimizer, weights, range(12))
    assert len(compilations) == 2  # with the gradient of the vector, and without


def test_a_checkpoint_of_one_is_read_by_the_other(compilations: list[int]) -> None:
    whole, halves = parameters(), parameters()
    take_steps(torch.optim.Adamax(whole, foreach=False), whole, range(6))
    first = CompiledAdamax(halves)
    take_steps(first, halves, range(2))
    second = torch.optim.Adamax(halves, foreach=False)
    second.load_state_dict(first.state_dict())
    take_steps(second, halves, range(2, 4))
    third = CompiledAdamax(halves)
    third.load_state_dict(second.state_dict())
    take_steps(third, halves, range(4, 6))
    for mine, other in zip(halves, whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_closure_computes_the_gradients(compilations: list[int]) -> None:
    (weight, *_) = parameters()
    optimizer = CompiledAdamax([weight], lr=0.1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value

    before = weight.detach().clone()
    value = optimizer.step(loss)
    torch.testing.assert_close(value, before.square().sum())
    torch.testing.assert_close(weight.detach(), before - 0.1 * before.sign())  # the first step is the rate, but for eps
