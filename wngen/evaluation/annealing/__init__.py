"""Annealed importance sampling: an independent check on bounds, which sees the decoder and the prior alone."""

from wngen.evaluation.annealing.annealed import Annealed, Sandwich
from wngen.evaluation.annealing.chains import annealed_importance_sampling, bidirectional_monte_carlo
from wngen.evaluation.annealing.check import bound_check, check_line

__all__ = [
    "Annealed",
    "Sandwich",
    "annealed_importance_sampling",
    "bidirectional_monte_carlo",
    "bound_check",
    "check_line",
]
