"""Differences of two models image by image."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from wngen.evaluation import Evaluation, Report
from wngen.evaluation.paired import Candidate, Comparison
from wngen.model import LikelihoodModel
from wngen.models import ConvVAE, PixelCNN

IMAGES = 400
DATA = {"name": "coins", "split": "test", "images": IMAGES, "sha256": "ab" * 32}


def candidate(name: str, model: LikelihoodModel, distortion: np.ndarray, bound: np.ndarray | None) -> Candidate:
    """A model whose rate is 1 nat on every image."""
    evaluation = Evaluation(
        index=np.arange(IMAGES),
        distortion_nats=distortion,
        layer_kl_nats=np.ones((IMAGES, 0 if model.is_exact else 1)),
        log_likelihood_nats=-distortion if model.is_exact else bound,
        is_exact=model.is_exact,
        importance_samples=None if model.is_exact or bound is None else 10,
        seed=0,
        dtype="float32",
        device="cpu",
        wall_seconds=1.0,
    )
    return Candidate(name, Report.of(evaluation, model, DATA, "ema"), evaluation)


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    """Images differ by 10 nats from each other; two models on the same image by 0.5 only."""
    images = 50 + 10 * np.random.default_rng(0).standard_normal(IMAGES)
    noise = 0.5 * np.random.default_rng(1).standard_normal(IMAGES)
    vae, exact = ConvVAE(height=4, width=4, widths=[4], blocks=1, hidden=4), PixelCNN(1, 4, 4, 2, filters=2, blocks=1)
    return [
        candidate("a", vae, images, None),
        candidate("b", vae, images + 2 + noise, -images),
        candidate("c", exact, images + 0.25, None),
    ]


def test_paired_differences_are_those_of_each_image(candidates: list[Candidate]):
    a, b, _ = candidates
    compared = Comparison.of([a, b])
    (difference,) = compared.differences  # of the ELBO, the only figure that both have
    values = b.evaluation.elbo_nats - a.evaluation.elbo_nats
    assert (difference.model, difference.baseline, difference.figure) == ("b", "a", "elbo")
    assert difference.nats.mean == pytest.approx(values.mean(), abs=1e-12)
    assert difference.nats.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(IMAGES), abs=1e-12)
    assert difference.nats.low < -2 < difference.nats.high
    assert difference.bits_per_dim.mean == pytest.approx(-values.mean() / (16 * math.log(2)), abs=1e-12)
    unpaired = math.hypot(*(c.report.nats["elbo"].standard_error for c in (a, b)))
    assert difference.nats.standard_error < unpaired / 20


def test_an_exact_log_likelihood_stands_beside_either_bound(candidates: list[Candidate]):
    a, b, c = candidates
    figures = [(d.figure, d.baseline_figure) for d in Comparison.of([c, b]).differences]
    assert figures == [("elbo", "log_likelihood"), ("log_likelihood", "log_likelihood")]
    (beside_elbo,) = Comparison.of([a, c]).differences
    assert (beside_elbo.figure, beside_elbo.baseline_figure) == ("log_likelihood", "elbo")
    assert beside_elbo.nats.mean == pytest.approx(0.75)  # a has a rate of 1 nat, c 0.25 nats more distortion
    assert beside_elbo.nats.standard_error == pytest.approx(0, abs=1e-12)
    (once,) = Comparison.of([c, c._replace(name="d")]).differences
    assert once.nats.mean == 0


def test_the_tables_fit_80_columns_and_tell_every_figure(candidates: list[Candidate]):
    compared = Comparison.of([c._replace(name=f"{c.name}-of-a-rather-long-name") for c in candidates])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(compared)
    text = console.export_text()
    assert "…" not in text
    for name in compared.names:
        assert name in text
    for difference in compared.differences:
        assert f"{difference.nats.mean:+.2f} ± {difference.nats.standard_error:.2f}" in text


def test_the_file_holds_reports_and_differences(candidates: list[Candidate], tmp_path: Path):
    compared = Comparison.of(candidates)
    compared.write(tmp_path / "made" / "comparison.json")
    content = json.loads((tmp_path / "made" / "comparison.json").read_text())
    assert list(content["reports"]) == ["a", "b", "c"]
    assert content["reports"]["b"]["nats"]["elbo"]["mean"] == candidates[1].report.nats["elbo"].mean
    assert [d["model"] for d in content["differences"]] == ["b", "c"]


def test_different_images_are_not_compared(candidates: list[Candidate]):
    a, b, _ = candidates
    elsewhere = {**b.report.protocol, "data": {**DATA, "sha256": "cd" * 32}}
    with pytest.raises(ValueError, match=r"b was evaluated on coins test.*cdcdcdcdcdcd.*but a on"):
        Comparison.of([a, b._replace(report=replace(b.report, protocol=elsewhere))])
    with pytest.raises(ValueError, match="at least 2"):
        Comparison.of([a])
    with pytest.raises(ValueError, match="a name of its own"):
        Comparison.of([a, a])
