"""What is evaluated and shown: a model, together with images that it takes; and its figures."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import get_console

from wngen.data import ImageDataModule, Split
from wngen.evaluation import Evaluation, Report, evaluate, weights_sha256
from wngen.evaluation.annealing import annealed_importance_sampling, bidirectional_monte_carlo, bound_check
from wngen.evaluation.audit.probabilities import check_mass
from wngen.evaluation.processes import ALONE, Processes
from wngen.evaluation.report import Weights, per_image_path
from wngen.evaluation.rows import Unfinished
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
class Measurement:
    """Figures of a model.

    Args:
        report: averaged over images, with their protocol.
        evaluation: of each image.
        unfinished: what an interruption would have left, of which there is no more need once they are written.
    """

    report: Report
    evaluation: Evaluation
    unfinished: Unfinished | None = None

    def write(self, path: Path) -> None:
        """Write the report, and the figures of each image beside it."""
        self.evaluation.write(per_image_path(path))
        self.report.write(path)
        self.discard_unfinished()

    def discard_unfinished(self) -> None:
        """Once the figures are written, in whatever form."""
        if self.unfinished is not None:
            self.unfinished.remove()


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

    def measure(
        self,
        split: Split,
        importance_samples: int | None = None,
        seed: int = 0,
        chunk: int | None = None,
        limit: int | None = None,
        dtype: torch.dtype | None = None,
        out: Path | None = None,
        processes: Processes = ALONE,
    ) -> Measurement:
        """Evaluate a split, or `limit` images of it, with a progress bar where there is a terminal.

        Args:
            split: which images.
            importance_samples: K of the importance-weighted bound, or None.
            seed: of the noise.
            chunk: images, or samples of them, at once; what the model says by default.
            limit: so many images, drawn by the data's evaluation seed; all by default.
            dtype: of the evaluation; that of the weights by default.
            out: where the report will be written; an interrupted evaluation of the same goes on from what it has left
                there.
            processes: that share the images.
        """
        check_mass(self.model, self.images(split, 1))
        training = self.training or {}
        chunk = self.model.chunk if chunk is None else chunk
        protocol = self.data.protocol(split, limit)
        unfinished = None
        if out is not None:
            k = None if self.model.is_exact else importance_samples
            model = {"weights": weights_sha256(self.model), **self.model.config}
            key = {"model": model, "data": protocol, "k": k, "seed": seed, "dtype": str(dtype)}
            unfinished = Unfinished(per_image_path(out), {**key, "wngen": version("wngen")}, processes.rank)
        evaluation = evaluate(
            self.model,
            self.data.evaluation_batches(split, chunk, limit, processes.rank, processes.count),
            protocol["images"],
            importance_samples,
            seed,
            chunk,
            progress=get_console().is_terminal and processes.rank == 0,
            dtype=dtype,
            unfinished=unfinished,
            processes=processes,
        )
        weights = "raw" if training.get("ema_decay") == 0 else self.weights  # an average that keeps nothing is none
        report = Report.of(evaluation, self.model, protocol, weights, training.get("precision"))
        return Measurement(report, evaluation, unfinished)

    def annealed(
        self,
        measured: Measurement,
        split: Split,
        steps: int,
        chains: int,
        images: int,
        seed: int = 0,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
        processes: Processes = ALONE,
    ) -> Measurement:
        """Figures, and what annealed importance sampling says of the bound.

        Args:
            measured: the figures.
            split: that they are of.
            steps: from the prior to the posterior.
            chains: for each image.
            images: how many of those that were evaluated, and how many that the model draws.
            seed: of the noise.
            chunk: chains at once; what the model says by default.
            dtype: of the chains; that of the weights by default.
            processes: that share the images.
        """
        images = min(images, len(measured.evaluation.index))
        progress = get_console().is_terminal and processes.rank == 0
        options: dict[str, Any] = {"seed": seed, "chunk": chunk, "progress": progress, "processes": processes}
        model = self.model if dtype is None else copy.deepcopy(self.model).to(dtype)
        batches = self.data.evaluation_batches(split, self.model.chunk, images, processes.rank, processes.count)
        annealed = annealed_importance_sampling(model, batches, images, steps, chains, **options)
        sandwich = bidirectional_monte_carlo(model, images, steps, chains, **options)
        check = bound_check(measured.evaluation, annealed, sandwich)
        return replace(measured, report=replace(measured.report, annealing=check))

    def images(self, split: Split, count: int) -> Batch:
        """Some images of a split, on the model's device, with labels only where the model wants them."""
        batch = next(iter(self.data.evaluation_batches(split, count, limit=count)))
        device = next(self.model.parameters()).device
        label = None if self.model.num_classes is None or batch.label is None else batch.label.to(device)
        return Batch(batch.image.to(device), label, batch.index)
