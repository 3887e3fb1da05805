"""Pictures are drawn at the validations that are asked for."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from wngen.data import ArrayFile
from wngen.models import ConvVAE
from wngen.sampling.grids import GAP
from wngen.training import ImageGrids, Training


@pytest.mark.parametrize(("every_n_epochs", "steps"), [(0, []), (1, [2, 4, 6]), (2, [4])])
def test_grids_appear_every_so_many_epochs(tmp_path: Path, every_n_epochs: int, steps: list[int]):
    images = np.random.default_rng(0).integers(0, 2, (50, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train=images[:40], val=images[40:])
    data = ArrayFile(str(tmp_path / "images.npz"), levels=2, batch_size=20, test=0)
    torch.manual_seed(0)
    model = ConvVAE(1, 6, 6, 2, latent_dim=2, widths=(4,), blocks=1, hidden=8, iaf_width=8)
    pl.Trainer(
        accelerator="cpu",
        callbacks=[ImageGrids(count=4, every_n_epochs=every_n_epochs)],
        default_root_dir=tmp_path,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Training(model, init_images=20), datamodule=data)
    drawn = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    assert drawn == [f"{name}-{step:07d}.png" for name in ("reconstructions", "samples") for step in steps]
    for name in drawn:
        with Image.open(tmp_path / "images" / name) as picture:
            side = 11 * 6 + GAP  # a small image is enlarged elevenfold
            assert picture.size == (2 * side + GAP, 2 * side + GAP)  # four samples, or two pairs


def test_options_that_draw_nothing_by_mistake_are_refused():
    for wrong in ({"count": 0}, {"every_n_epochs": -1}):
        with pytest.raises(ValueError, match="wanted count >= 1, and no negative number"):
            ImageGrids(**wrong)
