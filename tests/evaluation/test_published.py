"""Published figures are complete and plausible, and stand only beside reports of the same protocol."""

from __future__ import annotations

import io
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import wngen.evaluation
from wngen.evaluation import PublishedFigure, Report, published_figures, same_protocol
from wngen.evaluation.published import NEAREST, comparison, listing, published_data

RELEASED = Path(__file__).parents[2] / "checkpoints"
FIGURES = published_figures()


def released(name: str) -> Report:
    return Report.read(RELEASED / name / "report.json")


def with_data(report: Report, **changes: object) -> Report:
    return replace(report, protocol={**report.protocol, "data": {**report.protocol["data"], **changes}})


def shown(renderable: object) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.data_set}-{f.model}-{f.estimator}")
def test_every_figure_is_complete_and_plausible(figure: PublishedFigure):
    data = published_data()[figure.data_set]
    assert figure.unit == data.unit
    assert figure.nats < 0 < figure.bits_per_dim < math.log2(data.spec.levels)  # better than a uniform distribution
    assert figure.bits_per_dim == pytest.approx(-figure.nats / (data.spec.dims * math.log(2)), rel=1e-12)
    assert figure.estimator in ("exact", "elbo", "importance-weighted", "other")
    assert (figure.importance_samples is not None) == (figure.estimator == "importance-weighted")
    assert figure.importance_samples is None or figure.importance_samples > 1
    assert figure.parameters is None or figure.parameters > 1000
    assert figure.note or figure.estimator != "other"
    assert figure.model
    assert figure.seen_in
    assert figure.citation.endswith(str(figure.year))
    assert figure.year >= 2011
    assert figure.url.startswith(("https://arxiv.org/abs/", "https://github.com/"))


def test_a_figure_keeps_its_published_digits():
    table = tomllib.loads(Path(wngen.evaluation.__file__).with_name("published.toml").read_text())
    lines = [line for source in table["source"] for line in source["figures"]]
    assert len(lines) == len(FIGURES)
    published = sorted(line.get("nats", line.get("bits_per_dim")) for line in lines)
    assert published == sorted(getattr(figure, figure.unit) for figure in FIGURES)


def test_no_figure_stands_there_twice():
    keys = [(f.data_set, f.model, f.citation, f.estimator, f.importance_samples) for f in FIGURES]
    assert len(set(keys)) == len(keys)


def test_more_importance_samples_make_a_tighter_bound():
    def tightness(figure: PublishedFigure) -> int:
        return 1 if figure.estimator == "elbo" else figure.importance_samples or 0

    models = {(f.data_set, f.model, f.citation) for f in FIGURES}
    families = [
        [f for f in FIGURES if (f.data_set, f.model, f.citation) == model and tightness(f)] for model in sorted(models)
    ]
    assert sum(len(family) > 1 for family in families) >= 5
    for family in families:
        bounds = [figure.nats for figure in sorted(family, key=tightness)]
        assert bounds == sorted(bounds)


@pytest.mark.parametrize("name", published_data())
def test_the_best_comes_first_and_the_rest_of_80_columns_is_enough(name: str):
    figures = published_figures(name)
    assert {figure.data_set for figure in figures} <= {name}
    assert [f.nats for f in figures] == sorted((f.nats for f in figures), reverse=True)
    text = shown(listing(published_data()[name]))
    assert "…" not in text
    assert all(figure.url in text for figure in figures)
    assert figures or "None" in text


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match=r"'mnist'.*mnist-static, mnist-dynamic"):
        published_figures("mnist")


def test_released_models_stand_beside_figures_of_their_own_protocol():
    static = same_protocol(released("pixelcnn-pp-mnist-static"))
    assert static == published_figures("mnist-static")
    assert {"exact", "elbo", "importance-weighted"} <= {figure.estimator for figure in static}
    assert same_protocol(released("conv-vae-iaf-mnist")) == published_figures("mnist-dynamic") != []
    assert same_protocol(released("pixelcnn-pp-fashion-mnist")) == []


def test_another_protocol_has_no_published_figures():
    report = released("pixelcnn-pp-mnist-static")
    assert same_protocol(with_data(report, binarization="dynamic")) == published_figures("mnist-dynamic")
    for changes in (
        {"binarization": "threshold"},
        {"binarization": "none"},
        {"name": "FashionMNIST"},
        {"split": "val"},
        {"images": 100, "split_images": 20_000},
    ):
        assert same_protocol(with_data(report, **changes)) == [], changes
    assert same_protocol(replace(report, model={**report.model, "num_classes": 10})) == []
    assert same_protocol(replace(report, model={**report.model, "levels": 4})) == []
    assert same_protocol(replace(report, model={**report.model, "height": 32, "width": 32})) == []


def test_a_report_stands_in_its_place_among_the_nearest():
    report = released("pixelcnn-pp-mnist-static")
    text = shown(comparison(report))
    assert "…" not in text
    values = [float(word) for line in text.splitlines() for word in line.split() if word.startswith("-7")]
    values += [float(word) for line in text.splitlines() for word in line.split() if word.startswith("-8")]
    ours = report.nats["log_likelihood"].mean
    distances = sorted(abs(figure.nats - ours) for figure in published_figures("mnist-static"))
    assert values == sorted(values, reverse=True)
    assert len(values) == NEAREST + 1
    assert round(ours, 2) in values
    assert max(abs(value - ours) for value in values) == pytest.approx(distances[NEAREST - 1])
    assert "`wngen published mnist-static`" in text


def test_both_bounds_of_a_report_are_shown_with_their_estimators():
    text = shown(comparison(released("conv-vae-iaf-mnist")))
    (elbo,) = (line.split() for line in text.splitlines() if "-84.76" in line)
    (weighted,) = (line.split() for line in text.splitlines() if "-82.34" in line)
    assert elbo == ["ConvVAE", "-84.76", "ELBO", "this", "model"]
    assert weighted == ["ConvVAE", "-82.34", "K", "=", "128", "this", "model"]


def test_a_report_of_colour_is_compared_in_bits_per_dim():
    report = released("pixelcnn-pp-fashion-mnist")
    colour = with_data(report, name="CIFAR10")
    colour = replace(colour, model={**colour.model, "channels": 3, "height": 32, "width": 32})
    text = shown(comparison(colour))
    assert "bits/dim" in text
    assert f"{report.bits_per_dim['log_likelihood'].mean:.3f}" in text


def test_nothing_known_is_nothing_shown():
    assert comparison(released("pixelcnn-pp-fashion-mnist")) is None
