"""The model card of a release: what the model is, its figures with their protocol, and how to load it."""

from __future__ import annotations

import inspect
import json
import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from wngen.evaluation.report import Report
from wngen.model import LikelihoodModel

UNCONDITIONAL, CONDITIONAL = "unconditional-image-generation", "conditional-image-generation"


def model_card(model: LikelihoodModel, name: str, report: Report | None = None) -> ModelCard:
    """Write the page that the Hugging Face hub shows, and the metadata at its head.

    Args:
        model: what the card is about.
        name: of the release.
        report: its evaluation. Each bound becomes a result in the card's model index, in nats and in bits/dim.
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
        sections += ["## Figures", f"{report.data_line}.", _markdown(report), report.protocol_line]
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


def _markdown(report: Report) -> str:
    """The table of a report."""
    lines = [report.headings, ("---", *["---:"] * (len(report.headings) - 1)), *report.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
