"""ResNetVAE: its bound is that of the hierarchy it samples from, layer by layer, whatever its arguments."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dependence import jacobian
from gaussian_pixels import PIXEL_STD, GaussianPixels
from scipy.stats import chisquare
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from wngen.checkpoint import load, save_release
from wngen.distributions import DiscretizedLogistic
from wngen.flows import IAF
from wngen.image import ImageSpec
from wngen.model import Bound
from wngen.models import ResNetVAE
from wngen.models.resnet_vae import StochasticLayer
from wngen.nn import WeightNormalized, data_dependent_init, fold
from wngen.noise import Noise
from wngen.training.objective import objective_nats

TINY: dict[str, Any] = {
    "channels": 1,
    "height": 5,
    "width": 7,
    "levels": 2,
    "layers": "3x2, 2x1",
    "feature_maps": (4,),
    "latent_channels": 2,
    "iaf_layers": 1,
}
SIZES = [  # channels, height, width, layers, feature maps
    (1, 5, 7, "5x1, 3x2", (4, 6)),
    (3, 13, 10, "7x1, 4x1, 2x1", (3, 4, 5)),
    (1, 8, 9, "8x1, 2x1", (4,)),
    (2, 9, 4, "3x1", (4,)),
    (4, 6, 5, "6x2", (4,)),
    (1, 7, 3, "1x2", (4,)),
    (1, 1, 6, "1x2", (4,)),
]
INFERENCES = ["bidirectional", "bottom-up"]
POSTERIORS = ["diagonal", "iaf"]
LIKELIHOODS: list[dict[str, Any]] = [
    {"likelihood": "bernoulli"},
    {"likelihood": "bernoulli", "channels": 3},
    {"likelihood": "discretized_logistic", "levels": 256},
    {"likelihood": "discretized_logistic", "levels": 5, "channels": 3, "scale_per_channel": True},
    {"likelihood": "mixture", "levels": 256, "channels": 3, "components": 2},
]


def tiny(**changes: Any) -> ResNetVAE:
    """A small model in double precision, every parameter of which is far from where it begins, as after training."""
    model = ResNetVAE(**(TINY | changes)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".g"):
                parameter.uniform_(0.3, 1)
            elif name != "log_scale":
                parameter.normal_(std=0.3)
    return model


def images(model: ResNetVAE, n: int) -> tuple[Tensor, Tensor | None]:
    """Random levels, and labels where the model wants them."""
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return torch.randint(model.spec.levels, (n, *model.spec.shape), dtype=torch.uint8), y


def noise(n: int, draw: int = 0) -> Noise:
    return Noise(7, torch.arange(n), draw)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent_sizes(model: ResNetVAE) -> list[int]:
    return [math.prod(shape) for shape in model.latent_shapes]


def generated(model: ResNetVAE, eps: Tensor) -> Tensor:
    """The latents `(B, Z)` that the prior makes of noise `(B, Z)`."""
    h, latents = model._top(len(eps), None), []
    for layer, part in zip(model.top_down, model.split(eps), strict=True):
        h, z = layer.generate(h, part)
        latents.append(z.flatten(1))
    return torch.cat(latents, dim=1)


def inferred(model: ResNetVAE, code: tuple[Tensor, ...], eps: Tensor) -> tuple[Tensor, Tensor]:
    """What the posterior of one image makes of noise `(B, Z)`: latents `(B, Z)` and the rate of each layer `(B, L)`."""
    parts = model.split(eps)
    in_order = iter(parts if model.inference == "bidirectional" else reversed(parts))
    rows = tuple(part.expand(len(eps), -1, -1, -1) for part in code)
    _, latents, rates = model._infer(rows, None, lambda shape: next(in_order))
    return torch.cat([z.flatten(1) for z in latents], dim=1), torch.stack([kl.sum(dim=1) for kl in rates], dim=1)


@torch.no_grad()
def silence(layer: WeightNormalized, *rows: slice, bias: float | None = 0.0) -> None:
    """Make output channels constant; of the bias that they have if it is None."""
    for row in rows:
        layer.g[row] = 0
        if bias is not None and layer.bias is not None:
            layer.bias[row] = bias


def silence_flows(model: ResNetVAE) -> None:
    """Let no step of a flow depend on anything."""
    for module in model.modules():
        for step in module.steps if isinstance(module, IAF) else ():
            silence(step.conditioner.output, slice(None))


@torch.no_grad()
def near(model: ResNetVAE, distance: float) -> None:
    """Bring the posterior nearer to the prior that it is relative to, or both to the standard Gaussian.

    Importance weights then vary less.
    """
    own = slice(4, 8) if model.inference == "bidirectional" else slice(0, 4)
    for up, down in zip(model.bottom_up, model.top_down, strict=True):
        for layer, part in ((up.first, slice(0, 4)), (down.first, own)):
            layer.g[part] *= distance
            layer.bias[part] *= distance


def assert_reaches_every_parameter(model: ResNetVAE, objective: Tensor) -> None:
    objective.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def assert_agrees(draws: Tensor, expected: Tensor, precision: float = 0.02) -> None:
    """The mean over draws `(N, ...)` is the expected one, and known well enough to say so."""
    standard_error = draws.std(dim=0) / math.sqrt(len(draws))
    assert (standard_error < precision * expected.abs().clamp(min=1)).all()
    assert ((draws.mean(dim=0) - expected).abs() < 4 * standard_error + 1e-10).all()


# Every combination


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("changes", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_every_combination_gives_a_bound_whose_gradient_reaches_every_parameter(
    inference: str, posterior: str, changes: dict[str, Any], num_classes: int | None
):
    is_modern = num_classes is not None
    modern: dict[str, Any] = {"std": "softplus", "residual_scale": None, "iaf_steps": 2} if is_modern else {}
    modern |= {"relative_posterior": is_modern and inference == "bidirectional"}
    model = tiny(inference=inference, posterior=posterior, num_classes=num_classes, **changes, **modern)
    x, y = images(model, 6)
    bound = model(x, y, noise(6))
    assert [kl.shape for kl in bound.kl_nats] == [(6, 2)] * 3
    assert bound.elbo_nats.isfinite().all()
    rate = torch.stack([kl.sum(dim=1) for kl in bound.kl_nats]).sum(dim=0)
    torch.testing.assert_close(bound.rate_nats, rate, rtol=1e-13, atol=0)
    assert_reaches_every_parameter(model, bound.elbo_nats.mean())
    samples = model.sample(3, None if y is None else y[:3])
    assert samples.shape == (3, *model.spec.shape)
    assert samples.dtype == torch.uint8
    assert int(samples.max()) < model.spec.levels


@pytest.mark.parametrize("iaf_form", ["gated", "location_scale", "location"])
@pytest.mark.parametrize("iaf_layers", [0, 2])
@pytest.mark.parametrize("iaf_steps", [1, 3])
def test_every_flow_gives_a_bound_whose_gradient_reaches_every_parameter(
    iaf_form: str, iaf_layers: int, iaf_steps: int
):
    model = tiny(iaf_form=iaf_form, iaf_layers=iaf_layers, iaf_steps=iaf_steps)
    x, _ = images(model, 6)
    assert_reaches_every_parameter(model, model(x, noise=noise(6)).elbo_nats.mean())


def sized(size: tuple[int, int, int, str, tuple[int, ...]]) -> dict[str, Any]:
    return dict(zip(("channels", "height", "width", "layers", "feature_maps"), size, strict=True))


@pytest.mark.parametrize("inference", INFERENCES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size[3])
def test_every_size_has_its_latents_and_every_pixel_is_seen_and_made(
    size: Any, inference: str, monkeypatch: pytest.MonkeyPatch
):
    model = tiny(**sized(size), inference=inference)
    x, _ = images(model, 4)
    shapes = []
    for name in reversed(size[3].split(", ")):
        height, count = map(int, name.split("x"))
        width, rows = size[2], size[1]
        while rows > height:
            rows, width = -(-rows // 2), -(-width // 2)
        shapes += [(2, height, width)] * count
    assert model.latent_shapes == tuple(shapes)
    bound = model(x, noise=noise(4))
    assert [kl.shape for kl in bound.kl_nats] == [(4, 2)] * len(shapes)
    assert bound.elbo_nats.isfinite().all()
    assert model.sample(2).shape == (2, *model.spec.shape)

    z = torch.randn(1, sum(latent_sizes(model)), dtype=torch.float64)
    by_latent = jacobian(lambda z: model.decode(z).mean.flatten(1), z)  # (C H W, Z)
    assert by_latent.any(dim=0).all()
    assert by_latent.any(dim=1).all()
    monkeypatch.setattr(ImageSpec, "scale", lambda self, x, dtype: x)
    real = torch.randn(1, *model.spec.shape, dtype=torch.float64)
    views: list[Callable[[Tensor], Tensor]] = [
        *(lambda x, i=i: model.encode(x)[i] for i in range(len(model.encode(real)))),
        *(lambda x, i=i: model.split(model.represent(x))[i] for i in range(len(shapes))),
    ]
    for view in views:
        by_pixel = jacobian(lambda x, view=view: view(x).flatten(1), real)
        assert by_pixel.any(dim=0).all()
        assert by_pixel.any(dim=1).all()


def parameters_of_a_convolution(inputs: int, outputs: int, kernel_size: int = 3) -> int:
    return outputs * (inputs * kernel_size**2 + 2)  # direction, and each output's length and bias


@pytest.mark.parametrize(("inference", "total"), [("bidirectional", 41_568_007), ("bottom-up", 35_983_367)])
def test_the_model_of_the_paper_has_as_many_parameters_as_counted_by_hand(inference: Any, total: int):
    maps, latents, depth, is_drawn_upwards = 160, 32, 20, inference == "bottom-up"
    code = 2 * latents + maps  # mean, log standard deviation, and what enters the flow
    seen_above = maps + latents if is_drawn_upwards else maps
    bottom_up = parameters_of_a_convolution(maps, code + maps) + parameters_of_a_convolution(seen_above, maps)
    top_down = parameters_of_a_convolution(maps, 2 * latents + (0 if is_drawn_upwards else code) + maps)
    top_down += parameters_of_a_convolution(latents + maps, maps)
    flow = parameters_of_a_convolution(latents, maps) + parameters_of_a_convolution(maps, maps)
    flow += parameters_of_a_convolution(maps, 2 * latents)
    # Nothing is above the topmost layer.
    unused = parameters_of_a_convolution(maps, maps) + parameters_of_a_convolution(seen_above, maps)
    between = 2 * parameters_of_a_convolution(maps, maps)  # from 16 x 16 to 8 x 8 and back
    ends = parameters_of_a_convolution(3, maps, 5) + parameters_of_a_convolution(maps, 3, 5)
    expected = depth * (bottom_up + top_down + flow) - unused + between + ends + maps * 8 * 8 + 1
    with torch.device("meta"):
        model = ResNetVAE(inference=inference)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == total
    assert len(model.top_down) == len(model.bottom_up) == depth
    assert model.latent_shapes == ((32, 8, 8),) * 10 + ((32, 16, 16),) * 10


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


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize(("inference", "relative_posterior"), WAYS)
def test_the_sampled_rates_of_a_linear_gaussian_hierarchy_are_ratios_of_its_densities(
    inference: str, posterior: str, relative_posterior: bool, monkeypatch: pytest.MonkeyPatch
):
    linear = LinearHierarchy(
        monkeypatch, inference=inference, posterior=posterior, relative_posterior=relative_posterior
    )
    for image in images(linear.model, 2)[0]:
        z, rates = inferred(linear.model, linear.model.encode(image[None]), torch.randn(20, 10, dtype=torch.float64))
        torch.testing.assert_close(rates, linear.rates_at(image, z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize(("inference", "relative_posterior"), WAYS)
def test_the_elbo_of_a_linear_gaussian_hierarchy_is_its_closed_form(
    inference: str, posterior: str, relative_posterior: bool, monkeypatch: pytest.MonkeyPatch
):
    linear = LinearHierarchy(
        monkeypatch, inference=inference, posterior=posterior, relative_posterior=relative_posterior
    )
    model, n = linear.model, 4000
    x, _ = images(model, 3)
    closed = [linear.bound(image) for image in x]
    distortion, rates = torch.stack([d for d, _ in closed]), torch.stack([r for _, r in closed])
    elbo = -distortion - rates.sum(dim=1)
    assert (rates > 0.05).all()
    covariance = linear.posterior(x[0]).covariance_matrix
    assert covariance[linear.upper, linear.lower].abs().max() > 0.01  # the layers know of each other
    # What is drawn first has a diagonal covariance unless there is a flow.
    first = linear.upper if inference == "bidirectional" else linear.lower
    within = covariance[first, first]
    assert ((within - within.diag().diag()).abs().max() > 0.01) == (posterior == "iaf")
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


# Initialization, memory, precision and copies


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_after_init_every_layer_has_its_mean_and_deviation(inference: str, posterior: str, num_classes: int | None):
    """In a second pass over the same images with the same noise, through the bottom-up and the top-down layers."""
    arguments = {"height": 11, "width": 9, "layers": "6x2, 3x2", "channels": 3, "levels": 256, "iaf_layers": 2}
    arguments |= {"feature_maps": (6, 8), "iaf_steps": 2}
    choices = {"inference": inference, "posterior": posterior, "num_classes": num_classes}
    model = ResNetVAE(**(TINY | arguments | choices)).double()
    x, y = images(model, 50)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, WeightNormalized)}
    assert set(data_dependent_init(model, x, y, noise(50))) == set(layers)
    outputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, output, name=name: outputs.update({name: output}))
    with torch.no_grad():
        bound = model(x, y, noise(50))
    for name, layer in layers.items():
        assert layer.initialized, name
        assert layer.length.isfinite().all(), name
        assert layer.length.max() < 30 * layer.init_scale, name
        units = outputs[name].transpose(0, 1).flatten(1)
        std = torch.full_like(units[:, 0], layer.init_scale)
        torch.testing.assert_close(units.std(dim=1, correction=0), std, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(units.mean(dim=1), torch.zeros_like(std), rtol=0, atol=1e-6)
    assert data_dependent_init(model, x, y, noise(50)) == []
    assert (bound.layer_kl_nats.mean(dim=0) > 0).all()
    assert bound.layer_kl_nats.mean() < 50


@pytest.mark.parametrize("layers", ["2x2", "2x1, 1x1"])
@pytest.mark.parametrize("inference", INFERENCES)
def test_init_sets_no_large_length_where_the_top_is_small(inference: str, layers: str):
    model = ResNetVAE(**(TINY | {"layers": layers, "inference": inference}))
    x, _ = images(model, 20)
    data_dependent_init(model, x, None, noise(20))
    for name, layer in model.named_modules():
        if isinstance(layer, WeightNormalized):
            assert layer.length.isfinite().all(), name
            assert layer.length.max() < 30, name
    assert model(x, noise=noise(20)).elbo_nats.isfinite().all()


def gradients(model: ResNetVAE, x: Tensor, y: Tensor | None) -> tuple[Bound, list[Tensor], int]:
    """The bound, the gradients of its mean, and how many numbers were kept for them in between."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        bound = model(x, y, noise(len(x)))
        loss = -bound.elbo_nats.mean()
    return bound, list(torch.autograd.grad(loss, list(model.parameters()))), kept


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_computing_activations_again_changes_no_gradient(inference: str, posterior: str):
    choices = {"inference": inference, "posterior": posterior, "num_classes": 3}
    model, same = (tiny(**choices, recompute=recompute) for recompute in (False, True))
    same.load_state_dict(model.state_dict())
    x, y = images(model, 6)
    (bound, plain, kept), (again, recomputed, kept_again) = (gradients(each, x, y) for each in (model, same))
    assert torch.equal(again.elbo_nats, bound.elbo_nats)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)
    assert kept_again < kept / 4
    with torch.no_grad():
        assert torch.equal(same(x, y, noise(6)).elbo_nats, bound.elbo_nats)


@pytest.mark.parametrize("changes", LIKELIHOODS)
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("inference", INFERENCES)
def test_autocast_gives_nearly_the_same_bound_in_single_precision(
    inference: Any, posterior: Any, changes: dict[str, Any]
):
    """And adds up the residual branches in it."""
    model = ResNetVAE(**(TINY | changes), inference=inference, posterior=posterior)
    x, _ = images(model, 16)
    data_dependent_init(model, x, None, noise(16))
    single = model(x, noise=noise(16))
    streams = set()
    for layer in (*(layer.first for layer in (*model.bottom_up, *model.top_down)), model.output):
        layer.register_forward_pre_hook(lambda _, args: streams.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, noise=noise(16))
    assert streams == {torch.float32}
    assert {tensor.dtype for tensor in (mixed.distortion_nats, *mixed.kl_nats)} == {torch.float32}
    torch.testing.assert_close(mixed.elbo_nats, single.elbo_nats, rtol=0.02, atol=0)
    (-mixed.elbo_nats.mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


ELABORATE: dict[str, Any] = TINY | {"channels": 3, "levels": 8, "likelihood": "mixture", "num_classes": 4}
ELABORATE |= {"iaf_steps": 2, "iaf_form": "gated", "std": "softplus", "relative_posterior": True}


def initialized() -> tuple[ResNetVAE, Tensor, Tensor | None]:
    model = ResNetVAE(**ELABORATE)
    x, y = images(model, 8)
    data_dependent_init(model, x, y, noise(8))
    return model.eval(), x, y


def test_the_configuration_builds_the_same_model():
    model = ResNetVAE(**ELABORATE)
    config = json.loads(json.dumps(model.config))
    assert config.pop("model") == "ResNetVAE"
    again = ResNetVAE(**config)
    assert json.dumps(again.config) == json.dumps(model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    assert config.keys() >= {"channels", "height", "width", "levels", "layers", "recompute"}


@torch.no_grad()
def test_a_released_model_is_the_same_to_the_bit_and_a_folded_one_nearly(tmp_path: Path):
    model, x, y = initialized()
    expected = model(x, y, noise(8))
    save_release(model, tmp_path / "release")
    again = load(tmp_path / "release")
    assert isinstance(again, ResNetVAE)
    assert torch.equal(again(x, y, noise(8)).layer_kl_nats, expected.layer_kl_nats)
    assert torch.equal(again(x, y, noise(8)).elbo_nats, expected.elbo_nats)
    assert torch.equal(again.sample(8, y, generator=seeded()), model.sample(8, y, generator=seeded()))
    assert data_dependent_init(again, x, y, noise(8)) == []
    folded = fold(model.double())
    assert not any(isinstance(layer, WeightNormalized) for layer in folded.modules())
    torch.testing.assert_close(
        folded(x, y, noise(8)).elbo_nats, model(x, y, noise(8)).elbo_nats, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(expected.elbo_nats.double(), model(x, y, noise(8)).elbo_nats, rtol=1e-5, atol=1e-3)
    assert torch.equal(folded.sample(4, y[:4], generator=seeded()), model.sample(4, y[:4], generator=seeded()))


# Arguments


def test_feature_maps_may_be_one_number_for_all():
    one, also_one, each = (ResNetVAE(**(TINY | {"feature_maps": maps})) for maps in (4, (4,), [4, 4]))
    assert one.resolutions == also_one.resolutions == each.resolutions
    assert [resolution.maps for resolution in one.resolutions] == [4, 4]


@pytest.mark.parametrize(
    "layers", ["", "x", "3x2; 2x1", "3 2", "3x2,", "2x1, 3x2", "3x2, 3x1", "4x1", "6x1", "3x0", "-3x1", "0x1"]
)
def test_layers_that_name_no_hierarchy_are_refused(layers: str):
    with pytest.raises(ValueError, match=r"such as '16x10, 8x10'; heights of 5, 3, 2, 1, each at most once") as refused:
        ResNetVAE(**(TINY | {"layers": layers}))
    assert f"layers={layers!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_maps": ()}, r"feature_maps=\(\): wanted one number, or one for each of 2 heights"),
        ({"feature_maps": [4, 4, 4]}, r"feature_maps=\[4, 4, 4\]: wanted one number, or one for each of 2 heights"),
        ({"feature_maps": (4, 0)}, r"feature_maps=\(4, 0\)"),
        ({"feature_maps": 0}, "feature_maps=0: wanted one number"),
        ({"residual_scale": 0.0}, r"residual_scale=0\.0: wanted a positive number, or None"),
        ({"residual_scale": -0.1}, r"residual_scale=-0\.1: wanted a positive number"),
        ({"residual_scale": math.nan}, "residual_scale=nan: wanted a positive number"),
        ({"inference": "bottom-up", "relative_posterior": True}, "relative_posterior is for bidirectional inference"),
        ({"inference": "top-down"}, "inference='top-down': wanted one of bidirectional, bottom-up"),
        ({"posterior": "gaussian"}, "posterior='gaussian': wanted one of diagonal, iaf"),
        ({"iaf_form": "affine"}, "iaf_form='affine': wanted one of gated"),
        ({"iaf_form": "affine", "posterior": "diagonal"}, "iaf_form='affine': wanted one of gated"),
        ({"std": "exp"}, "std='exp': wanted one of exponential, softplus"),
        ({"likelihood": "gaussian"}, "likelihood='gaussian': wanted one of auto, bernoulli, mixture"),
        ({"likelihood": "categorical"}, "likelihood='categorical': wanted one of auto, bernoulli, mixture"),
        ({"likelihood": "bernoulli", "levels": 256}, "likelihood='bernoulli' is for levels=2, got levels=256"),
        ({"channels": 5}, "channels=5: wanted 1 to 4"),
        ({"height": 0}, "height=0"),
        ({"levels": 257}, "levels=257"),
        ({"latent_channels": 0}, "latent_channels=0: wanted at least 1"),
        ({"components": 0}, "components=0: wanted at least 1"),
        ({"iaf_steps": 0}, "iaf_steps=0: wanted at least 1"),
        ({"iaf_layers": -1}, "iaf_layers=-1: wanted at least 0"),
        ({"num_classes": 0}, "num_classes=0: wanted at least 1, or None"),
        ({"feature_maps": (2,), "latent_channels": 3}, r"feature_maps=\(2,\): wanted at least latent_channels=3"),
        ({"feature_maps": 2, "latent_channels": 3}, "feature_maps=2: wanted at least latent_channels=3"),
    ],
)
def test_arguments_that_make_no_model_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ResNetVAE(**(TINY | changes))


def test_wrong_images_and_labels_are_refused():
    model, conditional = tiny(), tiny(num_classes=3)
    (x, _), y = images(model, 3), torch.zeros(3, dtype=torch.long)
    z = torch.randn(3, sum(latent_sizes(model)), dtype=torch.float64)
    for call in (model, model.encode, model.represent, model.log_likelihood):
        with pytest.raises(TypeError, match=r"images are uint8 levels 0 to 1, got torch\.float32"):
            call(x.float())
        with pytest.raises(ValueError, match=r"images have shape \(3, 1, 7, 5\), the model wants \(B, 1, 5, 7\)"):
            call(x.mT)
        with pytest.raises(ValueError, match="built without num_classes"):
            call(x, y)
    calls = (conditional, conditional.encode, conditional.represent, conditional.log_likelihood)
    for call, argument in (
        *((call, x) for call in calls),
        *((c, z) for c in (conditional.decode,)),
        (conditional.sample, 3),
        (conditional.prior, 3),
    ):
        with pytest.raises(ValueError, match=r"conditioned on 3 classes: y must have shape \(3,\), got None"):
            call(argument)


def test_latents_that_end_within_a_layer_are_refused():
    model = tiny()
    ends = [0, *itertools.accumulate(latent_sizes(model))]
    z = torch.zeros(2, ends[-1] + 1, dtype=torch.float64)
    for wrong in (z, z[:, :3], z[:, : ends[1]].view(2, *model.latent_shapes[0])):
        with pytest.raises(ValueError, match=rf"where layers end at {', '.join(map(str, ends))}"):
            model.prior(2, given=wrong)
        with pytest.raises(ValueError, match="wanted"):
            model.decode(wrong)


def test_latents_of_another_number_of_images_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="n=3, but 2 rows of latents are given"):
        model.prior(3, given=model.prior(2))
