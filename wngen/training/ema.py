"""An exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class EMA(pl.Callback):
    """Keeps an exponential moving average of the model's parameters and validates and tests with it.

    The average starts from the weights as they are when training begins, after data-dependent init. Early on
    it forgets faster: the decay at step t is min(decay, (1 + t) / (10 + t)). Of a weight-normalized layer v and
    g are averaged, each by itself, as in PixelCNN++. Buffers are not averaged.

    A checkpoint holds the raw weights in `state_dict` and the averaged ones in `ema`.

    Args:
        decay: what is kept of the average at each step; 0 switches the average off.

    Raises:
        ValueError: a decay outside 0 to 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay}: wanted 0 (off) or a number below 1, such as 0.999")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}
        self._weights: list[Tensor] = []  # in the order of the averages
        self._step = 0  # of the last update

    @staticmethod
    def _parameters(pl_module: pl.LightningModule) -> dict[str, Tensor]:
        assert isinstance(pl_module.model, nn.Module)
        return {name: p.detach() for name, p in pl_module.model.named_parameters()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parameters = self._parameters(pl_module)
        if self.average:  # read from a checkpoint
            self.average = {name: self.average[name].to(p) for name, p in parameters.items()}
        else:
            self.average = {name: p.clone() for name, p in parameters.items()}
        self._weights = [parameters[name] for name in self.average]
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        t = trainer.global_step
        if t == self._step:  # gradients are being accumulated
            return
        self._step = t
        decay = min(self.decay, (1 + t) / (10 + t)) if self.decay else 0.0
        torch._foreach_lerp_(list(self.average.values()), self._weights, 1 - decay)

    @torch.no_grad()
    def swap_in(self, pl_module: pl.LightningModule) -> None:
        """Put the averaged weights into the model and keep the raw ones aside; nothing if there is no average yet."""
        if not self.average or self._raw:
            return
        parameters = self._parameters(pl_module)
        self._raw = {name: p.clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(self.average[name])

    @torch.no_grad()
    def swap_out(self, pl_module: pl.LightningModule) -> None:
        """Put the raw weights back."""
        for name, p in self._parameters(pl_module).items() if self._raw else ():
            p.copy_(self._raw[name])
        self._raw = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap_out(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.swap_out(pl_module)

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert not self._raw, "a checkpoint must hold the raw weights in state_dict"
        checkpoint["ema"] = {name: value.clone() for name, value in self.average.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.average = dict(checkpoint["ema"])
