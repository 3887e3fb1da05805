"""Images in the order of their likelihood, and how well it tells them from images that the model knows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wngen.evaluation.evaluate import Evaluation
from wngen.image import ImageSpec


@dataclass(frozen=True)
class Separation:
    """How well likelihoods tell images from those of a reference, such as the test images of the model's own data.

    Both are the area under the receiver operating characteristic: 0.5 tells nothing.

    Attributes:
        unlikely: the probability that an image has a lower likelihood than one of the reference. Far below 0.5, these
            images seem *more* at home than the model's own, as those of SVHN do to models of CIFAR-10.
        untypical: the same for the distance of the log-likelihood from the reference's mean, which sees both sides.

    References:
        Do deep generative models know what they don't know? (Nalisnick et al., 2019a), section 3.
        Detecting out-of-distribution inputs to deep generative models using typicality (Nalisnick et al., 2019b), of
        single images.
    """

    unlikely: float
    untypical: float

    @classmethod
    def of(cls, nats: NDArray[np.float64], reference: NDArray[np.float64]) -> Separation:
        """Compare the log-likelihoods `(N,)` of some images with those `(M,)` of the reference."""
        mean = reference.mean()
        return cls(_area(-nats, -reference), _area(np.abs(nats - mean), np.abs(reference - mean)))


def _area(above: NDArray[np.float64], below: NDArray[np.float64]) -> float:
    """The probability that a value of the first is greater than one of the second; of equal ones half counts."""
    from scipy.stats import mannwhitneyu  # takes a second to import, which `import wngen` shall not

    return float(mannwhitneyu(above, below).statistic) / (len(above) * len(below))


def write_scores(
    path: Path | str,
    evaluation: Evaluation,
    spec: ImageSpec,
    label: NDArray[np.int64] | None = None,
    reference: NDArray[np.float64] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write a table of images as CSV, the likeliest first.

    Its columns are `index`, the image's place in its split; `file`, where it has a name; `label`, where there are any;
    `log_likelihood_nats` (exact or the importance-weighted bound) or `elbo_nats`; `bits_per_dim`, the same as a cost;
    of a model with latent variables `distortion_nats` and `rate_nats`; and, with a reference, `quantile`, the part of
    its images that are less likely.

    Args:
        path: of the file; its folder is made if there is none.
        evaluation: of the images.
        spec: of the images.
        label: `(N,)`, their classes.
        reference: `(M,)` log-likelihoods.
        names: of all images of the split.
    """
    nats = evaluation.best_nats
    columns: dict[str, NDArray[Any]] = {"index": evaluation.index}
    if names is not None:
        columns["file"] = np.array(names)[evaluation.index]
    if label is not None:
        columns["label"] = label
    columns["elbo_nats" if evaluation.log_likelihood_nats is None else "log_likelihood_nats"] = nats
    columns["bits_per_dim"] = -nats * spec.bits_per_dim(1.0)
    if not evaluation.is_exact:
        columns |= {"distortion_nats": evaluation.distortion_nats, "rate_nats": evaluation.rate_nats}
    if reference is not None:
        columns["quantile"] = np.searchsorted(np.sort(reference), nats) / len(reference)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in np.argsort(-nats, kind="stable"):
            writer.writerow([column[row].item() for column in columns.values()])
