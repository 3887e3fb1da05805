"""Figures that others published, beside which a report can stand: the table `published.toml`."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table

from wngen.evaluation.report import Report
from wngen.image import ImageSpec

Unit = Literal["nats", "bits_per_dim"]
Estimator = Literal["exact", "elbo", "importance-weighted", "other"]

NEAREST = 8  # so many published figures at most stand beside a report


@dataclass(frozen=True)
class PublishedData:
    """A data set in the form in which figures on it can be compared.

    Args:
        name: such as `mnist-static`.
        title: what it is, in a few words.
        reports: the names that it has in the reports of wngen.
        binarization: as a data set's protocol says it.
        spec: of its images.
        remark: what a reader of its figures must know.
    """

    name: str
    title: str
    reports: tuple[str, ...]
    binarization: str
    spec: ImageSpec
    remark: str = ""

    @property
    def unit(self) -> Unit:
        """In which its figures are told: nats where images are binarized."""
        return "nats" if self.spec.levels == 2 else "bits_per_dim"

    def matches(self, report: Report) -> bool:
        """Whether a report is of this data: binarization, levels and shape the same, all test images, no labels."""
        data = report.protocol["data"]
        return (
            data.get("name") in self.reports
            and data.get("binarization") == self.binarization
            and {name: report.model.get(name) for name in self.spec.as_dict()} == self.spec.as_dict()
            and data.get("split") == "test"
            and data.get("split_images") == report.protocol["images"]
            and not report.model.get("num_classes")
        )


@dataclass(frozen=True)
class PublishedFigure:
    """A log-likelihood, or a bound on it, as its authors published it.

    Args:
        data_set: the name of the data set.
        model: what it is, in a few words.
        nats: the log-likelihood or the bound, in nats per image.
        bits_per_dim: the same as a cost in bits per sub-pixel.
        unit: the one that it was published in. In the other it is no more precise.
        estimator: `exact`; `elbo`; `importance-weighted`, the bound with `importance_samples` samples; or `other`, as
            `note` says.
        citation: authors and year.
        year: of the publication.
        url: of the source.
        seen_in: where in the source the figure was read.
        importance_samples: K.
        parameters: how many the model has, if it is known.
        note: what else a reader must know.
    """

    data_set: str
    model: str
    nats: float
    bits_per_dim: float
    unit: Unit
    estimator: Estimator
    citation: str
    year: int
    url: str
    seen_in: str
    importance_samples: int | None = None
    parameters: int | None = None
    note: str = ""


@cache
def published_data() -> dict[str, PublishedData]:
    """The data sets that figures are known of, or known to be missing for, by name."""
    return {
        name: PublishedData(
            name,
            entry["title"],
            tuple(entry["reports"]),
            entry["binarization"],
            ImageSpec(**entry["image"]),
            entry.get("remark", ""),
        )
        for name, entry in _content()["data_set"].items()
    }


def published_figures(data_set: str | None = None) -> list[PublishedFigure]:
    """Published figures, the best first; of all data sets one after the other if none is named.

    Raises:
        ValueError: no such data set is known.
    """
    names = list(published_data())
    if data_set is not None and data_set not in names:
        raise ValueError(f"no published figures of {data_set!r} are known, but of {', '.join(names)}")
    chosen = [figure for figure in _figures() if data_set in (None, figure.data_set)]
    return sorted(chosen, key=lambda figure: (names.index(figure.data_set), -figure.nats))


def same_protocol(report: Report) -> list[PublishedFigure]:
    """The published figures that a report can be compared with, the best first, whatever their estimators.

    They are of the same data, binarization and levels, and of the whole test split. A report of part of it, or of a
    model that is given the class of each image, has none.
    """
    data = _data_of(report)
    return [] if data is None else published_figures(data.name)


def listing(data: PublishedData) -> RenderableType:
    """All published figures of a data set and their sources, for a terminal of 80 columns."""
    figures = published_figures(data.name)
    parts: list[RenderableType] = [data.title]
    if figures:
        table = _table(data, figures)
        for figure in figures:
            table.add_row(*_cells(data, figure))
        sources = Table.grid(Column(no_wrap=True), Column(), padding=(0, 2))
        for citation, url, seen_in in sorted({(f.citation, f.url, f.seen_in) for f in figures}):
            sources.add_row(citation, f"{url}\n{seen_in}")
        parts += [table, "", sources]
    if data.remark:
        parts += ["", data.remark]
    return Group(*parts)


def comparison(report: Report) -> RenderableType | None:
    """A report's own figures among the nearest published ones of the same protocol; None if none is known."""
    data, figures = _data_of(report), same_protocol(report)
    if data is None or not figures:
        return None
    own = {name: report.nats[name].mean for name in ("elbo", "log_likelihood") if name in report.nats}
    nearest = sorted(figures, key=lambda figure: min(abs(figure.nats - nats) for nats in own.values()))[:NEAREST]
    rows = [(figure.nats, _cells(data, figure), "") for figure in nearest]
    for name, nats in own.items():
        k = report.protocol["importance_samples"]
        kind: Estimator = "elbo" if name == "elbo" else "exact" if k is None else "importance-weighted"
        number = f"{nats:.2f}" if data.unit == "nats" else f"{report.bits_per_dim[name].mean:.3f}"
        rows.append((nats, (report.model["model"], number, _estimator(kind, k), "", "this model"), "bold"))
    table = _table(data, nearest)
    table.title = f"Published figures of the same protocol, the {len(nearest)} nearest of {len(figures)}"
    table.caption = f"{table.caption}\n`wngen published {data.name}` gives all of them and their sources."
    for _, cells, style in sorted(rows, reverse=True):
        table.add_row(*cells, style=style)
    return table


def _data_of(report: Report) -> PublishedData | None:
    return next((data for data in published_data().values() if data.matches(report)), None)


def _table(data: PublishedData, figures: list[PublishedFigure]) -> Table:
    """The head of a table of figures, and what a reader must know of them as its caption."""
    notes = "".join(f"\n* {f.model}: {f.note}." for f in figures if f.note)
    return Table(
        "model",
        Column("nats" if data.unit == "nats" else "bits/dim", no_wrap=True),
        Column("estimator", no_wrap=True),
        Column("params", justify="right", no_wrap=True),
        "source",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title_justify="left",
        caption=f"K: the importance-weighted bound with so many samples.{notes}",
        caption_justify="left",
    )


def _cells(data: PublishedData, figure: PublishedFigure) -> tuple[str, ...]:
    value = getattr(figure, data.unit)
    return (
        figure.model,
        f"{value:.2f}" if math.isclose(value, round(value, 2)) else f"{value:.3f}",
        _estimator(figure.estimator, figure.importance_samples) + (" *" if figure.note else ""),
        "" if figure.parameters is None else f"{figure.parameters / 1e6:.0f} M",
        figure.citation,
    )


def _estimator(kind: Estimator, importance_samples: int | None) -> str:
    if kind == "importance-weighted":
        return f"K = {importance_samples:,}"
    return "ELBO" if kind == "elbo" else kind


@cache
def _content() -> dict[str, Any]:
    return tomllib.loads(resources.files("wngen.evaluation").joinpath("published.toml").read_text(encoding="utf-8"))


@cache
def _figures() -> tuple[PublishedFigure, ...]:
    return tuple(
        _figure(**{name: value for name, value in source.items() if name != "figures"}, **entry)
        for source in _content()["source"]
        for entry in source["figures"]
    )


def _figure(
    data_set: str, nats: float | None = None, bits_per_dim: float | None = None, **entry: Any
) -> PublishedFigure:
    """A line of the table, with the unit that it leaves out."""
    spec = published_data()[data_set].spec
    if nats is not None:
        assert bits_per_dim is None, "one unit: the one that it was published in"
        return PublishedFigure(data_set, nats=nats, bits_per_dim=spec.bits_per_dim(-nats), unit="nats", **entry)
    assert bits_per_dim is not None
    return PublishedFigure(
        data_set, nats=-spec.nats(bits_per_dim), bits_per_dim=bits_per_dim, unit="bits_per_dim", **entry
    )
