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
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from bound_curves import draw, first_epoch_above, show, summary
from jsonargparse import ArgumentParser
from measuring import count_parameters, interleaved, machine, write_json, write_text
from rich.console import Console
from training_runs import EVALUATION_BATCH, MOMENT_IMAGES, Data, Form, Key, Run, Settings, Trainer, build, part

NAME = "weightnorm_vs_plain"
FORMS: tuple[Form, ...] = get_args(Form)
GRID_SEED = 0  # of the runs that choose the learning rate; those that are reported have others

console = Console()


@dataclass(frozen=True)
class Options(Settings):
    """Which runs there are, and their settings.

    Args:
        out: the folder that the results go to.
        minutes: start no further runs that would not end within so many minutes; the same command goes on.
        epochs: of the runs that are reported.
        grid_epochs: of the runs that choose the learning rate.
        rates: the learning rates to choose from.
        seeds: how many runs of each form are reported.
    """

    out: Path = Path("runs/benchmarks")
    minutes: float | None = None
    epochs: int = 3
    grid_epochs: int = 1
    rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3])
    seeds: int = 3


class Benchmark:
    """All runs, those that are done and those to do.

    Args:
        options: of the benchmark.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.data = options, Data(options)
        self.log = options.out / f"{NAME}.jsonl"
        self.lines = self.log.read_text().splitlines() if self.log.exists() else []
        rows = map(json.loads, self.lines)
        found = [Run(**row["run"]) for row in rows if row["settings"] == options.as_dict()]
        self.done = {run.key: run for run in found}
        self.turn_steps = self.data.steps_per_epoch // options.evaluations_per_epoch
        self.started = time.monotonic()

    def grid(self) -> list[list[Key]]:
        """The runs that choose the learning rate, in groups that take turns."""
        return [[(form, rate, GRID_SEED, self.options.grid_epochs) for form in FORMS] for rate in self.options.rates]

    def final(self, rates: dict[Form, float]) -> list[list[Key]]:
        """The runs that are reported, in groups that take turns."""
        seeds = range(GRID_SEED + 1, GRID_SEED + 1 + self.options.seeds)
        return [[(form, rate, seed, self.options.epochs) for form, rate in rates.items()] for seed in seeds]

    def best_rates(self) -> dict[Form, float]:
        """The learning rate of the best validation bound of each form.

        Raises:
            ValueError: a form diverged with all of them.
        """
        best: dict[Form, float] = {}
        for form in FORMS:
            runs = [self.done[key] for group in self.grid() for key in group if key[0] == form]
            runs = [run for run in runs if not run.diverged]
            if not runs:
                raise ValueError(f"{form} diverged with every learning rate of {self.options.rates}: add lower ones")
            best[form] = max(runs, key=lambda run: run.curve_elbo_nats[-1]).rate
        return best

    def seconds(self) -> tuple[dict[str, float], float]:
        """Of a training step of each form, and of an evaluation of the validation images."""
        trainers = {form: Trainer(form, min(self.options.rates), GRID_SEED, self.data, self.options) for form in FORMS}
        batch = part(self.data.val, slice(EVALUATION_BATCH))
        calls: dict[str, Callable[[], object]] = {form: trainer.step for form, trainer in trainers.items()}
        calls["evaluation"] = lambda: trainers["plain"].evaluate(batch)
        seconds = {name: statistics.median(times) for name, times in interleaved(calls, rounds=9).items()}
        return seconds, seconds.pop("evaluation") / len(batch.index) * self.options.val_images

    def estimate(self) -> dict[int, float]:
        """Seconds that a group of runs will take, by its number of epochs."""
        steps, evaluation = self.seconds()
        turn = sum(steps.values()) * self.turn_steps + len(FORMS) * evaluation
        # Batch norm computes moments anew each time; the reported runs end with the test images.
        turn += evaluation * MOMENT_IMAGES / self.options.val_images
        test = len(FORMS) * evaluation * len(self.data.test.index) / self.options.val_images
        lengths = {self.options.grid_epochs: 0.0, self.options.epochs: test}
        return {n: n * self.options.evaluations_per_epoch * turn + extra for n, extra in lengths.items()}

    def run(self, groups: Iterable[list[Key]], seconds: dict[int, float], test: bool) -> bool:
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
            trainers = [Trainer(form, rate, seed, self.data, self.options) for form, rate, seed, _ in keys]
            for _ in range(epochs * self.options.evaluations_per_epoch):
                for trainer in trainers:
                    trainer.turn(self.turn_steps)
                trainers = trainers[1:] + trainers[:1]
            for trainer in trainers:
                run = trainer.result(epochs, test)
                self.done[run.key] = run
                self.lines.append(json.dumps({"run": asdict(run), "settings": self.options.as_dict()}))
                bound = "diverged" if run.diverged else f"{run.curve_elbo_nats[-1]:.2f} nats"
                console.print(f"{run.form:20} rate {run.rate:g}, seed {run.seed}, {epochs} epochs: {bound}")
            write_text(self.log, "\n".join(self.lines) + "\n")
        return True

    def record(self, rates: dict[Form, float]) -> dict[str, Any]:
        """Everything that came out, as JSON."""
        final = [self.done[key] for group in self.final(rates) for key in group]
        forms = {form: summary([run for run in final if run.form == form], self.options.rates) for form in FORMS}
        reached = forms["plain"]["val_elbo_nats"]["mean"]
        for figures in forms.values():
            figures["epochs_to_final_bound_of_plain"] = first_epoch_above(reached, figures["curve"])
        grid: dict[str, dict[str, float | None]] = {form: {} for form in FORMS}
        for key in (key for group in self.grid() for key in group):
            run = self.done[key]
            grid[run.form][f"{run.rate:g}"] = None if run.diverged else run.curve_elbo_nats[-1]
        return {
            "benchmark": NAME,
            "machine": machine(),
            "settings": self.options.as_dict(),
            "data": self.data.protocol,
            "parameters": {form: count_parameters(build(form, 0, self.data, self.options)) for form in FORMS},
            "epochs": self.options.epochs,
            "steps": self.options.epochs * self.options.evaluations_per_epoch * self.turn_steps,
            "seeds": [group[0][2] for group in self.final(rates)],
            "forms": forms,
            "grid": {"epochs": self.options.grid_epochs, "seed": GRID_SEED, "val_elbo_nats": grid},
        }


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
    minutes = (len(options.rates) * seconds[options.grid_epochs] + options.seeds * seconds[options.epochs]) / 60
    console.print(
        f"{len(FORMS)} forms: {options.grid_epochs} epochs with each of {len(options.rates)} rates, then "
        f"{options.epochs} epochs with each of {options.seeds} seeds. That is "
        f"{len(FORMS) * (len(options.rates) + options.seeds)} runs, about {minutes:.0f} minutes at the speed of now; "
        f"{len(benchmark.done)} runs are there."
    )
    if plan or not benchmark.run(benchmark.grid(), seconds, test=False):
        return
    rates = benchmark.best_rates()
    if not benchmark.run(benchmark.final(rates), seconds, test=True):
        return
    record = benchmark.record(rates)
    write_json(options.out / f"{NAME}.json", record)
    draw(record, options.out / f"{NAME}.png")
    show(record, console)
    console.print(f"Written to {options.out}/{NAME}.json and .png")


if __name__ == "__main__":
    main()
