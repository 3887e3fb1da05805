"""ConvVAE: every combination trains, and its bound, its samples and its probabilities are those of one model."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from wngen.distributions import DiagonalGaussian, DiscretizedLogistic
from wngen.models import ConvVAE
from wngen.nn import WeightNormalized, data_dependent_init, fold
from wngen.noise import Noise

TINY: dict[str, Any] = {"latent_dim": 3, "widths": (4, 6), "blocks": 1, "hidden": 10, "iaf_width": 8}
SIZES = [  # channels, height, width, patch, widths; the patch and the strides divide few of them
    (1, 5, 7, 1, (4, 6)),
    (3, 6, 4, 2, (4, 4, 4)),
    (4, 7, 10, 3, (4, 6)),
    (2, 9, 11, 4, (6,)),
    (1, 1, 1, 1, (4, 4)),
    (1, 3, 2, 4, (4,)),
]
LIKELIHOODS = [("bernoulli", 2), ("categorical", 5), ("discretized_logistic", 256)]
POSTERIORS_AND_PRIORS = list(itertools.product(["diagonal", "iaf"], ["standard", "autoregressive"]))


def sized(size: tuple[int, int, int, int, tuple[int, ...]]) -> dict[str, Any]:
    return dict(zip(("channels", "height", "width", "patch", "widths"), size, strict=True))


def tiny(**changes: Any) -> ConvVAE:
    """A small model of 5 x 7 binary images in double precision."""
    return ConvVAE(**(TINY | {"height": 5, "width": 7} | changes)).double()


def images(model: ConvVAE, n: int) -> tuple[Tensor, Tensor | None]:
    """Random levels, and labels where the model wants them."""
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return torch.randint(model.spec.levels, (n, *model.spec.shape), dtype=torch.uint8), y


def noise(n: int, draw: int = 0) -> Noise:
    return Noise(7, torch.arange(n), draw)


def posterior_sample(model: ConvVAE, x: Tensor, y: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, their log posterior density (by the flow's inverse and autograd) and their log prior density."""
    mean, log_std, context = model.encode(x, y)
    z0 = mean + log_std.exp() * noise.normal(model.latent_dim).to(mean)
    z, log_abs_det = z0, torch.zeros(len(x), dtype=z0.dtype)
    if model.flow is not None:
        z = model.flow(z0, context).value
        z0 = model.flow.inverse(z, context)
        for i in range(len(x)):
            one = context[i : i + 1]
            matrix = torch.autograd.functional.jacobian(lambda z, one=one: model.flow(z, one).value, z0[i : i + 1])
            log_abs_det[i] = matrix[0, :, 0].slogdet().logabsdet
    log_q = torch.distributions.Normal(mean, log_std.exp()).log_prob(z0).sum(dim=1) - log_abs_det
    prior_mean, prior_std = torch.zeros_like(z), torch.ones_like(z)
    if model.prior_flow is not None:
        prior_mean, prior_log_std = model.prior_flow.conditioner(z)
        prior_std = prior_log_std.exp()
    return z, log_q, torch.distributions.Normal(prior_mean, prior_std).log_prob(z).sum(dim=1)


# Every combination


@pytest.mark.parametrize("size", SIZES[:4])
@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(("likelihood", "levels"), LIKELIHOODS)
@pytest.mark.parametrize(("posterior", "prior"), POSTERIORS_AND_PRIORS)
def test_every_combination_gives_a_bound_whose_gradient_reaches_every_parameter(
    posterior: str, prior: str, likelihood: str, levels: int, num_classes: int | None, size: Any
):
    arguments = TINY | sized(size)
    model = ConvVAE(
        **arguments, levels=levels, likelihood=likelihood, posterior=posterior, prior=prior, num_classes=num_classes
    )
    x, y = images(model, 6)
    bound = model(x, y, noise(6))
    assert bound.elbo_nats.shape == (6,)
    assert bound.elbo_nats.isfinite().all()
    bound.elbo_nats.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    samples = model.sample(3, None if y is None else y[:3])
    assert samples.shape == (3, *model.spec.shape)
    assert samples.dtype == torch.uint8
    assert int(samples.max()) < levels


@pytest.mark.parametrize("iaf_form", ["gated", "location_scale", "location"])
@pytest.mark.parametrize("iaf_layers", [0, 1, 2])
@pytest.mark.parametrize("iaf_steps", [1, 3])
def test_every_flow_gives_a_bound_whose_gradient_reaches_every_parameter(
    iaf_form: str, iaf_layers: int, iaf_steps: int
):
    model = tiny(iaf_form=iaf_form, iaf_layers=iaf_layers, iaf_steps=iaf_steps, prior="autoregressive")
    x, _ = images(model, 6)
    model(x, noise=noise(6)).elbo_nats.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", [2, 256])
def test_every_pixel_is_seen_and_every_pixel_is_made(size: Any, levels: int):
    model = ConvVAE(**(TINY | sized(size)), levels=levels).double()
    x = model.spec.scale(images(model, 2)[0]).double().requires_grad_()
    (by_pixel,) = torch.autograd.grad(model.encoder(x, None).square().sum(), x)
    assert (by_pixel != 0).all()
    z = torch.randn(1, model.latent_dim, dtype=torch.float64)
    by_latent = torch.autograd.functional.jacobian(lambda z: model.decoder(z, None)[0], z)
    assert by_latent.shape[:3] == model.spec.shape
    assert (by_latent != 0).all()


# The bound


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(("posterior", "prior"), POSTERIORS_AND_PRIORS)
@pytest.mark.parametrize(("likelihood", "levels"), LIKELIHOODS)
def test_distortion_and_rate_are_those_computed_by_hand(
    likelihood: str, levels: int, posterior: str, prior: str, num_classes: int | None
):
    model = tiny(levels=levels, likelihood=likelihood, posterior=posterior, prior=prior, num_classes=num_classes)
    x, y = images(model, 4)
    data_dependent_init(model, x, y, noise(4))
    bound = model.bound(x, model.encode(x, y), y, noise(4))
    z, log_q, log_p = posterior_sample(model, x, y, noise(4))
    torch.testing.assert_close(bound.rate_nats, log_q - log_p, rtol=1e-9, atol=1e-9)
    parameters = model.decoder(z, y)
    if likelihood == "bernoulli":
        on = parameters[..., 0].sigmoid()
        log_probs = torch.where(x == 1, on, 1 - on).log()
    elif likelihood == "categorical":
        log_probs = parameters.softmax(dim=-1).gather(-1, x.long()[..., None])[..., 0].log()
    else:
        location, log_scale = parameters[..., 0], -7 + (1 + (parameters[..., 1] + 5).exp()).log()
        log_probs = DiscretizedLogistic(location, log_scale, levels).log_prob(x)
    torch.testing.assert_close(bound.distortion_nats, -log_probs.sum(dim=(1, 2, 3)), rtol=1e-11, atol=1e-11)


def test_scales_have_a_floor_and_a_gradient_everywhere():
    model, z = tiny(levels=256, likelihood="discretized_logistic"), torch.zeros(1, 3, dtype=torch.float64)
    raw = torch.tensor([-30.0, -6, -5, 0, 4], dtype=torch.float64, requires_grad=True)
    log_scales = []
    for value in raw:
        model.decoder.forward = lambda z, y, value=value: torch.stack([value * 0, value]).expand(1, 1, 5, 7, 2)
        log_scales.append(model.decode(z).log_scale.flatten()[0])
    log_scale = torch.stack(log_scales)
    assert (log_scale >= -7).all()
    assert (log_scale.diff() > 0).all()
    torch.testing.assert_close(
        log_scale[3:], raw[3:] - 2, rtol=0, atol=0.01
    )  # no floor to be felt where they usually are
    (gradient,) = torch.autograd.grad(log_scale.sum(), raw)
    assert (gradient > 0).all()


def test_a_width_that_nothing_uses_is_not_looked_at():
    for unused in ({"posterior": "diagonal"}, {"iaf_layers": 0}):
        ConvVAE(**(TINY | unused | {"iaf_width": 2}))


def test_the_closed_form_rate_is_the_mean_of_the_sampled_one():
    model, n = tiny(posterior="diagonal"), 2_000
    x, _ = images(model, 3)
    data_dependent_init(model, x, None, noise(3))
    closed = model(x, noise=noise(3)).rate_nats
    rows, code = x.repeat(n, 1, 1, 1), tuple(part.repeat(n, 1) for part in model.encode(x))
    sampled = model.bound(rows, code, None, noise(3 * n)).rate_nats.view(n, 3)
    standard_error = sampled.std(dim=0) / math.sqrt(n)
    assert (standard_error < 0.05 * closed).all()
    assert ((sampled.mean(dim=0) - closed).abs() < 4 * standard_error).all()


@pytest.mark.parametrize(
    ("posterior", "iaf_form"), [("diagonal", "gated"), ("iaf", "location_scale"), ("iaf", "location")]
)
def test_a_posterior_equal_to_the_prior_has_rate_zero(posterior: str, iaf_form: str):
    """With a decoder that ignores the latents too, every bound is the exact likelihood."""
    model = tiny(posterior=posterior, iaf_form=iaf_form)
    x, _ = images(model, 5)
    data_dependent_init(model, x, None, noise(5))
    with torch.no_grad():
        silenced = [model.posterior, model.decoder.hidden]
        silenced += [step.conditioner.output for step in model.flow.steps] if model.flow is not None else []
        for layer in silenced:
            layer.set_length(torch.zeros_like(layer.length))
            layer.bias.zero_()
    bound = model(x, noise=noise(5))
    assert not bound.rate_nats.any()
    assert not model.bound(x, model.encode(x), None, noise(5)).rate_nats.any()
    exact = -model.decode(torch.zeros(5, 3, dtype=torch.float64)).log_prob(x).flatten(1).sum(dim=1)
    torch.testing.assert_close(bound.distortion_nats, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.log_likelihood(x, importance_samples=4), -exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("posterior", "prior"), POSTERIORS_AND_PRIORS)
def test_the_bound_of_an_image_does_not_depend_on_its_batch(posterior: str, prior: str):
    model = tiny(posterior=posterior, prior=prior, num_classes=3, levels=256)
    x, y = images(model, 12)
    assert y is not None
    index = torch.randperm(1000)[:12]
    data_dependent_init(model, x, y, noise(12))
    whole = model(x, y, Noise(3, index, 5))
    order = torch.randperm(12)
    for batch in (order[:1], order[1:5], order.flip(0)):
        part = model(x[batch], y[batch], Noise(3, index[batch], 5))
        torch.testing.assert_close(part.distortion_nats, whole.distortion_nats[batch], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(part.kl_nats[0], whole.kl_nats[0][batch], rtol=1e-10, atol=1e-10)
    assert not torch.equal(model(x, y, Noise(4, index, 5)).elbo_nats, whole.elbo_nats)
    assert not torch.equal(model(x, y, Noise(3, index, 6)).elbo_nats, whole.elbo_nats)


@pytest.mark.parametrize(("posterior", "prior"), POSTERIORS_AND_PRIORS)
def test_the_importance_weighted_bound_does_not_depend_on_the_chunk(posterior: str, prior: str):
    model = tiny(posterior=posterior, prior=prior, num_classes=3)
    x, y = images(model, 5)
    data_dependent_init(model, x, y, noise(5))
    whole = model.log_likelihood(x, y, 7, noise(5), chunk=1000)
    for chunk in (3, 5, 12):
        torch.testing.assert_close(model.log_likelihood(x, y, 7, noise(5), chunk), whole, rtol=1e-10, atol=0)
    single = model.bound(x, model.encode(x, y), y, noise(5)).elbo_nats
    torch.testing.assert_close(model.log_likelihood(x, y, 1, noise(5)), single, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("posterior", "prior"), POSTERIORS_AND_PRIORS)
def test_the_joint_density_less_that_of_the_posterior_is_the_sampled_bound(posterior: str, prior: str):
    model = tiny(posterior=posterior, prior=prior, num_classes=3)
    x, y = images(model, 4)
    data_dependent_init(model, x, y, noise(4))
    z, log_q, _ = posterior_sample(model, x, y, noise(4))
    joint = model.log_prior(z, y) + model.decode(z, y).log_prob(x).flatten(1).sum(dim=1)
    torch.testing.assert_close(
        joint - log_q, model.bound(x, model.encode(x, y), y, noise(4)).elbo_nats, rtol=1e-9, atol=1e-9
    )
    if prior == "standard":
        closed = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double()).log_prob(z)
        torch.testing.assert_close(model.log_prior(z), closed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prior", ["standard", "autoregressive"])
def test_the_density_of_the_prior_is_that_of_noise_carried_through_it(prior: str):
    """By the change of variables, whose Jacobian is autograd's; and its gradient is that of differences."""
    model = tiny(prior=prior, iaf_layers=2)
    x, _ = images(model, 8)
    data_dependent_init(model, x, None, noise(8))
    eps = torch.randn(4, 3, dtype=torch.float64)
    z = model.prior_at(eps)
    drawn = model.prior(4, generator=torch.Generator().manual_seed(1))
    like = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(model.prior_at(like), drawn, rtol=0, atol=1e-12)
    each = [torch.autograd.functional.jacobian(lambda e: model.prior_at(e[None])[0], one) for one in eps]
    log_det = torch.stack([jacobian.slogdet().logabsdet for jacobian in each])
    assert (log_det.abs().min() > 1e-3) == (prior == "autoregressive")
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum(dim=1)
    torch.testing.assert_close(model.log_prior(z), normal - log_det, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(model.log_prior, (z.detach().requires_grad_(),))
    with pytest.raises(ValueError, match=r"latents of shape \(4, 0\): wanted those of all 1 layers"):
        model.log_prior(z[:, :0])


# One model: bound, samples and exact probabilities

EXACT: list[dict[str, Any]] = [
    {"latent_dim": 1, "posterior": "diagonal"},
    {"latent_dim": 2, "posterior": "iaf"},
    {"latent_dim": 2, "posterior": "diagonal", "prior": "autoregressive"},
    {"latent_dim": 2, "posterior": "iaf", "prior": "autoregressive", "num_classes": 2},
]


def all_images(num_classes: int | None) -> tuple[Tensor, Tensor | None]:
    """The sixteen binary images of 2 x 2 pixels, in the order of the numbers they spell; class 1 if there is one."""
    x = torch.tensor(list(itertools.product([0, 1], repeat=4)), dtype=torch.uint8).view(16, 1, 2, 2)
    return x, None if num_classes is None else torch.ones(16, dtype=torch.long)


def exact_model(changes: dict[str, Any]) -> ConvVAE:
    """A model whose latents matter, and whose posterior is not the true one but covers it."""
    model = tiny(height=2, width=2, widths=(4,), **changes)
    x, y = all_images(model.num_classes)
    data_dependent_init(model, x, y, noise(16))
    with torch.no_grad():
        # A wide posterior, which the gated flow narrows: the weights p / q stay bounded.
        model.posterior.set_length(0.2 * model.posterior.length)
        model.posterior.bias.copy_(
            torch.tensor([0.0, 0.3 if model.flow is None else 0.7]).repeat_interleave(model.latent_dim)
        )
        model.decoder.output.set_length(2 * model.decoder.output.length)
    return model


@torch.no_grad()
def exact_log_likelihood(model: ConvVAE) -> Tensor:
    """log p(x) of all sixteen images: the integral over the latents on a grid, by the trapezoid rule."""
    axis = torch.linspace(-9, 9, {1: 1801, 2: 181}[model.latent_dim], dtype=torch.float64)
    z = torch.cartesian_prod(*[axis] * model.latent_dim).view(-1, model.latent_dim)
    if model.prior_flow is None:
        log_prior = DiagonalGaussian.standard(z).log_prob(z).sum(dim=1)
    else:
        log_prior = model.prior_flow.log_prob(z).sum(dim=1)
    log_mass = log_prior + model.latent_dim * math.log(axis[1] - axis[0])
    decoded = model.decode(z, None if model.num_classes is None else torch.ones(len(z), dtype=torch.long))
    x, _ = all_images(model.num_classes)
    return torch.stack([(log_mass + decoded.log_prob(one).flatten(1).sum(dim=1)).logsumexp(dim=0) for one in x])


@pytest.mark.parametrize("changes", EXACT)
def test_the_probabilities_of_all_images_sum_to_one_and_the_bounds_rise_to_them(changes: dict[str, Any]):
    model, repeats, many = exact_model(changes), 64, 1000
    exact = exact_log_likelihood(model)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert exact.std() > 0.2  # it is not uniform
    x, y = all_images(model.num_classes)
    rows, labels = x.repeat(repeats, 1, 1, 1), None if y is None else y.repeat(repeats)
    bounds = []
    for k in (16, 4, 1):
        estimate = model.log_likelihood(rows, labels, k, noise(16 * repeats)).view(repeats, 16)
        weight = (estimate - exact).exp()  # its mean is 1 for every K
        assert ((weight.mean(dim=0) - 1).abs() < 4 * weight.std(dim=0) / math.sqrt(repeats)).all()
        bounds.append(estimate.mean().item())
    assert exact.mean() > bounds[0] > bounds[1] > bounds[2]
    converged = model.log_likelihood(x, y, many, noise(16), chunk=16 * many)
    assert weight.std() < 2
    assert ((converged - exact).abs() < 4 * weight.std(dim=0) / math.sqrt(many)).all()


@pytest.mark.parametrize("changes", EXACT)
def test_samples_follow_the_exact_probabilities(changes: dict[str, Any]):
    model, n = exact_model(changes), 20_000
    y = None if model.num_classes is None else torch.ones(n, dtype=torch.long)
    x = model.sample(n, y, generator=torch.Generator().manual_seed(1))
    number = (x.flatten(1).long() * torch.tensor([8, 4, 2, 1])).sum(dim=1)
    probs = exact_log_likelihood(model).exp()
    expected = n * probs / probs.sum()
    assert chisquare(torch.bincount(number, minlength=16).numpy(), expected.numpy()).pvalue > 1e-3


def test_sampling_is_repeatable_and_sharpened_by_temperature():
    model = tiny(prior="autoregressive", num_classes=3)
    x, y = images(model, 6)
    data_dependent_init(model, x, y, noise(6))
    one, two, other = (model.sample(6, y, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(model.sample(6, y, temperature=0.0), model.sample(6, y, temperature=0.0))
    assert tiny().prior(1000, temperature=0.5).std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("prior", ["standard", "autoregressive"])
def test_its_one_layer_is_given_or_drawn_at_a_temperature(prior: str):
    model = tiny(prior=prior)
    x, _ = images(model, 4)
    z = model.represent(x)
    assert torch.equal(model.prior(4, given=z), z)
    drawn, free = (model.prior(4, None, 0.5, torch.Generator().manual_seed(1), given) for given in (None, z[:, :0]))
    assert torch.equal(drawn, free)
    assert torch.equal(drawn, model.prior(4, None, [0.5], torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match=r"temperature=\[1.0, 0.5\]: wanted one, or one for each of 1 layers"):
        model.prior(4, temperature=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"latents of shape \(4, 2\): wanted \(B, Z\), where layers end at 0, 3"):
        model.prior(4, given=z[:, :2])


@pytest.mark.parametrize("posterior", ["diagonal", "iaf"])
def test_the_representation_is_the_centre_of_the_posterior(posterior: str):
    model = tiny(posterior=posterior)
    x, _ = images(model, 4)
    mean, _, context = model.encode(x)
    z = model.represent(x)
    torch.testing.assert_close(z if model.flow is None else model.flow.inverse(z, context), mean, rtol=0, atol=1e-10)
    assert model.decode(z).mode.shape == x.shape


# Initialization, precision and copies


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(("posterior", "prior"), POSTERIORS_AND_PRIORS)
def test_after_init_every_layer_has_its_mean_and_deviation(posterior: str, prior: str, num_classes: int | None):
    """In a second pass over the same images with the same noise, whatever stands before and after a layer."""
    model = tiny(posterior=posterior, prior=prior, num_classes=num_classes, levels=256, channels=3, iaf_layers=2)
    x, y = images(model, 50)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, WeightNormalized)}
    assert set(data_dependent_init(model, x, y, noise(50))) == set(layers)
    outputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, output, name=name: outputs.update({name: output}))
    with torch.no_grad():
        model(x, y, noise(50))
    for name, layer in layers.items():
        units = outputs[name].transpose(0, 1).flatten(1)
        seen = layer.weight.flatten(1).any(dim=1)  # a masked unit sees nothing and says nothing
        assert seen.sum() >= len(seen) - 2 * (1 + model.latent_dim)
        std = torch.full_like(units[:, 0], layer.init_scale)
        torch.testing.assert_close(units.std(dim=1, correction=0)[seen], std[seen], rtol=1e-6, atol=1e-6)
        if layer.bias is not None:
            torch.testing.assert_close(units.mean(dim=1), torch.zeros_like(std), rtol=0, atol=1e-6)
    assert data_dependent_init(model, x, y, noise(50)) == []


@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize(("posterior", "prior"), POSTERIORS_AND_PRIORS)
def test_autocast_gives_nearly_the_same_bound_in_single_precision(posterior: str, prior: str, levels: int):
    model = tiny(posterior=posterior, prior=prior, levels=levels).float()
    x, _ = images(model, 16)
    data_dependent_init(model, x, None, noise(16))
    single = model(x, noise=noise(16))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, noise=noise(16))
    assert mixed.distortion_nats.dtype == mixed.rate_nats.dtype == torch.float32
    torch.testing.assert_close(mixed.elbo_nats, single.elbo_nats, rtol=0.1, atol=0.5)
    torch.testing.assert_close(mixed.elbo_nats.mean(), single.elbo_nats.mean(), rtol=0.01, atol=0.1)
    mixed.elbo_nats.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


ELABORATE = TINY | {"channels": 2, "height": 6, "width": 5, "levels": 8, "patch": 2, "likelihood": "categorical"}
ELABORATE |= {"prior": "autoregressive", "iaf_form": "location_scale", "iaf_steps": 3, "num_classes": 4}


def initialized() -> tuple[ConvVAE, Tensor, Tensor | None]:
    model = ConvVAE(**ELABORATE)
    x, y = images(model, 8)
    data_dependent_init(model, x, y, noise(8))
    return model.eval(), x, y


def test_the_configuration_builds_the_same_model():
    model = ConvVAE(**ELABORATE)
    config = json.loads(json.dumps(model.config))
    assert config.pop("model") == "ConvVAE"
    again = ConvVAE(**config)
    assert json.dumps(again.config) == json.dumps(model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    assert config.keys() >= {
        "channels",
        "height",
        "width",
        "levels",
        "hidden",
        "iaf_layers",
    }  # the defaults are in it too
    positional = ConvVAE(1, 5, 7, 2, 3, (4,), hidden=10, iaf_width=8).config
    assert positional == ConvVAE(**(TINY | {"height": 5, "width": 7, "widths": (4,), "blocks": 2})).config


def test_a_saved_model_is_the_same_to_the_bit(tmp_path: Path):
    model, x, y = initialized()
    model.save_pretrained(tmp_path)
    again = ConvVAE.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert json.dumps(again.config) == json.dumps(model.config)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(again(x, y, noise(8)).elbo_nats, model(x, y, noise(8)).elbo_nats)
    assert data_dependent_init(again, x, y, noise(8)) == []


def test_a_copy_and_a_pickle_are_the_same_and_independent():
    model, x, y = initialized()
    expected = model(x, y, noise(8)).elbo_nats
    file = io.BytesIO()
    torch.save(model, file)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for again in copies:
        assert again.config == model.config
        assert torch.equal(again(x, y, noise(8)).elbo_nats, expected)
        with torch.no_grad():
            again.decoder.output.bias.add_(1)
    assert torch.equal(model(x, y, noise(8)).elbo_nats, expected)


def test_double_precision_agrees_with_single():
    model, x, y = initialized()
    single = model(x, y, noise(8)).elbo_nats
    double = model.double()(x, y, noise(8)).elbo_nats
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-4)


# Wrong arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"posterior": "gaussian"}, "posterior='gaussian': wanted one of diagonal, iaf"),
        (
            {"posterior": "diagonal", "iaf_form": "affine"},
            "iaf_form='affine': wanted one of gated, location_scale, location",
        ),
        ({"prior": "made"}, "prior='made': wanted one of standard, autoregressive"),
        (
            {"likelihood": "gaussian"},
            "likelihood='gaussian': wanted one of auto, bernoulli, categorical, discretized_logistic",
        ),
        ({"likelihood": "bernoulli", "levels": 256}, "likelihood='bernoulli' is for levels=2, got levels=256"),
        ({"channels": 5}, "channels=5: wanted 1 to 4"),
        ({"height": 0}, "height=0"),
        ({"levels": 257}, "levels=257"),
        ({"widths": ()}, r"widths=\[\]"),
        ({"widths": (4, 0)}, r"widths=\[4, 0\]"),
        ({"latent_dim": 0}, "latent_dim=0: wanted at least 1"),
        ({"hidden": 0}, "hidden=0: wanted at least 1"),
        ({"patch": 0}, "patch=0: wanted at least 1"),
        ({"blocks": -1}, "blocks=-1: wanted at least 0"),
        ({"iaf_steps": 0}, "iaf_steps=0: wanted at least 1"),
        ({"iaf_layers": -1}, "iaf_layers=-1: wanted at least 0"),
        ({"iaf_width": 2}, "iaf_width=2: wanted at least latent_dim=3"),
        (
            {"iaf_width": 2, "posterior": "diagonal", "prior": "autoregressive"},
            "iaf_width=2: wanted at least latent_dim=3",
        ),
        ({"num_classes": 0}, "num_classes=0: wanted at least 1, or None"),
    ],
)
def test_arguments_that_make_no_model_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ConvVAE(**(TINY | changes))


def test_wrong_images_are_refused():
    model = tiny()
    x, _ = images(model, 3)
    for call in (model, model.encode, model.represent, model.log_likelihood):
        with pytest.raises(TypeError, match=r"images are uint8 levels 0 to 1, got torch\.float32"):
            call(x.float())
        with pytest.raises(ValueError, match=r"images have shape \(3, 1, 7, 5\), the model wants \(B, 1, 5, 7\)"):
            call(x.mT)
        with pytest.raises(ValueError, match=r"images have shape \(3, 5, 7\), the model wants \(B, 1, 5, 7\)"):
            call(x[:, 0])


def test_labels_that_are_missing_or_unwanted_are_refused():
    model, conditional = tiny(), tiny(num_classes=3)
    (x, _), z, y = images(model, 3), torch.randn(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    for call, argument in (
        *((function, x) for function in (conditional, conditional.encode, conditional.represent)),
        *((function, x) for function in (conditional.log_likelihood,)),
        (conditional.decode, z),
        (conditional.sample, 3),
    ):
        with pytest.raises(ValueError, match=r"conditioned on 3 classes: y must have shape \(3,\), got None"):
            call(argument)
        with pytest.raises(ValueError, match=r"y must have shape \(3,\), got \(2,\)"):
            call(argument, y[:2])
    for call in (model, model.encode, model.represent, model.log_likelihood):
        with pytest.raises(ValueError, match="built without num_classes"):
            call(x, y)
    with pytest.raises(ValueError, match="built without num_classes"):
        model.decode(z, y)


def test_folded_to_plain_layers_it_gives_the_same_bound():
    model = ConvVAE(1, 9, 9, 2, latent_dim=3, widths=(4, 6), blocks=1, hidden=8, iaf_width=12, prior="autoregressive")
    x = torch.randint(0, 2, (5, 1, 9, 9), dtype=torch.uint8)
    noise = [Noise(0, torch.arange(5)) for _ in range(2)]
    with torch.no_grad():
        expected, folded = model(x, noise=noise[0]).elbo_nats, fold(model)(x, noise=noise[1]).elbo_nats
    torch.testing.assert_close(folded, expected, atol=1e-4, rtol=1e-6)
    assert fold(model).sample(2).shape == (2, 1, 9, 9)
