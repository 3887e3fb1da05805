"""What runs of training with several batch sizes left behind, to be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from wngen.evaluation.critical_batch import Curve
from wngen.evaluation.figures import metrics_of, read_curves

BOUND = "val/elbo_nats"
MAY_DIFFER = {"batch_size", "seed", "root", "path"}  # of data


@dataclass(frozen=True)
class Trained:
    """What a run's folder says of its batches and of the way its bound went.

    Attributes:
        name: of the folder.
        batch_size: images in a step, over all processes and micro-batches.
        config: its `config.yaml`.
        curve: the numbers of steps after which it was validated, and the bound in nats.
    """

    name: str
    batch_size: int
    config: Mapping[str, Any]
    curve: Curve

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """From `config.yaml` and `metrics/`.

        Raises:
            ValueError: they are not there, or without batch size or validations.
        """
        path = folder / "config.yaml"
        parts = metrics_of(folder)
        missing = [what for what, there in (("config.yaml", path.is_file()), ("metrics/", parts)) if not there]
        if missing:
            raise ValueError(
                f"{folder}: no {' and no '.join(missing)} in it; wanted the folder of a run of `wngen fit`"
            )
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            batch_size = int(config["data"]["init_args"]["batch_size"])
            batch_size *= int(config["trainer"].get("accumulate_grad_batches") or 1)
        except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} does not say the batch size of the run: {error!r}") from error
        curves = read_curves(*parts)
        if BOUND not in curves:
            raise ValueError(f"{folder}: {BOUND} is not in its metrics.csv; wanted a run that was validated")
        steps, values = curves[BOUND]
        return cls(
            folder.name or str(folder), batch_size, config, (steps + 1, values)
        )  # `step` is the last one's number

    @property
    def best_nats(self) -> float:
        """The best bound of validation; -inf if none is finite."""
        return self.best_until(math.inf)

    def best_until(self, step: float) -> float:
        """The same of the validations after so many steps or fewer."""
        steps, values = self.curve
        return float(values[(steps <= step) & np.isfinite(values)].max(initial=-math.inf))

    @property
    def recipe(self) -> dict[str, Any]:
        """How it was trained, which may be chosen anew for each batch size; not the seed."""
        return {name: value for name, value in (self.config.get("training") or {}).items() if name != "seed"}

    @property
    def rate(self) -> float | None:
        """Its learning rate, if its configuration tells."""
        rate = self.recipe.get("learning_rate")
        return rate if isinstance(rate, float) else None

    @property
    def validated_on(self) -> str:
        """How many images its validations were of, in words."""
        limit = self.config["trainer"].get("limit_val_batches")
        if limit is None or (isinstance(limit, float) and limit == 1):
            return "all images"
        size = self.config["data"]["init_args"]["batch_size"]
        return f"{limit * size:,.0f} images" if isinstance(limit, int) or limit > 1 else f"{limit:g} of all images"


def check_comparable(runs: Sequence[Trained]) -> None:
    """Runs may differ in batch size, seed and the way of training, but not in what is trained on what, and validated.

    Raises:
        ValueError: they do; the message says in what.
    """
    first, *others = runs
    for run in others:
        for part, free in (("model", set()), ("data", MAY_DIFFER)):
            mine, theirs = (_flat(each.config.get(part), free) for each in (run, first))
            wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            if wrong:
                name = wrong[0]
                raise ValueError(
                    f"{run.name} has {part}.{name}={mine.get(name)}, {first.name} has {theirs.get(name)}: wanted runs "
                    "of one model on the same data, with other batch sizes"
                )
        if run.validated_on != first.validated_on:
            raise ValueError(
                f"{run.name} was validated on {run.validated_on}, {first.name} on {first.validated_on}: wanted the "
                "same for all; train with --trainer.limit_val_batches set to one number of images divided by "
                "data.batch_size, where batches of that size divide all images, or without it"
            )


def _flat(part: Any, free: set[str]) -> dict[str, Any]:
    arguments = {name: value for name, value in (part or {}).get("init_args", {}).items() if name not in free}
    return {"class_path": (part or {}).get("class_path"), **arguments}
