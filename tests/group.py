"""Processes that train together, as torchrun would have started them, and what has come of it in each."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import socket
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from wngen.data import ArrayFile
from wngen.image import Batch
from wngen.models import ConvVAE, PixelCNNPP, ResNetVAE
from wngen.nn import fold
from wngen.training import AtomicCheckpointIO, Checkpoints, Training

PATIENCE_S = 120  # of a whole group of processes, on a machine that does other things too
STEPS = 20
BATCH = 12
# Processes are forked from a server that has imported everything and computed nothing: after a backward pass on a
# machine with a GPU, autograd works in no process that is forked.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytorch_lightning", "wngen.cli"])

MODELS: dict[str, Any] = {
    "ConvVAE": lambda: ConvVAE(1, 6, 6, 256, latent_dim=3, widths=(4,), blocks=1, hidden=8, iaf_width=8),
    "ResNetVAE": lambda: ResNetVAE(1, 8, 8, 256, layers="4x1, 2x1", feature_maps=4, latent_channels=2),
    "PixelCNNPP": lambda: PixelCNNPP(1, 8, 8, 256, filters=4, blocks=1, scales=1, components=2, dropout=0),
}


class Faulty(Training):
    """Whose loss is infinite at some steps, in the last process alone."""

    def __init__(self, *args: Any, faulty_steps: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.faulty_steps = faulty_steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        is_faulty = self.global_rank == self.trainer.world_size - 1 and self.global_step in self.faulty_steps
        return loss * math.inf if is_faulty else loss


class Deaf(Training):
    """Who decides what is below the floor by the process's own images."""

    def _average_over_processes(self, mean: Tensor) -> Tensor:
        return mean


class Witness(pl.Callback):
    """Keeps the weights that training begins with, and what is logged."""

    def __init__(self) -> None:
        self.begun: dict[str, Tensor] = {}
        self.logged: list[dict[str, float]] = []
        self.broadcasts = True  # of buffers, before every step

    def on_train_start(self, trainer: pl.Trainer, pl_module: Training) -> None:
        self.broadcasts = any(
            getattr(trainer.strategy.model, name, False) for name in ("broadcast_buffers", "forward_sync_buffers")
        )
        self.begun = {name: value.clone() for name, value in pl_module.model.state_dict().items()}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._keep(trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Training) -> None:
        self._keep(trainer, "val/")

    def _keep(self, trainer: pl.Trainer, kind: str) -> None:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(kind)}
        self.logged.append(figures)


def train(folder: Path, images: Path, kind: type[Training] = Training, model: str = "ConvVAE", **options: Any) -> Any:
    """One process's part of a training in `folder`, and what has come of it there."""
    torch.manual_seed(0)
    about = {"warmup_steps": 3, "ema_decay": 0.9, "init_images": 40, "learning_rate": 0.003}
    witness, network = Witness(), MODELS[model]()
    of_training = {name: options.pop(name) for name in {*Training(network).options, "faulty_steps"} & options.keys()}
    training = kind(network, **about | of_training)
    data = ArrayFile(
        str(images), binarization="none", horizontal_flips=True, batch_size=options.pop("batch_size", BATCH)
    )
    begun = folder / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[witness, Checkpoints(0)],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"max_steps": STEPS, **options},
    )
    trainer.fit(training, datamodule=data, ckpt_path=begun if begun.exists() else None, weights_only=True)
    return {
        "begun": witness.begun,
        "weights": dict(network.state_dict()),
        "effective": dict(fold(network).state_dict()),
        "average": training.ema.average,
        "logged": witness.logged,
        "skipped": training.skips.total,
        "steps": trainer.global_step,
        "broadcasts": witness.broadcasts,
    }


def take_part(folder: Path, rank: int, count: int, port: int, arguments: tuple[Any, ...], options: Any) -> None:
    """A process that torchrun would have started."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    several = {"strategy": "ddp", "devices": count} if count > 1 else {"devices": 1}
    try:
        with (folder / f"said.{rank}").open("w") as said, contextlib.redirect_stderr(said):
            result = train(folder, *arguments, **several, **options)
        torch.save(result, folder / f"result.{rank}")
    except BaseException:
        (folder / f"error.{rank}").write_text(traceback.format_exc())
        raise


def ended(processes: list[BaseProcess]) -> list[int | None]:
    """Their statuses; none of them outlives the patience, nor this."""
    until = time.monotonic() + PATIENCE_S
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def together(folder: Path, count: int, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    """The results of so many processes that train together."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=take_part, args=(folder, rank, count, port, arguments, options), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    statuses = ended(processes)
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error.*")))
    assert statuses == [0] * count, f"statuses {statuses}\n{errors}"
    return [torch.load(folder / f"result.{rank}", weights_only=True) for rank in range(count)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert one.keys() == other.keys()
    pairs = [(one[name].double(), other[name].double()) for name in one if one[name].is_floating_point()]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def saved_images(folder: Path, side: int) -> Path:
    path = folder / f"{side}.npz"
    arrays = np.random.default_rng(0).integers(0, 256, (120, side, side), dtype=np.uint8)
    np.savez(path, train=arrays[:79], val=arrays[79:102], test=arrays[102:])
    return path
