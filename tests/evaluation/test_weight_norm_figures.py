"""The figure of weight-norm health: every layer is drawn as it was logged, and of many the extremes are named."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from wngen.evaluation.weight_norm_figures import PANELS, draw_weight_norm_health, weight_norm_curves


def write(path: Path, layers: int, steps: range) -> Path:
    """Layer i ends at (i + 1) in every quantity, and a row of another kind stands between."""
    rows = []
    for step in steps:
        figures = {f"{kind}/block.{i}": (i + 1) * step / 1000 for kind in PANELS for i in range(layers)}
        medians = {f"{kind}/median": (layers + 1) / 2 * step / 1000 for kind in PANELS}
        rows += [{"step": step, **figures, **medians}, {"step": step, "train/elbo_nats": -100.0}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({*rows[0], *rows[1]}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_few_layers_are_all_named(tmp_path: Path):
    figure = weight_norm_curves(write(tmp_path / "metrics.csv", 5, range(100, 1001, 100)))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [*(f"block.{i}" for i in range(5)), "median of the layers"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        assert len(lines) == 6
        for i in range(5):
            np.testing.assert_allclose(lines[f"block.{i}"].get_xdata(), range(100, 1001, 100))
            np.testing.assert_allclose(lines[f"block.{i}"].get_ydata(), (i + 1) * np.arange(1, 11) / 10)


def test_of_many_layers_the_extremes_are_named(tmp_path: Path):
    parts = write(tmp_path / "a.csv", 150, range(100, 801, 100)), write(tmp_path / "b.csv", 150, range(700, 1001, 100))
    figure = weight_norm_curves(*parts)
    assert len(figure.axes) == 3
    assert not figure.legends
    for axes in figure.axes:
        named = {text.get_text() for text in axes.get_legend().texts}
        assert named == {"block.149", "block.0", "median of the layers"}
        assert len(axes.lines) == 151
        assert all(list(line.get_xdata()) == list(range(100, 1001, 100)) for line in axes.lines)
        ends = {line.get_label(): line.get_ydata()[-1] for line in axes.lines}
        assert ends["block.149"] == pytest.approx(150)
        assert ends["block.0"] == pytest.approx(1)


def test_it_is_written_as_png(tmp_path: Path):
    metrics = write(tmp_path / "metrics.csv", 3, range(100, 301, 100))
    draw_weight_norm_health(tmp_path / "new" / "health.png", metrics)
    assert (tmp_path / "new" / "health.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_without_it_are_refused(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/elbo_nats\n1,-100\n")
    with pytest.raises(ValueError, match="train with the callback WeightNormHealth"):
        weight_norm_curves(path)
