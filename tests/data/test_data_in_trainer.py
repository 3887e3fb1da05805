"""The data modules under Lightning's Trainer: without a warning, and resumed as if never interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from wngen.data import ArrayFile, BinarizedMNIST
from wngen.image import Batch

# Lightning's own, with torch from 2.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Probe(pl.LightningModule):
    """A model with one parameter that writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[int], int]] = []
        self.validated: list[int] = []
        self.tested: list[int] = []

    def _nats(self, batch: Batch) -> Tensor:
        assert batch.image.dtype == torch.uint8
        assert batch.image.max() <= 1
        return nn.functional.softplus(self.bias) - batch.image.float().mean() * self.bias

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weights = torch.arange(batch.image.numel()).view_as(batch.image)
        self.seen.append((batch.index.tolist(), int((weights * batch.image).sum())))
        return self._nats(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch.index.tolist()
        self.log("val", self._nats(batch), batch_size=len(batch.index))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.tested += batch.index.tolist()
        self.log("test", self._nats(batch), batch_size=len(batch.index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, *callbacks: pl.Callback, **arguments) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(
        **quiet, default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **arguments
    )


def test_binarized_mnist_trains_validates_and_tests_without_a_warning(tmp_path):
    """Every warning is an error here."""
    probe, data = Probe(), BinarizedMNIST(batch_size=100)
    run = trainer(tmp_path, max_steps=3, limit_val_batches=2)
    run.fit(probe, data)
    assert [len(index) for index, _ in probe.seen] == [100] * 3
    assert [index for index, _ in probe.seen] == [
        batch.index.tolist()
        for batch, _ in zip(BinarizedMNIST(batch_size=100).train_dataloader(), range(3), strict=False)
    ]
    assert probe.validated[-200:] == list(range(200))
    run.test(probe, data)
    assert probe.tested == list(range(10_000))


def test_data_without_validation_images_trains_without_validation(tmp_path):
    probe = Probe()
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        trainer(tmp_path, max_steps=2).fit(probe, BinarizedMNIST(batch_size=100, validation=0))
    assert len(probe.seen) == 2
    assert probe.validated == []


@pytest.fixture
def dynamic(tmp_path):
    """Data whose every epoch and image differ, so that a wrong one is noticed; 5 batches in an epoch."""
    array = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", train=array[:53], val=array[53:], test=array[53:])
    return lambda: ArrayFile(tmp_path / "grey.npz", binarization="dynamic", horizontal_flips=True, batch_size=10)


def test_overfitting_repeats_the_same_draws_of_the_same_images(tmp_path, dynamic):
    probe = Probe()
    trainer(tmp_path, overfit_batches=2, max_epochs=3, limit_val_batches=0).fit(probe, dynamic())
    assert [len(index) for index, _ in probe.seen] == [9] * 6
    assert sorted(i for index, _ in probe.seen[:2] for i in index) == list(range(18))
    assert probe.seen == probe.seen[:2] * 3


def test_a_place_in_another_order_is_refused(tmp_path, dynamic):
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(Probe(), data := dynamic())
    state = data.state_dict()
    for name, other in (("batch_size", 12), ("seed", 7)):
        changed = dynamic()
        setattr(changed, name, other)
        with pytest.raises(ValueError, match=rf"trained with data\.{name}={state[name]}, this data has {other}"):
            changed.load_state_dict(state)
    data.trainer = trainer(tmp_path, overfit_batches=2)
    with pytest.raises(ValueError, match="overfit_batches goes through the same batches"):
        data.load_state_dict(state)


def test_part_of_an_epoch_at_a_time_sees_all_images(tmp_path, dynamic):
    whole, parts = Probe(), Probe()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(whole, dynamic())
    trainer(tmp_path, max_epochs=5, limit_train_batches=2, limit_val_batches=0).fit(parts, dynamic())
    assert parts.seen == whole.seen


def test_going_on_with_the_same_trainer_goes_on_with_the_data(tmp_path, dynamic):
    whole, parts, data = Probe(), Probe(), dynamic()
    trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(whole, dynamic())
    loop = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    loop.fit(parts, data)
    loop.fit_loop.max_epochs = 3
    loop.fit(parts, data)
    assert parts.seen == whole.seen
    again = Probe()
    trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(again, data)  # a new trainer begins anew
    assert again.seen == whole.seen


SAVES = {
    "within an epoch": {"every_n_train_steps": 7},
    "with the last batch of an epoch": {"every_n_train_steps": 10},
    "after an epoch": {"every_n_epochs": 2, "save_on_train_epoch_end": True},
    "after a validation": {"every_n_epochs": 2, "save_on_train_epoch_end": False},
}


@pytest.mark.parametrize("length", [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 25}], ids=["epochs", "steps"])
@pytest.mark.parametrize("validation", [{}, {"val_check_interval": 2}], ids=["each epoch", "within epochs"])
@pytest.mark.parametrize("save", SAVES)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(tmp_path, dynamic, save, validation, length):
    def run(ckpt_path: Path | None = None) -> Probe:
        checkpoint = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, **SAVES[save])
        probe, loop = Probe(), trainer(tmp_path, checkpoint, num_sanity_val_steps=0, **length, **validation)
        loop.fit(probe, dynamic(), ckpt_path=ckpt_path, weights_only=True)
        return probe

    whole = run()
    assert len(whole.seen) == 25
    files = list((tmp_path / "saved").rename(tmp_path / "kept").iterdir())
    assert len(files) >= 2
    for file in files:
        step = torch.load(file, weights_only=True)["global_step"]
        resumed = run(file)
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        assert resumed.seen == whole.seen[step:]
        assert torch.equal(resumed.bias, whole.bias)
