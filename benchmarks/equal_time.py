"""What models reach in the same time of training on one core.

Two comparisons: `pixel_models`, of PixelCNN, PixelCNN++ and PixelSNAIL on statically binarized MNIST; and `resnet_vae`,
of inference, posterior and depth of the ResNet VAE on Fashion-MNIST, after the ablation of the IAF paper.

Trains each as its configuration says (model, batch size, optimizer), but for a given time in place of its epochs. Time
is that of the processor, so that what else the machine does matters little; it is counted from the first step on,
validation left out. How long a step takes is measured beforehand, in another training of the same model, and from that
the number of steps follows: the learning rate falls to 0 just as the time is up. What was really used is reported.

The curves are of averaged weights in training's precision, on the first validation images. The figure at the end is
that of `wngen evaluate`: the exact log-likelihood, or the ELBO, of the last averaged weights on the test images.

Writes to `out`, for each model, <comparison>-<model>.json, its averaged weights in <comparison>-<model>.ckpt and its
report in <comparison>-<model>-report.json; and of all models that are done <comparison>.json and <comparison>.png.
Started again, with the same models or with others, it goes on after those that are done.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser, Namespace
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import count_parameters, machine, write_json
from rich.console import Console

import wngen.models  # noqa: F401  # its classes are known by name once they are imported
from wngen import cli
from wngen.arguments import build, config_path
from wngen.cli.run import fastest_precision
from wngen.cli.subject import SPEC
from wngen.data import ImageDataModule
from wngen.evaluation.report import Report
from wngen.model import LikelihoodModel
from wngen.training import AtomicCheckpointIO, Training


@dataclass(frozen=True)
class Candidate:
    """A model in a comparison.

    Args:
        title: in tables and figures.
        color: of its curve.
        config: what it is trained as.
        changes: to the arguments of the configuration's model.
        dashed: whether its curve is.
    """

    title: str
    color: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    dashed: bool = False


def ladder(depth: int, inference: str, posterior: str, color: str) -> Candidate:
    """The ResNet VAE with so many stochastic layers, half of them at each of two resolutions."""
    changes = {
        "layers": f"14x{depth // 2}, 7x{depth // 2}",
        "inference": inference,
        "posterior": posterior,
        "relative_posterior": False,  # which bottom-up inference could not have
    }
    title = f"{depth} layers, {inference}, {'IAF' if posterior == 'iaf' else 'diagonal'}"
    return Candidate(title, color, "resnet_vae_fashion_mnist", changes, dashed=posterior == "diagonal")


COMPARISONS = {
    "pixel_models": {
        "pixelcnn": Candidate("PixelCNN", "#1d4ed8", "pixelcnn_mnist_static"),
        "pixelcnn_pp": Candidate("PixelCNN++", "#c2410c", "pixelcnn_pp_mnist_static"),
        "pixelsnail": Candidate("PixelSNAIL", "#15803d", "pixelsnail_mnist_static"),
    },
    "resnet_vae": {
        "4-iaf": ladder(4, "bidirectional", "iaf", "#c2410c"),
        "4-diagonal": ladder(4, "bidirectional", "diagonal", "#c2410c"),
        "4-bottom-up-iaf": ladder(4, "bottom-up", "iaf", "#1d4ed8"),
        "4-bottom-up-diagonal": ladder(4, "bottom-up", "diagonal", "#1d4ed8"),
        "2-iaf": ladder(2, "bidirectional", "iaf", "#15803d"),
        "2-diagonal": ladder(2, "bidirectional", "diagonal", "#15803d"),
    },
}
UNTIMED_STEPS, TIMED_STEPS = 20, 30  # of the measurement beforehand

console = Console()


@dataclass(frozen=True)
class Options:
    """How long each model is trained, and what is measured.

    Args:
        comparison: `pixel_models` or `resnet_vae`.
        out: the folder that the results go to.
        minutes: of the processor, for the training of each model.
        points: of each curve.
        val_batches: so many batches of validation images for each point.
        images: evaluate so many test images, drawn as `wngen evaluate` draws them; all by default.
        seed: of init, order and noise.
        threads: of torch.
    """

    comparison: Literal["pixel_models", "resnet_vae"] = "pixel_models"
    out: Path = Path("runs/benchmarks")
    minutes: float = 15.0
    points: int = 12
    val_batches: int = 32
    images: int | None = None
    seed: int = 0
    threads: int = 1

    def as_dict(self) -> dict[str, Any]:
        """What a result depends on: all but the folder."""
        return {name: value for name, value in asdict(self).items() if name not in ("comparison", "out")}


class Stopwatch(pl.Callback):
    """Takes the time that training has needed of the processor, validation left out.

    Attributes:
        step_seconds: the time after each step.
        val_seconds: the time at each validation.
        val_nats: the mean log-likelihood there.
    """

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.val_seconds: list[float] = []
        self.val_nats: list[float] = []

    def on_train_start(self, *args: Any) -> None:
        self._started = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.step_seconds.append(time.process_time() - self._started)

    def on_validation_start(self, *args: Any) -> None:
        self.val_seconds.append(time.process_time() - self._started)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.val_nats.append(float(trainer.callback_metrics["val/elbo_nats"]))
        self._started = time.process_time() - self.val_seconds[-1]
        console.print(
            f"step {trainer.global_step:,}, {self.val_seconds[-1] / 60:.2f} minutes: {self.val_nats[-1]:.2f} nats"
        )


class Experiment:
    """One model: its training and its evaluation.

    Args:
        name: of a candidate of the comparison.
        options: of the benchmark.

    Raises:
        ValueError: the folder holds a result of other options.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.candidate = COMPARISONS[options.comparison][name]
        path = options.out / f"{options.comparison}-{name}.json"
        self.path, self.checkpoint = path, path.with_suffix(".ckpt")
        self.report_path = path.with_name(f"{path.stem}-report.json")
        self.trained: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        if self.trained is not None and self.trained["settings"] != options.as_dict():
            raise ValueError(
                f"{path} is of other options, {self.trained['settings']}: name another folder by --out, or remove it"
            )

    @property
    def result(self) -> dict[str, Any] | None:
        """The training together with the figures on the test images; None if it is not finished."""
        if self.trained is None or not self.report_path.exists():
            return None
        report = Report.read(self.report_path)
        bound = "log_likelihood" if "log_likelihood" in report.nats else "elbo"
        figures = {"test_nats": report.nats[bound], "test_bits_per_dim": report.bits_per_dim[bound]}
        return self.trained | {name: asdict(figure) for name, figure in figures.items()} | {"protocol": report.protocol}

    def run(self) -> None:
        """Do what is not done yet.

        Raises:
            RuntimeError: the evaluation failed; what is wrong it has printed.
        """
        if self.trained is None:
            self.report_path.unlink(missing_ok=True)  # of weights that are about to be replaced
            self.trained = self.train()
            write_json(self.path, self.trained)
        if not self.report_path.exists():
            limit = [] if self.options.images is None else ["--limit", str(self.options.images)]
            if cli.main(["evaluate", str(self.checkpoint), "--out", str(self.report_path), "--device", "cpu", *limit]):
                raise RuntimeError(f"{self.checkpoint} could not be evaluated")

    def train(self) -> dict[str, Any]:
        """Measure a step, train for the time, and keep the weights."""
        measured = UNTIMED_STEPS + TIMED_STEPS
        seconds = self._fit(measured, measured, val_batches=0)[1].step_seconds
        step_seconds = (seconds[-1] - seconds[UNTIMED_STEPS - 1]) / TIMED_STEPS
        interval = max(1, round(60 * self.options.minutes / step_seconds / self.options.points))
        steps = interval * self.options.points
        console.print(f"{self.candidate.title}: {1000 * step_seconds:.0f} ms per step, so {steps:,} steps")
        trainer, stopwatch = self._fit(steps, interval, self.options.val_batches)
        trainer.save_checkpoint(self.checkpoint)
        training, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(training, Training)
        epochs_per_step = data.batch_size / data.size("train")
        val_images = sum(map(len, data.val_dataloader().batches[: self.options.val_batches]))
        return {
            "model": self.name,
            "config": self.candidate.config,
            "changes": self.candidate.changes,
            "settings": self.options.as_dict(),
            "machine": machine(),
            "precision": trainer.precision,
            "parameters": count_parameters(training.model),
            "batch_size": data.batch_size,
            "measured_step_seconds": step_seconds,
            "steps": steps,
            "epochs": steps * epochs_per_step,
            "skipped_steps": training.skips.total,
            "cpu_minutes": stopwatch.step_seconds[-1] / 60,
            "curve": {
                "val_images": val_images,
                "cpu_minutes": [seconds / 60 for seconds in stopwatch.val_seconds],
                "epochs": [interval * (i + 1) * epochs_per_step for i in range(self.options.points)],
                "val_nats": stopwatch.val_nats,
            },
        }

    def _fit(self, steps: int, interval: int, val_batches: int) -> tuple[pl.Trainer, Stopwatch]:
        """Train anew for so many steps, and validate after each `interval` of them."""
        config = self._read_config()
        pl.seed_everything(self.options.seed, verbose=False)
        data: ImageDataModule = build(config.data)
        model: LikelihoodModel = build(config.model, **data.spec.as_dict())
        training = Training(model, **config.training.as_dict())
        precision = fastest_precision("cpu")
        training.options["precision"] = precision  # into the checkpoint, and from there into the report
        stopwatch = Stopwatch()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision,
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=interval,
            check_val_every_n_epoch=None,
            limit_val_batches=val_batches,
            num_sanity_val_steps=0,
            callbacks=[stopwatch],
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(training, datamodule=data)
        return trainer, stopwatch

    def _read_config(self) -> Namespace:
        """The configuration with the seed of the options; its trainer, which says how long to train, is not used."""
        parser = ArgumentParser()
        parser.add_subclass_arguments(LikelihoodModel, "model", skip=SPEC)
        parser.add_subclass_arguments(ImageDataModule, "data")
        parser.add_class_arguments(Training, "training", skip={"model"})
        parser.add_argument("--trainer", type=dict)
        config = parser.parse_path(config_path(self.candidate.config))
        for name, value in self.candidate.changes.items():
            config.model.init_args[name] = value
        config.training.seed = config.data.init_args.seed = self.options.seed
        return config


def table(results: list[dict[str, Any]], candidates: dict[str, Candidate]) -> str:
    """The figures of all models, in Markdown."""
    lines = [
        f"| model | parameters | ms/step | steps | epochs | CPU minutes | test {bound(results)}, nats | bits/dim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        nats, bits = result["test_nats"], result["test_bits_per_dim"]
        cells = (
            candidates[result["model"]].title,
            f"{result['parameters']:,}",
            f"{60_000 * result['cpu_minutes'] / result['steps']:.0f}",
            f"{result['steps']:,}",
            f"{result['epochs']:.2f}",
            f"{result['cpu_minutes']:.1f}",
            f"{nats['mean']:.2f} ± {nats['standard_error']:.2f}",
            f"{bits['mean']:.4f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bound(results: list[dict[str, Any]]) -> str:
    """What is compared."""
    return "log-likelihood" if results[0]["protocol"]["estimator"] == "exact" else "ELBO"


def conditions(result: dict[str, Any], title: str) -> str:
    """What a result was measured on, in a line."""
    on, settings = result["machine"], result["settings"]
    return (
        f"{title}: {result['config']}, batches of {result['batch_size']}, {result['precision']}, "
        f"seed {settings['seed']}; {result['protocol']['images']:,} test images; {on['processor']}, "
        f"{on['instructions']}, threads: {on['threads']}, load {on['load_average']}; torch {on['torch']}"
    )


def draw(results: list[dict[str, Any]], candidates: dict[str, Candidate], path: Path) -> None:
    """Validation bound against processor time and against epochs."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    settled, ends = math.inf, -math.inf
    for result in results:
        candidate = candidates[result["model"]]
        curve = result["curve"]
        nats = np.array(curve["val_nats"])
        settled = min(settled, nats[len(nats) // 2 :].min())  # the steep beginning would flatten all the rest
        ends = max(ends, nats[-1])
        for panel, x in zip(panels, (curve["cpu_minutes"], curve["epochs"]), strict=True):
            style = {"color": candidate.color, "linestyle": "--" if candidate.dashed else "-"}
            label = f"{candidate.title}; {result['parameters'] / 1e6:.2f} M"
            panel.plot(x, nats, "o", markersize=3, label=label, **style)
    margin = 0.05 * (ends - settled)
    panels[0].set_ylim(settled - margin, ends + margin)
    on, val_images = results[0]["machine"], results[0]["curve"]["val_images"]
    panels[0].set(
        xlabel=f"CPU minutes of training ({on['processor']}, threads: {on['threads']})",
        ylabel=f"validation {bound(results)} (nats per image)",
    )
    panels[1].set(xlabel="epochs")
    panels[1].legend(frameon=False, loc="lower right")
    for panel in panels:
        panel.grid(color="#e5e7eb", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Equal time: {results[0]['protocol']['data']['name']}, {results[0]['precision']}, "
        f"seed {results[0]['settings']['seed']}, {val_images:,} validation images"
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    """Do what is left to do for the models that are named, and report all that are done."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", type=str | None, help="Which to train now; all by default.")
    parser.add_class_arguments(Options)
    arguments = parser.parse_args().as_dict()
    chosen = arguments.pop("models")
    options = Options(**arguments)
    candidates = COMPARISONS[options.comparison]
    if unknown := set(chosen or ()) - candidates.keys():
        parser.error(f"--models {' '.join(sorted(unknown))}: wanted some of {' '.join(candidates)}")
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`")
    options.out.mkdir(parents=True, exist_ok=True)
    experiments = {name: Experiment(name, options) for name in candidates}
    for name in chosen or candidates:
        experiments[name].run()
    results = [result for experiment in experiments.values() if (result := experiment.result) is not None]
    name = options.comparison
    write_json(options.out / f"{name}.json", {"benchmark": name, "results": results})
    draw(results, candidates, options.out / f"{name}.png")
    lines = (conditions(result, candidates[result["model"]].title) for result in results)
    print(table(results, candidates), *lines, shlex.join(["python", *sys.argv]), sep="\n")
    console.print(f"Written to {options.out}/{name}.json and .png")


if __name__ == "__main__":
    main()
