"""Charts of a report: its figures among published ones, and how its images differ in likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from wngen.evaluation.evaluate import Evaluation
from wngen.evaluation.figures import RULE, TRAIN, VAL, WIDTH, blank
from wngen.evaluation.standing import Standing

NARROW = 5.0  # inches; in less, what a row is stands above it and not beside it


def published_dots(among: Sequence[Standing], width: float = WIDTH) -> Figure:
    """Figures on one scale, the best at the top: published ones as dots, those of a report with their interval.

    Args:
        among: of one unit.
        width: in inches.

    Raises:
        ValueError: nothing to draw, or figures of several units.
    """
    if len(units := {place.unit for place in among}) != 1:
        raise ValueError(f"{len(among)} figures in units {sorted(units)}: wanted some, of one unit")
    is_narrow = width < NARROW
    figure = blank(width, 0.7 + (0.36 if is_narrow else 0.27) * len(among))
    axes = figure.subplots()
    for row, place in enumerate(among):
        own = place.estimate
        colour = TRAIN if own is None else VAL
        axes.axhline(row, color=RULE, linewidth=0.8, zorder=0)
        if own is not None:
            axes.hlines(row, own.low, own.high, color=colour, linewidth=2)
        exact = place.estimator.startswith("log-likelihood")
        face = colour if exact else "#ffffff"
        axes.plot(place.value, row, "o", color=colour, markerfacecolor=face, markersize=6)
    labels = [f"{place.model}, {_short(place)}" for place in among]
    if is_narrow:
        axes.set_yticks([])
        for row, label in enumerate(labels):
            axes.annotate(label, (0, row), (0, 3), axes.get_yaxis_transform(), "offset points", va="bottom", fontsize=9)
    else:
        axes.set_yticks(range(len(among)), labels)
    axes.set_ylim(len(among) - 0.5, -0.5 - 0.3 * is_narrow)
    axes.tick_params(left=False)
    axes.set_xlabel("nats per image" if units == {"nats"} else "bits per dimension")
    if units == {"bits_per_dim"}:
        axes.invert_xaxis()  # so that better is to the right in either unit
    axes.margins(x=0.06)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def histogram(evaluation: Evaluation, width: float = WIDTH) -> Figure:
    """How many images have which log-likelihood, or which bound on it, with their mean.

    Args:
        evaluation: of any model.
        width: in inches.
    """
    values = evaluation.best_nats
    figure = blank(width, 2.8)
    axes = figure.subplots()
    axes.hist(values, bins=min(60, 10 + len(values) // 20), color=TRAIN, alpha=0.75)
    mean = float(np.mean(values))
    axes.axvline(mean, color=VAL, linewidth=1.5)
    label = f"mean {mean:.2f}".replace("-", "\N{MINUS SIGN}")
    above = axes.get_xaxis_transform()
    axes.annotate(label, (mean, 1), (0, 3), above, "offset points", ha="center", va="bottom", color=VAL)
    axes.set(xlabel="nats per image", ylabel="images")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _short(place: Standing) -> str:
    """Of the list of a chart: `K = 128`, `ELBO`, `exact`, and whose figure it is."""
    estimator = place.estimator.rpartition(", ")[2].replace("log-likelihood (exact)", "exact")
    return estimator if place.estimate is None else f"{estimator} (this model)"
