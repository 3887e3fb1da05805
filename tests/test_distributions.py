"""Likelihoods over integer levels are normalized, exact and sampled as stated; the Gaussian's divergence is right."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import chisquare
from torch import Tensor

from wngen.distributions import Bernoulli, Categorical, DiagonalGaussian, DiscretizedLogistic, PixelDistribution
from wngen.noise import Noise

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

levels = st.integers(2, 256)
locations = st.floats(-1e4, 1e4) | st.floats(-1.1, 1.1)
log_scales = st.floats(-50, 50) | st.floats(-9, 2)
dtypes = st.sampled_from([torch.float32, torch.float64])


def log_pmf(distribution: PixelDistribution) -> Tensor:
    """`(levels, ...)`, log p of every level in each sub-pixel."""
    levels, shape = distribution.levels, distribution.mean.shape
    x = torch.arange(levels, dtype=torch.uint8).view(-1, *[1] * len(shape)).expand(-1, *shape)
    if isinstance(distribution, Categorical):
        distribution = Categorical(distribution.logits.expand(levels, *shape, levels))
    return distribution.log_prob(x)


def logistic_log_pmf(location: Tensor, log_scale: float, levels: int) -> Tensor:
    """The same by definition: log(F(upper edge) - F(lower edge)), in extended precision.

    A bin above the location is reflected below it, where F is small and the difference keeps its digits.
    """
    edge = (2 * np.arange(levels - 1, dtype=np.longdouble)[:, None] + 1) / (levels - 1) - 1
    u = (edge - location.numpy().astype(np.longdouble)) / np.exp(np.longdouble(log_scale))
    end = np.full_like(u[:1], np.inf)
    upper, lower = np.concatenate([u, end]), np.concatenate([-end, u])
    above = lower > 0
    upper, lower = np.where(above, -lower, upper), np.where(above, -upper, lower)
    return torch.from_numpy(np.log(expit(upper) - expit(lower)).astype(np.float64))


def one_of_each(n: int, dtype: torch.dtype = torch.float32) -> dict[str, PixelDistribution]:
    """One distribution of each kind, over `(n, 1, 1, 1)` sub-pixels that are all alike."""

    def alike(*values: float) -> Tensor:
        return torch.tensor(values, dtype=dtype).expand(n, 1, 1, 1, len(values))

    return {
        "bernoulli": Bernoulli(alike(0.8)[..., 0]),
        "categorical": Categorical(alike(0.3, -1.0, 2.0, 0.0, -2.5, 1.9)),
        "logistic_2": DiscretizedLogistic(alike(0.2)[..., 0], alike(-0.5)[..., 0], 2),
        "logistic_32": DiscretizedLogistic(alike(0.9)[..., 0], alike(-1.5)[..., 0], 32),
        "logistic_256": DiscretizedLogistic(alike(-0.4)[..., 0], alike(-3.0)[..., 0], 256),
    }


KINDS = list(one_of_each(1))


def assert_follows(samples: Tensor, log_probs: Tensor) -> None:
    """Chi-square test of samples against a probability mass function `(levels,)`."""
    probs = log_probs.double().exp().numpy()
    seen, expected = np.bincount(samples.flatten().numpy(), minlength=len(probs)), probs / probs.sum() * samples.numel()
    rare = expected < 5
    if rare.any():  # the test wants about five of each kind: the rare ones are counted as one
        seen = np.append(seen[~rare], seen[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert chisquare(seen, expected).pvalue > 1e-3


# Normalization


@given(levels, locations, log_scales, dtypes)
@example(256, -1.0, -7.0, torch.float32)  # the mean on the centre of an edge bin
@example(256, 0.99, -5.0, torch.float32)
@example(32, 2 / 31, -20.0, torch.float32)
@example(256, 0.0, -80.0, torch.float32)
@example(256, 0.0, 80.0, torch.float32)
@settings(max_examples=300)
def test_discretized_logistic_sums_to_one(levels: int, location: float, log_scale: float, dtype: torch.dtype):
    loc, scale = torch.tensor(location, dtype=dtype), torch.tensor(log_scale, dtype=dtype)
    log_probs = DiscretizedLogistic(loc, scale, levels).log_prob(torch.arange(levels, dtype=torch.uint8))
    assert log_probs.dtype == dtype
    assert (log_probs <= 0).all()
    assert log_probs.double().exp().sum().item() == pytest.approx(1, abs=TOLERANCE[dtype])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=256), dtypes)
def test_categorical_sums_to_one(logits: list[float], dtype: torch.dtype):
    total = log_pmf(Categorical(torch.tensor(logits, dtype=dtype))).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=TOLERANCE[dtype])


@given(st.floats(-1e4, 1e4) | st.floats(-30, 30), dtypes)
def test_bernoulli_sums_to_one(logit: float, dtype: torch.dtype):
    total = log_pmf(Bernoulli(torch.tensor(logit, dtype=dtype))).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=TOLERANCE[dtype])


# Exactness


@pytest.mark.parametrize("levels", [2, 3, 32, 256])
@pytest.mark.parametrize("log_scale", [-7.0, -5.0, -3.0, 0.0, 5.0])
def test_discretized_logistic_equals_the_difference_of_two_logistic_functions(levels: int, log_scale: float):
    location = torch.linspace(-1.2, 1.2, 97)
    reference = logistic_log_pmf(location, log_scale, levels)
    assert log_scale > -7 or levels == 2 or reference.min() < -1000  # the far tails are in it
    exact = log_pmf(DiscretizedLogistic(location.double(), torch.tensor(log_scale).double(), levels))
    torch.testing.assert_close(exact, reference, rtol=1e-12, atol=1e-11)
    # In single precision the location itself is known to 1e-7, or 1e-4 of the smallest scale.
    single = log_pmf(DiscretizedLogistic(location, torch.tensor(log_scale), levels))
    torch.testing.assert_close(single.double(), reference, rtol=1e-6, atol=3e-4 if log_scale == -7 else 1e-4)


def test_bernoulli_and_categorical_agree_with_torch():
    logits = torch.linspace(-60, 60, 41, dtype=torch.float64)
    x = (torch.arange(41) % 2).to(torch.uint8)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x.double())
    torch.testing.assert_close(Bernoulli(logits).log_prob(x), expected, rtol=1e-12, atol=1e-14)
    logits, x = 30 * torch.randn(50, 7, dtype=torch.float64), torch.randint(7, (50,), dtype=torch.uint8)
    expected = torch.distributions.Categorical(logits=logits).log_prob(x)
    torch.testing.assert_close(Categorical(logits).log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_two_levels_of_a_discretized_logistic_are_a_bernoulli():
    location, log_scale = torch.randn(2, 64, dtype=torch.float64)
    bernoulli = Bernoulli(location * (-log_scale).exp())
    torch.testing.assert_close(
        log_pmf(DiscretizedLogistic(location, log_scale, 2)), log_pmf(bernoulli), rtol=1e-12, atol=0
    )


# Derivatives


@given(levels, locations, log_scales)
@example(256, 1e4, -50.0)
@example(256, -1e4, -50.0)
@example(256, 0.0, -80.0)
@example(256, 0.0, 80.0)
@settings(max_examples=200)
def test_discretized_logistic_and_its_gradients_are_finite(levels: int, location: float, log_scale: float):
    loc, scale = torch.tensor(location, requires_grad=True), torch.tensor(log_scale, requires_grad=True)
    log_probs = DiscretizedLogistic(loc, scale, levels).log_prob(torch.arange(levels, dtype=torch.uint8))
    assert log_probs.isfinite().all()
    for log_prob in log_probs[[0, levels // 2, -1]]:
        assert torch.stack(torch.autograd.grad(log_prob, (loc, scale), retain_graph=True)).isfinite().all()


@pytest.mark.parametrize("logit", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("x", [0, 1])
def test_bernoulli_and_categorical_and_their_gradients_are_finite(logit: float, x: int):
    single = torch.tensor([logit], requires_grad=True)
    pair = torch.tensor([[0.0, logit]], requires_grad=True)
    for distribution, logits in ((Bernoulli(single), single), (Categorical(pair), pair)):
        log_prob = distribution.log_prob(torch.tensor([x], dtype=torch.uint8))
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        assert log_prob.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_has_mean_zero(kind: str):
    """sum_x p(x) d log p(x) = 0 for any distribution that stays normalized, if the gradients are right."""
    make: dict[str, Callable[..., PixelDistribution]] = {
        "bernoulli": lambda a, b: Bernoulli(a + b),
        "categorical": lambda a, b: Categorical(torch.stack([a, b, a * b, a - b], dim=-1)),
        "logistic_2": lambda a, b: DiscretizedLogistic(a, b, 2),
        "logistic_32": lambda a, b: DiscretizedLogistic(a, b - 2, 32),
        "logistic_256": lambda a, b: DiscretizedLogistic(a, b - 4, 256),
    }
    a, b = torch.randn(2, 20, dtype=torch.float64).requires_grad_()
    log_probs = log_pmf(make[kind](a, b))
    for gradient in torch.autograd.grad((log_probs.detach().exp() * log_probs).sum(), (a, b)):
        assert gradient.abs().max() < 1e-10
    x = torch.randint(2, (20,), dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda a, b: make[kind](a, b).log_prob(x), (a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_computed_in_single(dtype: torch.dtype):
    a, b = torch.randn(2, 64).to(dtype)
    x = torch.randint(2, (64,), dtype=torch.uint8)
    makers: list[Callable[..., PixelDistribution]] = [
        lambda a, b: Bernoulli(a),
        lambda a, b: Categorical(torch.stack([a, b], dim=-1)),
        lambda a, b: DiscretizedLogistic(a, b, 256),
    ]
    for make in makers:
        half, single = make(a, b), make(a.float(), b.float())
        assert torch.equal(half.log_prob(x), single.log_prob(x))
        assert half.log_prob(x).dtype == half.mean.dtype == torch.float32
    kl = DiagonalGaussian(a, b).kl(DiagonalGaussian.standard(a))
    assert torch.equal(kl, DiagonalGaussian(a.float(), b.float()).kl(DiagonalGaussian.standard(a.float())))


# Mean and mode


@given(levels, st.floats(-3, 3), st.floats(-9, 5))
def test_discretized_logistic_mean_and_mode_are_those_of_its_pmf(levels: int, location: float, log_scale: float):
    dtype = torch.float64
    distribution = DiscretizedLogistic(
        torch.tensor(location, dtype=dtype), torch.tensor(log_scale, dtype=dtype), levels
    )
    log_probs = log_pmf(distribution)
    expected = (torch.arange(levels) * log_probs.exp()).sum()
    torch.testing.assert_close(distribution.mean, expected, rtol=1e-11, atol=1e-11)
    assert log_probs[distribution.mode.long()] >= log_probs.max() - 1e-12
    assert distribution.mode.dtype == torch.uint8


def test_an_open_edge_bin_can_be_the_mode_of_a_wide_discretized_logistic():
    assert DiscretizedLogistic(torch.tensor(0.1), torch.tensor(2.0), 256).mode == 255
    assert DiscretizedLogistic(torch.tensor(-0.1), torch.tensor(2.0), 256).mode == 0
    assert DiscretizedLogistic(torch.tensor(0.1), torch.tensor(-5.0), 256).mode == 140


@pytest.mark.parametrize("levels", [2, 3, 32, 256])
def test_bernoulli_and_categorical_mean_and_mode_are_those_of_their_pmf(levels: int):
    logits = 3 * torch.randn(100, levels, dtype=torch.float64)
    distributions: list[PixelDistribution] = [Categorical(logits)] + ([Bernoulli(logits[:, 0])] if levels == 2 else [])
    for distribution in distributions:
        log_probs = log_pmf(distribution)
        expected = (torch.arange(levels)[:, None] * log_probs.exp()).sum(dim=0)
        torch.testing.assert_close(distribution.mean, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(distribution.mode.long(), log_probs.argmax(dim=0))
        assert distribution.mode.dtype == torch.uint8


# Samples


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_pmf(kind: str):
    generator = torch.Generator().manual_seed(1)
    samples = one_of_each(200_000)[kind].sample(generator)
    assert samples.dtype == torch.uint8
    assert_follows(samples, log_pmf(one_of_each(1)[kind]).flatten())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_scales_the_logits_or_the_scale(kind: str, temperature: float):
    one = one_of_each(1)[kind]
    tempered: PixelDistribution
    if isinstance(one, DiscretizedLogistic):
        tempered = DiscretizedLogistic(one.location, one.log_scale + math.log(temperature), one.levels)
    else:
        assert isinstance(one, Bernoulli | Categorical)
        tempered = type(one)(one.logits / temperature)
    samples = one_of_each(100_000)[kind].sample(torch.Generator().manual_seed(2), temperature)
    assert_follows(samples, log_pmf(tempered).flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_at_temperature_zero_nothing_is_random(kind: str):
    distribution = one_of_each(1000)[kind]
    centre = distribution.mode
    if isinstance(distribution, DiscretizedLogistic):  # its scale shrinks to 0, and all mass goes to the location's bin
        centre = DiscretizedLogistic(distribution.location, torch.tensor(-50.0), distribution.levels).mode
    assert torch.equal(distribution.sample(temperature=0), centre)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_makes_samples_repeatable_and_leaves_the_global_one_alone(kind: str, dtype: torch.dtype):
    distribution = one_of_each(1000, dtype)[kind]
    state = torch.get_rng_state()
    first, second = (distribution.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3))
    assert torch.equal(first, second)
    assert not torch.equal(first, distribution.sample(torch.Generator().manual_seed(4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(distribution.sample(), distribution.sample())


def test_samples_of_extreme_parameters_are_the_only_likely_level():
    far = torch.tensor([-1e4, 1e4])
    assert Bernoulli(far).sample().tolist() == [0, 1]
    assert DiscretizedLogistic(far, torch.tensor(-50.0), 256).sample().tolist() == [0, 255]
    assert Categorical(torch.tensor([[1e4, -1e4, 0], [-1e4, 0, 1e4]])).sample().tolist() == [0, 2]


# The diagonal Gaussian


def gaussians(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[DiagonalGaussian, DiagonalGaussian]:
    mean, log_std, other_mean, other_log_std = torch.randn(4, *shape, dtype=dtype)
    return DiagonalGaussian(mean, log_std), DiagonalGaussian(other_mean, 0.5 * other_log_std)


def as_torch(gaussian: DiagonalGaussian) -> torch.distributions.Normal:
    return torch.distributions.Normal(gaussian.mean, gaussian.log_std.exp())


def test_gaussian_density_and_divergence_agree_with_torch():
    q, p = gaussians((8, 5))
    z = torch.randn(8, 5, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), as_torch(q).log_prob(z), rtol=1e-12, atol=1e-12)
    expected = torch.distributions.kl_divergence(as_torch(q), as_torch(p))
    torch.testing.assert_close(q.kl(p), expected, rtol=1e-12, atol=1e-12)
    assert (q.kl(p) > 0).all()
    assert torch.equal(q.kl(q), torch.zeros_like(q.mean))


def test_the_standard_gaussian_has_mean_zero_and_deviation_one():
    standard = DiagonalGaussian.standard(torch.randn(3, 4, dtype=torch.float64))
    z = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        standard.log_prob(z), torch.distributions.Normal(0, 1).log_prob(z), rtol=1e-14, atol=1e-14
    )


def test_closed_form_divergence_equals_the_mean_of_the_sampled_one():
    q, p = gaussians((1, 6))
    n = 200_000
    many = DiagonalGaussian(q.mean.expand(n, 6), q.log_std.expand(n, 6))
    z = many.sample(Noise(0, torch.arange(n)))
    sampled = q.log_prob(z) - p.log_prob(z)
    standard_error = sampled.std(dim=0) / math.sqrt(n)
    assert (standard_error < 0.02 * q.kl(p)).all()  # or the next line says little
    assert ((sampled.mean(dim=0) - q.kl(p)).abs() < 4 * standard_error).all()


def test_a_gaussian_draw_is_reparameterized_and_belongs_to_the_image():
    mean, log_std = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    gaussian = DiagonalGaussian(mean, log_std)
    z = gaussian.sample(Noise(0, torch.arange(4)))
    eps = Noise(0, torch.arange(4)).normal(3)
    torch.testing.assert_close(z, mean + log_std.exp() * eps)
    d_mean, d_log_std = torch.autograd.grad(z.sum(), (mean, log_std))
    torch.testing.assert_close(d_mean, torch.ones_like(mean))
    torch.testing.assert_close(d_log_std, log_std.exp() * eps)
    alone = DiagonalGaussian(mean[2:3], log_std[2:3]).sample(Noise(0, torch.tensor([2])))
    assert torch.equal(alone, z[2:3])


def test_gaussian_values_and_gradients_are_finite_for_extreme_parameters():
    log_std = torch.tensor([-20.0, -5.0, 5.0, 20.0], requires_grad=True)
    mean = torch.tensor([-1e3, 0.0, 1.0, 1e3], requires_grad=True)
    gaussian = DiagonalGaussian(mean, log_std)
    for value in (gaussian.log_prob(torch.zeros(4)), gaussian.kl(DiagonalGaussian.standard(mean))):
        gradients = torch.autograd.grad(value.sum(), (mean, log_std), retain_graph=True)
        assert value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
