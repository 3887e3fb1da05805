"""Pictures of how training goes."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from wngen.image import Batch
from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel
from wngen.sampling import draw_samples, grid, reconstruct, save_png


class ImageGrids(pl.Callback):
    """Draws samples and reconstructions at each validation, with the averaged weights.

    They go to `<default_root_dir>/images/` and to TensorBoard. Samples are drawn from the same noise each time, so
    that one sees the same images become sharper.

    Args:
        count: images in a grid.
        every_n_epochs: how often, where there is a validation; 0 for never.
        seed: of the samples.

    Raises:
        ValueError: no image to draw, or a negative number of epochs.
    """

    def __init__(self, count: int = 64, every_n_epochs: int = 1, seed: int = 0) -> None:
        if count < 1 or every_n_epochs < 0:
            raise ValueError(
                f"count={count}, every_n_epochs={every_n_epochs}: wanted count >= 1, and no negative number"
            )
        self.count, self.every_n_epochs, self.seed = count, every_n_epochs, seed
        self._batch: Batch | None = None

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._batch = batch

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not trainer.is_global_zero or not is_due:
            return
        model = pl_module.model
        assert isinstance(model, LikelihoodModel)
        self._write(trainer, "samples", grid(draw_samples(model, self.count, seed=self.seed), model.spec.levels))
        if isinstance(model, LatentVariableModel) and self._batch is not None:
            x = self._batch.image[: self.count // 2]
            labels = None if model.num_classes is None or self._batch.label is None else self._batch.label[: len(x)]
            self._write(trainer, "reconstructions", reconstruct(model, x, labels))

    def _write(self, trainer: pl.Trainer, name: str, picture: Tensor) -> None:
        """`picture` is `(H, W, channels)` uint8."""
        save_png(picture, Path(trainer.default_root_dir) / "images" / f"{name}-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")
