"""A bound beside annealed importance sampling on the same images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from wngen.evaluation.annealing.annealed import Annealed, Sandwich
from wngen.evaluation.evaluate import Evaluation
from wngen.evaluation.statistics import Estimate, estimate


def bound_check(evaluation: Evaluation, annealed: Annealed, sandwich: Sandwich) -> dict[str, Any]:
    """What annealed importance sampling says of a bound, for `Report.annealing`.

    Args:
        evaluation: whose tightest bound is checked.
        annealed: of some of its images.
        sandwich: of images that the model has drawn, with as many steps and chains.

    Returns:
        JSON-able: `log_likelihood_nats` by annealing, `bound_nats` of the same images, `difference_nats` of the first
        from the second image by image, and `gap_nats` between chains in both directions, each an `Estimate` as a dict;
        mean `acceptance` and `effective_chains`; `images`, `simulated_images`, `steps`, `chains`, `leapfrog_steps`,
        `dtype`, `seed`, `wall_seconds`.

    Raises:
        ValueError: images that were annealed and not evaluated, or fewer than two.
    """
    rows = np.searchsorted(evaluation.index, annealed.index)
    if not np.isin(annealed.index, evaluation.index).all():
        raise ValueError("some images that were annealed were not evaluated: a check needs the bound of each")
    bound = evaluation.best_nats[rows]
    nats = {"log_likelihood_nats": annealed.log_likelihood_nats, "bound_nats": bound}
    figures = estimate({**nats, "difference_nats": annealed.log_likelihood_nats - bound})
    figures |= estimate({"gap_nats": sandwich.gap_nats})
    return {
        **{name: asdict(figure) for name, figure in figures.items()},
        "acceptance": float(annealed.acceptance.mean()),
        "effective_chains": float(annealed.effective_chains.mean()),
        "images": len(annealed.index),
        "simulated_images": len(sandwich.gap_nats),
        **{name: getattr(annealed, name) for name in ("steps", "chains", "leapfrog_steps", "dtype", "seed")},
        "wall_seconds": round(annealed.wall_seconds + sandwich.lower.wall_seconds, 3),
    }


def check_line(check: dict[str, Any], bound: str) -> str:
    """What `bound_check` gave, in two sentences, for the bound of this title."""
    figures = {name: Estimate(**value) for name, value in check.items() if isinstance(value, dict)}
    nats = {name: f"{figure.mean:+.2f} ± {figure.standard_error:.2f}" for name, figure in figures.items()}
    size = f"{check['steps']:,} steps, {check['chains']} chains, {check['images']:,} images"
    return (
        f"Annealed importance sampling ({size}): {nats['log_likelihood_nats']} nats; beside the bound of the same "
        f"images ({bound}) {nats['difference_nats']} nats. Its own error: on {check['simulated_images']:,} images that "
        f"the model drew, chains in both directions are {nats['gap_nats'].removeprefix('+')} nats apart."
    )
