"""Learning curves: what is drawn is what was logged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image

from wngen.evaluation import Estimate, Report
from wngen.evaluation.figures import (
    compared_curves,
    draw_curves,
    draw_rates,
    learning_curves,
    metrics_of,
    rate_per_layer,
    read_curves,
)

HEADER = (
    "train/epochs,step,train/elbo_nats,train/rate_nats,train/distortion_nats,train/learning_rate,val/elbo_nats,"
    "val/rate_nats,val/epochs"
)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Three epochs of 100 steps, logged as Lightning does: a row for each of its calls, with gaps."""
    lines = [HEADER]
    for step in range(0, 300, 10):
        elbo = -100 - 400 * 0.9**step
        lines.append(f"{(step + 1) / 100},{step},{elbo},{20},{-elbo - 20},{0.002},,,")
        if step % 100 == 90:
            lines.append(f",{step + 9},,,,,{elbo - 1},21,{(step + 10) // 100}")
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
    titles = ["ELBO", "distortion", "rate"]
    assert labels == [*(f"{title}\n(nats per image)" for title in titles), "learning\nrate"]
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


def test_of_an_exact_model_there_is_the_likelihood_alone(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/elbo_nats,train/rate_nats,train/distortion_nats\n0,-9,0,9\n50,-7,0,7\n")
    likelihood, learning_rate = learning_curves(path).axes
    assert likelihood.get_ylabel() == "log-likelihood\n(nats per image)"
    assert line(likelihood, "training batches, smoothed")[1].tolist() == [-9, -7]
    assert learning_rate.get_ylabel() == "learning\nrate"


def test_several_runs_in_one_picture_against_epochs(metrics: Path, tmp_path: Path):
    """One of other batches has other steps, and is known by its epochs; one without validation by its training."""
    other = tmp_path / "other.csv"
    rows = "".join(f"{(s + 1) / 10},{s},{-80 - s}\n" for s in range(9, 40, 10))
    other.write_text(f"train/epochs,step,train/elbo_nats\n{rows}")
    (axes,) = compared_curves({"first": [metrics], "second": [other]}).axes
    epochs, values = line(axes, "first")
    assert epochs == pytest.approx([1, 2, 3])
    assert values[-1] == pytest.approx(-101, abs=1e-3)
    epochs, values = line(axes, "second")
    assert epochs == pytest.approx([1, 2, 3, 4])
    assert values.tolist() == [-89, -99, -109, -119]
    assert axes.get_xlabel() == "epochs"
    rows = "".join(f"{s + 1},{s},{-300 + s / 9}\n" for s in range(99))
    other.write_text(f"val/epochs,step,val/elbo_nats\n{rows}")
    low, high = compared_curves({"short": [metrics], "long": [other]}).axes[0].get_ylim()
    assert low < -299
    assert high > -101  # a run that was over while the other one's transient lasted is seen too
    other.write_text("train/epochs,step,train/elbo_nats\n0.125,49,-9\n0.375,149,-7\n")  # of one epoch a part
    epochs, _ = line(compared_curves({"first": [metrics], "brief": [other]}).axes[0], "brief")
    assert epochs == pytest.approx([0.125, 0.375])
    with pytest.raises(ValueError, match="no runs"):
        compared_curves({})
    other.write_text("step,train/elbo_nats\n0,-5\n")
    with pytest.raises(ValueError, match="third: wanted val/elbo_nats and val/epochs"):
        compared_curves({"third": [other]})


@pytest.mark.parametrize("width", [8.0, 3.8])
def test_on_a_narrow_page_they_are_as_narrow(metrics: Path, width: float):
    released = Report.read(Path(__file__).parents[2] / "checkpoints" / "resnet-vae-mnist-static" / "report.json")
    shapes = [[16, side, side] for side in (4, 4, 7, 7, 14)]
    released = replace(released, protocol={**released.protocol, "latent_shapes": shapes})
    for figure in (
        learning_curves(metrics, width=width),
        compared_curves({"a": [metrics]}, width=width),
        rate_per_layer(released, (256, 256, 784, 784, 3136), width, titled=False),
    ):
        assert figure.get_figwidth() == width
        figure.canvas.draw()
        texts = [text for axes in figure.axes for text in (axes.yaxis.label, axes.xaxis.label)]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert boxes
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_a_run_that_went_wrong_is_drawn_too(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/elbo_nats,val/elbo_nats\n0,-500,\n50,nan,\n99,,nan\n")
    assert learning_curves(path).axes[0].get_ylabel() == "ELBO\n(nats per image)"


def test_what_cannot_be_drawn_is_refused(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    with pytest.raises(ValueError, match="No such file"):
        read_curves(path)
    for text, complaint in (
        ("", "neither train/elbo_nats nor val/elbo_nats in it, but nothing"),
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


def test_what_a_kill_cut_short_is_left_out(tmp_path):
    """A last row without its end; and a file with no rows, while all of them were written anew under more columns."""
    cut, empty, after = (tmp_path / f"{name}.csv" for name in ("cut", "empty", "after"))
    cut.write_text("step,val/rate_nats,val/elbo_nats\n0,1,-5\n10,1,-4\n2")
    after.write_text("step,val/elbo_nats\n20,-3\n")
    for text in ("", "step,val/elbo_nats\n"):
        empty.write_text(text)
        curves = read_curves(cut, empty, after)
        assert curves["val/elbo_nats"][0].tolist() == [0, 10, 20]
        assert curves["val/elbo_nats"][1].tolist() == [-5, -4, -3]


def test_parts_of_a_resumed_run_are_read_in_their_own_order_whatever_was_copied_when(tmp_path):
    for version in (0, 2, 10):
        path = tmp_path / "metrics" / f"version_{version}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(f"step,val/elbo_nats\n{version},-{version}\n")
        os.utime(path, (100 - version, 100 - version))
    assert read_curves(*metrics_of(tmp_path))["val/elbo_nats"][0].tolist() == [0, 2, 10]


@pytest.mark.parametrize("split", ["val", "train"])
def test_each_layer_has_a_curve_from_dark_to_light(tmp_path: Path, split: str):
    """Of validation, or where there is none of training."""
    names = [f"layer_{i:02}_{'4x4' if i < 6 else '8x8'}" for i in range(1, 13)]
    columns = [f"{split}/elbo_nats", *(f"{split}/kl_nats/{name}" for name in names), "train/kl_nats/layer_01_4x4"]
    path = tmp_path / "metrics.csv"
    path.write_text(
        f"step,{','.join(columns[: 13 + (split == 'val')])}\n"
        + "".join(
            f"{step},-9,{','.join(str(i + step / 10) for i in range(12))}{',' * (split == 'val')}\n"
            for step in (0, 50, 100)
        )
    )
    figure = learning_curves(path)
    panel = figure.axes[3]
    assert panel.get_ylabel() == "rate per layer\n(nats per image)"
    assert [line.get_ydata().tolist() for line in panel.lines] == [[i, i + 5, i + 10] for i in range(12)]
    brightness = [sum(line.get_color()[:3]) for line in panel.lines]
    assert brightness == sorted(brightness)
    legend = [text.get_text() for text in panel.get_legend().get_texts()]
    assert len(legend) == 6
    assert (legend[0], legend[-1]) == ("layer 1, 4x4", "layer 12, 8x8")


@pytest.fixture
def report() -> Report:
    """Of three layers with rates 1, 2 and 4."""
    rates = {f"kl_layer_{i + 1}": Estimate(2.0**i, 0.1 * 2**i, 0.9, 1.1) for i in range(3)}
    protocol = {"data": {"name": "Data", "split": "test"}, "images": 9, "latent_shapes": [[5, 4, 4], [5, 4, 4], [7]]}
    return Report({"model": "Some"}, rates, {}, protocol)


def test_bars_are_the_rates_of_the_report(report: Report, tmp_path: Path):
    figure = rate_per_layer(report, active=(80, 12, 0))
    (axes,) = figure.axes
    bars, errors = axes.patches, axes.collections[0].get_segments()
    assert [bar.get_width() for bar in bars] == [1, 2, 4]
    for (start, end), rate in zip(errors, (1, 2, 4), strict=True):
        assert (start[0], end[0]) == pytest.approx((0.9 * rate, 1.1 * rate))
    low, high = axes.get_ylim()
    assert low > high  # the topmost layer stands at the top
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["layer 1, 4x4: 80 of 80", "layer 2, 4x4: 12 of 80", "layer 3: 0 of 7"]
    assert bars[0].get_facecolor() == bars[1].get_facecolor() != bars[2].get_facecolor()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["4x4: 3.00 nats", "vectors: 4.00 nats"]
    draw_rates(tmp_path / "new" / "rates.png", report)
    with Image.open(tmp_path / "new" / "rates.png") as image:
        assert image.format == "PNG"
    assert pyplot.get_fignums() == []


def test_rates_that_no_layers_are_known_of_are_refused(report: Report):
    with pytest.raises(ValueError, match="3 layers and 2 numbers of active units"):
        rate_per_layer(report, active=(1, 2))
    with pytest.raises(ValueError, match="3 layers: wanted"):
        rate_per_layer(replace(report, protocol={"data": {}, "images": 9}))
