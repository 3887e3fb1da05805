"""Figures of runs: learning curves, from the `metrics.csv` of Lightning's CSVLogger, and the rate of each layer."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from wngen.evaluation.layers import layer_title
from wngen.evaluation.report import Report

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

TRAIN, VAL, RULE = "#4b5563", "#c2410c", "#e5e7eb"
RUNS = "#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#4b5563"
WIDTH = 8.0  # inches
LEGEND: dict[str, Any] = {"framealpha": 0.7, "edgecolor": "none"}  # where it must lie upon curves
TRANSIENT = 0.1  # the first part of a run, whose steep rise would flatten all the rest, may leave the picture
PANELS = {"elbo_nats": "ELBO", "distortion_nats": "distortion", "rate_nats": "rate"}
NAMED = 6  # of the curves of many layers, so many are named

Colour = tuple[float, float, float, float]


def metrics_of(run: Path) -> tuple[Path, ...]:
    """The `metrics.csv` in a run folder, or the several of a resumed run in the order in which they were begun."""
    parts = run.glob("metrics/version_*/metrics.csv")
    return tuple(sorted(parts, key=lambda part: int(part.parent.name.rpartition("_")[2])))


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
                reader = csv.DictReader(file)
                names = reader.fieldnames or ["step"]
                rows = [row for row in reader if None not in row.values()]  # a kill may have cut the last one short
            if not rows and "step" in names:
                continue  # or all of them, while a column was added
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
    save(learning_curves(*metrics), path)


def learning_curves(*metrics: Path | str, width: float = WIDTH) -> Figure:
    """The bound, its distortion and rate, and the learning rate of a run against steps and epochs.

    Of a model without latent variables, whose rate is 0 throughout, the log-likelihood and the learning rate.

    Args:
        metrics: the run's `metrics.csv`, with columns such as `train/elbo_nats` and `val/rate_nats`; or several of a
            resumed run.
        width: in inches.

    Raises:
        ValueError: `metrics` cannot be read, or has no bound in it.
    """
    curves = read_curves(*metrics)
    if not {"train/elbo_nats", "val/elbo_nats"} & curves.keys():
        raise ValueError(
            f"{', '.join(map(str, metrics))}: neither train/elbo_nats nor val/elbo_nats in it, but "
            f"{', '.join(curves) or 'nothing'}"
        )
    split = "val" if "val/elbo_nats" in curves else "train"
    layers = sorted(name for name in curves if name.startswith(f"{split}/kl_nats/"))
    rates = [curves[name][1] for name in ("train/rate_nats", "val/rate_nats") if name in curves]
    is_exact = bool(rates) and not any(rate.any() for rate in rates)
    shown = {"elbo_nats": "log-likelihood"} if is_exact else PANELS
    heights = [3, *[2] * (len(shown) - 1), *[2.5] * bool(layers), 1.2]
    figure = blank(width, sum(heights) / 8.2 * 10 * math.sqrt(width / WIDTH))
    *panels, learning_rate = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    for axes, (name, title) in zip(panels, shown.items(), strict=False):
        _draw_both(axes, curves.get(f"train/{name}"), curves.get(f"val/{name}"))
        axes.set_ylabel(f"{title}\n(nats per image)")
    if layers:
        _draw_layers(panels[-1], {name.rpartition("/")[2]: curves[name] for name in layers})
    panels[0].legend(loc="lower right", **LEGEND)
    if "train/learning_rate" in curves:
        learning_rate.plot(*curves["train/learning_rate"], color=TRAIN, linewidth=1.3)
    learning_rate.set(ylabel="learning\nrate", xlabel="optimizer steps", ylim=(0, None))
    for axes in (*panels, learning_rate):
        _plain(axes)
        axes.margins(x=0.01)
    if per_epoch := _steps_per_epoch(curves):
        scale = panels[0].secondary_xaxis("top", functions=(lambda x: x / per_epoch, lambda x: x * per_epoch))
        scale.set_xlabel("epochs")
    figure.align_ylabels()
    return figure


def compared_curves(runs: Mapping[str, Sequence[Path | str]], width: float = WIDTH) -> Figure:
    """The bounds of several runs against epochs: of validation, or where there is none of training, smoothed.

    Args:
        runs: for each by its name the `metrics.csv`, or several of a resumed run.
        width: in inches.

    Raises:
        ValueError: no runs, or one whose `metrics` cannot be read, or have no bound or no epochs in them.
    """
    figure = blank(width, 4.2 * math.sqrt(width / WIDTH))
    axes = figure.subplots()
    drawn = []
    for i, (name, metrics) in enumerate(runs.items()):
        curves = read_curves(*metrics)
        bound = curves.get("val/elbo_nats") or curves.get("train/elbo_nats")
        per_epoch = _steps_per_epoch(curves)
        if bound is None or per_epoch is None:
            raise ValueError(f"{name}: wanted val/elbo_nats and val/epochs, or those of train, got {', '.join(curves)}")
        steps, values = bound
        values = values if "val/elbo_nats" in curves else _running_mean(values)
        drawn.append(((steps + 1) / per_epoch, values))
        axes.plot(*drawn[-1], "o-", markersize=3, linewidth=1.5, color=RUNS[i % len(RUNS)], label=name)
    if not drawn:
        raise ValueError("no runs to compare: wanted at least one")
    _set_limits(axes, drawn)
    axes.set(xlabel="epochs", ylabel="bound (nats per image)")
    _plain(axes)
    figure.legend(loc="outside upper left", frameon=False, ncols=max(1, int(width // 3)))
    return figure


def draw_rates(path: Path | str, report: Report, active: Sequence[int] | None = None) -> None:
    """Write the picture of `rate_per_layer` as PNG, making its folder if there is none."""
    save(rate_per_layer(report, active), path)


def rate_per_layer(
    report: Report, active: Sequence[int] | None = None, width: float = WIDTH, titled: bool = True
) -> Figure:
    """The rate of each stochastic layer with its standard error, as bars, the topmost layer first.

    Args:
        report: of a model with several of them.
        active: how many units of each are; see `wngen.evaluation.active_units`.
        width: in inches.
        titled: whether what it is of stands above it.

    Raises:
        ValueError: a report that says nothing of layers, or another number of `active`.
    """
    layers, shapes = report.layers, report.protocol.get("latent_shapes")
    if not layers or not shapes or (active is not None and len(active) != len(layers)):
        numbers = "" if active is None else f" and {len(active)} numbers of active units"
        raise ValueError(f"a report of {len(layers)} layers{numbers}: wanted layers, the shape of each, and as many")
    rates = [report.nats[f"kl_layer_{i}"] for i in range(1, len(layers) + 1)]
    resolutions = [layer_title(name).partition(", ")[2] for name in layers]
    distinct = list(dict.fromkeys(resolutions))
    colours = dict(zip(distinct, _colours(len(distinct)), strict=True))
    labels = [layer_title(name) for name in layers]
    if active is not None:
        units = [f"{n:,} of {math.prod(shape):,}" for n, shape in zip(active, shapes, strict=True)]
        labels = [f"{label}: {used}" for label, used in zip(labels, units, strict=True)]
    figure = blank(width, (1.6 if titled else 1.2) + 0.28 * len(layers))
    axes = figure.subplots()
    axes.barh(
        labels,
        [rate.mean for rate in rates],
        xerr=[rate.standard_error for rate in rates],
        color=[colours[resolution] for resolution in resolutions],
        error_kw={"ecolor": TRAIN, "capsize": 2, "elinewidth": 1},
    )
    axes.invert_yaxis()
    for i, rate in enumerate(rates):
        end = max(rate.mean, 0.0) + rate.standard_error
        axes.annotate(f"{rate.mean:.2f}", (end, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.1, y=0.01)
    axes.set(xlabel="nats per image\n(± standard error)")
    _plain(axes, "x")
    if titled:
        title = f"Stochastic layers{'' if active is None else ', and how many of their units are active'}"
        figure.suptitle(f"{title}\n{report.model['model']} on {report.data_line}", fontsize=10)
    sums = [sum(r.mean for r, at in zip(rates, resolutions, strict=True) if at == here) for here in distinct]
    keys = [f"{here or 'vectors'}: {total:.2f} nats" for here, total in zip(distinct, sums, strict=True)]
    handles = [Patch(color=colours[here], label=key) for here, key in zip(distinct, keys, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, int(width // 2)), frameon=False)
    return figure


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure as PNG, making the folder if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")


def blank(width: float, height: float) -> Figure:
    """Of so many inches, without pyplot, which would choose a backend for the whole process."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    """A quiet grid below the data, and no frame."""
    axes.grid(axis=grid, color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _steps_per_epoch(curves: Mapping[str, Curve]) -> float | None:
    """As the last step tells after which `epochs` was logged, if ever."""
    logged = [curves[name] for name in ("train/epochs", "val/epochs") if name in curves]
    steps, epochs = max(((steps[-1], epochs[-1]) for steps, epochs in logged), default=(0, 0))
    return float((steps + 1) / epochs) if epochs else None


def _colours(n: int) -> list[Colour]:
    """From dark to light, none of them hard to see on white."""
    return [colormaps["viridis"](place) for place in np.linspace(0.05, 0.85, n)]


def _draw_layers(axes: Axes, layers: dict[str, Curve]) -> None:
    """The rate of each stochastic layer, from the topmost, dark, to the lowest, light."""
    named = set(np.linspace(0, len(layers) - 1, NAMED).round().astype(int).tolist())
    for i, ((name, curve), colour) in enumerate(zip(layers.items(), _colours(len(layers)), strict=True)):
        label = layer_title(name) if i in named else None
        axes.plot(*curve, "o-", markersize=2.5, linewidth=1.3, color=colour, label=label)
    axes.set_ylabel("rate per layer\n(nats per image)")
    axes.legend(fontsize=8, ncols=2, loc="best", **LEGEND)
    _set_limits(axes, list(layers.values()))


def _draw_both(axes: Axes, train: Curve | None, val: Curve | None) -> None:
    """Training as a thin line under its running mean, validation with a point for each time it was measured."""
    both = [curve for curve in (train, val) if curve is not None]
    if train is not None:
        axes.plot(*train, linewidth=0.6, alpha=0.35, color=TRAIN)
        axes.plot(train[0], _running_mean(train[1]), linewidth=1.3, color=TRAIN, label="training batches, smoothed")
    if val is not None:
        axes.plot(*val, "o-", markersize=3.5, linewidth=1.5, color=VAL, label="validation")
    _set_limits(axes, both)


def _set_limits(axes: Axes, curves: list[Curve]) -> None:
    """Show the range that each curve keeps to once its transient is over."""
    if any(np.isfinite(values[-1]) for _, values in curves):
        settled = [values[steps >= TRANSIENT * steps[-1]] for steps, values in curves]
        seen = np.concatenate([values[np.isfinite(values)] for values in settled])
        margin = 0.05 * float(np.ptp(seen)) or 1.0
        axes.set_ylim(seen.min() - margin, seen.max() + margin)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a window of a fiftieth of the curve, which is narrower at both ends."""
    window = np.ones(max(1, len(values) // 50))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
