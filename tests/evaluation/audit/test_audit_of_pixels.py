"""The audit of autoregressive models: sound ones pass, and each planted fault is caught by the claim that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import auditing
import pytest
import torch
import torch.nn.functional as F
from auditing import failures, faulty
from pixel_zoo import each_model, images, made, sized
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.distributions import DiscretizedLogistic, PixelDistribution
from wngen.evaluation.audit import Audit
from wngen.nn import MaskedWNConv2d, Walk, WeightNormalized

GREY, COLOUR = (1, 3, 4, 4, None), (3, 2, 3, 4, 3)


def sound(name: str, size: Any) -> AutoregressiveModel:
    return auditing.as_if_initialized(made(name, size, torch.float))


def audited(model: AutoregressiveModel, n: int = 5) -> Audit:
    torch.manual_seed(1)
    return auditing.audited(model, *images(model, n))


@each_model
@sized([COLOUR, (2, 2, 1, 3, 2), (1, 4, 3, 256, None), (1, 1, 1, 7, None)])
def test_a_sound_model_passes_every_claim(name, size):
    verdict = audited(sound(name, size))
    assert not verdict.failed
    found = {finding.name: finding.measured for finding in verdict.findings}
    assert {"causality", "poisoned_future", "decoder_is_forward", "level_probabilities", "surprise"} <= found.keys()
    assert ("receptive_field" in found) == (size[0] * size[1] * size[2] > 1)
    assert ("image_probabilities" in found) == (size[3] ** (size[0] * size[1] * size[2]) <= 4096)
    joint = next((finding for finding in verdict.findings if finding.name == "pixel_probabilities"), None)
    assert (joint is not None) == (size[0] > 1 and name != "pixelcnn")


# Causality


def leaking(row: int, column: int) -> Callable[..., Tensor]:
    """Let a single pixel be predicted from the one after it, ever so little."""

    def predict(self: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        predicted = super(type(self), self).predict(x, y)
        later = torch.zeros_like(predicted)
        later[:, :, row, column] = x[:, :1, row, column + 1]
        return predicted + 1e-6 * later

    return predict


@pytest.mark.parametrize(
    ("name", "row", "column"), [("pixelcnn", 2, 1), ("pixelcnn++", 0, 0), ("pixelcnn++", 2, 2), ("pixelsnail", 1, 0)]
)
def test_one_pixel_that_sees_the_next_one_is_caught(name, row, column):
    verdict = audited(faulty(sound(name, GREY), predict=leaking(row, column)))
    assert {"causality", "poisoned_future", "decoder_is_forward", "decoder_likelihood"} >= failures(verdict)
    assert {"causality", "poisoned_future"} <= failures(verdict)
    leak = next(finding for finding in verdict.failed if finding.name == "causality")
    assert leak.measured == 1
    assert f"row {row}, column {column} on row {row}, column {column + 1}" in leak.detail


def test_a_mask_that_leaks_one_future_pixel_everywhere_is_caught():
    def predict(self: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super(type(self), self).predict(x, y) + 1e-3 * F.pad(x[..., 1:], (0, 1))

    verdict = audited(faulty(sound("pixelcnn++", GREY), predict=predict))
    leak = next(finding for finding in verdict.failed if finding.name == "causality")
    assert leak.measured == 3 * 3  # pairs of a pixel and the next one in its row


def test_a_mask_that_lets_a_channel_see_itself_is_caught():
    model = sound("pixelcnn", COLOUR)
    first = next(layer for layer in model.modules() if isinstance(layer, MaskedWNConv2d))
    first.mask.fill_(1)
    assert {"causality", "poisoned_future"} <= failures(audited(model))


def test_pixels_that_are_predicted_from_nothing_are_caught():
    def predict(self: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super(type(self), self).predict(torch.zeros_like(x), y) + 0 * x

    verdict = failures(audited(faulty(sound("pixelcnn++", GREY), predict=predict)))
    assert {"neighbours", "receptive_field", "decoder_is_forward"} <= verdict
    assert not {"causality", "poisoned_future"} & verdict


def test_a_reversed_raster_is_caught():
    def predict(self: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super(type(self), self).predict(x.flip(2, 3), y).flip(2, 3)

    assert {"causality", "poisoned_future", "neighbours"} <= failures(
        audited(faulty(sound("pixelcnn", GREY), predict=predict))
    )


# Probabilities


class EdgeOff(DiscretizedLogistic):
    """Its last open bin is one level too high: the highest level has a closed bin, and mass is lost above it."""

    def __init__(self, mean: Tensor, log_scale: Tensor, levels: int) -> None:
        super().__init__(mean, log_scale, levels + 1)
        self._draws = DiscretizedLogistic(mean, log_scale, levels)

    def _draw(self, uniform: Tensor, temperature: float) -> Tensor:
        return self._draws._draw(uniform, temperature)


def test_an_edge_bin_that_is_off_by_one_is_caught():
    def distribution(self: Any, predicted: Tensor) -> PixelDistribution:
        return EdgeOff(predicted[:, :1], predicted[:, 1:2] - 1, 4)

    def right(self: Any, predicted: Tensor) -> PixelDistribution:
        return DiscretizedLogistic(predicted[:, :1], predicted[:, 1:2] - 1, 4)

    assert not audited(faulty(sound("pixelcnn++", GREY), distribution=right)).failed
    caught = failures(audited(faulty(sound("pixelcnn++", GREY), distribution=distribution)))
    assert "level_probabilities" in caught
    assert caught <= {"level_probabilities", "surprise"}
    tiny = audited(faulty(sound("pixelcnn++", (1, 2, 2, 4, None)), distribution=distribution))
    assert "image_probabilities" in failures(tiny)


def test_a_density_is_no_probability():
    def distribution(self: Any, predicted: Tensor) -> PixelDistribution:
        return Doubled(predicted[:, :1], predicted[:, 1:2] - 1, 4)

    assert {"level_probabilities", "at_most_certain"} <= failures(
        audited(faulty(sound("pixelcnn++", GREY), distribution=distribution))
    )


class Doubled(DiscretizedLogistic):
    def log_prob(self, x: Tensor) -> Tensor:
        return super().log_prob(x) + 8


# Batches and random numbers


@each_model
def test_statistics_of_the_batch_are_caught(name):
    def predict(self: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super(type(self), self).predict(x, y) * (1 + 1e-3 * x.mean())

    caught = failures(audited(faulty(sound(name, GREY), predict=predict)))
    assert "batch_composition" in caught
    assert caught <= {"batch_composition", "causality", "poisoned_future", "decoder_is_forward", "decoder_likelihood"}


def test_a_likelihood_that_depends_on_its_neighbours_alone_is_caught_by_that_claim_alone():
    def log_likelihood(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nats = super(type(self), self).log_likelihood(x, *args, **kwargs)
        return nats - 1e-4 * (nats - nats.mean()).square()

    model = faulty(sound("pixelcnn++", GREY), log_likelihood=log_likelihood)
    assert {"batch_composition"} <= failures(audited(model)) <= {"batch_composition", "agreement", "decoder_likelihood"}


def test_a_likelihood_that_is_random_is_caught():
    def log_likelihood(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nats = super(type(self), self).log_likelihood(x, *args, **kwargs)
        return nats + 1e-12 * nats.abs() * torch.randn(len(x), dtype=torch.double)

    verdict = audited(faulty(sound("pixelcnn++", GREY), log_likelihood=log_likelihood))
    assert failures(verdict) == {"determinism"}


def test_samples_that_ignore_their_seed_are_caught():
    def sample(self: Any, n: int, y: Any = None, temperature: float = 1.0, generator: Any = None) -> Tensor:
        return super(type(self), self).sample(n, y, temperature)

    assert failures(audited(faulty(sound("pixelcnn++", GREY), sample=sample))) == {"determinism"}


def test_what_is_changed_in_passing_is_caught():
    def forward(self: Any, x: Tensor, y: Any = None, noise: Any = None) -> Any:
        bound = super(type(self), self).forward(x, y, noise)
        x.fill_(0)
        return bound

    assert "untouched" in failures(audited(faulty(sound("pixelcnn++", GREY), forward=forward)))


def test_a_model_stays_as_it_was():
    model = sound("pixelcnn++", GREY).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert audited(model).passed
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The decoder, and what it draws


@each_model
def test_a_stale_cache_is_caught(name):
    def predict_pixel(self: Any, left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        left = torch.zeros_like(left) if (walk.row, walk.column) == (1, 2) else left
        return super(type(self), self).predict_pixel(left, here, y, walk)

    verdict = audited(faulty(sound(name, GREY), predict_pixel=predict_pixel))
    assert {"decoder_is_forward"} <= failures(verdict) <= {"decoder_is_forward", "decoder_likelihood"}
    detail = next(finding.detail for finding in verdict.failed if finding.name == "decoder_is_forward")
    assert "row 1, column" in detail or "row 2, column" in detail


def test_samples_of_another_temperature_are_caught():
    def sample(self: Any, n: int, y: Any = None, temperature: float = 1.0, generator: Any = None) -> Tensor:
        return super(type(self), self).sample(n, y, 0.3, generator)

    assert failures(audited(faulty(sound("pixelcnn", GREY), sample=sample))) == {"surprise"}


def test_samples_that_are_no_images_are_caught():
    def sample(self: Any, n: int, y: Any = None, temperature: float = 1.0, generator: Any = None) -> Tensor:
        return super(type(self), self).sample(n, y, temperature, generator).float() * 2

    assert "sample_form" in failures(audited(faulty(sound("pixelcnn", GREY), sample=sample)))


# Weights


def test_weights_that_are_no_numbers_are_caught_and_nothing_else_is_taken_for_granted():
    model = sound("pixelcnn++", GREY)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    verdict = audited(model)
    assert {"finite_weights", "finite_likelihoods", "at_most_certain", "decoder_is_forward"} <= failures(verdict)
    assert {"level_probabilities", "surprise", "batch_composition"} <= failures(verdict)


def test_layers_that_were_never_initialized_are_caught():
    model = sound("pixelcnn++", GREY)
    next(layer for layer in model.modules() if isinstance(layer, WeightNormalized)).initialized.fill_(False)
    verdict = audited(model)
    assert failures(verdict) == {"initialized"}
    assert verdict.failed[0].measured == 1
