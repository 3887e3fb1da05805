"""Figures of what a batch size pays: the noise scale during a training, and the trade-off of steps and examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from wngen.evaluation.critical_batch import TradeOff
from wngen.evaluation.figures import LEGEND, RULE, RUNS, TRAIN, VAL, WIDTH, blank, read_curves, save

TOTAL = "noise_scale/total"


def draw_noise_scale(path: Path | str, *metrics: Path | str) -> None:
    """Write the picture of `noise_scale_curves` as PNG, making its folder if there is none."""
    save(noise_scale_curves(*metrics), path)


def noise_scale_curves(*metrics: Path | str, width: float = WIDTH) -> Figure:
    """The gradient noise scale of a run and of each of its blocks against steps, as `NoiseScale` logged them.

    Args:
        metrics: the run's `metrics.csv`, or several of a resumed run.
        width: in inches.

    Raises:
        ValueError: `metrics` cannot be read, or holds no noise scale.
    """
    curves = read_curves(*metrics)
    if TOTAL not in curves:
        raise ValueError(f"{', '.join(map(str, metrics))}: no {TOTAL} in it: train with the callback NoiseScale")
    figure = blank(width, 4.2 * math.sqrt(width / WIDTH))
    axes = figure.subplots()
    blocks = [name for name in curves if name.startswith("noise_scale/") and name != TOTAL]
    for i, name in enumerate(blocks):
        axes.plot(*curves[name], linewidth=1, color=RUNS[i % len(RUNS)], alpha=0.6, label=name.partition("/")[2])
    axes.plot(*curves[TOTAL], "o-", markersize=3, linewidth=1.8, color=TRAIN, label="all parameters")
    axes.set(yscale="log", xlabel="optimizer steps", ylabel="tr Σ / |G|² (images)")
    axes.grid(color=RULE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, ncols=max(1, int(width // 2)))
    return figure


def draw_trade_off(path: Path | str, fit: TradeOff, batch_sizes: Sequence[float], steps: Sequence[float]) -> None:
    """Write the picture of `trade_off` as PNG, making its folder if there is none."""
    save(trade_off(fit, batch_sizes, steps), path)


def trade_off(fit: TradeOff, batch_sizes: Sequence[float], steps: Sequence[float], width: float = WIDTH) -> Figure:
    """Images against optimizer steps: the runs, the hyperbola fitted to them, and its critical batch size.

    Args:
        fit: to the runs.
        batch_sizes: of each run, in images.
        steps: that each took to the bound.
        width: in inches.
    """
    figure = blank(width, 5 * math.sqrt(width / WIDTH))
    axes = figure.subplots()
    around = [*batch_sizes, fit.critical_batch]
    batches = np.geomspace(min(around) / 2, max(around) * 2, 200)
    hyperbola = np.array([fit.steps(batch) for batch in batches])
    axes.plot(hyperbola, hyperbola * batches, color=VAL, linewidth=1.5, label="hyperbola")
    axes.axvline(fit.least_steps, color=TRAIN, linewidth=0.8, linestyle="--", label="least steps, least images")
    axes.axhline(fit.least_examples, color=TRAIN, linewidth=0.8, linestyle="--")
    knee = 2 * fit.least_steps
    axes.plot(knee, 2 * fit.least_examples, "D", color=VAL, label=f"critical batch, {fit.critical_batch:,.0f} images")
    examples = [batch * each for batch, each in zip(batch_sizes, steps, strict=True)]
    axes.plot(steps, examples, "o", color=RUNS[1], label="runs, by batch size")
    outermost = dict(sorted(zip(batch_sizes, steps, strict=True)))  # of several with one batch size the slowest
    for batch, each in outermost.items():
        axes.annotate(f"{batch:,.0f}", (each, batch * each), (5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="optimizer steps", ylabel="images")
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", **LEGEND)
    return figure
