"""What a report is about: one run or release, and several beside each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wngen.evaluation.evaluate import Evaluation
from wngen.evaluation.page.pictures import Extreme, Picture
from wngen.evaluation.paired import Candidate, Comparison, Difference
from wngen.evaluation.report import Report
from wngen.evaluation.standing import standings

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """A run or a release, as far as it is known.

    Attributes:
        name: that readers know it by; no two entries of a page have the same.
        report: its figures.
        parameters: how many the model has; None if it could not be built.
        evaluation: its figures image by image, if they were kept.
        metrics: the `metrics.csv` of its training, several of a resumed run, none of a release.
        active: how many units of each stochastic layer are; see `wngen.evaluation.active_units`.
        pictures: that the model drew.
        best: the images with the highest likelihood, the best first.
        worst: those with the lowest, the worst first.
        missing: of what the page cannot show, why, and how to come by it: of `model`, `data`, `evaluation`, `metrics`.
    """

    name: str
    report: Report
    parameters: int | None = None
    evaluation: Evaluation | None = None
    metrics: tuple[Path, ...] = ()
    active: tuple[int, ...] | None = None
    pictures: tuple[Picture, ...] = ()
    best: tuple[Extreme, ...] = ()
    worst: tuple[Extreme, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


def differences(entries: Sequence[Entry]) -> list[Difference]:
    """Of any two entries that were evaluated on the same images, image by image, how much higher the later one is."""
    held = [Candidate(e.name, e.report, e.evaluation) for e in entries if e.evaluation is not None]
    return [
        difference
        for first, other in itertools.combinations(held, 2)
        if _same_images(first, other)
        for difference in Comparison.of([first, other]).differences
    ]


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """All figures for machines.

    Returns:
        A JSON-able dict: `schema`, the version of this form; `runs`, of each its `name`, the number of `parameters`
        (None if it is not known), `report` as in `report.json`, and `published`, the figures of the same protocol, the
        best first; `differences` of any two on the same images, see `wngen.evaluation.paired.Difference`.
    """
    return {
        "schema": SCHEMA,
        "runs": [
            {
                "name": entry.name,
                "parameters": entry.parameters,
                "report": asdict(entry.report),
                "published": [asdict(place.published) for place in standings(entry.report) if place.published],
            }
            for entry in entries
        ],
        "differences": [asdict(difference) for difference in differences(entries)],
    }


def _same_images(one: Candidate, other: Candidate) -> bool:
    hashes = {candidate.report.protocol["data"].get("sha256") for candidate in (one, other)}
    return len(hashes) == 1 and None not in hashes and np.array_equal(one.evaluation.index, other.evaluation.index)
