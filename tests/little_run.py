"""A training of a few steps on random images, which says and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from wngen.data import ArrayFile
from wngen.training import Training

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "limit_val_batches": 0, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
}  # fmt: skip


def images_in(folder: Path) -> ArrayFile:
    """The same in every folder: 96 of 6 x 6 pixels, in batches of 16."""
    path = folder / "images.npz"
    arrays = np.random.default_rng(0).integers(0, 256, (96, 6, 6), dtype=np.uint8)
    np.savez(path, train=arrays, val=arrays[:8], test=arrays[:8])
    return ArrayFile(str(path), levels=256, batch_size=16)


def fit(training: Training, data: ArrayFile, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Four steps, unless the options of the trainer say otherwise."""
    path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_steps": 4, **options})
    trainer.fit(training, datamodule=data, ckpt_path=path, weights_only=True)
    return trainer
