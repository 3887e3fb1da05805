"""What stands on the page, and the page itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from wngen.evaluation.charts import histogram, published_dots
from wngen.evaluation.figures import compared_curves, learning_curves, rate_per_layer
from wngen.evaluation.page.entry import Entry, differences
from wngen.evaluation.page.svg import Chart, chart
from wngen.evaluation.report import Report
from wngen.evaluation.standing import Standing, standings

PROTOCOL = {  # what a protocol's entries are called for readers, in their order
    "data.name": "data set",
    "data.split": "split",
    "data.images": "images",
    "data.split_images": "images in the split",
    "images": "images evaluated",
    "data.channels": "channels",
    "data.height": "height",
    "data.width": "width",
    "data.levels": "levels of a sub-pixel",
    "data.binarization": "binarization",
    "data.seed": "seed of what was drawn",
    "data.sha256": "SHA-256 of the images",
    "estimator": "estimator",
    "importance_samples": "importance samples, K",
    "seed": "seed of the noise",
    "latent_shapes": "latents of each layer",
    "weights": "weights",
    "weights_sha256": "SHA-256 of the weights",
    "dtype": "precision of the evaluation",
    "training_precision": "precision of training",
    "confidence": "confidence of the intervals",
    "resamples": "bootstrap resamples",
    "device": "device",
    "wall_seconds": "seconds",
    "versions.wngen": "wngen",
    "versions.torch": "torch",
}
COUNTS = {"data.images", "data.split_images", "images", "importance_samples", "resamples"}


@dataclass(frozen=True)
class Sections:
    """An entry, and what is drawn and listed of it.

    Attributes:
        entry: the run or release.
        anchor: its place on the page.
        headline: the name of the figure that it is known by.
        figures: the names of all that are shown.
        among: its figures among published ones.
        dots: the same as a chart.
        curves: of its training.
        rates: of its stochastic layers.
        histogram: of its images.
        protocol: names and values.
        configuration: likewise.
    """

    entry: Entry
    anchor: str
    headline: str
    figures: tuple[str, ...]
    among: tuple[Standing, ...]
    dots: Chart | None
    curves: Chart | None
    rates: Chart | None
    histogram: Chart | None
    protocol: tuple[tuple[str, str], ...]
    configuration: tuple[tuple[str, str], ...]


def page(entries: Sequence[Entry]) -> str:
    """One HTML page that needs nothing but itself: no network, no script.

    Args:
        entries: one or several, each with a name of its own.

    Raises:
        ValueError: no entries, two of one name, or learning curves that cannot be read.
    """
    names = [entry.name for entry in entries]
    if not entries or len(set(names)) < len(names):
        raise ValueError(f"runs {', '.join(names) or 'none'}: wanted at least one, each with a name of its own")
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=_number, code=_code)
    return environment.get_template("page.html").render(
        runs=[_sections(entry, f"run-{i}") for i, entry in enumerate(entries, start=1)],
        differences=differences(entries),
        reports={entry.name: entry.report for entry in entries},
        compared=_compared(entries),
        version=version("wngen"),
    )


def _read(name: str) -> str:
    return files("wngen.evaluation.page").joinpath(name).read_text(encoding="utf-8")


def _number(value: float, digits: int, sign: bool = False) -> str:
    """With a true minus sign."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _code(text: str) -> Markup:
    """What stands between backticks as code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _sections(entry: Entry, anchor: str) -> Sections:
    report, evaluation = entry.report, entry.evaluation
    among = standings(report, entry.parameters)
    single_layer = "kl_layer_2" not in report.nats  # whose KL is the rate
    headline = "log_likelihood" if "log_likelihood" in report.nats else "elbo"
    has_layers = not single_layer and bool(report.protocol.get("latent_shapes"))
    return Sections(
        entry=entry,
        anchor=anchor,
        headline=headline,
        figures=tuple(name for name in report.nats if not (single_layer and name == "kl_layer_1")),
        among=tuple(among),
        dots=chart(f"{anchor}-dots", partial(published_dots, among), _dots_alt(among)) if among else None,
        curves=_learning(entry, anchor),
        rates=chart(
            f"{anchor}-rates",
            lambda width: rate_per_layer(report, entry.active, width, titled=False),
            f"Bars: the rate of each of {len(report.layers)} stochastic layers, as in the table of figures.",
        )
        if has_layers
        else None,
        histogram=None
        if evaluation is None
        else chart(
            f"{anchor}-histogram",
            partial(histogram, evaluation),
            f"A histogram of {report.title(headline)} over {len(evaluation.index):,} images: from "
            f"{evaluation.best_nats.min():.1f} to {evaluation.best_nats.max():.1f} nats, "
            f"mean {evaluation.best_nats.mean():.2f}.",
        ),
        protocol=tuple(_protocol(report)),
        configuration=tuple((name, _shown(value)) for name, value in report.model.items()),
    )


def _learning(entry: Entry, anchor: str) -> Chart | None:
    if not entry.metrics:
        return None
    alt = f"Learning curves of {entry.name}: the bound in training and validation, and the learning rate."
    return chart(f"{anchor}-curves", lambda width: learning_curves(*entry.metrics, width=width), alt)


def _compared(entries: Sequence[Entry]) -> list[tuple[str, Chart]]:
    """Learning curves of runs on the same kind of images, in one chart for each kind."""
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        data = entry.report.protocol["data"]
        levels = entry.report.model.get("levels")
        kind = f"{data.get('name', 'images')}, binarization {data.get('binarization', 'none')}, {levels} levels"
        kinds.setdefault(kind, []).extend([entry] if entry.metrics else [])
    return [
        (
            kind,
            chart(
                f"compared-{i}",
                partial(compared_curves, {entry.name: entry.metrics for entry in runs}),
                f"Curves of the bound against epochs, of {', '.join(entry.name for entry in runs)}.",
            ),
        )
        for i, (kind, runs) in enumerate(kinds.items())
        if len(runs) > 1
    ]


def _dots_alt(among: Sequence[Standing]) -> str:
    places = [f"{i} of {len(among)}" for i, place in enumerate(among, start=1) if place.estimate is not None]
    return f"Dots on one scale, the best at the top: this model at place {' and '.join(places)}. Values in the table."


def _protocol(report: Report) -> Iterator[tuple[str, str]]:
    """Every entry of a report's protocol, those that have a name for readers first."""
    held = dict(_flat(report.protocol))
    for path in [*PROTOCOL, *(path for path in held if path not in PROTOCOL)]:
        if path in held:
            value = held[path]
            yield PROTOCOL.get(path, path), f"{value:,}" if path in COUNTS and value is not None else _shown(value)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        nested = any(isinstance(part, (list, tuple)) for part in value)
        parts = [" x ".join(map(str, part)) if isinstance(part, (list, tuple)) else str(part) for part in value]
        return "; ".join(parts) if nested else ", ".join(parts) or "none"
    return {"True": "yes", "False": "no"}.get(str(value), str(value))
