"""Learning curves of a run, from the `metrics.csv` that Lightning's CSVLogger writes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

TRAIN, VAL = "#4b5563", "#c2410c"
TRANSIENT = 0.1  # the first part of a run, whose steep rise would flatten all the rest, may leave the picture
PANELS = {"elbo_nats": "ELBO", "distortion_nats": "distortion", "rate_nats": "rate"}


def read_curves(*metrics: Path | str) -> dict[str, Curve]:
    """Each column of a `metrics.csv` as steps and values, both `(n,)`, where it has any.

    Args:
        metrics: one file; or of a resumed run several, each of which takes over from its own first step on.

    Raises:
        ValueError: no such file, or it has no column `step` or no values.
    """
    curves: dict[str, Curve] = {}
    for path in metrics:
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            columns = [name for name in rows[0] if name != "step"]
            start = min(float(row["step"]) for row in rows)
            curves = {name: (steps[steps < start], values[steps < start]) for name, (steps, values) in curves.items()}
            for name in columns:
                points = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
                if points:
                    before = curves.get(name, (np.empty(0), np.empty(0)))
                    steps, values = (np.concatenate(pair) for pair in zip(before, np.array(points).T, strict=True))
                    curves[name] = steps, values
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a metrics.csv with a column 'step' and values: {error!r}") from error
    return curves


def draw_curves(path: Path | str, *metrics: Path | str) -> None:
    """Write the picture of `learning_curves` as PNG, making its folder if there is none.

    Args:
        path: of the PNG.
        metrics: the run's `metrics.csv`, or several of a resumed run.

    Raises:
        ValueError: `metrics` cannot be read, or has no bound in it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    learning_curves(*metrics).savefig(path, dpi=130, format="png")


def learning_curves(*metrics: Path | str) -> Figure:
    """The bound, its distortion and rate, and the learning rate of a run against steps and epochs.

    Args:
        metrics: the run's `metrics.csv`, with columns such as `train/elbo_nats` and `val/rate_nats`; or several of a
            resumed run.

    Raises:
        ValueError: `metrics` cannot be read, or has no bound in it.
    """
    curves = read_curves(*metrics)
    if not {"train/elbo_nats", "val/elbo_nats"} & curves.keys():
        raise ValueError(
            f"{', '.join(map(str, metrics))}: neither train/elbo_nats nor val/elbo_nats in it, but {', '.join(curves)}"
        )
    figure = Figure(figsize=(8, 10), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which would choose a backend for the whole process
    *panels, learning_rate = figure.subplots(len(PANELS) + 1, sharex=True, height_ratios=(3, 2, 2, 1.2))
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        _draw_both(axes, curves.get(f"train/{name}"), curves.get(f"val/{name}"))
        axes.set_ylabel(f"{title} (nats per image)")
    panels[0].legend(frameon=False, loc="lower right")
    if "train/learning_rate" in curves:
        learning_rate.plot(*curves["train/learning_rate"], color=TRAIN, linewidth=1.3)
    learning_rate.set(ylabel="learning rate", xlabel="optimizer steps", ylim=(0, None))
    for axes in (*panels, learning_rate):
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    if "epoch" in curves:
        steps, epochs = curves["epoch"]
        per_epoch = float(((steps + 1) / (epochs + 1)).max())  # reached at the last step of an epoch
        scale = panels[0].secondary_xaxis("top", functions=(lambda x: x / per_epoch, lambda x: x * per_epoch))
        scale.set_xlabel("epochs")
    figure.align_ylabels()
    return figure


def _draw_both(axes: Axes, train: Curve | None, val: Curve | None) -> None:
    """Training as a thin line under its running mean, validation with a point for each time it was measured."""
    both = [curve for curve in (train, val) if curve is not None]
    if train is not None:
        axes.plot(*train, linewidth=0.6, alpha=0.35, color=TRAIN)
        axes.plot(train[0], _running_mean(train[1]), linewidth=1.3, color=TRAIN, label="training batches, smoothed")
    if val is not None:
        axes.plot(*val, "o-", markersize=3.5, linewidth=1.5, color=VAL, label="validation")
    if any(np.isfinite(values[-1]) for _, values in both):
        last = max(steps[-1] for steps, _ in both)
        seen = np.concatenate([values[(steps >= TRANSIENT * last) & np.isfinite(values)] for steps, values in both])
        margin = 0.05 * float(np.ptp(seen)) or 1.0
        axes.set_ylim(seen.min() - margin, seen.max() + margin)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a window of a fiftieth of the curve, which is narrower at both ends."""
    window = np.ones(max(1, len(values) // 50))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
