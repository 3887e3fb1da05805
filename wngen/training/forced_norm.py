"""Forced weight normalization: v is brought back to the same length after each step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from wngen.nn.layers import WeightNormalized
from wngen.training.module import Training


class ForcedWeightNorm(pl.Callback):
    """Brings v of every weight-normalized unit back to ||v|| = 1 after each step, which leaves the function unchanged.

    A layer uses the direction of v alone, so a gradient is orthogonal to v, and steps make ||v|| grow: by
    sqrt(1 + c^2) in one of plain gradient descent that is c ||v|| long. The longer v, the less a step turns it. So the
    effective learning rate falls by itself, in each layer at its own pace, besides the schedule
    (`WeightNormHealth` shows it). Kept at one length, v turns as fast as the schedule says, and that should then fall:
    `training.decay=linear`, or EDM2's 1 / sqrt(step).

    Adam and Adamax move an entry of v by about the learning rate, whatever the gradient's size. So a unit of n inputs
    turns by up to learning_rate sqrt(n) / ||v|| radians a step: at unit norm wide units turn faster than narrow ones.
    With `rms` they all turn by up to learning_rate / rms, as they do at the beginning of a training without this
    callback, where v ~ N(0, 0.05^2). A learning rate that was found without it suits `rms=0.05`.

    What a mask hides becomes zero. The moments that an optimizer keeps belong to gradients for v of one length; so
    v is brought to it when a training begins, and from a checkpoint only a run goes on that began so.

    Args:
        rms: the root mean square of a unit's entries that is kept, in place of the norm 1; EDM2 keeps 1.

    Raises:
        ValueError: an `rms` that is not positive; or, when training begins, a strategy that splits up parameters, a
            model without weight-normalized layers, or a checkpoint of a run with another length of v.

    References:
        Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024), section 2.3.
        Weight Normalization (Salimans & Kingma, 2016), section 2.
    """

    def __init__(self, rms: float | None = None) -> None:
        if rms is not None and not 0 < rms < float("inf"):
            raise ValueError(f"rms={rms}: wanted a positive number, such as 0.05, or none for unit norm")
        self.rms = rms
        self._layers: list[tuple[WeightNormalized, Tensor]] = []  # with the norms that are kept
        self._step = 0  # of the last one that was followed
        self._begun_with: dict[str, Any] | None = None  # of the run that a checkpoint is of

    @property
    def _length(self) -> str:
        return "unit norm" if self.rms is None else f"rms={self.rms}"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = trained_layers(trainer, pl_module, type(self).__name__)
        self._layers = [(layer, norm_of_rms(layer, self.rms)) for layer in layers.values()]
        self._step = trainer.global_step
        if trainer.ckpt_path is None:
            self._force()
        elif self._begun_with != self.state_dict():
            before = "without ForcedWeightNorm" if self._begun_with is None else f"with {self._begun_with['length']}"
            raise ValueError(
                f"ForcedWeightNorm with {self._length}: the run was begun {before}, and its optimizer's moments belong "
                "to v of that length; go on as it was begun, or begin a new run"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Training)
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        self._force(pl_module.skips.left_out)

    def _force(self, left_out: Tensor | None = None) -> None:
        for layer, norm in self._layers:
            force_norm(layer, norm, left_out)

    def state_dict(self) -> dict[str, Any]:
        return {"length": self._length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begun_with = state_dict


@torch.no_grad()
def force_norm(layer: WeightNormalized, norm: Tensor, left_out: Tensor | None = None) -> None:
    """Give v this norm per unit, in the shape of g, without changing the weight; a row of zeros stays one.

    If `left_out` says so, a scalar that a GPU is not waited for to know, v stays what it is.
    """
    v = layer.weight_of_length(norm)
    layer.v.copy_(v if left_out is None else torch.where(left_out, layer.v, v))


def norm_of_rms(layer: WeightNormalized, rms: float | None = None) -> Tensor:
    """||v|| of the units, in the shape of g, whose entries have this root mean square; without it 1."""
    inputs = layer.norm(torch.ones_like(layer.v) if layer.mask is None else layer.mask.ne(0).to(layer.v))
    return torch.ones_like(inputs) if rms is None else rms * inputs


def trained_layers(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: str) -> dict[str, WeightNormalized]:
    """The weight-normalized layers whose v is trained, by their names in the model.

    Raises:
        ValueError: there are none, or a process does not hold them whole.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"{callback} with {type(trainer.strategy).__name__}: wanted whole weights in every process, as with "
            "strategy=ddp; leave the callback out"
        )
    assert isinstance(pl_module, Training)
    modules = pl_module.model.named_modules()
    layers = {name: m for name, m in modules if isinstance(m, WeightNormalized) and m.v.requires_grad}
    if not layers:
        raise ValueError(
            f"{callback}: {type(pl_module.model).__name__} has no weight-normalized layer that is trained; leave the "
            "callback out"
        )
    return layers
