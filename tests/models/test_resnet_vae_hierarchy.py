"""The hierarchy of the ResNet VAE: prior, posterior, and latents that are given."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from dependence import jacobian
from ladder_zoo import (
    INFERENCES,
    POSTERIORS,
    generated,
    images,
    inferred,
    latent_sizes,
    seeded,
    tiny,
)

from wngen.stochastic import StochasticLayer

# The hierarchy: prior, posterior, and what is given


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_layers_that_are_given_are_kept_and_the_others_drawn(posterior: str, num_classes: int | None):
    model = tiny(posterior=posterior, num_classes=num_classes)
    x, y = images(model, 4)
    z = model.represent(x, y).detach()
    parts, sizes = model.split(z), latent_sizes(model)
    assert [part.shape[1:] for part in parts] == list(model.latent_shapes)
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], dim=1), z)
    assert torch.equal(model.prior(4, y, given=z), z)
    free = model.prior(4, y, generator=seeded())
    assert torch.equal(free, model.prior(4, y, generator=seeded(), given=z[:, :0]))
    for kept in itertools.accumulate(sizes[:-1]):
        drawn, again, other = (model.prior(4, y, generator=seeded(s), given=z[:, :kept]) for s in (1, 1, 2))
        assert torch.equal(drawn[:, :kept], z[:, :kept])
        assert torch.equal(drawn, again)
        assert (drawn[:, kept:] != z[:, kept:]).all()
        assert (drawn[:, kept:] != other[:, kept:]).all()
    # What is drawn below goes on from what is given: the same noise leads elsewhere.
    top = sizes[0]
    assert not torch.equal(*(model.prior(4, y, 0.0, given=given[:, :top])[:, top:] for given in (z, free)))


def test_the_prior_draws_from_the_distribution_that_the_bound_measures_against():
    model, n, generator = tiny(), 2, seeded()
    noises = [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in model.latent_shapes]
    eps = torch.cat([part.flatten(1) for part in noises], dim=1)
    torch.testing.assert_close(model.prior(n, generator=seeded()), generated(model, eps), rtol=1e-12, atol=1e-12)


def test_a_temperature_acts_on_its_own_layer():
    model = tiny()
    ends = list(itertools.accumulate(latent_sizes(model)))
    usual = model.prior(3, generator=seeded())
    torch.testing.assert_close(model.prior(3, None, [1.0, 1.0, 1.0], seeded()), usual, rtol=0, atol=0)
    for layer, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        by_temperature = {}
        for t in (0.0, 0.5, 1.0):
            temperatures = [t if i == layer else 1.0 for i in range(3)]
            by_temperature[t] = model.prior(3, None, temperatures, seeded())
            assert torch.equal(by_temperature[t][:, :start], usual[:, :start])
        centre, half, full = (by_temperature[t][:, start:end] for t in (0.0, 0.5, 1.0))
        assert (full != centre).all()
        torch.testing.assert_close(half - centre, (full - centre) / 2, rtol=1e-10, atol=1e-10)
    assert torch.equal(model.prior(3, None, 0.0, seeded(1)), model.prior(3, None, 0.0, seeded(2)))
    one = model.prior(1, None, 0.0)
    assert torch.equal(model.sample(2, temperature=0.0), model.decode(one.expand(2, -1)).mode)


def test_sampling_is_repeatable():
    model = tiny(num_classes=3, levels=256)
    _, y = images(model, 6)
    one, two, other = (model.sample(6, y, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    cold = [model.sample(6, y, (0.9, 0.5, 0.0), seeded()) for _ in range(2)]
    assert torch.equal(*cold)


@pytest.mark.parametrize("temperature", [(1.0, 0.5), (), -0.5, math.nan, (1.0, -1.0, 1.0), (1.0, 1.0, math.nan)])
def test_temperatures_that_scale_no_deviation_are_refused(temperature: Any):
    model = tiny()
    for draw in (model.sample, model.prior):
        with pytest.raises(ValueError, match=r"wanted one, or one for each of 3 layers, none negative") as refused:
            draw(6, None, temperature)
        assert f"temperature={temperature}:" in str(refused.value)


@pytest.mark.parametrize("temperature", [1.0, (0.9, 0.5, 0.3)])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_samples_are_pixels_of_latents_from_the_prior_in_one_pass(num_classes: int | None, temperature: Any):
    model, generator = tiny(num_classes=num_classes, levels=256), seeded()
    _, y = images(model, 6)
    of_pixels = temperature if isinstance(temperature, float) else temperature[-1]
    expected = model.decode(model.prior(6, y, temperature, generator), y).sample(generator, of_pixels)
    passes: list[int] = []
    for i, layer in enumerate(model.top_down):
        layer.first.register_forward_hook(lambda *_, i=i: passes.append(i))
    assert torch.equal(model.sample(6, y, temperature, seeded()), expected)
    assert passes == [0, 1, 2]


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_latents_depend_on_the_noise_of_those_above_or_in_bottom_up_inference_of_those_below(
    inference: str, posterior: str
):
    model = tiny(inference=inference, posterior=posterior)
    code = tuple(part.detach() for part in model.encode(images(model, 1)[0]))
    dims, ends = sum(latent_sizes(model)), list(itertools.accumulate(latent_sizes(model)))
    by_noise = jacobian(lambda eps: inferred(model, code, eps)[0], torch.randn(1, dims, dtype=torch.float64))
    layers = [slice(*ends) for ends in itertools.pairwise([0, *ends])]
    for (i, own), (j, other) in itertools.product(enumerate(layers), repeat=2):
        if i == j:
            assert (by_noise[own, own].diagonal() != 0).all()
        else:
            is_drawn_before = j < i if inference == "bidirectional" else j > i
            assert by_noise[own, other].any(dim=1).all() == by_noise[own, other].any() == is_drawn_before
    by_noise = jacobian(lambda eps: generated(model, eps), torch.randn(1, dims, dtype=torch.float64))
    assert by_noise[ends[0] :, : ends[0]].any(dim=1).all()  # the prior depends on those above in any case


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_representation_is_the_posterior_without_noise(posterior: str):
    model = tiny(posterior=posterior, num_classes=3)
    x, y = images(model, 4)
    h = model._top(4, y)
    for layer, part, z in zip(model.top_down, model.encode(x, y), model.split(model.represent(x, y)), strict=True):
        _, prior, own, _ = layer._read(h)
        mean, context = (part + own).split([2, part.shape[1] - 2], dim=1)
        if layer.flow is not None:
            z = layer.flow.inverse(z, context[:, 2:])
        torch.testing.assert_close(z, mean, rtol=0, atol=1e-8)
        assert not torch.allclose(z, prior.mean, atol=0.01)
        h = layer.infer(h, part, torch.zeros_like(z), sampled_rate=False)[0]
    assert model.decode(model.represent(x, y), y).mode.shape == x.shape


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_representation_of_bottom_up_inference_is_the_posterior_without_noise(posterior: str):
    model = tiny(inference="bottom-up", posterior=posterior, num_classes=3)
    x, y = images(model, 4)
    (h,) = model.encode(x, y)
    for layer, z in zip(model.bottom_up, reversed(model.split(model.represent(x, y))), strict=True):
        _, code, _ = layer._read(h)
        base = z if layer.flow is None else layer.flow.inverse(z, code[:, 4:])
        torch.testing.assert_close(base, code[:, :2], rtol=0, atol=1e-8)
        h = layer.draw(h, torch.zeros_like(z))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softplus_deviation_is_finite_and_has_a_gradient_everywhere(dtype: torch.dtype):
    values = [-200.0, -50.0, -20.001, -20.0, -19.999, -3.0, 0.0, 4.0, 60.0]
    x, exact = (torch.tensor(values, dtype=each, requires_grad=True) for each in (dtype, torch.float64))
    parameters = torch.stack([torch.zeros_like(x), x])[None, :, :, None]
    log_std = StochasticLayer(1, None, "softplus").gaussian(parameters).log_std.flatten()
    expected = (exact.exp2().log1p() / math.log(2)).log()
    torch.testing.assert_close(log_std, expected.to(dtype), rtol=1e-6, atol=1e-6)
    (gradient,), (slope,) = (torch.autograd.grad(y.sum(), at) for y, at in ((log_std, x), (expected, exact)))
    torch.testing.assert_close(gradient, slope.to(dtype), rtol=1e-5, atol=0)
    assert log_std[0].item() == pytest.approx(-200 * math.log(2) - math.log(math.log(2)), rel=1e-6)
    assert gradient[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert log_std[6].item() == pytest.approx(0, abs=1e-6)
