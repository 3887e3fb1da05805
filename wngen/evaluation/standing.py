"""Where a report stands among the published figures of the same protocol."""

from __future__ import annotations

from dataclasses import dataclass

from wngen.evaluation.published import PublishedFigure, Unit, same_protocol
from wngen.evaluation.report import Report
from wngen.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Standing:
    """A figure in the list that a report and the published figures make together.

    Args:
        model: what it is, in a few words.
        value: in `unit`.
        unit: of the list; nats where images are binarized.
        digits: after the point, as many as are worth telling: of a published figure those that were published.
        estimator: for readers, with K in it.
        parameters: how many the model has, if it is known.
        published: where the figure is from; None for one of the report.
        estimate: of a figure of the report, with its uncertainty.
    """

    model: str
    value: float
    unit: Unit
    digits: int
    estimator: str
    parameters: int | None
    published: PublishedFigure | None = None
    estimate: Estimate | None = None


def standings(report: Report, parameters: int | None = None) -> list[Standing]:
    """A report's bounds among all published figures of the same protocol, the best first; empty if none is known.

    Args:
        report: of a model on a whole test split.
        parameters: how many its model has.
    """
    figures = same_protocol(report)
    if not figures:
        return []
    unit = figures[0].unit
    rows = [(figure.nats, _published(figure)) for figure in figures]
    for name in ("elbo", "log_likelihood"):
        if name in report.nats:
            estimate = getattr(report, unit)[name]
            digits = 2 if unit == "nats" else 3
            title = report.title(name)
            own = Standing(report.model["model"], estimate.mean, unit, digits, title, parameters, None, estimate)
            rows.append((report.nats[name].mean, own))
    return [row for _, row in sorted(rows, key=lambda row: -row[0])]


def _published(figure: PublishedFigure) -> Standing:
    k = figure.importance_samples
    names = {"elbo": "ELBO", "exact": "log-likelihood (exact)", "other": "other"}
    estimator = names.get(figure.estimator, f"importance-weighted, K = {k:,}" if k else figure.estimator)
    value = getattr(figure, figure.unit)
    digits = 2 if abs(value - round(value, 2)) < 1e-9 else 3
    return Standing(figure.model, value, figure.unit, digits, estimator, figure.parameters, figure)
