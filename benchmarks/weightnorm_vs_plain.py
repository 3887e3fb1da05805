"""The claim of the weight normalization paper: the same VAE trained with and without it.

Trains one convolutional VAE with an IAF posterior on statically binarized MNIST in four forms:

- weight_norm: weight-normalized layers with data-dependent init;
- plain: plain layers that start from exactly the same function, and so from the same data-dependent init;
- plain_default_init: plain layers with torch's default init;
- batch_norm: the plain layers, each but the last one of encoder and decoder followed by batch norm. The
  parameters of the posterior and the flow have none: normalized over a batch, they would be no density. In
  training even so the bound of an image depends on the rest of its batch; what is reported is taken with fixed
  moments, computed anew for the averaged weights from training images.

Each form is trained once with each learning rate of a grid, for `grid_epochs`. With the rate of the best
validation bound, its own, it is then trained for `epochs` with every seed. The forms take turns of a fraction of
an epoch, so that the machine's moods hit all alike. Seconds are those of training steps, evaluation left out.
Bounds are of exponentially averaged weights, with one sample of the posterior.

Writes to `out`: weightnorm_vs_plain.json, weightnorm_vs_plain.png (bound against epochs and against seconds, mean
and standard deviation over seeds), and weightnorm_vs_plain.jsonl with every finished run. Started again, it goes
on after the finished runs of the same settings.

Reference: Salimans & Kingma 2016, section 5.2 and figure 3.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import interleaved, machine, write_json
from plain_layers import add_batch_norm, plain_copy
from rich.console import Console
from rich.table import Table
from torch import nn

from wngen.data import BinarizedMNIST
from wngen.image import Batch
from wngen.models import ConvVAE
from wngen.nn import data_dependent_init
from wngen.noise import Noise

NAME = "weightnorm_vs_plain"
ARMS = {
    "weight_norm": ("weight norm", "#c2410c"),
    "plain": ("plain, same init", "#1d4ed8"),
    "plain_default_init": ("plain, torch's init", "#6b7280"),
    "batch_norm": ("batch norm", "#15803d"),
}
INIT_IMAGES = 256
MOMENT_IMAGES = 2048  # from which batch norm's moments are computed for evaluation
EVALUATION_BATCH = 512
GRID_SEED = 0  # of the runs that choose the learning rate; those that are reported have others

console = Console()


@dataclass(frozen=True)
class Options:
    """Weight normalization against plain layers and batch norm: bound against epochs and seconds.

    Args:
        out: the folder that the results go to.
        minutes: start no further runs that would not end within so many minutes; the same command goes on.
        epochs: of the runs that are reported.
        grid_epochs: of the runs that choose the learning rate.
        evaluations_per_epoch: points of the curve in each epoch.
        rates: the learning rates to choose from.
        seeds: how many runs of each form are reported.
        optimizer: adamax as in the paper, or adam.
        batch_size: images in a step.
        ema_decay: of the averaged weights; less at the beginning.
        train_images: a random subset of so many training images, the same in all runs; 50,000 by default.
        val_images: a random subset of so many validation images.
        widths: feature maps of each stage of the model.
        blocks: residual blocks of each stage.
        patch: the first stage works on patches of so many pixels squared.
        hidden: units of the fully connected layers.
        iaf_width: units of the hidden layer of each of the two steps of the flow.
        precision: bf16 is autocast.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks")
    minutes: float | None = None
    epochs: int = 3
    grid_epochs: int = 1
    evaluations_per_epoch: int = 4
    rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3])
    seeds: int = 3
    optimizer: Literal["adamax", "adam"] = "adamax"
    batch_size: int = 64
    ema_decay: float = 0.999
    train_images: int | None = None
    val_images: int = 2000
    widths: list[int] = field(default_factory=lambda: [16, 32])
    blocks: int = 1
    patch: int = 2
    hidden: int = 256
    iaf_width: int = 320
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What a run depends on beside its form, learning rate, seed and number of epochs."""
        varied = {"out", "minutes", "epochs", "grid_epochs", "rates", "seeds"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in varied}


@dataclass(frozen=True)
class Data:
    """The images that all runs share, in memory.

    Attributes:
        train: to train on.
        init: of those, the ones that initialize.
        val: for the curves and the choice of the learning rate.
        test: for the figure at the end.
    """

    train: Batch
    init: Batch
    val: Batch
    test: Batch

    @classmethod
    def load(cls, options: Options) -> Data:
        """Draw the subsets that the options ask for."""
        data = BinarizedMNIST()

        def images(split: Literal["train", "val", "test"], limit: int | None) -> Batch:
            return next(iter(data.evaluation_batches(split, data.size(split), limit)))

        train = images("train", options.train_images)
        return cls(train, part(train, slice(INIT_IMAGES)), images("val", options.val_images), images("test", None))


def part(images: Batch, rows: slice | torch.Tensor) -> Batch:
    """Some of the images; the binarized set has no labels."""
    return Batch(images.image[rows], None, images.index[rows])


def parts(images: Batch) -> Iterator[Batch]:
    """All images in order, as many at a time as are evaluated at once."""
    for start in range(0, len(images.index), EVALUATION_BATCH):
        yield part(images, slice(start, start + EVALUATION_BATCH))


def shuffled(images: Batch, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of one size without end, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images.index), generator=generator).split(batch_size):
            if len(rows) == batch_size:
                yield part(images, rows)


def build(arm: str, seed: int, data: Data, options: Options) -> nn.Module:
    """The model in one of its four forms; but for torch's init, all of a seed start from the same function."""
    torch.manual_seed(seed)
    sizes = {name: getattr(options, name) for name in ("widths", "blocks", "patch", "hidden", "iaf_width")}
    model: nn.Module = ConvVAE(**sizes)
    data_dependent_init(model, data.init.image, noise=Noise(seed, data.init.index))
    if arm != "weight_norm":
        model = plain_copy(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    if arm == "plain_default_init":
        for layer in layers.values():
            layer.reset_parameters()
    if arm == "batch_norm":
        inner = [name for name in layers if name.startswith(("encoder.", "decoder.")) and name != "decoder.output"]
        add_batch_norm(model, inner)
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Run:
    """What a run is, and what came of it.

    Attributes:
        arm: the form of the model.
        rate: learning rate.
        seed: of init, order and noise.
        epochs: how long.
        curve_epochs: where the bound was taken.
        curve_elbo_nats: the validation bound there, of averaged weights; shorter for a run that diverged.
        seconds_per_epoch: median over its turns, of training steps alone.
        test_elbo_nats: at the end; None where it was not wanted, or the run diverged.
        diverged: whether the bound ceased to be finite.
    """

    arm: str
    rate: float
    seed: int
    epochs: int
    curve_epochs: list[float]
    curve_elbo_nats: list[float]
    seconds_per_epoch: float
    test_elbo_nats: float | None
    diverged: bool

    @property
    def key(self) -> tuple[str, float, int, int]:
        """What tells it from other runs of the same settings."""
        return self.arm, self.rate, self.seed, self.epochs


class Trainer:
    """Trains one model, a turn at a time.

    Args:
        arm: the form of the model.
        rate: learning rate.
        seed: of init, order and noise.
        data: what all runs share.
        options: of the benchmark.
    """

    def __init__(self, arm: str, rate: float, seed: int, data: Data, options: Options) -> None:
        self.arm, self.rate, self.seed, self.data, self.options = arm, rate, seed, data, options
        self.model = build(arm, seed, data, options)
        self.parameters = list(self.model.parameters())
        if options.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters, rate, fused=True)
        else:
            self.optimizer = torch.optim.Adamax(self.parameters, rate, foreach=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.batches = shuffled(data.train, options.batch_size, seed)
        self.steps = 0
        self.diverged = False
        self.step_seconds: list[float] = []
        self.epochs: list[float] = []
        self.elbo_nats: list[float] = []

    def step(self) -> None:
        """One step of the optimizer and of the average."""
        batch = next(self.batches)
        with self.autocast():
            bound = self.model(batch.image, noise=Noise(self.seed, batch.index, self.steps + 1))
        loss = -bound.elbo_nats.mean()
        self.diverged = not math.isfinite(loss.item())
        if self.diverged:
            return
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        decay = min(self.options.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def turn(self, steps: int, steps_per_epoch: int) -> None:
        """Train for some steps, then take the validation bound; nothing once the run has diverged."""
        started = time.perf_counter()
        for done in range(steps):
            if self.diverged:
                return
            self.step()
        self.step_seconds.append((time.perf_counter() - started) / steps)
        elbo_nats = self.evaluate(self.data.val)
        self.diverged = not math.isfinite(elbo_nats)
        if not self.diverged:
            self.epochs.append(self.steps / steps_per_epoch)
            self.elbo_nats.append(elbo_nats)

    @torch.no_grad()
    def evaluate(self, images: Batch) -> float:
        """The mean bound on some images, of the averaged weights."""
        raw = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        self._renew_moments()
        self.model.eval()
        total = 0.0
        for batch in parts(images):
            with self.autocast():
                bound = self.model(batch.image, noise=Noise(0, batch.index))
            total += bound.elbo_nats.double().sum().item()
        self.model.train()
        torch._foreach_copy_(self.parameters, raw)
        return total / len(images.index)

    def _renew_moments(self) -> None:
        """The moments of batch norm under the weights as they are now."""
        norms = [layer for layer in self.model.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for norm in norms:
            norm.reset_running_stats()
        for batch in parts(part(self.data.train, slice(MOMENT_IMAGES))) if norms else ():
            with self.autocast():
                self.model(batch.image, noise=Noise(0, batch.index))

    def autocast(self) -> torch.autocast:
        """As the precision says."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.options.precision == "bf16")

    def result(self, epochs: int, steps_per_epoch: int, test: bool) -> Run:
        """The run as it is recorded."""
        return Run(
            self.arm,
            self.rate,
            self.seed,
            epochs,
            self.epochs,
            self.elbo_nats,
            statistics.median(self.step_seconds or [math.nan]) * steps_per_epoch,
            self.evaluate(self.data.test) if test and not self.diverged else None,
            self.diverged,
        )


class Benchmark:
    """All runs, those that are done and those to do.

    Args:
        options: of the benchmark.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.data = options, Data.load(options)
        self.log = options.out / f"{NAME}.jsonl"
        rows = map(json.loads, self.log.read_text().splitlines()) if self.log.exists() else ()
        found = [Run(**row["run"]) for row in rows if row["settings"] == options.settings]
        self.done = {run.key: run for run in found}
        self.steps_per_epoch = len(self.data.train.index) // options.batch_size
        self.turn_steps = self.steps_per_epoch // options.evaluations_per_epoch
        self.started = time.monotonic()

    def grid(self) -> list[list[tuple[str, float, int, int]]]:
        """The runs that choose the learning rate, in groups that take turns."""
        return [[(arm, rate, GRID_SEED, self.options.grid_epochs) for arm in ARMS] for rate in self.options.rates]

    def final(self, rates: dict[str, float]) -> list[list[tuple[str, float, int, int]]]:
        """The runs that are reported, in groups that take turns."""
        seeds = range(GRID_SEED + 1, GRID_SEED + 1 + self.options.seeds)
        return [[(arm, rate, seed, self.options.epochs) for arm, rate in rates.items()] for seed in seeds]

    def best_rates(self) -> dict[str, float]:
        """The learning rate of the best validation bound of each form.

        Raises:
            ValueError: a form diverged with all of them.
        """
        best = {}
        for arm in ARMS:
            runs = [self.done[key] for group in self.grid() for key in group if key[0] == arm]
            runs = [run for run in runs if not run.diverged]
            if not runs:
                raise ValueError(f"{arm} diverged with every learning rate of {self.options.rates}: add lower ones")
            best[arm] = max(runs, key=lambda run: run.curve_elbo_nats[-1]).rate
        return best

    def seconds(self) -> tuple[dict[str, float], float]:
        """Of a training step of each form, and of an evaluation of the validation images."""
        trainers = {arm: Trainer(arm, min(self.options.rates), GRID_SEED, self.data, self.options) for arm in ARMS}
        batch = part(self.data.val, slice(EVALUATION_BATCH))
        calls = {**{arm: trainer.step for arm, trainer in trainers.items()}, "": lambda: trainers["plain"].evaluate(batch)}
        seconds = {name: statistics.median(times) for name, times in interleaved(calls, rounds=9).items()}
        return seconds, seconds.pop("") / len(batch.index) * self.options.val_images

    def estimate(self) -> dict[int, float]:
        """Seconds that a group of runs will take, by its number of epochs."""
        steps, evaluation = self.seconds()
        turn = sum(steps.values()) * self.turn_steps + len(ARMS) * evaluation
        # Batch norm computes moments anew each time; the reported runs end with the test images.
        turn += evaluation * MOMENT_IMAGES / self.options.val_images
        test = len(ARMS) * evaluation * len(self.data.test.index) / self.options.val_images
        lengths = {self.options.grid_epochs: 0.0, self.options.epochs: test}
        return {n: n * self.options.evaluations_per_epoch * turn + extra for n, extra in lengths.items()}

    def run(self, groups: Iterable[list[tuple[str, float, int, int]]], seconds: dict[int, float], test: bool) -> bool:
        """Do the runs that are not done yet; False if the time does not suffice for all."""
        for group in groups:
            keys = [key for key in group if key not in self.done]
            if not keys:
                continue
            epochs = keys[0][-1]
            elapsed = time.monotonic() - self.started
            if self.options.minutes is not None and elapsed + seconds[epochs] > 60 * self.options.minutes:
                console.print("No time is left for further runs; the same command goes on after the finished ones.")
                return False
            trainers = [Trainer(arm, rate, seed, self.data, self.options) for arm, rate, seed, _ in keys]
            for _ in range(epochs * self.options.evaluations_per_epoch):
                for trainer in trainers:
                    trainer.turn(self.turn_steps, self.steps_per_epoch)
                trainers = trainers[1:] + trainers[:1]
            with self.log.open("a") as file:
                for trainer in trainers:
                    run = trainer.result(epochs, self.steps_per_epoch, test)
                    self.done[run.key] = run
                    file.write(json.dumps({"run": asdict(run), "settings": self.options.settings}) + "\n")
                    bound = "diverged" if run.diverged else f"{run.curve_elbo_nats[-1]:.2f} nats"
                    console.print(f"{run.arm:20} rate {run.rate:g}, seed {run.seed}, {epochs} epochs: {bound}")
        return True

    def record(self, rates: dict[str, float]) -> dict[str, Any]:
        """Everything that came out, as JSON."""
        grid = [self.done[key] for group in self.grid() for key in group]
        final = [self.done[key] for group in self.final(rates) for key in group]
        arms = {arm: summary([run for run in final if run.arm == arm], self.options.rates) for arm in ARMS}
        reached = arms["plain"]["val_elbo_nats"]["mean"]
        for arm in arms.values():
            arm["epochs_to_final_bound_of_plain"] = first_epoch_above(reached, arm["curve"])
        return {
            "benchmark": NAME,
            "machine": machine(),
            "settings": self.options.settings,
            "data": {
                "train": BinarizedMNIST().protocol("train", self.options.train_images),
                "val": BinarizedMNIST().protocol("val", self.options.val_images),
                "test": BinarizedMNIST().protocol("test"),
            },
            "parameters": {arm: sum(p.numel() for p in build(arm, 0, self.data, self.options).parameters()) for arm in ARMS},
            "epochs": self.options.epochs,
            "steps": self.options.epochs * self.options.evaluations_per_epoch * self.turn_steps,
            "seeds": [group[0][2] for group in self.final(rates)],
            "arms": arms,
            "grid": {
                "epochs": self.options.grid_epochs,
                "seed": GRID_SEED,
                "val_elbo_nats": {
                    arm: {f"{run.rate:g}": None if run.diverged else run.curve_elbo_nats[-1] for run in grid if run.arm == arm}
                    for arm in ARMS
                },
            },
        }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values) if values else None, "std": std, "runs": len(values)}


def summary(runs: list[Run], rates: list[float]) -> dict[str, Any]:
    """What came out for one form; runs that diverged are counted, and left out of the averages."""
    finite = [run for run in runs if not run.diverged]
    seconds = statistics.median([run.seconds_per_epoch for run in finite]) if finite else None
    curves = np.array([run.curve_elbo_nats for run in finite])
    return {
        "rate": runs[0].rate,
        "rate_at_edge_of_grid": runs[0].rate in (min(rates), max(rates)),
        "diverged": len(runs) - len(finite),
        "val_elbo_nats": spread([run.curve_elbo_nats[-1] for run in finite]),
        "test_elbo_nats": spread([run.test_elbo_nats for run in finite if run.test_elbo_nats is not None]),
        "seconds_per_epoch": seconds,
        "curve": {
            "epochs": finite[0].curve_epochs if finite else [],
            "elbo_nats_mean": curves.mean(axis=0).tolist() if finite else [],
            "elbo_nats_std": curves.std(axis=0, ddof=min(1, len(finite) - 1)).tolist() if finite else [],
        },
    }


def first_epoch_above(bound: float | None, curve: dict[str, list[float]]) -> float | None:
    """Where a curve first reaches a bound, between its points by straight lines; None if it never does."""
    if bound is None:
        return None
    points = list(zip(curve["epochs"], curve["elbo_nats_mean"], strict=True))
    for i, (epoch, value) in enumerate(points):
        if value >= bound:
            if i == 0:
                return epoch
            before, below = points[i - 1]
            return before + (epoch - before) * (bound - below) / (value - below)
    return None


def show(record: dict[str, Any]) -> None:
    """The table."""
    table = Table("form", "rate", "val ELBO", "test ELBO", "s/epoch", "epochs*", "diverged")
    for arm, figures in record["arms"].items():
        edge = "!" if figures["rate_at_edge_of_grid"] else ""
        bounds = [figures["val_elbo_nats"], figures["test_elbo_nats"]]
        reached = figures["epochs_to_final_bound_of_plain"]
        table.add_row(
            ARMS[arm][0],
            f"{figures['rate']:g}{edge}",
            *("-" if b["mean"] is None else f"{b['mean']:.2f} ± {b['std'] or 0:.2f}" for b in bounds),
            f"{figures['seconds_per_epoch'] or math.nan:.1f}",
            "-" if reached is None else f"{reached:.2f}",
            str(figures["diverged"]),
        )
    console.print(table)
    console.print(
        f"ELBO in nats, mean ± standard deviation over {len(record['seeds'])} seeds. Rates were chosen on validation "
        "images; ! is one at the edge of the grid.\n* until the bound that the plain form with the same init ends with."
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Bound against epochs and against seconds of training."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    settled = []
    for arm, figures in record["arms"].items():
        label, color = ARMS[arm]
        epochs, mean, std = (np.array(figures["curve"][name]) for name in ("epochs", "elbo_nats_mean", "elbo_nats_std"))
        if not len(epochs):
            continue
        settled.append(mean[epochs >= 0.2 * record["epochs"]].min())
        for panel, x in zip(panels, (epochs, epochs * figures["seconds_per_epoch"]), strict=True):
            panel.plot(x, mean, "o-", color=color, markersize=3, label=f"{label}, rate {figures['rate']:g}")
            panel.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    if settled:
        panels[0].set_ylim(bottom=min(settled) - 1)  # the steep beginning would flatten all the rest
    panels[0].set(xlabel="epochs", ylabel="validation ELBO (nats per image)")
    panels[1].set(xlabel=f"seconds of training ({record['machine']['processor']}, threads: {record['machine']['threads']})")
    panels[0].legend(frameon=False, loc="lower right")
    for panel in panels:
        panel.grid(color="#e5e7eb", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    settings = record["settings"]
    figure.suptitle(
        f"ConvVAE with IAF on statically binarized MNIST, {settings['optimizer']}, {settings['precision']}, "
        f"{len(record['seeds'])} seeds: mean and standard deviation"
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    """Do what is left to do, and report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_class_arguments(Options)
    parser.add_argument("--plan", action="store_true", help="Only say how many runs there are, and how long they take.")
    arguments = parser.parse_args().as_dict()
    plan = arguments.pop("plan")
    options = Options(**arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(options)
    seconds = benchmark.estimate()
    groups = {options.grid_epochs: len(options.rates), options.epochs: options.seeds}
    minutes = (len(options.rates) * seconds[options.grid_epochs] + options.seeds * seconds[options.epochs]) / 60
    console.print(
        f"{len(ARMS)} forms x {len(options.rates)} rates x {options.grid_epochs} epochs, then x {options.seeds} seeds x "
        f"{options.epochs} epochs: {len(ARMS) * sum(groups.values())} runs in about {minutes:.0f} minutes, "
        f"{len(benchmark.done)} done before"
    )
    if plan or not benchmark.run(benchmark.grid(), seconds, test=False):
        return
    rates = benchmark.best_rates()
    if not benchmark.run(benchmark.final(rates), seconds, test=True):
        return
    record = benchmark.record(rates)
    write_json(options.out / f"{NAME}.json", record)
    draw(record, options.out / f"{NAME}.png")
    show(record)
    console.print(f"Written to {options.out}/{NAME}.json and .png")


if __name__ == "__main__":
    main()
