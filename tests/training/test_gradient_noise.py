"""The noise in a gradient: estimated without bias, and the same in every gauge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from per_image import estimate, make_training, per_image_gradients
from torch import Tensor, nn

from wngen.image import Batch
from wngen.models import ResNetVAE
from wngen.nn import MaskedWNLinear, WNConv2d, WNConvTranspose2d, WNLinear
from wngen.training.gradient_noise import Blocks, GradientNoise, PartSums, RunningNoise

# The estimator


class TwoVectors(nn.Module):
    """Of the loss |theta - x|^2 / 2 for Gaussian x, whose gradient has a known mean and covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1, bias=False), nn.Linear(2, 1, bias=False)


def test_trace_and_squared_gradient_are_without_bias_for_parts_of_any_size():
    generator = torch.Generator().manual_seed(0)
    model = TwoVectors()
    blocks = Blocks(model)
    assert blocks.names == ["first", "second"]
    std = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0])
    mean = torch.tensor([0.5, -1.0, 1.0, 0.2, 1.5])  # of the gradient
    true = {
        "first": (14.0, float(mean[:3].square().sum())),
        "second": (16.25, float(mean[3:].square().sum())),
        "total": (30.25, float(mean.square().sum())),
    }
    seen: dict[str, list[GradientNoise]] = {name: [] for name in true}
    for _ in range(1200):
        sums = PartSums(blocks)
        for images in (2, 3, 7):
            part = (mean + std * torch.randn(images, 5, generator=generator)).mean(dim=0)
            sums.add(images, [part[None, :3], part[None, 3:]])
        for name, noise in sums.estimate().items():
            seen[name].append(noise)
    for name, (trace, square) in true.items():
        for values, wanted in (
            ([noise.covariance_trace for noise in seen[name]], trace),
            ([noise.squared_gradient for noise in seen[name]], square),
        ):
            error = np.std(values) / math.sqrt(len(values))
            assert error < 0.08 * wanted  # so that a factor of 2 / 3 would be seen
            assert abs(np.mean(values) - wanted) < 4 * error, name


def test_the_scale_is_a_ratio_of_averages_and_not_an_average_of_ratios():
    generator = np.random.default_rng(0)
    trace, square = 162 * generator.chisquare(8, 4000) / 8, 2 + 4 * generator.standard_normal(4000)
    running, lately = RunningNoise(window=4000), RunningNoise(window=10)
    ratios = []
    for pair in zip(trace, square, strict=True):
        running.add({"total": GradientNoise(*pair)})
        lately.add({"total": GradientNoise(*pair)})
        ratios.append(pair[0] / pair[1])
    assert running.averages()["total"].noise_scale == pytest.approx(81, rel=0.15)
    assert abs(np.mean(ratios) - 81) > 40
    assert running.averages()["total"].covariance_trace == pytest.approx(trace.mean())
    assert lately.averages()["total"].covariance_trace == pytest.approx(trace[-10:].mean())
    assert lately.averages()["total"].squared_gradient == pytest.approx(square[-10:].mean())
    assert (running.count, lately.count) == (4000, 10)
    assert GradientNoise(1.0, -0.1).noise_scale == math.inf


def test_what_lies_before_the_window_does_not_count_after_a_resumption_either():
    """Training goes on from a checkpoint, with the same window or a shorter one."""
    before = RunningNoise(window=5)
    assert before.averages() == {}
    for trace in (1e6, 1.0, 2.0, 3.0, 4.0, 9.0):
        before.add({"a": GradientNoise(trace, 1.0), "total": GradientNoise(2 * trace, -trace)})
    for window, mean in ((5, 19 / 5), (2, 13 / 2)):
        after = RunningNoise(window)
        after.load_state_dict(before.state_dict())
        assert after.count == window
        assert after.averages()["a"] == GradientNoise(mean, 1.0)
        assert after.averages()["total"] == GradientNoise(2 * mean, -mean)
    after.add({"a": GradientNoise(3.0, 1.0), "total": GradientNoise(0.0, 0.0)})
    assert after.averages()["a"].covariance_trace == pytest.approx(6)


def test_random_parts_agree_with_the_variance_over_single_images():
    """Over all ways to divide a batch, the estimate from parts has the mean of that from its single images."""
    torch.manual_seed(1)
    training, batch = make_training(), images_of_random(48)
    training.initialize(batch)
    blocks, each = Blocks(training.model), per_image_gradients(training, batch, draw=1)
    singles = estimate(blocks, each, torch.arange(48).split(1))
    many = [estimate(blocks, each, torch.randperm(48).split(12)) for _ in range(100)]
    for name, noise in singles.items():
        traces = [parts[name].covariance_trace for parts in many]
        squares = [parts[name].squared_gradient for parts in many]
        assert np.mean(traces) == pytest.approx(noise.covariance_trace, rel=0.05), name
        assert np.mean(squares) == pytest.approx(noise.squared_gradient, abs=0.05 * noise.covariance_trace / 48), name


def images_of_random(count: int) -> Batch:
    image = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8)
    return Batch(image, None, torch.arange(count))


# The gauge


class ManyLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = WNConv2d(2, 4, 3, padding=1, groups=2, gain="exponential")
        self.up = WNConvTranspose2d(4, 6, 2, stride=2, groups=2)
        mask = torch.ones(5, 96).triu(1)
        mask[2] = 0  # nothing is left of this unit
        self.masked = nn.ModuleList([MaskedWNLinear(mask), WNLinear(5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.masked[0](torch.tanh(self.up(torch.tanh(self.down(x)))).flatten(1))
        return self.masked[1](torch.tanh(h))


@torch.no_grad()
def stretch(model: ManyLayers, factor: Any) -> None:
    """v -> c v of every layer, with c = factor(norm of v), one for each output unit."""
    for layer in (model.down, *model.masked):
        layer.v.mul_(factor(layer.norm(layer.direction)))
    by_group = model.up.v.unflatten(0, (2, -1))  # its output channels lie in two groups
    by_group.mul_(factor(model.up.norm(model.up.v)).view(2, 1, 3, 1, 1))


def test_the_length_of_v_does_not_matter_and_at_length_1_the_gradient_counts_as_it_is():
    x = torch.randn(7, 2, 2, 2)
    model = ManyLayers()
    blocks = Blocks(model)
    assert blocks.names == ["down", "up", "masked.0", "masked.1"]

    def squares() -> tuple[Tensor, Tensor]:
        loss = model(x).square().sum()
        gradients = torch.autograd.grad(loss, blocks.parameters)
        plain = torch.stack([gradient.square().sum() for gradient in gradients])
        names = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
        return blocks.squared_norms(gradients, blocks.lengths()), torch.stack(
            [sum(plain[[n == b for n in names]]) for b in blocks.names]
        )

    before, raw = squares()
    stretch(model, lambda norm: torch.rand_like(norm) * 5 + 0.1)
    after, raw_after = squares()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)
    assert (raw_after / raw - 1).abs().min() > 0.01
    stretch(model, lambda norm: 1 / norm.clamp(min=1e-9))
    at_one, raw_at_one = squares()
    torch.testing.assert_close(at_one, before, rtol=1e-4, atol=0)
    torch.testing.assert_close(raw_at_one.double(), before, rtol=1e-4, atol=0)


def test_each_stochastic_layer_of_a_hierarchy_is_a_block():
    names = Blocks(ResNetVAE(1, 6, 6, 2, "6x2, 3x1", (4,), 2, iaf_layers=0)).names
    assert sum(name.startswith("top_down.") for name in names) == 3
