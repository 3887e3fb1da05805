"""Audits of small models: how one is made, what failed in it, and how a fault is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from wngen.evaluation.audit import Audit, audit
from wngen.image import Batch
from wngen.model import LikelihoodModel
from wngen.nn import WeightNormalized

Model = TypeVar("Model", bound=LikelihoodModel)


def as_if_initialized(model: Model) -> Model:
    """With weights as they are, which the audit would else complain of."""
    for layer in model.modules():
        if isinstance(layer, WeightNormalized):
            layer.initialized.fill_(True)
    return model


def audited(model: LikelihoodModel, x: Tensor, y: Tensor | None) -> Audit:
    return audit(model, Batch(x, y, torch.arange(len(x))), seed=3)


def failures(verdict: Audit) -> set[str]:
    return {finding.name for finding in verdict.failed}


def faulty(model: Model, **methods: Callable[..., Any]) -> Model:
    """The model with some methods replaced: of its class, so that a copy has the same fault."""
    model.__class__ = type("Faulty", (type(model),), methods)
    return model
