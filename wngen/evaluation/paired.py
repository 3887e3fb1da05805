"""Several models on the same images: their differences image by image, which are surer than the figures themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table

from wngen.evaluation.evaluate import Evaluation
from wngen.evaluation.report import Report
from wngen.evaluation.statistics import Estimate, estimate
from wngen.image import ImageSpec

FIGURES = ("elbo", "log_likelihood")


class Candidate(NamedTuple):
    """A model in a comparison.

    Args:
        name: that readers know it by.
        report: its figures.
        evaluation: the same, image by image.
    """

    name: str
    report: Report
    evaluation: Evaluation


@dataclass(frozen=True)
class Difference:
    """How much higher a figure of one model is than that of another on the same images.

    Attributes:
        model: whose figure is higher where the difference is positive.
        baseline: the other.
        figure: the model's, as in `Report.nats`: `elbo` or `log_likelihood`.
        baseline_figure: the other's. An exact log-likelihood stands beside bounds too, which are below the other's own.
        nats: the mean difference per image, with the bootstrap interval of the mean over images.
        bits_per_dim: the same as a cost: negative where the model is better.
        importance_samples: K of the model's importance-weighted bound and of the other's, or None.
    """

    model: str
    baseline: str
    figure: str
    baseline_figure: str
    nats: Estimate
    bits_per_dim: Estimate
    importance_samples: tuple[int | None, int | None]


@dataclass(frozen=True)
class Comparison:
    """Models beside each other, and each beside the first.

    Attributes:
        names: of the models.
        reports: of each.
        differences: of each but the first from the first, one for each figure that both have.
    """

    names: tuple[str, ...]
    reports: tuple[Report, ...]
    differences: tuple[Difference, ...]

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Comparison:
        """Compare the first with each of the others.

        Raises:
            ValueError: fewer than two, two of one name, or models that were evaluated on different images.
        """
        if len(candidates) < 2:
            raise ValueError(f"{len(candidates)} model: a comparison needs at least 2")
        names = [candidate.name for candidate in candidates]
        if len(set(names)) < len(names):
            raise ValueError(f"models {', '.join(names)}: each needs a name of its own")
        first, *others = candidates
        for other in others:
            seen, wanted = (candidate.report.protocol["data"].get("sha256") for candidate in (other, first))
            if seen != wanted or not np.array_equal(other.evaluation.index, first.evaluation.index):
                raise ValueError(
                    f"{other.name} was evaluated on {other.report.data_line} (images {str(seen)[:12]}), but "
                    f"{first.name} on {first.report.data_line} (images {str(wanted)[:12]}): a comparison needs the same"
                )
        differences = [difference for other in others for difference in _differences(other, first)]
        return cls(tuple(names), tuple(candidate.report for candidate in candidates), tuple(differences))

    def write(self, path: Path | str) -> None:
        """Write reports and differences as JSON."""
        reports = dict(zip(self.names, map(asdict, self.reports), strict=True))
        content = {"reports": reports, "differences": [asdict(difference) for difference in self.differences]}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def __rich__(self) -> RenderableType:
        """The figures, and below them the differences, in tables that fit a terminal of 80 columns."""
        first = self.reports[0]
        is_one = len({report.data_line for report in self.reports}) == 1  # conditional models are told so
        figures = _table(f"On {first.data_line}" if is_one else "On the same images", "nats", "bits/dim")
        for name, report in zip(self.names, self.reports, strict=True):
            figures.add_row(name if is_one else f"{name}, {report.data_line}")
            for figure in FIGURES:
                if figure in report.nats:
                    values = (_with_error(report.nats[figure], 2), _with_error(report.bits_per_dim[figure], 4))
                    figures.add_row(f"  {report.title(figure)}", *values)
        beside = _table(f"Beside {self.names[0]}, image by image", "nats more", first.headings[2], "bits/dim")
        for name, report in zip(self.names[1:], self.reports[1:], strict=True):
            beside.add_row(name)
            for difference in self.differences:
                if difference.model == name:
                    titles = report.title(difference.figure), first.title(difference.baseline_figure)
                    beside.add_row(
                        "\n  - ".join(dict.fromkeys(f"  {title}" for title in titles)),
                        _with_error(difference.nats, 2, sign=True),
                        f"{difference.nats.low:+.2f} to {difference.nats.high:+.2f}",
                        f"{difference.bits_per_dim.mean:+.4f}",
                    )
        return Group(figures, beside)


def _table(title: str, *headings: str) -> Table:
    """Names and titles in the first column, figures in the others."""
    columns = [Column(heading, justify="right", no_wrap=True) for heading in headings]
    return Table(Column(overflow="fold"), *columns, title=title, title_justify="left", box=SIMPLE_HEAD)


def _differences(other: Candidate, first: Candidate) -> list[Difference]:
    """Of each bound that both have; an exact log-likelihood stands for any of them."""
    pairs = {}
    for bound in FIGURES:
        figures = [
            bound if bound in report.nats else "log_likelihood" if report.protocol["estimator"] == "exact" else None
            for report in (other.report, first.report)
        ]
        if None not in figures:
            pairs[tuple(figures)] = _values(other, figures[0]) - _values(first, figures[1])
    spec = ImageSpec(*(first.report.model[name] for name in ("channels", "height", "width", "levels")))
    samples = other.evaluation.importance_samples, first.evaluation.importance_samples
    nats = estimate({" - ".join(map(str, figures)): values for figures, values in pairs.items()}) if pairs else {}
    return [
        Difference(
            other.name, first.name, str(a), str(b), difference, difference.times(-spec.bits_per_dim(1.0)), samples
        )
        for (a, b), difference in zip(pairs, nats.values(), strict=True)
    ]


def _values(candidate: Candidate, figure: str | None) -> NDArray[np.float64]:
    values = candidate.evaluation.elbo_nats if figure == "elbo" else candidate.evaluation.log_likelihood_nats
    assert values is not None
    return values


def _with_error(figure: Estimate, digits: int, sign: bool = False) -> str:
    mean = f"{figure.mean:{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {figure.standard_error:.{digits}f}"
