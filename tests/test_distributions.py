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

from wngen.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    PixelDistribution,
)
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
    if isinstance(distribution, DiscretizedLogisticMixture):  # it wants four dimensions
        return torch.stack([distribution.log_prob(level) for level in x])
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
        "mixture_32": DiscretizedLogisticMixture(
            alike(0.5, -0.5, 0.7).movedim(-1, 1).squeeze(2),
            alike(-0.8, 0.3, 0.9).movedim(-1, 1),
            alike(-3.0, -4.0, -1.0).movedim(-1, 1),
            torch.zeros(n, 3, 0, 1, 1, dtype=dtype),
            32,
        ),
    }


def tempered(one: PixelDistribution, temperature: float) -> PixelDistribution:
    """The distribution that samples of a temperature follow: by definition, with logits and scales changed."""
    if isinstance(one, DiscretizedLogistic):
        return DiscretizedLogistic(one.location, one.log_scale + math.log(temperature), one.levels)
    if isinstance(one, DiscretizedLogisticMixture):
        log_scale = one.log_scale + math.log(temperature)
        return DiscretizedLogisticMixture(
            one.logits / temperature, one.location, log_scale, one.coefficients, one.levels
        )
    assert isinstance(one, Bernoulli | Categorical)
    return type(one)(one.logits / temperature)


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
        "mixture_32": lambda a, b: DiscretizedLogisticMixture.from_parameters(
            torch.stack([a, b, a * b, a - b, a + b, b - 2], dim=1).view(20, 6, 1, 1), 1, 32
        ),
    }
    a, b = torch.randn(2, 20, dtype=torch.float64).requires_grad_()
    log_probs = log_pmf(make[kind](a, b))
    for gradient in torch.autograd.grad((log_probs.detach().exp() * log_probs).sum(), (a, b)):
        assert gradient.abs().max() < 1e-10
    x = torch.randint(2, log_probs.shape[1:], dtype=torch.uint8)
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
    samples = one_of_each(100_000)[kind].sample(torch.Generator().manual_seed(2), temperature)
    assert_follows(samples, log_pmf(tempered(one_of_each(1)[kind], temperature)).flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_at_temperature_zero_nothing_is_random(kind: str):
    distribution = one_of_each(1000)[kind]
    centre = tempered(distribution, 1e-9).mode  # all mass goes to the likeliest level, or to the bin of the location
    assert centre.unique().numel() == 1
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
    assert Categorical(torch.tensor([[1e4, -1e4, 0], [-1e4, 0, 1e4]])).sample(temperature=1e-30).tolist() == [0, 2]


def images_of_each() -> dict[str, PixelDistribution]:
    """Distributions of 4 images of 3 channels and 2 x 5 pixels, all different."""
    mean, log_scale = torch.randn(2, 4, 3, 2, 5)
    return {
        "bernoulli": Bernoulli(mean),
        "categorical": Categorical(torch.randn(4, 3, 2, 5, 9)),
        "logistic_256": DiscretizedLogistic(mean, log_scale - 2, 256),
        "mixture_256": DiscretizedLogisticMixture.from_parameters(torch.randn(4, 70, 2, 5), 3, 256),
    }


def rows(distribution: PixelDistribution, index: Tensor) -> PixelDistribution:
    """The distribution of some of the images."""
    if isinstance(distribution, DiscretizedLogistic):
        return DiscretizedLogistic(distribution.location[index], distribution.log_scale[index], distribution.levels)
    if isinstance(distribution, DiscretizedLogisticMixture):
        return mixture_map(distribution, lambda parameter: parameter[index])
    assert isinstance(distribution, Bernoulli | Categorical)
    return type(distribution)(distribution.logits[index])


@pytest.mark.parametrize("kind", list(images_of_each()))
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_an_images_draw_depends_on_its_own_numbers_alone(kind: str, temperature: float):
    distribution = images_of_each()[kind]
    assert distribution.uniforms == (4 if kind == "mixture_256" else 3)
    uniform = Noise(0, torch.arange(4)).uniform(distribution.uniforms, 2, 5)
    x = distribution.draw(uniform, temperature)
    assert x.dtype == torch.uint8
    assert torch.equal(distribution.draw(uniform, temperature), x)
    for index in (torch.tensor([2, 0, 3, 1]), torch.tensor([3])):
        assert torch.equal(rows(distribution, index).draw(uniform[index], temperature), x[index])
    other = uniform.clone()
    other[..., 1, 3] = 1 - other[..., 1, 3]
    changed = (distribution.draw(other, temperature) != x).any(dim=1)
    assert changed[:, 1, 3].any() == (temperature > 0)
    changed[:, 1, 3] = False
    assert not changed.any()


@pytest.mark.parametrize("kind", list(images_of_each()))
def test_a_sample_is_the_draw_of_the_generators_next_numbers(kind: str):
    distribution = images_of_each()[kind]
    uniform = torch.rand(4, distribution.uniforms, 2, 5, generator=torch.Generator().manual_seed(7))
    x = distribution.sample(torch.Generator().manual_seed(7), 0.9)
    assert torch.equal(x, distribution.draw(uniform, 0.9))
    noise = (uniform.log() - (-uniform).log1p()) * 0.9
    if isinstance(distribution, Bernoulli):
        assert torch.equal(x, (distribution.logits + noise > 0).byte())
    if isinstance(distribution, DiscretizedLogistic):
        value = (distribution.location + distribution.log_scale.exp() * noise + 1) * 127.5
        assert ((x - value.clamp(0, 255)).abs() < 0.5 + 1e-3).all()


@pytest.mark.parametrize("kind", list(images_of_each()))
def test_draw_says_what_numbers_it_wants(kind: str):
    distribution = images_of_each()[kind]
    uniform = torch.rand(4, distribution.uniforms, 2, 5)
    with pytest.raises(ValueError, match=r"uniform of shape \(4, 1, 2, 5\), wanted \(4, [34], 2, 5\)"):
        distribution.draw(uniform[:, :1])
    with pytest.raises(ValueError, match=r"temperature=-0\.5, wanted 0 or more"):
        distribution.draw(uniform, -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_the_unit_interval_lead_to_levels_too(kind: str, dtype: torch.dtype):
    ends = torch.tensor([0.0, 1e-30, 2**-24, 1 - 2**-24], dtype=dtype)
    distribution = one_of_each(4, dtype)[kind]
    x = distribution.draw(ends.view(-1, 1, 1, 1).expand(-1, distribution.uniforms, 1, 1)).flatten().tolist()
    assert x[0] <= x[1] <= x[2] < x[3] < distribution.levels


@given(st.integers(2, 256), st.integers(0, 2**32 - 1), st.sampled_from([0.2, 1.0, 3.0]))
def test_categorical_inverts_the_cumulative_distribution_and_never_draws_the_impossible(
    levels: int, seed: int, temperature: float
):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(levels, generator=generator)
    impossible = torch.rand(levels, generator=generator) < 0.4
    impossible[torch.randint(levels, (), generator=generator)] = False
    logits[impossible] = -torch.inf
    ends = torch.tensor([0.0, 2**-24, 1 - 2**-23, 1 - 2**-24])
    uniform = torch.cat([ends, torch.rand(500, generator=generator)])
    x = Categorical(logits.expand(504, levels)).draw(uniform, temperature)
    assert not impossible[x.long()].any()
    cumulative = (logits.double() / temperature).softmax(dim=0).cumsum(dim=0)
    bounds = torch.cat([torch.zeros(1, dtype=torch.float64), cumulative])
    assert (bounds[x.long()] - 1e-6 <= uniform).all()
    assert (uniform <= bounds[x.long() + 1] + 1e-6).all()


def test_all_levels_of_a_flat_categorical_are_drawn_though_their_sum_rounds():
    logits = torch.zeros(4096, 255)
    uniform = (torch.arange(4096) + 0.5) / 4096
    expected = (uniform.double() * 255).floor()
    assert torch.equal(Categorical(logits).draw(uniform).double(), expected)


# The mixture of discretized logistics


def mixture_map(mixture: DiscretizedLogisticMixture, change: Callable[[Tensor], Tensor]) -> DiscretizedLogisticMixture:
    parameters = (mixture.logits, mixture.location, mixture.log_scale, mixture.coefficients)
    return DiscretizedLogisticMixture(*map(change, parameters), levels=mixture.levels)


def random_mixtures(
    n: int, components: int, channels: int, levels: int, dtype: torch.dtype = torch.float64
) -> DiscretizedLogisticMixture:
    """`(n, K, C, 1, 1)` of every width, around, on and far outside the edges."""
    pairs = channels * (channels - 1) // 2
    kind = torch.arange(n).view(n, 1, 1, 1, 1) % 4
    mean = torch.randn(n, components, channels, 1, 1, dtype=dtype)
    mean = torch.where(kind == 1, mean.sign(), torch.where(kind == 2, 20 * mean, mean))
    log_scale = (3 * torch.randn(mean.shape, dtype=dtype) - 2).clamp(min=-7)
    log_scale = torch.where(kind == 3, torch.full_like(mean, -7), log_scale)
    coefficients = torch.randn(n, components, pairs, 1, 1, dtype=dtype).tanh()
    logits = 2 * torch.randn(n, components, 1, 1, dtype=dtype)
    return DiscretizedLogisticMixture(logits, mean, log_scale, coefficients, levels)


def pixels(channels: int, levels: int) -> Tensor:
    """`(levels^C, C, 1, 1)`, every pixel there is; the last channel changes fastest."""
    level = torch.arange(levels, dtype=torch.uint8)
    return torch.cartesian_prod(*[level] * channels).view(-1, channels, 1, 1)


def table(mixture: DiscretizedLogisticMixture) -> Tensor:
    """`(n, levels, ..., levels, C)`, the log-probability of each channel of every pixel given its channels before."""
    n, channels, levels = len(mixture.logits), mixture.channels, mixture.levels
    x = pixels(channels, levels)
    many = mixture_map(mixture, lambda parameter: parameter.repeat_interleave(len(x), dim=0))
    return many.log_prob(x.repeat(n, 1, 1, 1)).view(n, *[levels] * channels, channels)


def brute_force(mixture: DiscretizedLogisticMixture, x: Tensor) -> np.ndarray:
    """The joint probability of `(n, C)` levels by the plain formula, in extended precision."""
    logits, mean, log_scale, coefficients = (
        parameter.flatten(-3).squeeze().numpy().astype(np.longdouble).reshape(len(x), mixture.logits.shape[1], -1)
        for parameter in (mixture.logits, mixture.location, mixture.log_scale, mixture.coefficients)
    )
    top = mixture.levels - 1
    scaled = 2 * x.numpy().astype(np.longdouble) / top - 1
    total = np.zeros(len(x), dtype=np.longdouble)
    for i in range(len(x)):
        weights = np.exp(logits[i, :, 0] - logits[i, :, 0].max())
        weights /= weights.sum()
        for k, weight in enumerate(weights):
            product, pair = weight, 0
            for c in range(x.shape[1]):
                location = mean[i, k, c]
                for j in range(c):
                    location += coefficients[i, k, pair] * scaled[i, j]
                    pair += 1
                scale = np.exp(log_scale[i, k, c])
                upper = 1 if x[i, c] == top else expit((scaled[i, c] + 1 / np.longdouble(top) - location) / scale)
                lower = 0 if x[i, c] == 0 else expit((scaled[i, c] - 1 / np.longdouble(top) - location) / scale)
                product *= upper - lower
            total[i] += product
    return total


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 3), (1, 32), (1, 256), (2, 16), (3, 2), (3, 4), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_sums_to_one_jointly_and_for_each_channel(channels: int, levels: int, dtype: torch.dtype):
    log_probs = table(random_mixtures(24, 3, channels, levels, dtype))
    joint = log_probs.double().sum(dim=-1).exp().flatten(1).sum(dim=1)
    torch.testing.assert_close(joint, torch.ones_like(joint), rtol=0, atol=TOLERANCE[dtype])
    for c in range(channels):
        log_prob = log_probs[..., c].double().reshape(24 * levels**c, levels, -1)  # (before, channel c, after)
        assert torch.equal(log_prob, log_prob[..., :1].expand_as(log_prob))  # what comes later has no say
        before = log_probs[..., :c].sum(dim=-1).reshape(24 * levels**c, -1)[:, 0]
        total = log_prob[..., 0].exp().sum(dim=1)[before > -30]  # what is less likely is given less exactly
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 256), (2, 32), (3, 4), (3, 256), (4, 256)])
def test_mixture_equals_the_plain_formula(channels: int, levels: int):
    mixture = random_mixtures(60, 4, channels, levels)
    x = torch.randint(levels, (60, channels), dtype=torch.uint8)
    x[::5], x[1::5] = 0, levels - 1
    x[2::5] = mixture.draw(Noise(0, torch.arange(60)).uniform(1 + channels, 1, 1))[2::5].flatten(1)  # likely ones
    expected = brute_force(mixture, x)
    digits = expected > 1e-6  # where the plain formula has lost none of importance
    assert digits.sum() > 10
    log_prob = mixture.log_prob(x.view(60, channels, 1, 1)).sum(dim=1).flatten().numpy()
    np.testing.assert_allclose(log_prob[digits], np.log(expected[digits]).astype(float), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(np.exp(log_prob), expected.astype(float), rtol=1e-9, atol=1e-15)
    single = mixture_map(mixture, Tensor.float).log_prob(x.view(60, channels, 1, 1)).sum(dim=1).flatten().numpy()
    np.testing.assert_allclose(single[digits], log_prob[digits], rtol=1e-5, atol=2e-3)  # 1e-7 of a mean at scale e^-7


def test_a_pixel_computed_by_hand():
    """Three levels at -1, 0, 1 with inner edges at -1/2 and 1/2; green and blue follow what came before."""

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).view(1, 2, -1, 1, 1)

    mixture = DiscretizedLogisticMixture(
        column(math.log(0.25), math.log(0.75))[:, :, 0],
        column(0.1, 0.2, 0.3, -0.1, -0.2, -0.3),
        column(0.0, 0.0, 0.0, math.log(0.5), math.log(0.5), math.log(0.5)),
        column(0.5, 0.6, 0.7, -0.5, 0.0, 0.9),
        levels=3,
    )
    x = torch.tensor([2, 0, 1], dtype=torch.uint8).view(1, 3, 1, 1)  # 1, -1, 0
    # Means of the first component: 0.1; 0.2 + 0.5 = 0.7; 0.3 + 0.6 - 0.7 = 0.2
    # Of the second, of scale 1/2: -0.1; -0.2 - 0.5 = -0.7; -0.3 + 0 - 0.9 = -1.2
    first = [1 - expit(0.4), expit(-1.2), expit(0.3) - expit(-0.7)]
    second = [1 - expit(1.2), expit(0.4), expit(3.4) - expit(1.4)]
    joint = 0.25 * np.cumprod(first) + 0.75 * np.cumprod(second)
    expected = np.log(joint / np.concatenate([[1.0], joint[:-1]]))
    np.testing.assert_allclose(mixture.log_prob(x).flatten().numpy(), expected, rtol=1e-13)
    # The first number chooses the second component, and 1/2 leads to the means: -0.1, -0.2, -0.3 are all nearest to 0.
    uniform = torch.tensor([0.9, 0.5, 0.5, 0.5], dtype=torch.float64).view(1, 4, 1, 1)
    assert mixture.draw(uniform).flatten().tolist() == [1, 1, 1]
    # 0.9 leads to -0.1 + 0.5 log 9 = 1.0, the last level, which draws green to -0.7 and, by green's level, blue to -1.2
    uniform[0, 1] = 0.9
    assert mixture.draw(uniform).flatten().tolist() == [2, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_component_without_coefficients_is_a_discretized_logistic(dtype: torch.dtype):
    mean, log_scale = torch.randn(2, 5, 3, 4, 6, dtype=dtype)
    x = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    logistic = DiscretizedLogistic(mean, log_scale - 2, 256)
    mixture = DiscretizedLogisticMixture(
        torch.randn(5, 1, 4, 6, dtype=dtype),
        mean[:, None],
        log_scale[:, None] - 2,
        torch.zeros(5, 1, 3, 4, 6, dtype=dtype),
        256,
    )
    torch.testing.assert_close(
        mixture.log_prob(x), logistic.log_prob(x), rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-5
    )
    torch.testing.assert_close(mixture.mean, logistic.mean)
    assert torch.equal(mixture.mode, logistic.mode)
    uniform = Noise(0, torch.arange(5)).uniform(4, 4, 6)
    assert torch.equal(mixture.draw(uniform, 0.8), logistic.draw(uniform[:, 1:], 0.8))


def test_parameters_are_read_in_the_order_that_is_stated():
    assert DiscretizedLogisticMixture.parameters_per_pixel(10, 3) == 100
    assert DiscretizedLogisticMixture.parameters_per_pixel(10, 1) == 30
    parameters = torch.randn(2, 20, 3, 5) * 8
    mixture = DiscretizedLogisticMixture.from_parameters(parameters, channels=3, levels=256)
    for k in range(2):
        assert torch.equal(mixture.logits[:, k], parameters[:, k])
        for c in range(3):
            assert torch.equal(mixture.location[:, k, c], parameters[:, 2 + 2 * c + k])
            assert torch.equal(mixture.log_scale[:, k, c], parameters[:, 8 + 2 * c + k].clamp(min=-7))
            assert torch.equal(mixture.coefficients[:, k, c], parameters[:, 14 + 2 * c + k].tanh())
    assert (mixture.log_scale == -7).any()
    wide = DiscretizedLogisticMixture.from_parameters(parameters, channels=3, levels=256, min_log_scale=-2.0)
    assert wide.log_scale.min() == -2
    channels_last = parameters.to(memory_format=torch.channels_last)
    again = DiscretizedLogisticMixture.from_parameters(channels_last, channels=3, levels=256)
    x = torch.randint(256, (2, 3, 3, 5), dtype=torch.uint8)
    assert torch.equal(again.log_prob(x), mixture.log_prob(x))
    with pytest.raises(ValueError, match="20 parameters per pixel, wanted a multiple of 3"):
        DiscretizedLogisticMixture.from_parameters(parameters, channels=1, levels=256)
    with pytest.raises(
        ValueError, match=r"of shapes .* wanted \[\(2, 2, 3, 3, 5\), \(2, 2, 3, 3, 5\), \(2, 2, 3, 3, 5\)\]"
    ):
        DiscretizedLogisticMixture(
            mixture.logits, mixture.location, mixture.log_scale[:, :1], mixture.coefficients, 256
        )


@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 20.0])
@pytest.mark.parametrize("mean", [-1e4, -3.0, -1.0, 0.0, 0.7, 1e4])
def test_mixture_and_its_gradients_are_finite_for_extreme_parameters(mean: float, log_scale: float):
    parameters = torch.zeros(256, 30, 1, 1)
    parameters[:, 0], parameters[:, 1] = 1e4, -1e4  # logits of three components
    parameters[:, 3:12], parameters[:, 12:21], parameters[:, 21:30] = mean, log_scale, 30.0
    parameters.requires_grad_()
    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).repeat(1, 3, 1, 1)
    x[:, 1] = 255 - x[:, 1]
    log_prob = DiscretizedLogisticMixture.from_parameters(parameters, 3, 256).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
    assert log_prob.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.any()


def test_mixture_has_the_right_gradients():
    parameters = torch.randn(3, 20, 2, 1, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0, 1, 4, 3, 0, 2, 4, 4, 0, 0, 1, 3, 2, 2, 0, 4, 0, 1], dtype=torch.uint8).view(3, 3, 2, 1)
    assert torch.autograd.gradcheck(
        lambda p: DiscretizedLogisticMixture.from_parameters(p, 3, 5).log_prob(x), parameters
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixture_of_half_precision_parameters_is_computed_in_single(dtype: torch.dtype):
    parameters = torch.randn(2, 50, 4, 4).to(dtype)
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    single = DiscretizedLogisticMixture.from_parameters(parameters.float(), 3, 256)
    with torch.autocast("cpu", dtype=dtype):
        half = DiscretizedLogisticMixture.from_parameters(parameters, 3, 256)
        log_prob, mean = half.log_prob(x), half.mean
    assert log_prob.dtype == mean.dtype == torch.float32
    assert torch.equal(log_prob, single.log_prob(x))
    assert torch.equal(mean, single.mean)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_draws_of_three_channels_follow_the_joint_pmf(temperature: float):
    mixture = DiscretizedLogisticMixture.from_parameters(
        torch.randn(1, 30, 1, 1, generator=torch.Generator().manual_seed(5)), 3, 4
    )
    n = 200_000
    many = mixture_map(mixture, lambda parameter: parameter.expand(n, *parameter.shape[1:]))
    x = many.draw(Noise(3, torch.arange(n)).uniform(4, 1, 1), temperature).long().flatten(1)
    log_probs = table(tempered(mixture, temperature)).sum(dim=-1).flatten()
    assert (log_probs.exp() * n > 5).sum() > 32
    assert_follows(x @ torch.tensor([16, 4, 1]), log_probs)


def test_draws_of_a_low_temperature_are_the_levels_next_to_the_likeliest_components_means():
    mixture = DiscretizedLogisticMixture.from_parameters(torch.randn(50, 30, 2, 2), 3, 256)
    uniform = torch.rand(50, 4, 2, 2)
    cold = mixture.draw(uniform, 1e-6)
    assert torch.equal(cold, mixture.draw(uniform, 0))
    assert torch.equal(cold, mixture.draw(torch.rand(50, 4, 2, 2), 0))
    likeliest = mixture.logits.argmax(dim=1)
    image, row, column = torch.meshgrid(torch.arange(50), torch.arange(2), torch.arange(2), indexing="ij")
    location = mixture.location[image, likeliest, :, row, column]
    a, b, c = mixture.coefficients[image, likeliest, :, row, column].unbind(dim=-1)
    red, green, blue = (cold / 127.5 - 1).unbind(dim=1)
    exact = torch.stack([location[..., 0], location[..., 1] + a * red, location[..., 2] + b * red + c * green], dim=1)
    assert ((torch.stack([red, green, blue], dim=1) - exact.clamp(-1, 1)).abs() <= 1 / 255 + 1e-5).all()


@given(levels, st.integers(0, 1000))
@settings(max_examples=50)
def test_mean_and_mode_of_a_mixture_of_one_channel_are_those_of_its_pmf(levels: int, seed: int):
    torch.manual_seed(seed)
    mixture = random_mixtures(8, 3, 1, levels)
    log_probs = table(mixture).squeeze(-1)
    expected = (log_probs.exp() * torch.arange(levels)).sum(dim=1)
    torch.testing.assert_close(mixture.mean.flatten(), expected, rtol=1e-10, atol=1e-10)
    mode = mixture.mode.flatten(1)
    assert mode.dtype == torch.uint8
    assert (log_probs.gather(1, mode.long()) >= log_probs.amax(dim=1, keepdim=True) - 1e-9).all()
    single = mixture_map(mixture, Tensor.float).mode.flatten(1)  # 1e-7 of all mass, as a share of the likeliest level's
    assert (log_probs.gather(1, single.long()) >= log_probs.amax(dim=1, keepdim=True) - 1e-3).all()


def test_mode_of_more_channels_is_greedy():
    mixture = random_mixtures(40, 3, 3, 5)
    log_probs, image = table(mixture), torch.arange(40)
    red = log_probs[:, :, 0, 0, 0].argmax(dim=1)
    green = log_probs[image, red, :, 0, 1].argmax(dim=1)
    blue = log_probs[image, red, green, :, 2].argmax(dim=1)
    assert torch.equal(mixture.mode.flatten(1), torch.stack([red, green, blue], dim=1).byte())


def test_mean_of_more_channels_is_exact_away_from_the_edges():
    mixture = random_mixtures(40, 3, 2, 64)
    mixture = DiscretizedLogisticMixture(
        mixture.logits,
        0.3 * mixture.location.tanh(),
        torch.full_like(mixture.log_scale, -3.5),
        mixture.coefficients,
        64,
    )
    probs = table(mixture).sum(dim=-1).exp()
    level = torch.arange(64)
    expected = torch.stack([(probs.sum(dim=2) * level).sum(dim=1), (probs.sum(dim=1) * level).sum(dim=1)], dim=1)
    torch.testing.assert_close(mixture.mean.flatten(1), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(mixture.mean[:, 0].flatten(), expected[:, 0], rtol=0, atol=1e-10)


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
