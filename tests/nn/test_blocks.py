from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wngen.nn import GatedResidualBlock, ResidualBlock


def test_residual_block_by_its_formula():
    block = ResidualBlock(4, kernel_size=5, scale=0.3)
    x = torch.randn(2, 4, 7, 6)
    h = F.conv2d(F.elu(x), block.first.weight, block.first.bias, padding=2)
    h = F.conv2d(F.elu(h), block.second.weight, block.second.bias, padding=2)
    torch.testing.assert_close(block(x), x + 0.3 * h)


def test_gated_residual_block_by_its_formula():
    block = GatedResidualBlock(4, aux_channels=3, num_classes=5)
    x, aux, y = torch.randn(2, 4, 7, 6), torch.randn(2, 3, 7, 6), torch.tensor([4, 0])

    def concat_elu(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.elu(x), F.elu(-x)], dim=1)

    h = F.conv2d(concat_elu(x), block.first.weight, block.first.bias, padding=1)
    h = h + F.conv2d(concat_elu(aux), block.aux.conv.weight, block.aux.conv.bias)
    h = F.conv2d(concat_elu(h), block.second.weight, block.second.bias, padding=1)
    h = h + block.label.weight[y][:, :, None, None]
    torch.testing.assert_close(block(x, aux, y), x + h[:, :4] * h[:, 4:].sigmoid())


def test_another_activation_keeps_the_channels():
    block = GatedResidualBlock(4, activation=torch.tanh)
    assert block.first.in_channels == 4
    assert block(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)


@pytest.mark.parametrize("make", [ResidualBlock, GatedResidualBlock])
def test_dropout_lies_on_the_residual_branch(make):
    block = make(4, dropout=1 - 1e-7)  # as good as always
    x = torch.randn(2, 4, 5, 5)
    nn.init.zeros_(block.second.bias)
    torch.testing.assert_close(block.train()(x), x)
    assert not torch.allclose(block.eval()(x), x)


def test_blocks_copy_and_compile():
    for block in (ResidualBlock(4), GatedResidualBlock(4)):
        x = torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(copy.deepcopy(block)(x), block(x), rtol=0, atol=0)
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))


def test_inputs_that_the_block_was_not_built_for():
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="wants no aux input"):
        GatedResidualBlock(4)(x, aux=x)
    with pytest.raises(ValueError, match="wants an aux input"):
        GatedResidualBlock(4, aux_channels=4)(x)
    with pytest.raises(ValueError, match="no classes y, got none and some"):
        GatedResidualBlock(4)(x, y=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="and classes y, got none and none"):
        GatedResidualBlock(4, num_classes=2)(x)
