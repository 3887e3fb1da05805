"""The critical batch size: how optimizer steps and images are traded for each other on the way to the same bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import f as f_distribution

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

BEYOND = 1e3  # a critical batch size so far from all that were tried cannot be told from none


@dataclass(frozen=True)
class TradeOff:
    """The hyperbola (S / S_min - 1)(E / E_min - 1) = 1 of steps S and examples E that reach the same bound.

    Attributes:
        least_steps: S_min, with batches of any size.
        least_examples: E_min, in images, with batches as small as can be.
        low: of the interval for the critical batch size, in images; 0 where the runs do not limit it from below.
        high: the same from above, infinite where they do not limit it.
        confidence: of the interval.
        residual: standard deviation of log S around the hyperbola.
    """

    least_steps: float
    least_examples: float
    low: float
    high: float
    confidence: float
    residual: float

    @property
    def critical_batch(self) -> float:
        """E_min / S_min in images: a batch of this size takes twice the least steps and twice the least examples."""
        return self.least_examples / self.least_steps

    def steps(self, batch_size: float) -> float:
        """S = S_min (1 + critical batch / B)."""
        return self.least_steps * (1 + self.critical_batch / batch_size)


def fit_trade_off(batch_sizes: Sequence[float], steps: Sequence[float], confidence: float = 0.95) -> TradeOff:
    """Fit the hyperbola by least squares of log S; those of log E = log B + log S are the same.

    On the hyperbola S = S_min (1 + B_crit / B), so that for a given B_crit the best S_min is a mean. The interval holds
    every B_crit for which the sum of squares is no larger than an F distribution allows (profile likelihood).

    Args:
        batch_sizes: B of each run, in images.
        steps: S of each run, the optimizer steps it took to the bound.
        confidence: of the interval.

    Raises:
        ValueError: fewer than three batch sizes; numbers that are not positive; or batch sizes that all lie so far
            below or above the critical one that it cannot be told.

    References:
        An Empirical Model of Large-Batch Training (McCandlish et al., 2018), equation 2.11.
    """
    if len(batch_sizes) != len(steps):
        raise ValueError(f"{len(batch_sizes)} batch sizes and {len(steps)} numbers of steps: wanted one of each a run")
    if not all(0 < number < math.inf for number in (*batch_sizes, *steps)):
        raise ValueError(f"batch sizes {list(batch_sizes)}, steps {list(steps)}: wanted positive numbers")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: wanted a number between 0 and 1, such as 0.95")
    different = sorted(set(batch_sizes))
    if len(different) < 3:
        seen = ", ".join(f"{size:g}" for size in different)
        count = "1 batch size" if len(different) == 1 else f"{len(different)} batch sizes"
        raise ValueError(
            f"{count} ({seen}): two numbers are fitted, and the scatter around them; wanted runs "
            "at 3 or more, best a factor of 2 to 4 apart"
        )
    log_batch, log_steps = np.log(np.asarray(batch_sizes, float)), np.log(np.asarray(steps, float))

    def offsets(log_critical: float) -> NDArray[np.float64]:
        """log S_min as each run has it."""
        return np.asarray(log_steps - np.logaddexp(0, log_critical - log_batch))

    def squares(log_critical: float) -> float:
        each = offsets(log_critical)
        return float(((each - each.mean()) ** 2).sum())

    lowest, highest = float(log_batch.min()) - math.log(BEYOND), float(log_batch.max()) + math.log(BEYOND)
    grid = np.linspace(lowest, highest, 400)
    best = int(np.argmin([squares(place) for place in grid]))
    names = f"{different[0]:g} to {different[-1]:g}"
    if best == 0:
        raise ValueError(
            f"the steps do not become fewer from batches of {names}: the critical batch size is far below; try smaller"
        )
    if best == len(grid) - 1:
        raise ValueError(
            f"the steps fall as fast as batches grow from {names}: the critical batch size is far above; try larger"
        )
    found = minimize_scalar(squares, bounds=(grid[best - 1], grid[best + 1]), method="bounded", options={"xatol": 1e-9})
    center, least = float(found.x), float(found.fun)
    freedom = len(steps) - 2
    allowed = least * (1 + float(f_distribution.ppf(confidence, 1, freedom)) / freedom) + 1e-18  # of exact data

    def excess(place: float) -> float:
        return squares(place) - allowed

    low = math.exp(brentq(excess, lowest, center)) if excess(lowest) > 0 else 0.0
    high = math.exp(brentq(excess, center, highest)) if excess(highest) > 0 else math.inf
    least_steps = math.exp(offsets(center).mean())
    residual = math.sqrt(least / freedom)
    return TradeOff(least_steps, least_steps * math.exp(center), low, high, confidence, residual)


def steps_to(bound_nats: float, curve: Curve) -> float | None:
    """The optimizer steps after which a run's bound had risen to `bound_nats`, interpolated between two validations.

    Args:
        bound_nats: what is to be reached.
        curve: the steps after which the bound was measured, and what it was, both `(n,)`.

    Returns:
        The number of steps; None if the run never came so far.

    Raises:
        ValueError: it had reached it before the bound was first measured, so that nobody knows when.
    """
    steps, values = (column[np.isfinite(curve[1])] for column in curve)
    reached = np.flatnonzero(values >= bound_nats)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        raise ValueError(
            f"its first validation, after {steps[0]:,.0f} steps, had {values[0]:.2f} nats already: wanted a higher "
            f"bound than {bound_nats:.2f}, or validations more often"
        )
    share = (bound_nats - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
