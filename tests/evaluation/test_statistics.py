"""Standard errors and bootstrap intervals say what they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wngen.evaluation import Estimate, estimate


def test_mean_and_standard_error():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    result = estimate({"x": values})["x"]
    assert result.mean == 4
    assert result.standard_error == pytest.approx(math.sqrt(38 / 3) / 2, rel=1e-12)
    assert 1 <= result.low < result.mean < result.high <= 9


def test_the_interval_of_a_mean_is_nearly_normal():
    values = np.random.default_rng(1).normal(-90, 25, 10_000)
    e = estimate({"elbo": values})["elbo"]
    assert e.standard_error == pytest.approx(0.25, rel=0.03)
    assert (e.mean - e.low) / e.standard_error == pytest.approx(1.96, abs=0.06)
    assert (e.high - e.mean) / e.standard_error == pytest.approx(1.96, abs=0.06)
    assert e.low < -90 < e.high


def test_the_interval_covers_the_true_mean_in_95_of_100_cases():
    """Of skewed figures, as losses are."""
    cases, n = 400, 300
    draws = np.random.default_rng(2).gamma(4, 20, (cases, n))
    results = estimate({str(i): row for i, row in enumerate(draws)})
    covered = np.mean([e.low < 80 < e.high for e in results.values()])
    assert 0.92 < covered < 0.975


def test_figures_of_the_same_images_are_drawn_together():
    """So that the interval of a sum is that of the sum, not wider."""
    rate, distortion = np.random.default_rng(3).gamma(2, 10, (2, 500))
    e = estimate({"rate": rate, "negative": -rate, "sum": rate + distortion, "distortion": distortion})
    assert e["negative"].low == pytest.approx(-e["rate"].high, rel=1e-12)
    assert e["sum"].mean == pytest.approx(e["rate"].mean + e["distortion"].mean, rel=1e-12)
    alone = estimate({"rate": rate})["rate"]
    assert (alone.low, alone.high) == pytest.approx((e["rate"].low, e["rate"].high), rel=1e-12)


def test_the_same_every_time_whatever_numpy_was_seeded_with():
    values = {"x": np.random.default_rng(4).normal(size=50)}
    first = estimate(values)
    np.random.seed(123)  # noqa: NPY002
    assert estimate(values) == first
    assert estimate(values, seed=1) != first


def test_a_constant_has_no_error():
    assert estimate({"rate": np.zeros(10)})["rate"] == Estimate(0, 0, 0, 0)


def test_a_negative_factor_swaps_the_ends():
    assert Estimate(-10.0, 2.0, -14.0, -7.0).times(-0.5) == Estimate(5.0, 1.0, 3.5, 7.0)


def test_one_image_has_no_spread():
    with pytest.raises(ValueError, match="1 image: a standard error needs at least 2"):
        estimate({"x": np.ones(1)})
