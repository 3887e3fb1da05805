"""Learning curves: what is drawn is what was logged."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image

from wngen.evaluation.figures import draw_curves, learning_curves, read_curves

HEADER = (
    "epoch,step,train/elbo_nats,train/rate_nats,train/distortion_nats,train/learning_rate,val/elbo_nats,val/rate_nats"
)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Three epochs of 100 steps, logged as Lightning does: a row for each of its calls, with gaps."""
    lines = [HEADER]
    for step in range(0, 300, 10):
        elbo = -100 - 400 * 0.9**step
        lines.append(f"{step // 100},{step},{elbo},{20},{-elbo - 20},{0.002},,")
        if step % 100 == 90:
            lines.append(f"{step // 100},{step + 9},,,,,{elbo - 1},21")
    path = tmp_path / "metrics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [candidate for candidate in axes.lines if candidate.get_label() == label]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def test_columns_are_read_with_their_steps(metrics: Path):
    curves = read_curves(metrics)
    steps, values = curves["val/elbo_nats"]
    assert steps.tolist() == [99, 199, 299]
    assert values == pytest.approx([-101 - 400 * 0.9**90, -101, -101], abs=1e-3)
    assert len(curves["train/elbo_nats"][0]) == 30
    assert curves["train/elbo_nats"][1][0] == -500


def test_the_picture_shows_the_curves_with_units(metrics: Path):
    figure = learning_curves(metrics)
    bound, distortion, rate, learning_rate = figure.axes
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["ELBO (nats per image)", "distortion (nats per image)", "rate (nats per image)", "learning rate"]
    assert learning_rate.get_xlabel() == "optimizer steps"
    steps, values = line(bound, "validation")
    assert steps.tolist() == [99, 199, 299]
    assert values[-1] == pytest.approx(-101, abs=1e-3)
    assert line(rate, "training batches, smoothed")[1] == pytest.approx(np.full(30, 20.0))
    assert len(line(distortion, "training batches, smoothed")[0]) == 30
    low, high = bound.get_ylim()
    assert -130 < low < -101 < -100 < high < -95  # the first tenth of the run does not flatten the rest


def test_epochs_stand_above_the_steps(metrics: Path):
    (scale,) = learning_curves(metrics).axes[0].child_axes
    assert scale.get_xlabel() == "epochs"
    forward, backward = scale._functions  # type: ignore[attr-defined]
    assert (forward(300), backward(3)) == (3, 300)


def test_the_file_is_a_png(metrics: Path, tmp_path: Path):
    draw_curves(tmp_path / "new" / "curves.png", metrics)
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.format == "PNG"
        assert image.size == (1040, 1300)


def test_pyplot_and_its_settings_are_left_alone(metrics: Path, tmp_path: Path):
    before = dict(matplotlib.rcParams)
    draw_curves(tmp_path / "curves.png", metrics)
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


def test_a_run_that_went_wrong_is_drawn_too(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/elbo_nats,val/elbo_nats\n0,0,-500,\n0,50,nan,\n0,99,,nan\n")
    assert learning_curves(path).axes[0].get_ylabel() == "ELBO (nats per image)"


def test_what_cannot_be_drawn_is_refused(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    with pytest.raises(ValueError, match="No such file"):
        read_curves(path)
    for text, complaint in (
        ("", "not a metrics.csv"),
        ("epoch,loss\n0,1\n", "'step'"),
        ("epoch,step,loss\n0,1,2\n", "neither train/elbo_nats nor val/elbo_nats in it, but epoch, loss"),
        ("step,train/elbo_nats\n0,abc\n", "abc"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint) as error:
            learning_curves(path)
        assert str(path) in str(error.value)


def test_a_resumed_run_takes_over_from_where_it_was_resumed(tmp_path):
    """What the interrupted part did after its last checkpoint was done again, and counts once."""
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("step,train/elbo_nats,val/elbo_nats\n0,-5,\n10,-4,\n10,,-4.5\n20,-9,\n")
    second.write_text("step,train/elbo_nats\n15,-3\n25,-2\n")
    curves = read_curves(first, second)
    assert curves["train/elbo_nats"][0].tolist() == [0, 10, 15, 25]
    assert curves["train/elbo_nats"][1].tolist() == [-5, -4, -3, -2]
    assert curves["val/elbo_nats"][0].tolist() == [10]
