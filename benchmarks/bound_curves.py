"""What came out of the training runs: figures over seeds, a table and curves."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from training_runs import Form, Run

STYLES: dict[Form, tuple[str, str]] = {
    "weight_norm": ("weight norm", "#c2410c"),
    "plain": ("plain, same init", "#1d4ed8"),
    "plain_default_init": ("plain, torch's init", "#6b7280"),
    "batch_norm": ("batch norm", "#15803d"),
}


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values) if values else None, "std": std, "runs": len(values)}


def summary(runs: list[Run], rates: list[float]) -> dict[str, Any]:
    """What came out for one form; runs that diverged are counted, and left out of the averages."""
    finite = [run for run in runs if not run.diverged]
    seconds = statistics.median([run.seconds_per_epoch for run in finite]) if finite else None
    curves = np.array([run.curve_elbo_nats for run in finite])
    return {
        "rate": runs[0].rate,
        "rate_at_edge_of_grid": runs[0].rate in (min(rates), max(rates)),
        "diverged": len(runs) - len(finite),
        "val_elbo_nats": spread([run.curve_elbo_nats[-1] for run in finite]),
        "test_elbo_nats": spread([run.test_elbo_nats for run in finite if run.test_elbo_nats is not None]),
        "seconds_per_epoch": seconds,
        "curve": {
            "epochs": finite[0].curve_epochs if finite else [],
            "elbo_nats_mean": curves.mean(axis=0).tolist() if finite else [],
            "elbo_nats_std": curves.std(axis=0, ddof=min(1, len(finite) - 1)).tolist() if finite else [],
        },
    }


def first_epoch_above(bound: float | None, curve: dict[str, list[float]]) -> float | None:
    """Where a curve first reaches a bound, between its points by straight lines; None if it never does."""
    if bound is None:
        return None
    points = list(zip(curve["epochs"], curve["elbo_nats_mean"], strict=True))
    for i, (epoch, value) in enumerate(points):
        if value >= bound:
            if i == 0:
                return epoch
            before, below = points[i - 1]
            return before + (epoch - before) * (bound - below) / (value - below)
    return None


def show(record: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table("form", "rate", "val ELBO", "test ELBO", "s/epoch", "epochs*", "diverged")
    for form, figures in record["forms"].items():
        edge = "!" if figures["rate_at_edge_of_grid"] else ""
        bounds = [figures["val_elbo_nats"], figures["test_elbo_nats"]]
        reached = figures["epochs_to_final_bound_of_plain"]
        table.add_row(
            STYLES[form][0],
            f"{figures['rate']:g}{edge}",
            *("-" if b["mean"] is None else f"{b['mean']:.2f} ± {b['std'] or 0:.2f}" for b in bounds),
            f"{figures['seconds_per_epoch'] or math.nan:.1f}",
            "-" if reached is None else f"{reached:.2f}",
            str(figures["diverged"]),
        )
    console.print(table)
    console.print(
        f"ELBO in nats, mean ± standard deviation over {len(record['seeds'])} seeds. Rates were chosen on validation "
        "images; ! is one at the edge of the grid.\n* until the bound that the plain form with the same init ends with."
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Bound against epochs and against seconds of training."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    settled, ends = [], []
    for form, figures in record["forms"].items():
        label, color = STYLES[form]
        epochs, mean, std = (np.array(figures["curve"][name]) for name in ("epochs", "elbo_nats_mean", "elbo_nats_std"))
        if not len(epochs):
            continue
        settled.append(mean[epochs >= 0.2 * record["epochs"]].min())
        ends.append(mean[-1])
        for panel, x in zip(panels, (epochs, epochs * figures["seconds_per_epoch"]), strict=True):
            panel.plot(x, mean, "o-", color=color, markersize=3, label=f"{label}, rate {figures['rate']:g}")
            panel.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    if settled:  # the steep beginning, or one form far below, would flatten all the rest
        reach = 4 * (max(ends) - statistics.median(settled))
        panels[0].set_ylim(max(min(settled) - 1, max(ends) - reach), max(ends) + 0.05 * reach)
    panels[0].set(xlabel="epochs", ylabel="validation ELBO (nats per image)")
    panels[1].set(
        xlabel=f"seconds of training ({record['machine']['processor']}, threads: {record['machine']['threads']})"
    )
    panels[0].legend(frameon=False, loc="lower right")
    for panel in panels:
        panel.grid(color="#e5e7eb", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    settings = record["settings"]
    figure.suptitle(
        f"ConvVAE with IAF on statically binarized MNIST, {settings['optimizer']}, {settings['precision']}, "
        f"{len(record['seeds'])} seeds: mean and standard deviation"
    )
    figure.savefig(path, dpi=130)
