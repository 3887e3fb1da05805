"""The critical batch size of a small VAE from whole runs, and the gradient noise scale of one of them beside it.

Runs `wngen fit` on statically binarized MNIST with several batch sizes until the validation bound reaches a given
value, with a constant learning rate tuned for each: from a guess the rate is doubled and halved until its neighbours on
both sides are slower. A run is given up after one and a half times the steps of the fastest yet of its batch size. With
the fastest rate it is run again with other seeds, and of these runs the first of the middle batch size has the callback
NoiseScale with it. What `wngen critical-batch` makes of the runs is the result.

Every run has a folder of its own in `out`; started again, the script goes on after the runs that are complete.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from measuring import machine, write_json
from rich.console import Console
from whole_runs import fitted

from wngen import cli
from wngen.evaluation.critical_batch import fit_trade_off, steps_to
from wngen.evaluation.figures import metrics_of, read_curves
from wngen.evaluation.reached import Reached
from wngen.evaluation.trained import Trained

TRAINING = [
    "--model.widths=[8,16]", "--model.hidden=128", "--model.posterior=diagonal", "--training.decay=constant",
    "--training.warmup_steps=20", "--images.every_n_epochs=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=-1",
    "--trainer.check_val_every_n_epoch=null", "--trainer.enable_progress_bar=false",
]  # fmt: skip
STOPPING = [
    "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/elbo_nats", "--trainer.callbacks.mode=max",
    f"--trainer.callbacks.patience={10**9}",
]  # fmt: skip
NOISE_SCALE = [
    "--trainer.callbacks+=NoiseScale", "--trainer.callbacks.every_n_steps=5", "--trainer.callbacks.parts=10",
    "--trainer.callbacks.window=1",
]  # fmt: skip
FIFTHS = 5
GUESS = 2e-3, 50  # a learning rate and its batch size; of others it is guessed to go with the square root
PATIENCE = 1.5  # times the steps of the fastest run of a batch size

console = Console()


@dataclass(frozen=True)
class Options:
    """What is run.

    Args:
        out: the folder that the runs and the results go to.
        batch_sizes: of training; divisors of `val_images`, so that all runs are validated on the same images.
        bound_nats: the validation bound to be reached.
        val_images: so many images for each validation.
        interval_images: train on so many between validations, but for ten steps at least.
        seeds: runs with the best rate of each batch size.
        max_steps: of a run.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks/critical_batch")
    batch_sizes: tuple[int, ...] = (16, 50, 200, 1000)
    bound_nats: float = -105.0
    val_images: int = 2000
    interval_images: int = 2000
    seeds: int = 2
    max_steps: int = 12_000
    threads: int = 1

    def __post_init__(self) -> None:
        if wrong := [size for size in self.batch_sizes if self.val_images % size]:
            raise ValueError(f"batch_sizes={wrong}: wanted divisors of val_images={self.val_images}")


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        batch_size: images in a step.
        exponent: the learning rate is 0.001 times this power of two.
        seed: of init, order and noise.
        is_measured: whether the noise scale is.
    """

    batch_size: int
    exponent: int
    seed: int = 0
    is_measured: bool = False

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 1e-3 * 2.0**self.exponent

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"batch-{self.batch_size}-rate-{self.rate:g}-seed-{self.seed}"

    def steps(self, options: Options, limit: float) -> float:
        """Steps to the bound, infinite if it is not reached; trains for at most `limit` of them, if not done before.

        Raises:
            RuntimeError: the training failed.
        """
        folder = fitted(options.out / self.name, self._arguments(options, limit))
        steps = steps_to(options.bound_nats, Trained.read(folder).curve) or math.inf
        console.print(f"{self.name}: {steps:,.0f} steps, {steps * self.batch_size:,.0f} images")
        return steps

    def _arguments(self, options: Options, limit: float) -> list[str]:
        interval = max(10, options.interval_images // self.batch_size)
        return [
            *TRAINING,
            f"--data.batch_size={self.batch_size}",
            f"--data.seed={self.seed}",
            f"--training.seed={self.seed}",
            f"--training.learning_rate={self.rate}",
            f"--trainer.max_steps={math.ceil(min(options.max_steps, limit))}",
            f"--trainer.val_check_interval={interval}",
            f"--trainer.limit_val_batches={options.val_images // self.batch_size}",
            *STOPPING,
            f"--trainer.callbacks.stopping_threshold={options.bound_nats}",
            *(NOISE_SCALE if self.is_measured else ()),
        ]


def tuned(batch_size: int, options: Options) -> tuple[Run, dict[float, float]]:
    """The fastest run of a batch size, and the steps to the bound for every learning rate that was tried.

    Raises:
        RuntimeError: none reached the bound.
    """
    rate, size = GUESS
    best = round(math.log2(1e3 * rate * math.sqrt(batch_size / size)))
    steps: dict[int, float] = {}
    while untried := [exponent for exponent in (best, best + 1, best - 1) if exponent not in steps]:
        fewest = min(steps.values(), default=math.inf)
        steps[untried[0]] = Run(batch_size, untried[0]).steps(options, PATIENCE * fewest)
        best = min(steps, key=lambda exponent: steps[exponent])
        if steps[best] == math.inf:
            raise RuntimeError(
                f"{options.bound_nats} nats is out of reach for batches of {batch_size}: raise max_steps"
            )
    return Run(batch_size, best), {Run(batch_size, exponent).rate: steps[exponent] for exponent in sorted(steps)}


def noise_scale(folder: Path) -> dict[str, Any]:
    """B_simple in images in each fifth of a run that measured it, as a ratio of averages, and the mean of them.

    The gradient of the first steps is so much larger that in an average over the whole run nothing else would count.
    """
    curves = read_curves(*metrics_of(folder))
    pairs = (curves[f"{name}/total"][1] for name in ("covariance_trace", "squared_gradient"))
    traces, squares = (np.array_split(values, FIFTHS) for values in pairs)
    scales = [float(trace.sum() / square.sum()) for trace, square in zip(traces, squares, strict=True)]
    return {"fifths": scales, "mean": statistics.fmean(scales)}


def main() -> None:
    """Run what is left to run, and report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_class_arguments(Options)
    options = Options(**parser.parse_args().as_dict())
    torch.set_num_threads(options.threads)
    rates: dict[int, dict[float, float]] = {}
    fastest: list[Run] = []
    middle = sorted(options.batch_sizes)[len(options.batch_sizes) // 2]
    measured: Run | None = None
    for batch_size in options.batch_sizes:
        best, rates[batch_size] = tuned(batch_size, options)
        fastest.append(best)
        for seed in range(1, options.seeds):
            again = Run(batch_size, best.exponent, seed, batch_size == middle and seed == 1)
            if again.steps(options, math.inf) < math.inf:
                fastest.append(again)
            measured = again if again.is_measured else measured
    folders = [str(options.out / run.name) for run in fastest]
    reached = Reached.by([Trained.read(Path(folder)) for folder in folders], options.bound_nats)
    fit = fit_trade_off([each.run.batch_size for each in reached], [each.steps for each in reached])
    record: dict[str, Any] = {
        "benchmark": "critical_batch",
        "machine": machine(),
        "options": {**asdict(options), "out": str(options.out)},
        "training": TRAINING,
        "steps_by_rate": rates,
        "runs": {each.run.name: {"batch_size": each.run.batch_size, "steps": each.steps} for each in reached},
        "fit": {**asdict(fit), "critical_batch": fit.critical_batch},
    }
    if measured is not None:
        record["noise_scale"] = {"run": measured.name, **noise_scale(options.out / measured.name)}
        console.print(f"Noise scale of {measured.name}, in images: {record['noise_scale']}", soft_wrap=True)
    write_json(options.out / "critical_batch.json", record)
    picture = str(options.out / "critical_batch.png")
    command = ["critical-batch", *folders, "--bound", str(options.bound_nats), "--out", picture]
    console.print(f"wngen {shlex.join(command)}", soft_wrap=True)
    sys.exit(cli.main(command))


if __name__ == "__main__":
    main()
