"""Charts of a report: every dot stands at its figure, every image is in the histogram."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from wngen.evaluation import Evaluation, Report
from wngen.evaluation.charts import histogram, published_dots
from wngen.evaluation.figures import VAL
from wngen.evaluation.standing import standings

RELEASED = Path(__file__).parents[2] / "checkpoints"


@pytest.mark.parametrize("width", [8.0, 3.8])
def test_dots_stand_at_their_figures_best_at_the_top(width: float):
    report = Report.read(RELEASED / "conv-vae-iaf-mnist" / "report.json")
    among = standings(report)
    (axes,) = published_dots(among, width).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(p.value, i) for i, p in enumerate(among)]
    low, high = axes.get_ylim()
    assert low > high
    own = [i for i, place in enumerate(among) if place.estimate is not None]
    assert [i for i, dot in enumerate(dots) if to_hex(dot.get_color()) == VAL] == own
    (first, second) = (collection.get_segments()[0] for collection in axes.collections)
    for segment, name in ((first, "log_likelihood"), (second, "elbo")):
        assert segment[:, 0].tolist() == [report.nats[name].low, report.nats[name].high]
    labels = [text.get_text() for text in (axes.get_yticklabels() or axes.texts)]
    assert labels[own[0]] == "ConvVAE, K = 128 (this model)"
    assert labels[0] == "LMConv, 8 orders, exact"
    exact = [dot.get_markerfacecolor() != "#ffffff" for dot in dots]
    assert exact == [place.estimator == "log-likelihood (exact)" for place in among]


def test_dots_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 figures in units"):
        published_dots([])


def test_the_histogram_holds_every_image_and_their_mean():
    rng = np.random.default_rng(0)
    distortion = rng.normal(80, 9, 300)
    evaluation = Evaluation(np.arange(300), distortion, np.ones((300, 2)), None, False, None, 0, "float32", "cpu", 1.0)
    (axes,) = histogram(evaluation).axes
    assert sum(bar.get_height() for bar in axes.patches) == 300
    assert axes.patches[0].get_x() == pytest.approx(evaluation.elbo_nats.min())
    (line,) = axes.lines
    assert line.get_xdata()[0] == pytest.approx(-(distortion.mean() + 2))
    assert axes.texts[0].get_text() == f"mean \N{MINUS SIGN}{distortion.mean() + 2:.2f}"
