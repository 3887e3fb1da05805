"""Whether bf16 learns as fp32 does: curves of the same trainings in both, with several seeds.

Runs `wngen fit` on statically binarized MNIST for the quickstart's VAE and for a small PixelCNN++. The two runs of a
seed start from the same weights and see the same images and the same noise in the same order; the difference of their
validation bounds is compared with the spread between seeds, and at the end that of the test bounds, which are computed
in fp32 for both, of the best averaged weights.

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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import machine, write_json
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from whole_runs import fitted

from wngen.evaluation.figures import RULE, RUNS, metrics_of, read_curves
from wngen.evaluation.report import Report

MODELS = {
    "ConvVAE": ["--config=quickstart", "--data.batch_size=64"],
    "PixelCNN++": [
        "--config=smoke", "--model.scales=1", "--data.batch_size=8", "--trainer.limit_train_batches=1.0",
    ],
}  # fmt: skip
TRAINING = [
    "--images.every_n_epochs=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=-1",
    "--trainer.check_val_every_n_epoch=null", "--trainer.enable_progress_bar=false",
]  # fmt: skip
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}

console = Console()


@dataclass(frozen=True)
class Options:
    """What is run.

    Args:
        out: the folder that the runs and the results go to.
        models: which of ConvVAE and PixelCNN++.
        steps: of each training.
        points: of each curve.
        val_images: about so many images for each of them.
        seeds: of init, order and noise, from 0 on.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks/precision_curves")
    models: tuple[str, ...] = tuple(MODELS)
    steps: int = 2000
    points: int = 8
    val_images: int = 1000
    seeds: int = 3
    threads: int = 1

    def __post_init__(self) -> None:
        if self.seeds < 2 or self.steps % self.points or not set(self.models) <= MODELS.keys():
            raise ValueError(
                f"seeds={self.seeds}, steps={self.steps}, points={self.points}, models={list(self.models)}: wanted at "
                f"least 2 seeds, steps that the points divide, and some of {', '.join(MODELS)}"
            )


@dataclass(frozen=True)
class Curves:
    """The curves of one model.

    Attributes:
        steps: where the bounds were taken, `(points,)`.
        val_nats: for each precision, `(seeds, points)`.
        test_nats: at the end, for each precision, `(seeds,)`.
    """

    steps: NDArray[np.float64]
    val_nats: dict[str, NDArray[np.float64]]
    test_nats: dict[str, NDArray[np.float64]]

    @classmethod
    def of(cls, model: str, options: Options) -> Curves:
        """Train in both precisions with all seeds, what is not trained yet."""
        steps: NDArray[np.float64] = np.empty(0)
        val: dict[str, list[NDArray[np.float64]]] = {name: [] for name in PRECISIONS}
        test: dict[str, list[float]] = {name: [] for name in PRECISIONS}
        for seed in range(options.seeds):
            for precision in PRECISIONS:
                folder = fitted(options.out / f"{model}-{precision}-{seed}", arguments(model, precision, seed, options))
                steps, values = read_curves(*metrics_of(folder))["val/elbo_nats"]
                report = Report.read(folder / "report.json")
                val[precision].append(values)
                test[precision].append(
                    report.nats["log_likelihood" if "log_likelihood" in report.nats else "elbo"].mean
                )
                console.print(f"{folder.name}: validation {values[-1]:.2f}, test {test[precision][-1]:.2f} nats")
        stacked = {name: np.stack(values) for name, values in val.items()}
        return cls(steps + 1, stacked, {name: np.array(values) for name, values in test.items()})

    @property
    def rows(self) -> list[dict[str, float]]:
        """What the precisions differ by at each point of the curve, and on the test images."""
        pairs = [(self.val_nats["bf16"][:, i], self.val_nats["fp32"][:, i]) for i in range(len(self.steps))]
        compared = [compare(*pair) for pair in (*pairs, (self.test_nats["bf16"], self.test_nats["fp32"]))]
        return [{"steps": step, **row} for step, row in zip([*self.steps, self.steps[-1]], compared, strict=True)]


def compare(bf16: NDArray[np.float64], fp32: NDArray[np.float64]) -> dict[str, float]:
    """The difference of bounds seed by seed, with its standard error, and the deviation between seeds in fp32."""
    difference = (bf16 - fp32).tolist()
    return {
        "fp32_nats": float(fp32.mean()),
        "difference_nats": statistics.fmean(difference),
        "standard_error_nats": statistics.stdev(difference) / math.sqrt(len(difference)),
        "between_seeds_nats": statistics.stdev(fp32.tolist()),
    }


def arguments(model: str, precision: str, seed: int, options: Options) -> list[str]:
    """Of `wngen fit`."""
    batch_size = int(next(word for word in MODELS[model] if "batch_size" in word).partition("=")[2])
    return [
        *MODELS[model],
        *TRAINING,
        f"--data.seed={seed}",
        f"--training.seed={seed}",
        f"--trainer.precision={PRECISIONS[precision]}",
        f"--trainer.max_steps={options.steps}",
        f"--trainer.val_check_interval={options.steps // options.points}",
        f"--trainer.limit_val_batches={max(1, options.val_images // batch_size)}",
    ]


def table(name: str, curves: Curves) -> Table:
    """The figures of a model."""
    columns = "steps", "fp32", "bf16 - fp32", "standard error", "between seeds"
    shown = Table(
        *(Column(column, justify="right") for column in columns),
        title=f"{name}, nats; the last line is of the test images",
        title_justify="left",
    )
    for row in curves.rows:
        shown.add_row(*(f"{value:,.0f}" if key == "steps" else f"{value:.3f}" for key, value in row.items()))
    return shown


def draw(curves: dict[str, Curves], path: Path) -> None:
    """The bounds of all runs above, and the differences of the pairs below."""
    figure = Figure(figsize=(5.5 * len(curves), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(curves), sharex="col", squeeze=False, height_ratios=(3, 2))
    for (above, below), (name, each) in zip(panels.T, curves.items(), strict=True):
        for i, precision in enumerate(PRECISIONS):
            for seed, values in enumerate(each.val_nats[precision]):
                style = {"linestyle": "-" if i == 0 else "--", "color": RUNS[1 - i], "linewidth": 1.3}
                above.plot(each.steps, values, label="" if seed else precision, **style)
        settled = each.val_nats["fp32"][:, 1:]
        above.set_ylim(settled.min() - 2, settled.max() + 2)
        above.set(title=name, ylabel="validation bound\n(nats per image)")
        above.legend(loc="lower right", frameon=False)
        spread = each.val_nats["fp32"].std(axis=0, ddof=1)
        below.fill_between(each.steps, -spread, spread, color=RULE, label="± deviation between seeds (fp32)")
        for seed, difference in enumerate(each.val_nats["bf16"] - each.val_nats["fp32"]):
            below.plot(each.steps, difference, "o-", markersize=3, color=RUNS[0], label="" if seed else "one seed each")
        below.axhline(0, color="black", linewidth=0.8)
        below.set(xlabel="optimizer steps", ylabel="bf16 - fp32\n(nats per image)")
        below.legend(loc="upper right", frameon=False, fontsize=8)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is left to run, and report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_class_arguments(Options)
    options = Options(**parser.parse_args().as_dict())
    torch.set_num_threads(options.threads)
    curves = {name: Curves.of(name, options) for name in options.models}
    for name, each in curves.items():
        console.print(table(name, each))
    record: dict[str, Any] = {
        "benchmark": "precision_curves",
        "machine": machine(),
        "options": {**asdict(options), "out": str(options.out)},
        "models": {name: {"arguments": [*MODELS[name], *TRAINING], "rows": each.rows} for name, each in curves.items()},
    }
    write_json(options.out / "precision_curves.json", record)
    draw(curves, options.out / "precision_curves.png")
    console.print(shlex.join(["python", *sys.argv]), soft_wrap=True)


if __name__ == "__main__":
    main()
