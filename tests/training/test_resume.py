"""A training that was killed, wherever that was, goes on as if it had not been: event for event, bit for bit."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from wngen.data import ArrayFile
from wngen.models import ConvVAE
from wngen.training import AtomicCheckpointIO, Checkpoints, Training

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Killed(BaseException):
    """As by `kill -9`: nothing more is written."""


class Witness(pl.Callback):
    """Writes down what happens."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Training) -> None:
        self.events.append(("epoch begins", trainer.current_epoch, trainer.global_step))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Training, outputs: Any, batch: Any, i: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        place = trainer.current_epoch, i, trainer.global_step, trainer.is_last_batch
        self.events.append(("batch", *place, rate, batch.index.tolist(), pl_module.skips.total))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Training) -> None:
        if not trainer.sanity_checking:
            figure = float(trainer.callback_metrics["val/elbo_nats"])
            logged_at = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.events.append(("validation", trainer.current_epoch, trainer.global_step, logged_at, figure))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Training) -> None:
        self.events.append(("epoch ends", trainer.current_epoch, trainer.global_step))


class Ledger(AtomicCheckpointIO):
    """Keeps each state that was written and the events before it, and kills the training after so many."""

    def __init__(self, witness: Witness, lives: float) -> None:
        super().__init__()
        self.witness, self.lives = witness, lives
        self.states: list[bytes] = []
        self.events: list[list[tuple[Any, ...]]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)
        if Path(path).name == "last.ckpt":
            self.states.append(Path(path).read_bytes())
            self.events.append(self.witness.events.copy())
            if len(self.states) == self.lives:
                raise Killed


class OnlyBetweenBatches(Checkpoints):
    """Writes nothing before a validation, so that the state after it is written."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    arrays = np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8)
    np.savez(path, train=arrays[:43], val=arrays[43:], test=arrays[43:])
    return path


def live(folder: Path, images: Path, mode: dict[str, Any], lives: float = math.inf) -> Ledger:
    """From `last.ckpt`, if there is one, until so many states are written or the end."""
    resumes = (folder / "last.ckpt").is_file()
    torch.manual_seed(99 if resumes else 0)  # what a process that resumes has drawn must not matter
    model = ConvVAE(1, 6, 6, 2, latent_dim=2, widths=(4,), blocks=1, hidden=8, iaf_width=8)
    options = {"init_images": 20, "warmup_steps": 2, "ema_decay": 0.9, "skip_norm": 40.0, "learning_rate": 0.05, **mode}
    checkpoints = options.pop("checkpoints", Checkpoints)(every_n_minutes=0, every_n_steps=1)
    of_training = {name: options.pop(name) for name in Training(model).options if name in options}
    witness = Witness()
    ledger = Ledger(witness, lives)
    best = ModelCheckpoint(
        folder, "best", "val/elbo_nats", mode="max", save_on_train_epoch_end=False, enable_version_counter=False
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[witness, best, checkpoints],
        plugins=[ledger],
        default_root_dir=folder,
        **quiet,
        **options,
    )
    with contextlib.suppress(Killed):
        trainer.fit(
            Training(model, **of_training),
            datamodule=ArrayFile(str(images), binarization="dynamic", horizontal_flips=True, batch_size=10),
            ckpt_path=folder / "last.ckpt" if resumes else None,
            weights_only=True,
        )
    return ledger


def plain(state: Any) -> Any:
    """Tensors as bytes, which can be compared."""
    if isinstance(state, Tensor):
        return state.dtype, state.shape, state.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items() if key != "current_score"}  # of the last validation
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


MODES = {
    "epochs": {"max_epochs": 3},
    "a schedule that asks for the epoch's length": {
        "max_epochs": 2, "val_check_interval": 0.5, "decay": "linear", "optimizer": "adamax"
    },
    "steps": {"max_steps": 17, "check_val_every_n_epoch": 2},
    "validation within epochs": {"max_epochs": 2, "val_check_interval": 2},
    "state after validation": {"max_epochs": 2, "val_check_interval": 2, "checkpoints": OnlyBetweenBatches},
    "validation across epochs": {"max_steps": 11, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "state after validation across epochs": {
        "max_steps": 11, "val_check_interval": 3, "check_val_every_n_epoch": None, "checkpoints": OnlyBetweenBatches
    },
    "accumulated gradients": {"max_epochs": 3, "accumulate_grad_batches": 2},
    "part of an epoch": {"max_epochs": 3, "limit_train_batches": 3, "decay": "cosine"},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_from_every_state_training_goes_on_to_the_next_event_for_event_and_bit_for_bit(mode, images, tmp_path):
    """And so, by induction, to the end, however often it is killed: between two states nothing is written to resume."""
    folder = tmp_path / "run"
    whole = live(folder, images, MODES[mode])
    kinds = [event[0] for event in whole.events[-1]]
    assert kinds.count("validation") >= 2
    for i, state in enumerate(whole.states):
        (folder / "last.ckpt").write_bytes(state)
        resumed = live(folder, images, MODES[mode], lives=1)
        if i == len(whole.states) - 1:
            assert not resumed.witness.events
            continue
        expected = whole.events[i + 1][len(whole.events[i]) :]
        assert resumed.witness.events == expected, i
        before, after = (
            torch.load(io.BytesIO(run.states[n]), weights_only=True) for run, n in ((whole, i + 1), (resumed, 0))
        )
        for name, value in before.items():
            assert plain(value) == plain(after[name]), (i, name)
