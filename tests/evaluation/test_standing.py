"""A report among published figures, in the order of how good they are, and so in its card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from wngen import load
from wngen.evaluation import Report, published_figures
from wngen.evaluation.card import model_card
from wngen.evaluation.standing import standings

RELEASED = Path(__file__).parents[2] / "checkpoints"


@pytest.fixture
def report() -> Report:
    """With an ELBO and a bound of K = 128."""
    return Report.read(RELEASED / "conv-vae-iaf-mnist" / "report.json")


def test_all_published_figures_and_ones_own_best_first(report: Report):
    among = standings(report, parameters=7)
    values = [place.value for place in among]
    assert values == sorted(values, reverse=True)
    assert [place.published for place in among if place.published] == published_figures("mnist-dynamic")
    own = {place.estimator: place for place in among if place.published is None}
    assert own.keys() == {"ELBO", "importance-weighted, K = 128"}
    assert own["ELBO"].estimate == report.nats["elbo"]
    assert own["ELBO"].value == report.nats["elbo"].mean
    assert own["ELBO"].parameters == 7
    assert {place.unit for place in among} == {"nats"}


def test_bits_per_dim_rise_where_they_are_the_unit(report: Report):
    colour = {"channels": 3, "height": 32, "width": 32, "levels": 256}
    data = {**report.protocol["data"], "name": "CIFAR10", "binarization": "none"}
    report = replace(report, model={"model": "X", **colour}, protocol={**report.protocol, "data": data})
    among = standings(report)
    assert {place.unit for place in among} == {"bits_per_dim"}
    published = [place.value for place in among if place.published]
    assert published == sorted(published)
    digits = {place.published.bits_per_dim: place.digits for place in among if place.published}
    assert (digits[3.15], digits[3.111]) == (2, 3)  # as they were published


def test_without_the_same_protocol_there_are_none(report: Report):
    assert standings(replace(report, protocol={**report.protocol, "images": 10})) == []
    fashion = RELEASED / "pixelcnn-pp-fashion-mnist"
    report = Report.read(fashion / "report.json")
    assert standings(report) == []
    assert "published" not in model_card(load(fashion), "fashion", report).text


def test_the_card_lists_them_with_their_sources(report: Report):
    model = load(RELEASED / "conv-vae-iaf-mnist")
    text = model_card(model, "released", report).text
    section = text[text.index("## Among published figures") : text.index("## Use")]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(published_figures("mnist-dynamic")) + 2
    assert [row for row in rows if "this model" in row] == [
        "| **ConvVAE** | **-82.34** | **importance-weighted, K = 128** | **2.2 M** | **this model** |",
        "| **ConvVAE** | **-84.76** | **ELBO** | **2.2 M** | **this model** |",
    ]
    noted = [figure for figure in published_figures("mnist-dynamic") if figure.note]
    assert noted
    for figure in noted:
        assert f"\\* {figure.model}: {figure.note}." in section
        assert f"{figure.estimator.replace('exact', 'log-likelihood (exact)')} *" in section
    assert "[Kingma et al. 2016](https://arxiv.org/abs/1606.04934)" in section
