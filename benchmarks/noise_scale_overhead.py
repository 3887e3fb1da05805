"""What the callback NoiseScale costs: how many steps of training a measurement takes as long as.

Every few steps of one training are measured, so that steps with a measurement and steps without one take turns.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from bare_step import Way, built, lightning, read_config
from jsonargparse import ArgumentParser
from measuring import Clock, machine, write_json
from rich.console import Console

from wngen.training import NoiseScale

UNTIMED_ROUNDS = 5

console = Console()


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        out: the folder of the result.
        config: what is trained.
        parts: of each measurement, one training for each.
        every_n_steps: so many steps for each measurement.
        rounds: measurements.
        clock: `cpu` for a machine where others run too.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks")
    config: str = "quickstart"
    parts: tuple[int, ...] = (4, 8)
    every_n_steps: int = 4
    rounds: int = 40
    clock: Clock = "wall"
    threads: int = 1


class Seconds(pl.Callback):
    """Takes the time of each step, from the end of the one before it.

    Attributes:
        of_step: in seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._now = time.perf_counter if clock == "wall" else time.process_time
        self.of_step: list[float] = []

    def on_train_start(self, *args: Any) -> None:
        self._ended = self._now()

    def on_train_batch_end(self, *args: Any) -> None:
        self.of_step.append(self._now() - self._ended)
        self._ended = self._now()


def steps_of_a_measurement(parts: int, options: Options) -> dict[str, float]:
    """How many steps a measurement takes as long as: median and quartiles over rounds; and the seconds of a step."""
    way = Way().on("cpu")
    training, data = built(read_config(options.config, None), way)
    seconds, noise = Seconds(options.clock), NoiseScale(options.every_n_steps, parts)
    every = options.every_n_steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning(
            Path(folder),
            way,
            "cpu",
            callbacks=[noise, seconds],
            max_steps=every * (UNTIMED_ROUNDS + options.rounds),
            enable_progress_bar=False,
        )
        trainer.fit(training, datamodule=data)
    starts = range(every * UNTIMED_ROUNDS, len(seconds.of_step), every)
    rounds = [seconds.of_step[start : start + every] for start in starts]
    ratios = [measured / statistics.median(plain) - 1 for *plain, measured in rounds]
    low, median, high = statistics.quantiles(ratios, n=4)
    step = statistics.median(second for *plain, _ in rounds for second in plain)
    return {"median": median, "low_quartile": low, "high_quartile": high, "step_seconds": step}


def main() -> None:
    """Measure and report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_class_arguments(Options)
    options = Options(**parser.parse_args().as_dict())
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`")
    results = {parts: steps_of_a_measurement(parts, options) for parts in options.parts}
    for parts, result in results.items():
        median, low, high, step = result.values()
        console.print(
            f"{parts} parts: a measurement takes as long as {median:.2f} steps ({low:.2f} to {high:.2f}) of "
            f"{1000 * step:.1f} ms; every 50 steps that is {2 * median:.1f} % more time",
            soft_wrap=True,
        )
    record = {"benchmark": "noise_scale_overhead", "machine": machine(), "options": {**asdict(options), "out": ""}}
    write_json(options.out / "noise_scale_overhead.json", {**record, "steps_of_a_measurement": results})


if __name__ == "__main__":
    main()
