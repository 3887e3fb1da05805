"""The decoder predicts, pixel by pixel, what the forward pass predicts at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pixel_zoo import DEEP, SIZES, drawn, each_deep_model, each_model, images, made, released, sized
from recording import recorded
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.decoder import Decoder, Drawn, Given
from wngen.distributions import PixelDistribution
from wngen.nn import Walk
from wngen.noise import Noise

PRECISIONS = [(torch.double, 1e-10), (torch.float, 1e-4)]


def assert_predicts_what_forward_predicts(
    model: AutoregressiveModel, x: Tensor, y: Tensor | None, tolerance: float
) -> None:
    with torch.no_grad():
        wanted = model.predict(model.spec.scale(x, next(model.parameters()).dtype), y)
    decoder = Decoder(model)
    predict_pixel = decoder.model.predict_pixel
    predicted = torch.zeros_like(wanted)

    def watched(left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        step = predict_pixel(left, here, y, walk)
        predicted[:, :, walk.row, walk.column] = step[:, :, 0, 0]
        return step

    decoder.model.predict_pixel = watched
    copied, _ = decoder.run(len(x), Given(x, torch.ones(x.shape[2:], dtype=torch.bool), never), y)
    assert torch.equal(copied, x)
    torch.testing.assert_close(predicted, wanted, rtol=tolerance, atol=tolerance)


def never(distribution: PixelDistribution, row: int, column: int) -> Tensor:
    raise AssertionError


@each_deep_model
@sized(SIZES)
@pytest.mark.parametrize(("n", "dtype", "tolerance"), [(1, *PRECISIONS[0]), (5, *PRECISIONS[1])])
def test_the_decoder_predicts_what_forward_predicts(name, size, n, dtype, tolerance):
    model = made(name, size, dtype, DEEP)
    assert_predicts_what_forward_predicts(model, *images(model, n), tolerance)


@each_model
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_the_decoder_predicts_what_forward_predicts_for_many_images(name, dtype, tolerance):
    model = made(name, SIZES[1], dtype)
    assert_predicts_what_forward_predicts(model, *images(model, 256), tolerance)


def test_the_decoder_predicts_what_forward_predicts_with_trained_weights():
    model, digits = released()
    assert_predicts_what_forward_predicts(model, digits[:1], None, 1e-4)


@each_model
@sized(SIZES)
def test_each_channel_is_taken_from_its_distribution_given_those_before(name, size):
    model = made(name, size)
    x, y = images(model, 5)
    parts: list[Tensor] = []

    def told(distribution: PixelDistribution, row: int, column: int) -> Tensor:
        level = x[:, :, row : row + 1, column : column + 1]
        log_prob = distribution.log_prob(level)
        step = len(parts) % model.spec.channels
        parts.append(log_prob[:, step] if model.by_channel else log_prob.sum(dim=1))
        return level

    _, nats = Decoder(model).run(5, told, y)
    torch.testing.assert_close(torch.stack(parts).sum(dim=(0, 2, 3)), nats, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(nats, model.log_likelihood(x, y), rtol=1e-10, atol=1e-10)


@each_model
@sized(SIZES)
def test_a_step_that_was_captured_replays_at_every_pixel(name, size):
    model = made(name, size)
    n, (_, y) = 3, images(model, 3)
    eager, eager_nats = Decoder(model).run(n, drawn(model, n), y)
    replayed, replayed_nats = Decoder(model, capture=recorded).run(n, drawn(model, n), y)
    assert torch.equal(replayed, eager)
    torch.testing.assert_close(replayed_nats, eager_nats, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a GPU")
@each_model
@pytest.mark.parametrize("n", [1, 16])
def test_a_gpu_draws_what_its_steps_uncaptured_draw(name, n):
    model = made(name, SIZES[1]).float().cuda()
    noise, y = Noise(0, torch.arange(n, device="cuda")), torch.arange(n, device="cuda") % 3
    captured, eager = Decoder(model), Decoder(model)
    eager.capture = None
    images, nats = captured.run(n, Drawn(noise, model.spec.width), y)
    again, nats_again = eager.run(
        n, Given(images, torch.ones(images.shape[2:], dtype=torch.bool), Drawn(noise, model.spec.width)), y
    )
    assert torch.equal(images, again)
    torch.testing.assert_close(nats, nats_again, rtol=0, atol=1e-4)
    torch.testing.assert_close(nats, model.log_likelihood(images, y).cpu(), rtol=0, atol=1e-4)


@each_model
def test_where_nothing_can_be_captured_the_steps_run_as_they_stand(name):
    model = made(name, SIZES[1])
    n, (_, y) = 2, images(model, 2)
    eager, eager_nats = Decoder(model).run(n, drawn(model, n), y)
    captures = itertools.count()

    def some(step: Any) -> Any:
        if next(captures) == 2:
            raise RuntimeError("out of graphs")
        return recorded(step)

    with pytest.warns(UserWarning, match="goes on without CUDA graphs, more slowly: out of graphs"):
        images_, nats = Decoder(model, capture=some).run(n, drawn(model, n), y)
    assert next(captures) == 3
    assert torch.equal(images_, eager)
    torch.testing.assert_close(nats, eager_nats, rtol=1e-10, atol=1e-10)
