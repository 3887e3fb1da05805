"""Likelihoods of whole data sets: bounds, their uncertainty, and the report. Curves: `wngen.evaluation.figures`."""

from wngen.evaluation.evaluate import Evaluation, evaluate
from wngen.evaluation.layers import active_units, by_resolution, layer_names, layer_title
from wngen.evaluation.paired import Candidate, Comparison, Difference
from wngen.evaluation.published import PublishedFigure, published_figures, same_protocol
from wngen.evaluation.report import Report, weights_sha256
from wngen.evaluation.statistics import Estimate, estimate

__all__ = [
    "Candidate",
    "Comparison",
    "Difference",
    "Estimate",
    "Evaluation",
    "PublishedFigure",
    "Report",
    "active_units",
    "by_resolution",
    "estimate",
    "evaluate",
    "layer_names",
    "layer_title",
    "published_figures",
    "same_protocol",
    "weights_sha256",
]
