"""What is evaluated and shown: a model, together with images that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import get_console

from wngen.data import ImageDataModule, Split
from wngen.evaluation import Report, evaluate
from wngen.evaluation.report import Weights
from wngen.image import Batch
from wngen.model import LikelihoodModel

SPEC = {"channels", "height", "width", "levels"}  # a model takes these four from the data


def check_fit(model: LikelihoodModel, data: ImageDataModule) -> None:
    """Data must have images that the model takes, and for a conditional model labels, of no more classes than it knows.

    Raises:
        ValueError: it does not.
    """
    if data.spec != model.spec:
        raise ValueError(f"the model takes images of {model.spec}, the data has {data.spec}")
    if model.num_classes is not None and not 0 < (data.num_classes or 0) <= model.num_classes:
        raise ValueError(
            f"the model knows {model.num_classes} classes, {data.name} has {data.num_classes or 'no'} labels"
        )


@dataclass(frozen=True)
class Subject:
    """A model and a data set that fit each other.

    Args:
        model: with its weights in place, wherever it is to run.
        data: of the same spec, with labels if the model is conditioned on them.
        training: the options that the model was trained with, as far as they are known.
        weights: which weights were asked for.

    Raises:
        ValueError: they do not; see `check_fit`.
    """

    model: LikelihoodModel
    data: ImageDataModule
    training: Mapping[str, Any] | None = None
    weights: Weights = "ema"

    def __post_init__(self) -> None:
        check_fit(self.model, self.data)

    def report(
        self,
        split: Split,
        importance_samples: int | None = None,
        seed: int = 0,
        chunk: int | None = None,
        limit: int | None = None,
    ) -> Report:
        """Evaluate a split, or `limit` images of it, with a progress bar where there is a terminal."""
        training = self.training or {}
        chunk = self.model.chunk if chunk is None else chunk
        protocol = self.data.protocol(split, limit)
        batches = self.data.evaluation_batches(split, chunk, limit)
        progress = get_console().is_terminal
        evaluation = evaluate(
            self.model, batches, protocol["images"], importance_samples, seed, chunk, progress=progress
        )
        weights = "raw" if training.get("ema_decay") == 0 else self.weights  # an average that keeps nothing is none
        return Report.of(evaluation, self.model, protocol, weights, training.get("precision"))

    def images(self, split: Split, count: int) -> Batch:
        """Some images of a split, on the model's device, with labels only where the model wants them."""
        batch = next(iter(self.data.evaluation_batches(split, count, limit=count)))
        device = next(self.model.parameters()).device
        label = None if self.model.num_classes is None or batch.label is None else batch.label.to(device)
        return Batch(batch.image.to(device), label, batch.index)
