"""Images in the order of their likelihood."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wngen.evaluation import Evaluation
from wngen.evaluation.scores import Separation, write_scores
from wngen.image import ImageSpec

SPEC = ImageSpec(1, 2, 2, 2)


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        index=np.array([3, 5, 8]),
        distortion_nats=np.array([2.0, 1.0, 3.0]),
        layer_kl_nats=np.array([[0.5, 0.5], [0.25, 0.0], [1.0, 1.0]]),
        log_likelihood_nats=None,
        is_exact=False,
        importance_samples=None,
        seed=0,
        dtype="float32",
        device="cpu",
        wall_seconds=1.0,
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_likeliest_image_comes_first(evaluation: Evaluation, tmp_path: Path):
    path = tmp_path / "made" / "scores.csv"
    write_scores(path, evaluation, SPEC, np.array([7, 1, 4]), reference=np.array([-1.0, -2.0, -4.0, -9.0]))
    rows = read(path)
    assert list(rows[0]) == [
        *("index", "label", "elbo_nats", "bits_per_dim", "distortion_nats", "rate_nats", "quantile")
    ]
    assert [(row["index"], row["label"]) for row in rows] == [("5", "1"), ("3", "7"), ("8", "4")]
    assert [float(row["elbo_nats"]) for row in rows] == [-1.25, -3.0, -5.0]
    assert [float(row["bits_per_dim"]) for row in rows] == pytest.approx([n / (4 * math.log(2)) for n in (1.25, 3, 5)])
    assert [float(row["quantile"]) for row in rows] == [0.75, 0.5, 0.25]


def test_an_exact_model_has_no_rate(evaluation: Evaluation, tmp_path: Path):
    exact = replace(evaluation, is_exact=True, log_likelihood_nats=-evaluation.distortion_nats)
    write_scores(tmp_path / "scores.csv", exact, SPEC)
    rows = read(tmp_path / "scores.csv")
    assert list(rows[0]) == ["index", "log_likelihood_nats", "bits_per_dim"]
    assert [row["index"] for row in rows] == ["5", "3", "8"]


def test_separation_is_the_area_under_the_curve():
    """Of two normal distributions at distance d it is Phi(d / sqrt 2); of equal ones one half."""
    rng = np.random.default_rng(0)
    images, reference = rng.normal(-1.5, 1, 4000), rng.normal(0, 1, 4000)
    expected = 0.5 * (1 + math.erf(1.5 / 2))
    assert Separation.of(images, reference).unlikely == pytest.approx(expected, abs=0.015)
    assert Separation.of(reference, reference).unlikely == 0.5
    assert Separation.of(reference, reference).untypical == 0.5


def test_images_that_are_too_likely_are_untypical_and_not_unlikely():
    reference = np.random.default_rng(0).normal(0, 1, 1000)
    separation = Separation.of(np.full(10, 50.0), reference)
    assert (separation.unlikely, separation.untypical) == (0.0, 1.0)
