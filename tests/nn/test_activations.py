from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from wngen.nn import concat_elu, elu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_elu_is_torchs(dtype):
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([0.0, 1e-6, -1e-6, -200.0, 1000.0])]).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = elu(a)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, F.elu(b), rtol=eps, atol=2e-7)
    y.sum().backward()
    F.elu(b).sum().backward()
    slope_rounding = max(eps / 2, 2e-7)  # the slope is y + 1, and y is rounded
    torch.testing.assert_close(a.grad, b.grad, rtol=eps, atol=slope_rounding)


def test_derivatives_of_elu():
    x = torch.randn(20, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(elu, x)
    assert torch.autograd.gradgradcheck(elu, x)


def test_elu_under_transforms_and_compilation():
    x = torch.randn(4, 3)
    jacobian = torch.func.vmap(torch.func.jacrev(elu))(x)
    torch.testing.assert_close(jacobian, torch.diag_embed(torch.where(x > 0, 1, x.exp())))
    compiled = torch.compile(elu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), elu(x))


def test_elu_keeps_what_is_not_finite_visible():
    y = elu(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert y[0].isnan()
    assert y[1:].tolist() == [float("inf"), -1.0]


def test_concat_elu_shows_both_sides():
    x = torch.randn(2, 3, 4)
    y = concat_elu(x)
    assert y.shape == (2, 6, 4)
    torch.testing.assert_close(y[:, :3], F.elu(x))
    torch.testing.assert_close(y[:, 3:], F.elu(-x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_derivatives_of_concat_elu(dtype):
    x = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(2, 6, 4, 5).to(dtype)
    (concat_elu(a) * weight).sum().backward()
    (F.elu(torch.cat([b, -b], dim=1)) * weight).sum().backward()
    tolerance = max(torch.finfo(dtype).eps, 2e-7)
    torch.testing.assert_close(a.grad, b.grad, rtol=2 * tolerance, atol=4 * tolerance)
    assert concat_elu(a).is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(concat_elu(a), concat_elu(x), rtol=0, atol=0)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(concat_elu, a)
        assert torch.autograd.gradgradcheck(concat_elu, a)
