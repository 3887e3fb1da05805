"""The model card of a release: what the model is, its figures with their protocol, and how to load it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterable, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from wngen.evaluation.report import Report
from wngen.evaluation.standing import Standing, standings
from wngen.model import LikelihoodModel

UNCONDITIONAL, CONDITIONAL = "unconditional-image-generation", "conditional-image-generation"


def model_card(model: LikelihoodModel, name: str, report: Report | None = None) -> ModelCard:
    """Write the page that the Hugging Face hub shows, and the metadata at its head.

    Args:
        model: what the card is about.
        name: of the release.
        report: its evaluation. Each bound becomes a result in the card's model index, in nats and in bits/dim, and
            stands among the published figures of the same protocol.
    """
    spec = model.spec
    size = f"{spec.channels} x {spec.height} x {spec.width}"
    parameters = sum(p.numel() for p in model.parameters())
    sections = [
        f"# {name}",
        (inspect.getdoc(type(model)) or type(model).__name__).split("\n")[0],
        f"{parameters:,} parameters; images of {size} sub-pixels with {spec.levels} levels each.",
    ]
    if report is not None:
        sections += ["## Figures", f"{report.data_line}.", _table(report.headings, report.rows)]
        sections += [line for line in (report.annealing_line, report.protocol_line) if line]
        if among := standings(report, parameters):
            sections += ["## Among published figures", _published(among), *_notes(among)]
    sections += [
        "## Use",
        f"```python\n{_snippet(model, name)}```",
        "## Configuration",
        f"```json\n{json.dumps(model.config, indent=2)}\n```",
    ]
    data = ModelCardData(
        library_name="wngen",
        tags=["wngen", "likelihood", "weight-normalization"],
        pipeline_tag=None if model.num_classes else UNCONDITIONAL,  # the hub has no tag for class-conditional images
        model_name=name,
        eval_results=None if report is None else _results(report),
    )
    body = "\n\n".join(sections)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _snippet(model: LikelihoodModel, name: str) -> str:
    """How to load the model and sample from it."""
    shape = f"(16, {', '.join(map(str, model.spec.shape))}) uint8 levels"
    load = f'model = wngen.load("{name}")  # this folder, or its id on the hub\n'
    if model.num_classes is None:
        return f"import wngen\n\n{load}images = model.sample(16)  # {shape}\n"
    classes = f"y = torch.arange(16) % {model.num_classes}  # all classes in turn\n"
    return f"import torch\nimport wngen\n\n{load}{classes}images = model.sample(16, y)  # {shape}\n"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str] = ()) -> str:
    """A table of which all columns but the first and those of `words` are numbers."""
    marks = ["---" if i == 0 or heading in words else "---:" for i, heading in enumerate(headings)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows))


def _published(among: Sequence[Standing]) -> str:
    """The model's own figures, in bold, among those that others published of the same test images."""
    unit = "nats" if among[0].unit == "nats" else "bits/dim"
    rows = []
    for place in among:
        mark, figure = ("", place.published) if place.published else ("**", None)
        parameters = "" if place.parameters is None else f"{place.parameters / 1e6:.1f} M"
        source = "this model" if figure is None else f"[{figure.citation}]({figure.url})"
        estimator = place.estimator + (" *" if figure and figure.note else "")
        cells = (place.model, f"{place.value:.{place.digits}f}", estimator, parameters, source)
        rows.append([f"{mark}{cell}{mark}" if cell else "" for cell in cells])
    return _table(("model", unit, "estimator", "parameters", "source"), rows, words=("estimator", "source"))


def _notes(among: Sequence[Standing]) -> list[str]:
    """What else a reader must know of the published figures."""
    noted = [place.published for place in among if place.published and place.published.note]
    return [f"\\* {figure.model}: {figure.note}." for figure in noted]


def _results(report: Report) -> list[EvalResult]:
    """The bounds as entries of a model index, each with the protocol that makes it comparable."""
    data, protocol = report.protocol["data"], report.protocol
    keys = ("weights", "weights_sha256", "dtype", "training_precision", "seed", "images")
    stated = {key: protocol[key] for key in keys if protocol.get(key) is not None}
    samples = {"elbo": {}, "log_likelihood": {"importance_samples": protocol["importance_samples"]}}
    units = {"nats": report.nats, "bits_per_dim": report.bits_per_dim}
    return [
        EvalResult(
            task_type=CONDITIONAL if report.model.get("num_classes") else UNCONDITIONAL,
            dataset_type=re.sub(r"\W+", "-", str(data.get("name", "images"))).lower(),
            dataset_name=report.data_line,
            dataset_split=data.get("split"),
            metric_type=f"{figure}_{unit}",
            metric_name=f"{report.title(figure)}, {unit.replace('_', ' ')}",
            metric_value=round(figures[figure].mean, 6),
            metric_args={**stated, **more, "standard_error": round(figures[figure].standard_error, 6)},
        )
        for figure, more in samples.items()
        for unit, figures in units.items()
        if figure in figures
    ]
