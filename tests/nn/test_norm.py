from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from wngen.nn import MeanOnlyBatchNorm

SHAPES = [(8, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 2, 3)]


@pytest.fixture(params=SHAPES, ids=["flat", "1d", "2d", "3d"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return 2 * torch.randn(request.param) + 5


def by_channel(x: Tensor) -> Tensor:
    return x.movedim(1, 0).flatten(1)


def test_training_output_has_the_bias_as_its_mean_and_is_not_rescaled(x):
    norm = MeanOnlyBatchNorm(3)
    nn.init.normal_(norm.bias)
    y = norm(x)
    torch.testing.assert_close(by_channel(y).mean(dim=1), norm.bias.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(by_channel(y).std(dim=1), by_channel(x).std(dim=1))


def test_gradient_is_centred(x):
    norm = MeanOnlyBatchNorm(3)
    x.requires_grad_()
    grad = torch.randn_like(x)
    grad_x, grad_bias = torch.autograd.grad(norm(x), (x, norm.bias), grad)
    expected = by_channel(grad) - by_channel(grad).mean(dim=1, keepdim=True)
    torch.testing.assert_close(by_channel(grad_x), expected)
    torch.testing.assert_close(grad_bias, by_channel(grad).sum(dim=1))


def test_running_mean_and_eval_mode():
    norm = MeanOnlyBatchNorm(3, momentum=0.1)
    nn.init.normal_(norm.bias)
    expected = torch.zeros(3)
    for _ in range(5):
        x = torch.randn(4, 3, 5) + 7
        norm(x)
        expected = 0.9 * expected + 0.1 * x.mean(dim=(0, 2))
    torch.testing.assert_close(norm.running_mean, expected)
    norm.eval()
    expected = norm.running_mean.clone()
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(norm(x), x - expected[:, None] + norm.bias[:, None])
    torch.testing.assert_close(norm(x)[2:3], norm(x[2:3]))
    torch.testing.assert_close(norm.running_mean, expected, rtol=0, atol=0)


def test_statistics_are_single_precision_for_half_precision_inputs():
    norm = MeanOnlyBatchNorm(2)
    x = (torch.randn(5000, 2) + 100).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    exact = x.double().mean(dim=0)
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(y, (x.double() - exact).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.float()).dtype == torch.float32


def test_state_and_copies_keep_the_running_mean():
    norm = MeanOnlyBatchNorm(3)
    norm(torch.randn(10, 3))
    fresh = MeanOnlyBatchNorm(3)
    fresh.load_state_dict(norm.state_dict(), strict=True)
    x = torch.randn(4, 3)
    for twin in (fresh, copy.deepcopy(norm)):
        torch.testing.assert_close(twin.eval()(x), copy.deepcopy(norm).eval()(x), rtol=0, atol=0)
    norm.reset_parameters()
    torch.testing.assert_close(norm.eval()(x), x, rtol=0, atol=0)


def test_compiles_to_one_graph():
    norm, x = MeanOnlyBatchNorm(3), torch.randn(4, 3, 5)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(norm.running_mean, twin.running_mean)


def test_inputs_that_cannot_be_centred():
    norm = MeanOnlyBatchNorm(3)
    with pytest.raises(ValueError, match=r"shape \(4, 5\), wanted \(B, 3, \.\.\.\)"):
        norm(torch.randn(4, 5))
    with pytest.raises(ValueError, match="its own mean"):
        norm(torch.randn(1, 3))
    assert norm.eval()(torch.randn(1, 3)).shape == (1, 3)
