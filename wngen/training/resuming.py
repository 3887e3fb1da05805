"""The state that a training goes on from: written between two steps, and complete."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger

from wngen.checkpoint import LAST
from wngen.training.ema import EMA


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt`, in the run folder, the newest state of the training.

    It is written at the end of each epoch, now and then within one, and where Ctrl-C or SIGTERM asks the training to
    stop: at the end of the step, or before the validation that it came in; with several processes, at the end of the
    next step, or after the validation. What it holds goes on as if nothing had been between: the same batch comes next,
    and the same validation.

    Args:
        every_n_minutes: how often within an epoch; 0 for no such.
        every_n_steps: how often within an epoch, besides; 0 for no such.

    Raises:
        ValueError: a negative number.

    Attributes:
        saved_step: the step that `last.ckpt` was written after; None if this training has written none yet.
    """

    def __init__(self, every_n_minutes: float = 5.0, every_n_steps: int = 0) -> None:
        if every_n_minutes < 0 or every_n_steps < 0:
            raise ValueError(
                f"every_n_minutes={every_n_minutes}, every_n_steps={every_n_steps}: wanted no negative number"
            )
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.saved_step: int | None = None
        self._place: tuple[int, bool] | None = None  # in training, of the last save: its step, and if validation came
        self._last_time = 0.0
        self._told = torch.zeros(())  # what any of the processes was asked
        self._arrived: torch.cuda.Event | None = None  # when that is here, where it comes from a GPU
        self._validation_comes: bool | None = None  # while saving
        self._signal = 0  # that asked to stop
        self._handlers: dict[signal.Signals, Any] = {}

    # When to save, and when to stop

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signal, self._last_time, self._told, self._arrived = 0, time.monotonic(), torch.zeros(()), None
        self._place = trainer.global_step, trainer.fit_loop.epoch_loop.val_loop.restarted_mid_evaluation
        # Before every step Lightning would have all processes wait to hear of a signal, which is ours to tell.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: object) -> None:
        if number == self._signal == signal.SIGINT:  # for the second time: not even to the end of the step
            raise KeyboardInterrupt
        self._signal = number

    def _release(self) -> None:
        self._place = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = trainer.global_step  # figures are logged under it, and resuming loses count of it
        done: int = loop.batch_progress.current.processed  # type: ignore[attr-defined]
        if done % trainer.accumulate_grad_batches == 0:
            self._rest(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._place is None or trainer.fit_loop._should_accumulate():
            return
        averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        for average in averages:
            average.swap_out(pl_module)
        self._rest(trainer, validation_comes=True)
        for average in averages:
            average.swap_in(pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._signal and trainer.world_size == 1:  # several processes may differ in their number of batches
            self.on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._place is not None:
            self._tell(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rest(trainer, is_due=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        if self._signal:
            raise SystemExit(128 + self._signal)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _rest(self, trainer: pl.Trainer, validation_comes: bool = False, is_due: bool = False) -> None:
        """Between two steps: save if it is time to, and stop if that was asked for.

        Raises:
            SystemExit: it was asked for, with the status that says by which signal.
        """
        assert self._place is not None
        place = trainer.global_step, validation_comes
        by_steps = self.every_n_steps and place[0] % self.every_n_steps == 0
        if trainer.world_size == 1 or validation_comes or is_due:
            self._tell(trainer)
        if self._arrived is not None:
            self._arrived.synchronize()
        asked = int(self._told)
        wanted = asked or int(is_due or by_steps)
        is_new = place != self._place if is_due or wanted > 1 else place[0] != self._place[0]
        if wanted and is_new and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, validation_comes)
            self._place, self._last_time, self.saved_step = place, time.monotonic(), place[0]
        if wanted > 1:
            raise SystemExit(128 + wanted)
        if trainer.world_size > 1:  # to be read at the next step, so that a GPU is not waited for
            self._tell(trainer)

    @property
    def _asked(self) -> int:
        """The signal that came to this process; 1 if so many minutes have passed here, 0 for neither."""
        minutes = (time.monotonic() - self._last_time) / 60
        return self._signal or int(0 < self.every_n_minutes <= minutes)

    def _tell(self, trainer: pl.Trainer) -> None:
        """What one of the processes was asked, all are."""
        self._told, self._arrived = torch.tensor(self._asked), None
        if trainer.world_size > 1:  # not by the strategy's `reduce`, which waits for all processes first
            told = torch.full((), self._asked, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self._told = told.to("cpu", non_blocking=True)
            if told.is_cuda:  # reading it there later would wait for all that the GPU has been asked since
                self._arrived = torch.cuda.Event()
                self._arrived.record()

    # What is saved

    def _save(self, trainer: pl.Trainer, validation_comes: bool) -> None:
        for logger in trainer.loggers:  # so that curves reach up to here
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        self._validation_comes = validation_comes
        try:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / LAST)
        finally:
            self._validation_comes = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validation_comes is not None:
            set_at_rest(checkpoint["loops"]["fit_loop"], int(trainer.num_training_batches), self._validation_comes)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """What was the best so far is known by its path, also where the folder has been moved."""
        folder = os.path.realpath(trainer.default_root_dir)
        for state in checkpoint["callbacks"].values():
            before = state.get("dirpath")
            if before and "best_model_path" in state:
                state["dirpath"] = folder
                for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[name] = _moved(state[name], before, folder)
                state["best_k_models"] = {_moved(p, before, folder): v for p, v in state["best_k_models"].items()}


def _moved(path: str, before: str, after: str) -> str:
    return str(Path(after) / Path(path).relative_to(before)) if path and Path(path).is_relative_to(before) else path


def set_at_rest(fit_loop: dict[str, Any], num_batches: int, validation_comes: bool) -> None:
    """Write into the state of Lightning's loops that they are between two steps.

    Lightning saves its counters as they are, in whatever hook, and guesses from their differences which hook it was
    when it resumes. It guesses wrong here and there: leaves a validation out, or counts an epoch twice. From counters
    at rest it resumes rightly.

    Args:
        fit_loop: the state, as in a checkpoint; it is changed.
        num_batches: of an epoch.
        validation_comes: whether a validation is to come before the next step.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    done = batches["current"]["processed"]
    is_over = done == num_batches and not validation_comes
    completed = epochs["current"]["completed"] + is_over
    done = 0 if is_over else done
    begun = completed + (done > 0)
    for counts in epochs.values():
        counts |= {"ready": begun, "started": begun, "processed": completed, "completed": completed}
    batches["current"] = dict.fromkeys(batches["current"], done)
    batches["total"] = dict.fromkeys(batches["total"], batches["total"]["processed"])
    batches["is_last_batch"] = done == num_batches
    if not done:
        optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        for counts in (fit_loop["epoch_loop.scheduler_progress"], *optimizer.values()):
            counts["current"] = dict.fromkeys(counts["current"], 0)
    # Begun and without a batch is how Lightning knows a validation that was interrupted.
    comes = int(validation_comes)
    none = {"ready": comes, "started": comes, "processed": 0, "completed": 0}
    fit_loop["epoch_loop.val_loop.batch_progress"] = {"total": none, "current": dict(none), "is_last_batch": False}
    fit_loop["state_dict"].pop("combined_loader", None)  # may be a batch ahead; the data module knows its place
