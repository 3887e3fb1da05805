"""Figures of weight-norm health: how long v has become in each layer, and how fast it turns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wngen.evaluation.figures import RULE, RUNS, TRAIN, VAL, WIDTH, Curve, blank, read_curves, save

PANELS = {
    "v_norm": "||v||",
    "angle": "angle of a step\n(radians)",
    "effective_learning_rate": "effective\nlearning rate",
}
MEDIAN = "median"
END = 0.95  # a part of the steps, up to which all values are shown
MARGIN = 1.2  # a factor


def draw_weight_norm_health(path: Path | str, *metrics: Path | str) -> None:
    """Write the picture of `weight_norm_curves` as PNG, making its folder if there is none."""
    save(weight_norm_curves(*metrics), path)


def weight_norm_curves(*metrics: Path | str, width: float = WIDTH) -> Figure:
    """||v||, the angle of a step and the effective learning rate of each layer against steps.

    As `WeightNormHealth` logged them. Of many layers, those that are highest and lowest in a panel, by the median over
    the steps, are named in it. Where the learning rate falls to 0 at the end, a panel need not show it.

    Args:
        metrics: the run's `metrics.csv`, or several of a resumed run.
        width: in inches.

    Raises:
        ValueError: `metrics` cannot be read, or holds no such figures.
    """
    curves = read_curves(*metrics)
    if f"v_norm/{MEDIAN}" not in curves:
        raise ValueError(
            f"{', '.join(map(str, metrics))}: no v_norm/{MEDIAN} in it: train with the callback WeightNormHealth"
        )
    names = [name.removeprefix("v_norm/") for name in curves if name.startswith("v_norm/")]
    layers = [name for name in names if name != MEDIAN]
    is_few = len(layers) <= len(RUNS)
    rows = math.ceil((len(layers) + 1) / 3) if is_few else 1
    figure = blank(width, (8.4 + 0.2 * rows) * math.sqrt(width / WIDTH))
    panels = figure.subplots(len(PANELS), sharex=True)
    for axes, (quantity, title) in zip(panels, PANELS.items(), strict=True):
        of_layers = {name: curves[f"{quantity}/{name}"] for name in layers}
        if is_few:
            for (name, curve), colour in zip(of_layers.items(), RUNS, strict=False):
                axes.plot(*curve, linewidth=1, color=colour, alpha=0.8, label=name)
        else:
            _draw_many(axes, of_layers)
        axes.plot(*curves[f"{quantity}/{MEDIAN}"], linewidth=1.8, color="black", label="median of the layers")
        if not is_few:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
        shown = np.concatenate([values[steps <= END * steps[-1]] for steps, values in of_layers.values()])
        axes.set(yscale="log", ylabel=title)
        if (shown > 0).any():
            axes.set_ylim(shown[shown > 0].min() / MARGIN, shown.max() * MARGIN)
        axes.grid(color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("optimizer steps")
    figure.align_ylabels()
    if is_few:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=3, fontsize=8)
    return figure


def _draw_many(axes: Axes, layers: dict[str, Curve]) -> None:
    """Thin lines, but for the highest and the lowest layer."""
    ordered = sorted(layers, key=lambda name: float(np.median(layers[name][1])))
    extremes = {ordered[-1]: VAL, ordered[0]: RUNS[1]}
    for name in ordered[1:-1]:
        axes.plot(*layers[name], linewidth=0.6, color=TRAIN, alpha=0.4)
    for name, colour in extremes.items():
        axes.plot(*layers[name], linewidth=1.3, color=colour, label=name)
