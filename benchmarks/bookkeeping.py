"""What Lightning and our own bookkeeping add to a step: `wngen fit`'s trainer against a bare loop, in turns."""

from __future__ import annotations

import cProfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from bare_step import BareStep, Way, built, lightning
from jsonargparse import Namespace
from measuring import Clock

UNTIMED_STEPS = 5


class Turns(pl.Callback):
    """Lets blocks of training's steps take turns with blocks of bare ones, and times both.

    A block of training is timed from the end of the last batch before it to that of its own last batch, so that all
    that Lightning does between two batches is in it. It has one step that is logged.

    Args:
        bare: the other loop, with a model of its own.
        steps: of a block.
        rounds: how often each is timed, after a round that is not.
        clock: see `measuring.interleaved`.
        profile: records training's blocks where it is given.

    Attributes:
        training_seconds: of a step in training, of each round.
        bare_seconds: of a bare step, of each round.
    """

    def __init__(
        self, bare: BareStep, steps: int, rounds: int, clock: Clock, profile: cProfile.Profile | None = None
    ) -> None:
        self.bare, self.steps, self.rounds, self.profile = bare, steps, rounds, profile
        self._now = time.perf_counter if clock == "wall" else time.process_time
        self.training_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        done = trainer.global_step - UNTIMED_STEPS
        if done < 0 or done % self.steps:
            return
        if done:
            self.training_seconds.append(self._elapsed())
            if self.profile:
                self.profile.disable()
        started = self._now()
        for _ in range(self.steps):
            self.bare.bare()
        self.bare.wait()
        self.bare_seconds.append((self._now() - started) / self.steps)
        if self.profile:
            self.profile.enable()
        self._started = self._now()

    def _elapsed(self) -> float:
        self.bare.wait()
        return (self._now() - self._started) / self.steps

    def on_train_end(self, *args: Any) -> None:
        # A block of training is compared with the bare one before it; the first of them warmed up.
        self.training_seconds, self.bare_seconds = self.training_seconds[1:], self.bare_seconds[1 : self.rounds + 1]


def bookkeeping(
    config: Namespace,
    way: Way,
    device: str,
    folder: Path,
    steps: int,
    rounds: int,
    clock: Clock,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Seconds of a step in training, of a bare one, and where the difference goes.

    Args:
        config: see `bare_step.read_config`.
        way: how steps are taken.
        device: `cpu` or `cuda`.
        folder: that the training writes into.
        steps: of a block, of which one is logged.
        rounds: of one block each.
        clock: see `measuring.interleaved`.
        profile: a file for the profile of training's blocks, which `python -m pstats` shows; it makes them slower.

    Returns:
        A list for each, with an element for each round.
    """
    bare = BareStep(config, way, device, folder / "bare")
    profiler = cProfile.Profile(time.perf_counter if clock == "wall" else time.process_time) if profile else None
    turns = Turns(bare, steps, rounds, clock, profiler)
    training, data = built(config, way)
    trainer = lightning(
        folder,
        way,
        device,
        callbacks=[turns],
        log_every_n_steps=steps,
        max_steps=UNTIMED_STEPS + steps * (rounds + 1),
    )
    trainer.fit(training, datamodule=data)
    if profiler and profile:
        profiler.dump_stats(profile)
    return {"training_seconds": turns.training_seconds, "bare_seconds": turns.bare_seconds}
