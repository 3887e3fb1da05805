"""What annealed importance sampling finds out about images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wngen.evaluation.statistics import estimate


@dataclass(frozen=True)
class Annealed:
    """Log-likelihoods by annealed importance sampling: float64 tables with one row for each image.

    Attributes:
        index: `(N,)`, the images' places in their split, rising.
        log_likelihood_nats: `(N,)`, log of the average weight, in expectation a lower bound; of reverse chains minus
            log of the average reciprocal weight, in expectation an upper bound.
        effective_chains: `(N,)`, (sum w)^2 / sum w^2, between 1 and `chains`. Near 1 the bound may be far off.
        acceptance: `(N,)`, mean probability that a transition is accepted.
        steps: from the prior to the posterior.
        chains: for each image.
        leapfrog_steps: of each transition.
        is_reverse: whether the chains ran from the posterior to the prior.
        seed: of the noise.
        dtype: of the weights, such as `float32`.
        device: where it ran.
        wall_seconds: how long it took.
    """

    index: NDArray[np.int64]
    log_likelihood_nats: NDArray[np.float64]
    effective_chains: NDArray[np.float64]
    acceptance: NDArray[np.float64]
    steps: int
    chains: int
    leapfrog_steps: int
    is_reverse: bool
    seed: int
    dtype: str
    device: str
    wall_seconds: float

    @property
    def monte_carlo_error_nats(self) -> NDArray[np.float64]:
        """`(N,)`, standard error of each log-likelihood, as far as the chains' spread tells: of one chain infinite."""
        if self.chains == 1:
            return np.full(len(self.index), np.inf)
        return np.sqrt((self.chains / self.effective_chains - 1).clip(min=0) / (self.chains - 1))

    def summary(self) -> dict[str, Any]:
        """JSON-able: averages over the images with their uncertainty, and how they were measured.

        Raises:
            ValueError: fewer than two images.
        """
        tables = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        about = {name: value for name, value in vars(self).items() if name not in tables}
        del tables["index"]
        figures = {name: asdict(figure) for name, figure in estimate(tables).items()}
        return {**figures, "images": len(self.index), **about}


@dataclass(frozen=True)
class Sandwich:
    """Both bounds on the log-likelihood of images that the model itself has drawn.

    The mean gap, but for its standard error, is more than what either bound is off by on such images. Of other images
    it says as much as these resemble them.

    Attributes:
        lower: by chains from the prior.
        upper: by chains from the latents that each image was drawn with, which are an exact draw from its posterior.
    """

    lower: Annealed
    upper: Annealed

    @property
    def gap_nats(self) -> NDArray[np.float64]:
        """`(N,)`, upper minus lower bound; its expectation is not negative, a single one may be."""
        return self.upper.log_likelihood_nats - self.lower.log_likelihood_nats

    def summary(self) -> dict[str, Any]:
        """JSON-able: the gap and both bounds averaged over the images, and how they were measured.

        Raises:
            ValueError: fewer than two images.
        """
        gap = asdict(estimate({"gap_nats": self.gap_nats})["gap_nats"])
        return {"gap_nats": gap, "lower": self.lower.summary(), "upper": self.upper.summary()}
