"""The contract of models, proved on one whose likelihood is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from gaussian_pixels import PIXEL_STD, GaussianPixels
from torch import Tensor

from wngen.distributions import DiagonalGaussian, PixelDistribution
from wngen.image import ImageSpec
from wngen.latent import LatentVariableModel
from wngen.model import Bound
from wngen.noise import Noise

LOADINGS = torch.tensor([[1.5, 0.2], [-0.3, 2.0], [2.0, 0.3], [0.4, -0.0]], dtype=torch.float64)


class LinearGaussian(LatentVariableModel):
    """x = 8 + W z + noise: factor analysis. W has orthogonal columns, so that the true posterior is diagonal.

    Args:
        error: how far the approximate posterior is from the true one.
        num_classes: a class moves the mean of the pixels.
    """

    def __init__(self, error: float = 0.0, num_classes: int | None = None) -> None:
        super().__init__(ImageSpec(channels=1, height=2, width=2, levels=16), num_classes)
        self.error = error
        self.register_buffer("loadings", torch.linalg.qr(LOADINGS).Q * 3)
        self.latent_shapes = ((2,),)
        self.encoded_images = 0

    def offset(self, y: Tensor | None) -> Tensor:
        return torch.tensor(8.0) if y is None else 8.0 + y[:, None].double()

    def true_posterior(self, x: Tensor, y: Tensor | None = None) -> DiagonalGaussian:
        precision = 1 + self.loadings.square().sum(dim=0) / PIXEL_STD**2
        mean = (x.flatten(1).double() - self.offset(y)) @ self.loadings / PIXEL_STD**2 / precision
        return DiagonalGaussian(mean, -0.5 * precision.log())

    def exact_log_likelihood(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        covariance = self.loadings @ self.loadings.T + PIXEL_STD**2 * torch.eye(4, dtype=torch.float64)
        centred = x.flatten(1).double() - self.offset(y)
        return torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance).log_prob(centred)

    def posterior(self, code: tuple[Tensor, ...]) -> DiagonalGaussian:
        return DiagonalGaussian(code[0] + self.error, code[1] + self.error)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        self.encoded_images += len(x)
        true = self.true_posterior(x, y)
        return true.mean, true.log_std

    def bound(
        self, x: Tensor, code: tuple[Tensor, ...], y: Tensor | None, noise: Noise, sampled_rate: bool = True
    ) -> Bound:
        q = self.posterior(code)
        z, p = q.sample(noise), DiagonalGaussian.standard(q.mean)
        rate = q.log_prob(z) - p.log_prob(z) if sampled_rate else q.kl(p)
        return Bound(-self.decode(z, y).log_prob(x).flatten(1).sum(dim=1), (rate,))

    def represent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.encode(x, y)[0]

    def decode(self, z: Tensor, y: Tensor | None = None) -> PixelDistribution:
        return GaussianPixels((z @ self.loadings.T + self.offset(y)).view(-1, 1, 2, 2))

    def prior(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        if given is not None and self.split(given):
            return given
        return torch.randn(n, 2, generator=generator, dtype=torch.float64) * self.layer_temperatures(temperature)[0]

    def prior_at(self, eps: Tensor, y: Tensor | None = None) -> Tensor:
        return eps

    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return DiagonalGaussian.standard(z).log_prob(z).sum(dim=1)


def images(n: int) -> Tensor:
    return torch.randint(16, (n, 1, 2, 2), dtype=torch.uint8)


def test_bound_adds_up():
    kl = torch.rand(3, 4), torch.rand(3, 2)
    bound = Bound(torch.tensor([80.0, 90.0, 100.0]), kl)
    assert bound.layer_kl_nats.shape == (3, 2)
    rate = kl[0].sum(dim=1) + kl[1].sum(dim=1)
    torch.testing.assert_close(bound.rate_nats, rate)
    torch.testing.assert_close(bound.elbo_nats, -bound.distortion_nats - rate)


def test_the_bound_of_an_exact_model_has_no_rate():
    bound = Bound(torch.tensor([80.0, 90.0]))
    assert bound.layer_kl_nats.shape == (2, 0)
    assert torch.equal(bound.rate_nats, torch.zeros(2))
    assert torch.equal(bound.elbo_nats, -bound.distortion_nats)


@pytest.mark.parametrize("importance_samples", [1, 2, 50])
def test_with_the_true_posterior_every_bound_is_exact(importance_samples: int):
    model, x = LinearGaussian(), images(20)
    exact = model.exact_log_likelihood(x)
    torch.testing.assert_close(
        model.log_likelihood(x, importance_samples=importance_samples), exact, rtol=1e-12, atol=0
    )
    sampled = model.bound(x, model.encode(x), None, Noise.fresh(20))
    torch.testing.assert_close(sampled.elbo_nats, exact, rtol=1e-12, atol=0)


def test_the_elbo_falls_short_by_the_divergence_from_the_true_posterior():
    model, x, n = LinearGaussian(error=0.4), images(4), 20_000
    gap = model.posterior(model.encode(x)).kl(model.true_posterior(x)).sum(dim=1)
    for noise_seed, sampled_rate in ((0, False), (1, True)):
        rows, noise = x.repeat(n, 1, 1, 1), Noise(noise_seed, torch.arange(4 * n))
        elbo = model.bound(rows, model.encode(rows), None, noise, sampled_rate).elbo_nats.view(n, 4)
        standard_error = elbo.std(dim=0) / math.sqrt(n)
        assert (standard_error < 0.05 * gap).all()
        assert ((model.exact_log_likelihood(x) - gap - elbo.mean(dim=0)).abs() < 4 * standard_error).all()


def test_the_importance_weighted_bound_rises_to_the_exact_likelihood():
    """ELBO <= IWAE-K <= exact on average, and the difference vanishes (Burda et al. 2015, theorem 1)."""
    model, x = LinearGaussian(error=0.4), images(1000)
    exact, noise = model.exact_log_likelihood(x), Noise(0, torch.arange(1000))
    gaps = [exact - model.log_likelihood(x, importance_samples=k, noise=noise) for k in (1, 3, 9, 27, 81)]
    means = [gap.mean().item() for gap in gaps]
    standard_errors = [gap.std().item() / math.sqrt(len(x)) for gap in gaps]
    assert all(mean > 4 * error for mean, error in zip(means[:3], standard_errors[:3], strict=True))
    assert all(later < earlier for earlier, later in pairwise(means))
    assert abs(means[-1]) < 0.02 < 0.2 < means[0]


@pytest.mark.parametrize("importance_samples", [1, 7])
def test_the_average_weight_is_the_exact_likelihood(importance_samples: int):
    """exp(IWAE-K) is an unbiased estimate of p(x) for every K."""
    model, x, n = LinearGaussian(error=0.2), images(3), 10_000
    noise = Noise(0, torch.arange(3 * n))
    estimate = model.log_likelihood(x.repeat(n, 1, 1, 1), importance_samples=importance_samples, noise=noise)
    ratio = (estimate.view(n, 3) - model.exact_log_likelihood(x)).exp()
    standard_error = ratio.std(dim=0) / math.sqrt(n)
    assert (standard_error < 0.05).all()
    assert ((ratio.mean(dim=0) - 1).abs() < 4 * standard_error).all()


def test_the_importance_weighted_bound_does_not_depend_on_chunk_batch_or_order():
    model, x, index = LinearGaussian(error=0.4), images(11), torch.randperm(1000)[:11]
    whole = model.log_likelihood(x, importance_samples=13, noise=Noise(5, index), chunk=10**6)
    assert whole.dtype == torch.float64
    for chunk in (1, 2, 10, 11, 12, 13, 50, 143):
        model.encoded_images = 0
        result = model.log_likelihood(x, importance_samples=13, noise=Noise(5, index), chunk=chunk)
        torch.testing.assert_close(result, whole, rtol=1e-13, atol=0)
        assert model.encoded_images == 11  # once for each image
    order = torch.randperm(11)
    for batch in (order[:1], order[1:5], order):
        result = model.log_likelihood(x[batch], importance_samples=13, noise=Noise(5, index[batch]), chunk=20)
        torch.testing.assert_close(result, whole[batch], rtol=1e-13, atol=0)


def test_the_importance_weighted_bound_averages_exactly_k_draws():
    model, x, index = LinearGaussian(error=0.4), images(5), torch.arange(5)
    code = model.encode(x)
    weights = torch.stack([model.bound(x, code, None, Noise(3, index, draw)).elbo_nats for draw in range(6)])
    for k in (1, 2, 6):
        expected = weights[:k].logsumexp(dim=0) - math.log(k)
        result = model.log_likelihood(x, importance_samples=k, noise=Noise(3, index))
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


def test_fresh_noise_follows_the_global_seed():
    model, x = LinearGaussian(error=0.4), images(3)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append((model(x).elbo_nats, model.log_likelihood(x, importance_samples=2)))
    for first, second, third in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


def test_samples_come_from_the_prior_and_the_decoder():
    model = LinearGaussian()
    first, second = (model.sample(6, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.uint8
    assert torch.equal(model.sample(6, temperature=0.0), torch.full((6, 1, 2, 2), 8, dtype=torch.uint8))
    mean = model.sample(50_000).double().mean(dim=0)
    assert (mean - 8).abs().max() < 0.1


def test_a_conditional_model_is_evaluated_and_sampled_for_its_classes():
    model, x, y = LinearGaussian(num_classes=4), images(9), torch.arange(9) % 4
    result = model.log_likelihood(x, y, importance_samples=5, chunk=7)
    torch.testing.assert_close(result, model.exact_log_likelihood(x, y), rtol=1e-12, atol=0)
    assert model.sample(4, torch.arange(4), temperature=0.0)[:, 0, 0, 0].tolist() == [8, 9, 10, 11]


def test_wrong_arguments_are_refused():
    x, model, conditional = images(3), LinearGaussian(), LinearGaussian(num_classes=4)
    with pytest.raises(ValueError, match="built without num_classes and takes no labels"):
        model(x, torch.zeros(3, dtype=torch.long))
    for call in (conditional, conditional.log_likelihood):
        with pytest.raises(ValueError, match=r"conditioned on 4 classes: y must have shape \(3,\), got None"):
            call(x)
        with pytest.raises(ValueError, match=r"y must have shape \(3,\), got \(2,\)"):
            call(x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"y must have shape \(5,\), got None"):
        conditional.sample(5)
    with pytest.raises(ValueError, match="importance_samples=0"):
        model.log_likelihood(x, importance_samples=0)
    with pytest.raises(ValueError, match="chunk=0"):
        model.log_likelihood(x, chunk=0)


def test_latents_are_taken_apart_at_the_ends_of_layers():
    model = LinearGaussian()
    model.latent_shapes = ((2, 1, 3), (4,), (5, 2, 2))
    z = torch.randn(7, 30)
    parts = model.split(z)
    assert [part.shape for part in parts] == [(7, 2, 1, 3), (7, 4), (7, 5, 2, 2)]
    assert torch.equal(torch.cat([part.flatten(1) for part in parts], dim=1), z)
    for layers, end in enumerate((0, 6, 10, 30)):
        uppermost = model.split(z[:, :end])
        assert len(uppermost) == layers
        assert all(torch.equal(part, whole) for part, whole in zip(uppermost, parts, strict=False))
    for wrong in (z[:, :7], torch.randn(7, 31), parts[0]):
        with pytest.raises(ValueError, match=r"latents of shape .*wanted \(B, Z\), where layers end at 0, 6, 10, 30"):
            model.split(wrong)


def test_a_temperature_is_for_all_layers_or_for_each():
    model = LinearGaussian()
    model.latent_shapes = ((2,), (3,), (4,))
    assert model.layer_temperatures(0.5) == [0.5, 0.5, 0.5]
    assert model.layer_temperatures(1) == [1.0, 1.0, 1.0]
    assert model.layer_temperatures((0.1, 0, 2.0)) == [0.1, 0.0, 2.0]
    wrong: list[float | list[float]] = [-0.1, [0.5, 0.5], [1.0] * 4, [1.0, -1.0, 1.0], []]
    for temperature in wrong:
        with pytest.raises(ValueError, match=r"temperature=.*: wanted one, or one for each of 3 layers, none negative"):
            model.layer_temperatures(temperature)


def test_the_lowest_temperature_of_several_is_the_pixels_too():
    model = LinearGaussian()
    assert torch.equal(model.sample(3, temperature=[0.0]), torch.full((3, 1, 2, 2), 8, dtype=torch.uint8))
    one, several = (model.sample(9, temperature=t, generator=torch.Generator().manual_seed(1)) for t in (0.7, [0.7]))
    assert torch.equal(one, several)
    with pytest.raises(ValueError, match="n=0: wanted at least 1 image"):
        model.sample(0)
    with pytest.raises(ValueError, match=r"temperature=-1.0: wanted one"):
        model.sample(1, temperature=-1.0)
