"""How sure an average over images is: its standard error, and a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """The mean of a figure over images.

    Attributes:
        mean: over the images.
        standard_error: of the mean: standard deviation over the images / sqrt(N).
        low: lower end of the 95 % bootstrap interval.
        high: upper end of it.
    """

    mean: float
    standard_error: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """The same in another unit; a negative factor swaps the ends of the interval."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.mean * factor, self.standard_error * abs(factor), low, high)


def estimate(figures: Mapping[str, NDArray[np.float64]], seed: int = 0) -> dict[str, Estimate]:
    """Mean, standard error and 95 % interval of several figures of the same images.

    The images are the population's sample: the interval says how the mean would vary had other images been drawn,
    not how it varies with training. It is the percentile bootstrap. For a mean of thousands of images the
    correction of BCa is smaller than the Monte Carlo error of the interval's ends, and costs N^2.

    Args:
        figures: `(N,)` float64 tables by name.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two images, which say nothing about the spread.
    """
    from scipy.stats import bootstrap  # takes a second to import, which `import wngen` shall not

    table = np.stack(list(figures.values()))  # (figures, N)
    n = table.shape[1]
    if n < 2:
        raise ValueError(f"{n} image: a standard error needs at least 2")

    def means(drawn: NDArray[Any], axis: int) -> NDArray[np.float64]:
        """`(..., N)` drawn images to `(figures, ...)` means of all figures, by counting how often each was drawn."""
        flat = drawn.reshape(-1, n)
        places = flat + n * np.arange(len(flat))[:, None]
        counts = np.bincount(places.ravel(), minlength=flat.size).reshape(flat.shape)
        return (table @ counts.T / n).reshape(len(table), *drawn.shape[:-1])

    result = bootstrap(
        (np.arange(n),),
        means,
        n_resamples=RESAMPLES,
        batch=max(1, 500_000 // n),
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    error = table.std(axis=1, ddof=1) / np.sqrt(n)
    rows = np.stack([table.mean(axis=1), error, interval.low, interval.high], axis=1)
    return {name: Estimate(*row) for name, row in zip(figures, rows.tolist(), strict=True)}
