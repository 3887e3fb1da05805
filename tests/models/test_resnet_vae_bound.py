"""The bound of the ResNet VAE, against hierarchies of Gaussians in closed form and against sums over all images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dependence import jacobian
from gaussian_pixels import PIXEL_STD, GaussianPixels
from ladder_zoo import (
    INFERENCES,
    POSTERIORS,
    assert_agrees,
    generated,
    images,
    inferred,
    latent_sizes,
    near,
    noise,
    seeded,
    silence,
    silence_flows,
    tiny,
)
from scipy.stats import chisquare
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from wngen.distributions import DiscretizedLogistic
from wngen.flows import IAF
from wngen.models import ResNetVAE
from wngen.noise import Noise
from wngen.training.objective import objective_nats

# The bound: a hierarchy of Gaussians whose divergences are known


@pytest.mark.parametrize("std", ["exponential", "softplus"])
@pytest.mark.parametrize(
    ("posterior", "iaf_form"), [("diagonal", "gated"), *(("iaf", f) for f in ("location_scale", "location"))]
)
@pytest.mark.parametrize("inference", INFERENCES)
def test_a_posterior_equal_to_the_prior_has_rate_zero(inference: str, posterior: str, iaf_form: str, std: str):
    is_relative = inference == "bidirectional"
    model = tiny(inference=inference, posterior=posterior, iaf_form=iaf_form, std=std, relative_posterior=is_relative)
    x, _ = images(model, 5)
    assert (model(x, noise=noise(5)).layer_kl_nats.abs() > 1e-3).all()
    for up, down in zip(reversed(model.bottom_up), model.top_down, strict=True):
        if is_relative:
            silence(up.first, slice(0, 4))
            silence(down.first, slice(4, 8))
        else:  # it does not know the prior, which is to be the same for all latents above
            silence(up.first, slice(0, 4), bias=None)
            silence(down.first, slice(0, 4), bias=None)
            with torch.no_grad():
                up.first.bias[:4] = down.first.bias[:4]
    silence_flows(model)
    for bound in (model(x, noise=noise(5)), model.bound(x, model.encode(x), None, noise(5))):
        for kl in bound.kl_nats:
            assert kl.abs().max() < 1e-12
    prior_std = generated(model, torch.randn(200, sum(latent_sizes(model)), dtype=torch.float64)).std(dim=0)
    assert (prior_std - 1).abs().max() > 0.1  # the prior is not the standard Gaussian


@pytest.mark.parametrize("inference", INFERENCES)
def test_a_flow_that_only_scales_gives_back_what_the_base_has_too_much(inference: str):
    """Of a standard Gaussian prior, with the gate of every step at its bias and a base so much wider."""
    model = tiny(iaf_form="gated", iaf_steps=2, inference=inference)
    x, _ = images(model, 5)
    gate = next(module for module in model.modules() if isinstance(module, IAF)).steps[0].forget_bias
    for up, down in zip(model.bottom_up, model.top_down, strict=True):
        silence(up.first, slice(0, 2))
        silence(up.first, slice(2, 4), bias=-2 * math.log(1 / (1 + math.exp(-gate))))
        silence(down.first, slice(0, 8 if inference == "bidirectional" else 4))
    silence_flows(model)
    assert model(x, noise=noise(5)).layer_kl_nats.abs().max() < 1e-12


def constants(model: ResNetVAE) -> None:
    """Make prior and posterior of each layer, and the flow's context, the same everywhere; the decoder is not."""
    for up in model.bottom_up:
        silence(up.first, slice(0, up.parts[0]), bias=None)
    for down in model.top_down:
        silence(down.first, slice(0, sum(down.parts[:2])), bias=None)


@pytest.mark.parametrize("inference", INFERENCES)
def test_the_rate_of_constant_gaussians_is_the_sum_of_their_divergences(inference: str):
    model, n = tiny(posterior="diagonal", inference=inference), 4000
    x, _ = images(model, 2)
    constants(model)
    expected = []
    for up, down in zip(reversed(model.bottom_up), model.top_down, strict=True):
        mean_p, log_std_p = down.first.bias[:4].detach().view(2, 2)
        mean_q, log_std_q = up.first.bias[:4].detach().view(2, 2)
        if inference == "bidirectional":
            mean_q, log_std_q = mean_q + down.first.bias[4:6].detach(), log_std_q + down.first.bias[6:8].detach()
        each = kl_divergence(Normal(mean_q, log_std_q.exp()), Normal(mean_p, log_std_p.exp()))
        expected.append(each * math.prod(down.size))
    if inference == "bidirectional":  # bottom-up has no closed form
        for kl, wanted in zip(model(x, noise=noise(2)).kl_nats, expected, strict=True):
            torch.testing.assert_close(kl, wanted.expand(2, 2), rtol=1e-12, atol=1e-12)
    rows, code = x.repeat(n, 1, 1, 1), tuple(part.repeat(n, 1, 1, 1) for part in model.encode(x))
    with torch.no_grad():
        sampled = model.bound(rows, code, None, noise(2 * n))
    for kl, wanted in zip(sampled.kl_nats, expected, strict=True):
        assert_agrees(kl, wanted)
    assert_agrees(sampled.rate_nats, torch.cat(expected).sum())


HIERARCHY = {"height": 4, "width": 3, "layers": "2x1, 1x1", "iaf_form": "location", "iaf_layers": 0, "iaf_steps": 2}


def affine(function: Callable[[Tensor], Tensor], dims: int) -> tuple[Tensor, Tensor]:
    """Offset and loadings of an affine function of `(1, dims)`."""
    origin, somewhere = torch.zeros(1, dims, dtype=torch.float64), torch.randn(1, dims, dtype=torch.float64)
    offset, loadings = function(origin)[0].detach(), jacobian(function, origin)
    torch.testing.assert_close(function(somewhere)[0].detach(), offset + loadings @ somewhere[0], rtol=0, atol=1e-10)
    return offset, loadings


def gaussian(draw: Callable[[Tensor], Tensor], dims: int) -> MultivariateNormal:
    """The distribution of an affine function of standard normal noise `(1, dims)`."""
    mean, loadings = affine(draw, dims)
    return MultivariateNormal(mean, loadings @ loadings.T)


def marginal(gaussian: MultivariateNormal, dims: slice) -> MultivariateNormal:
    return MultivariateNormal(gaussian.mean[dims], gaussian.covariance_matrix[dims, dims])


class LinearHierarchy:
    """A model without nonlinearities and with Gaussian pixels, and the distributions of all that is in it.

    Attributes:
        model: two stochastic layers; standard deviations are constant, means and the flow linear.
        prior: of all latents.
        loadings: of the pixels on the latents, `(C H W, Z)`.
        offset: of the pixels.
        evidence: the exact distribution of the images.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        monkeypatch.setattr("wngen.models.resnet_vae.elu", lambda x: x)
        monkeypatch.setattr("wngen.stochastic.elu", lambda x: x)
        self.model = tiny(**(HIERARCHY | {"residual_scale": 1.0} | changes))
        self.model.likelihood = lambda predicted, log_scale: GaussianPixels(predicted)
        for up in self.model.bottom_up:
            silence(up.first, slice(2, 4), bias=None)
        for down in self.model.top_down:
            silence(down.first, slice(2, 4), bias=None)
            if self.model.inference == "bidirectional":
                silence(down.first, slice(6, 8), bias=None)
        with torch.no_grad():  # or the pixels would hardly depend on the latents
            self.model.output.g *= 10
        sizes = latent_sizes(self.model)
        dims, self.upper, self.lower = sum(sizes), slice(0, sizes[0]), slice(sizes[0], None)
        self.prior = gaussian(lambda eps: generated(self.model, eps), dims)
        self.offset, self.loadings = affine(lambda z: self.model.decode(z).mean.flatten(1), dims)
        covariance = self.loadings @ self.prior.covariance_matrix @ self.loadings.T
        covariance = covariance + PIXEL_STD**2 * torch.eye(len(covariance), dtype=torch.float64)
        self.evidence = MultivariateNormal(self.offset + self.loadings @ self.prior.mean, covariance)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """Of all latents, given one image."""
        code = self.model.encode(x[None])
        return gaussian(lambda eps: inferred(self.model, code, eps)[0], len(self.prior.mean))

    def bound(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In closed form, of one image: the distortion, and the rates of both layers (chain rule of divergences).

        What is inferred upwards is not factored as the prior is: of KL(q(z) || p(z)), the mutual information that both
        layers have in the posterior counts for the upper one, though the lower one's prior explains it.
        """
        q = self.posterior(x)
        q_upper, q_lower = marginal(q, self.upper), marginal(q, self.lower)
        rate, rate_of_upper = kl_divergence(q, self.prior), kl_divergence(q_upper, marginal(self.prior, self.upper))
        if self.model.inference == "bottom-up":
            rate_of_upper = rate_of_upper + q_upper.entropy() + q_lower.entropy() - q.entropy()
        error = (x.flatten() - self.offset - self.loadings @ q.mean).square().sum()
        spread = (self.loadings @ q.covariance_matrix @ self.loadings.T).trace()
        distortion = (error + spread) / (2 * PIXEL_STD**2) + x.numel() * math.log(math.sqrt(2 * math.pi) * PIXEL_STD)
        return distortion, torch.stack([rate_of_upper, rate - rate_of_upper])

    def rates_at(self, x: Tensor, z: Tensor) -> Tensor:
        """Both layers' log q - log p at latents `(B, Z)` of one image, `(B, 2)`, each factored in its own order."""
        q, z_upper, z_lower = self.posterior(x), z[:, self.upper], z[:, self.lower]
        log_p_upper = marginal(self.prior, self.upper).log_prob(z_upper)
        log_p_lower = self.prior.log_prob(z) - log_p_upper  # given the upper
        if self.model.inference == "bidirectional":
            log_q_upper = marginal(q, self.upper).log_prob(z_upper)
            log_q_lower = q.log_prob(z) - log_q_upper
        else:
            log_q_lower = marginal(q, self.lower).log_prob(z_lower)
            log_q_upper = q.log_prob(z) - log_q_lower
        return torch.stack([log_q_upper - log_p_upper, log_q_lower - log_p_lower], dim=1)


WAYS = [("bidirectional", False), ("bidirectional", True), ("bottom-up", False)]  # and whether relative


@pytest.fixture(params=[(posterior, *way) for posterior in POSTERIORS for way in WAYS], ids=str)
def linear(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LinearHierarchy:
    posterior, inference, relative = request.param
    return LinearHierarchy(monkeypatch, inference=inference, posterior=posterior, relative_posterior=relative)


def test_the_sampled_rates_of_a_linear_gaussian_hierarchy_are_ratios_of_its_densities(linear: LinearHierarchy):
    for image in images(linear.model, 2)[0]:
        z, rates = inferred(linear.model, linear.model.encode(image[None]), torch.randn(20, 10, dtype=torch.float64))
        torch.testing.assert_close(rates, linear.rates_at(image, z), rtol=0, atol=1e-9)


def test_the_elbo_of_a_linear_gaussian_hierarchy_is_its_closed_form(linear: LinearHierarchy):
    model, n = linear.model, 4000
    x, _ = images(model, 3)
    closed = [linear.bound(image) for image in x]
    distortion, rates = torch.stack([d for d, _ in closed]), torch.stack([r for _, r in closed])
    elbo = -distortion - rates.sum(dim=1)
    assert (rates > 0.05).all()
    covariance = linear.posterior(x[0]).covariance_matrix
    assert covariance[linear.upper, linear.lower].abs().max() > 0.01  # the layers know of each other
    # What is drawn first has a diagonal covariance unless there is a flow.
    first = linear.upper if model.inference == "bidirectional" else linear.lower
    within = covariance[first, first]
    assert ((within - within.diag().diag()).abs().max() > 0.01) == (model.config["posterior"] == "iaf")
    assert (elbo < linear.evidence.log_prob(x.flatten(1).double())).all()
    rows, code = x.repeat(n, 1, 1, 1), tuple(part.repeat(n, 1, 1, 1) for part in model.encode(x))
    for seed, sampled_rate in enumerate((False, True)):
        with torch.no_grad():
            bound = model.bound(rows, code, None, Noise(seed, torch.arange(3 * n)), sampled_rate)
        assert_agrees(bound.distortion_nats.view(n, 3), distortion)
        assert_agrees(bound.layer_kl_nats.view(n, 3, 2), rates, precision=0.05)
        assert_agrees(bound.elbo_nats.view(n, 3), elbo)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_importance_weighted_bound_of_a_linear_gaussian_hierarchy_rises_to_its_evidence(
    posterior: str, monkeypatch: pytest.MonkeyPatch
):
    """ELBO <= IWAE-K <= log p(x) on average, and the average weight is p(x) for every K (Burda et al., 2015)."""
    linear, n = LinearHierarchy(monkeypatch, posterior=posterior, relative_posterior=True), 1000
    near(linear.model, 0.3)
    x, _ = images(linear.model, 2)
    exact = linear.evidence.log_prob(x.flatten(1).double())
    means = [-sum(part.sum() for part in linear.bound(image)) for image in x]
    previous = torch.stack([torch.as_tensor(mean) for mean in means])
    for k in (4, 16):
        estimate = linear.model.log_likelihood(x.repeat(n, 1, 1, 1), None, k, noise(2 * n), chunk=4 * n).view(n, 2)
        standard_error = estimate.std(dim=0) / math.sqrt(n)
        assert (estimate.mean(dim=0) > previous + 4 * standard_error).all()
        assert (estimate.mean(dim=0) < exact).all()
        assert_agrees((estimate - exact).exp(), torch.ones(2, dtype=torch.float64), precision=0.05)
        previous = estimate.mean(dim=0)


# The density of the prior


def test_the_log_prior_of_a_linear_gaussian_hierarchy_is_its_closed_form(linear: LinearHierarchy):
    """And with the pixels' density and the posterior's it makes up the sampled bound."""
    model = linear.model
    for image in images(model, 2)[0]:
        z, rates = inferred(model, model.encode(image[None]), torch.randn(20, 10, dtype=torch.float64))
        torch.testing.assert_close(model.log_prior(z), linear.prior.log_prob(z), rtol=0, atol=1e-9)
        q = linear.posterior(image)
        torch.testing.assert_close(q.log_prob(z) - model.log_prior(z), rates.sum(dim=1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("inference", INFERENCES)
def test_the_density_of_the_prior_is_that_of_noise_carried_through_it(inference: str):
    """By the change of variables, whose Jacobian is autograd's; and its gradient is that of differences."""
    model = tiny(inference=inference, num_classes=3, height=3, width=2, layers="3x1, 2x1, 1x1")
    sizes = latent_sizes(model)
    eps, y = torch.randn(3, sum(sizes), dtype=torch.float64), torch.arange(3)
    z = model.prior_at(eps, y)
    whole = torch.autograd.functional.jacobian(lambda e: model.prior_at(e, y), eps)  # (B, Z, B, Z)
    log_det = torch.stack([whole[i, :, i].slogdet().logabsdet for i in range(3)])
    assert log_det.abs().min() > 0.1
    normal = Normal(0.0, 1.0).log_prob(eps).sum(dim=1)
    torch.testing.assert_close(model.log_prior(z, y), normal - log_det, rtol=0, atol=1e-9)
    assert (model.log_prior(z, y) - model.log_prior(z, y.flip(0)))[0].abs() > 1e-3  # it is the class's
    assert torch.autograd.gradcheck(lambda z: model.log_prior(z, y), (z.detach().requires_grad_(),))
    with pytest.raises(ValueError, match=rf"latents of shape \(3, {sizes[0]}\): wanted those of all 3 layers"):
        model.log_prior(z[:, : sizes[0]], y)


# The bound: of any model


def test_free_bits_change_the_objective_and_not_the_bound():
    model = tiny(posterior="diagonal")
    x, _ = images(model, 6)
    bound = model(x, noise=noise(6))
    before = bound.elbo_nats.clone()
    plain = objective_nats(bound)
    torch.testing.assert_close(plain, -bound.elbo_nats.mean(), rtol=1e-12, atol=0)
    per_channel = torch.stack([kl.mean(dim=0) for kl in bound.kl_nats])  # (L, Z)
    free_bits = per_channel.median().item()
    for group, rates in (("channel", per_channel), ("layer", per_channel.sum(dim=1))):
        objective = objective_nats(bound, free_bits=free_bits, free_bits_per=group)
        expected = bound.distortion_nats.mean() + rates.clamp(min=free_bits).sum()
        torch.testing.assert_close(objective, expected, rtol=1e-12, atol=0)
    assert objective_nats(bound, free_bits=free_bits) > plain
    assert torch.equal(bound.elbo_nats, before)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_the_importance_weighted_bound_averages_exactly_k_draws_whatever_the_chunk(inference: str, posterior: str):
    model = tiny(inference=inference, posterior=posterior, num_classes=3)
    x, y = images(model, 5)
    assert y is not None
    code = model.encode(x, y)
    draws = torch.stack([model.bound(x, code, y, noise(5, draw)).elbo_nats for draw in range(7)]).detach()
    for k in (1, 7):
        expected = draws[:k].logsumexp(dim=0) - math.log(k)
        for chunk in (3, 12, 1000):
            result = model.log_likelihood(x, y, k, noise(5), chunk)
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.log_likelihood(x, y, 1, noise(5)), draws[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_the_bound_of_an_image_does_not_depend_on_its_batch(inference: str, posterior: str):
    model = tiny(inference=inference, posterior=posterior, num_classes=3, levels=256)
    index = torch.randperm(1000)[:9]
    x, y = images(model, 9)
    assert y is not None
    whole = model(x, y, Noise(3, index, 5))
    order = torch.randperm(9)
    for batch in (order[:1], order[1:5], order.flip(0)):
        part = model(x[batch], y[batch], Noise(3, index[batch], 5))
        torch.testing.assert_close(part.distortion_nats, whole.distortion_nats[batch], rtol=0, atol=1e-9)
        torch.testing.assert_close(part.layer_kl_nats, whole.layer_kl_nats[batch], rtol=0, atol=1e-9)
    for other in (Noise(4, index, 5), Noise(3, index, 6)):
        assert not torch.equal(model(x, y, other).elbo_nats, whole.elbo_nats)


def test_the_importance_weighted_bound_rises_with_k():
    model, n = tiny(), 100
    x, _ = images(model, 3)
    rows = x.repeat(n, 1, 1, 1)
    bounds = [model.log_likelihood(rows, None, k, noise(3 * n), 10_000).view(n, 3) for k in (1, 4, 16)]
    for fewer, more in itertools.pairwise(bounds):
        gain = more - fewer
        assert (gain.mean(dim=0) > 4 * gain.std(dim=0) / math.sqrt(n)).all()


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_probabilities_of_all_images_sum_to_one_and_samples_follow_them(posterior: str, inference: str):
    """Bound and samples are those of one model, whose ELUs leave no closed form."""
    small = {"height": 2, "width": 2, "layers": "2x1, 1x1", "residual_scale": 1.0}
    small |= {"posterior": posterior, "inference": inference, "relative_posterior": inference == "bidirectional"}
    model, k, n = tiny(**small), 2000, 20_000
    x = torch.tensor(list(itertools.product([0, 1], repeat=4)), dtype=torch.uint8).view(16, 1, 2, 2)
    with torch.no_grad():
        near(model, 0.2)
        model.output.g *= 6
        code = [part.repeat(k, 1, 1, 1) for part in model.encode(x)]
        bound = model.bound(x.repeat(k, 1, 1, 1), tuple(code), None, noise(16).repeat(range(k)))
    weights = bound.elbo_nats.exp().view(k, 16)
    assert_agrees(weights.sum(dim=1), torch.tensor(1.0, dtype=torch.float64))
    probs = weights.mean(dim=0)
    assert probs.log().std() > 0.2  # they differ
    numbers = model.sample(n, generator=seeded()).flatten(1).long() @ torch.tensor([8, 4, 2, 1])
    counts = torch.bincount(numbers, minlength=16)
    error = torch.sqrt(probs * (1 - probs) / n + weights.var(dim=0) / k)
    assert ((counts / n - probs).abs() < 4 * error).all()
    assert chisquare(counts.numpy(), (n * probs / probs.sum()).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_scale_of_discretized_logistics_is_one_for_all_or_one_for_each_channel(per_channel: bool):
    model = tiny(channels=3, levels=256, likelihood="discretized_logistic", scale_per_channel=per_channel)
    z = model.prior(2, generator=seeded()).detach()
    x, _ = images(model, 2)
    pixels = model.decode(z)
    assert isinstance(pixels, DiscretizedLogistic)
    assert model.log_scale is not None
    assert model.log_scale.shape == ((3, 1, 1) if per_channel else (1, 1, 1))
    std = model.log_scale.exp() * math.pi / math.sqrt(3)  # of a logistic distribution
    torch.testing.assert_close(std, torch.full_like(std, 0.5), rtol=0, atol=0.01)
    before = pixels.log_prob(x)
    with torch.no_grad():
        model.log_scale[-1] += 0.5
    changed = (model.decode(z).log_prob(x) != before).flatten(2).any(dim=2).any(dim=0)
    assert changed.tolist() == [not per_channel, not per_channel, True]
