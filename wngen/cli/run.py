"""A run: what happens in its folder from the first step to the release."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from rich import get_console

from wngen.autoregressive import AutoregressiveModel
from wngen.checkpoint import load, read_metadata, save_release
from wngen.cli.subject import Subject
from wngen.data import ImageDataModule
from wngen.evaluation import active_units
from wngen.evaluation.figures import draw_curves, draw_rates
from wngen.latent import LatentVariableModel
from wngen.sampling import completions, draw_samples, grid, ladder, reconstruct, save_png, upper_rows
from wngen.training import AtomicCheckpointIO, ImageGrids, Training


class Run:
    """One training, and the folder that everything about it goes to.

    Args:
        folder: made when the training begins.
        resumed: whether it goes on from the folder's `last.ckpt`.
    """

    def __init__(self, folder: Path, resumed: bool = False) -> None:
        self.folder, self.resumed = folder, resumed
        self.last = folder / "last.ckpt"

    def check_resumable(self, training: Training) -> None:
        """What was trained so far must be what is to be trained on: neither model nor training may have changed.

        Raises:
            ValueError: the run is resumed, and they have.
        """
        if not self.resumed:
            return
        held = read_metadata(self.last)
        for part, before, now in (
            ("model", held.model, training.model.config),
            ("training", held.training or {}, training.options),
        ):
            differing = [f"{part}.{name}={value}" for name, value in before.items() if now.get(name, value) != value]
            if differing:
                raise ValueError(
                    f"--resume {self.folder}: it was begun with {', '.join(differing)} and can only go on so"
                )

    def trainer(self, options: dict[str, Any], images: ImageGrids, has_validation: bool) -> pl.Trainer:
        """Lightning's trainer, writing into the folder.

        Args:
            options: of `pl.Trainer`, all of them.
            images: the callback that draws pictures at each validation.
            has_validation: whether there are images to validate on, and so a best checkpoint.
        """
        if options["logger"] in (None, True):
            options["logger"] = [
                CSVLogger(self.folder, name="metrics"),
                TensorBoardLogger(self.folder, name="tensorboard"),
            ]
        if options["accelerator"] == "auto" and not torch.cuda.is_available():
            options["accelerator"] = "cpu"  # Apple's GPUs lack the double precision that figures are summed in
        folder: dict[str, Any] = {"dirpath": self.folder, "enable_version_counter": False}
        checkpoints = [ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **folder)]
        if has_validation:
            checkpoints.append(ModelCheckpoint(filename="best", monitor="val/elbo_nats", mode="max", **folder))
        else:
            options["limit_val_batches"] = 0
        given = options["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        bar = [] if options["enable_progress_bar"] is False else [RichProgressBar(refresh_rate=10)]
        options["callbacks"] = [*given, images, *bar, *checkpoints]
        plugins = options["plugins"] or []
        options["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        options["enable_model_summary"] = options["enable_model_summary"] or False
        options["use_distributed_sampler"] = False  # the data module divides the images among processes itself
        options["default_root_dir"] = str(self.folder)
        return pl.Trainer(**options)

    def train(self, trainer: pl.Trainer, training: Training, data: ImageDataModule, configuration: str) -> None:
        """Train, from the beginning or from where the run was interrupted, with `configuration` as `config.yaml`.

        Raises:
            ValueError: interrupted by Ctrl-C; the message says how to go on.
        """
        training.options["precision"] = trainer.precision  # into the checkpoints, and from there into reports
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / ".config.yaml.partial"
            partial.write_text(configuration)
            partial.replace(self.folder / "config.yaml")
            parameters = sum(p.numel() for p in training.model.parameters())
            name = type(training.model).__name__
            get_console().print(f"{name}, {parameters:,} parameters, on {data.name}; writing to {self.folder}/")
        begun = str(self.last) if self.resumed else None
        try:
            trainer.fit(training, datamodule=data, ckpt_path=begun, weights_only=True)
        except SystemExit:  # how Lightning ends after Ctrl-C
            how = f"; `wngen fit --resume {self.folder}` goes on from its last epoch" if self.last.is_file() else ""
            raise ValueError(f"interrupted{how}") from None

    def finish(self, data: ImageDataModule, importance_samples: int | None, device: torch.device) -> None:
        """Evaluate the best averaged weights on the test images, make a release, and draw pictures."""
        metadata = read_metadata(self.folder)
        model = load(self.folder, device=device)
        subject = Subject(model, data, metadata.training)
        images = data.size("test")
        report = subject.report("test", importance_samples) if images else None
        if report is not None:
            report.write(self.folder / "report.json")
        save_release(model, self.folder / "release", report, metadata)
        get_console().print(report or "There are no test images, and so no report.")
        save_png(grid(draw_samples(model, 64), model.spec.levels), self.folder / "samples.png")
        if isinstance(model, LatentVariableModel) and images:
            batch = subject.images("test", min(32, images))
            save_png(reconstruct(model, batch.image, batch.label), self.folder / "reconstructions.png")
            if report is not None and min(images, len(model.latent_shapes)) > 1:
                batch = subject.images("test", min(8, images))
                save_png(ladder(model, batch.image, batch.label), self.folder / "ladder.png")
                varied = data.evaluation_batches("test", model.chunk, limit=min(1000, images))
                draw_rates(self.folder / "rate_per_layer.png", report, active_units(model, varied))
        if isinstance(model, AutoregressiveModel) and images:
            batch, known = subject.images("test", min(8, images)), upper_rows(model.spec, model.spec.height // 2)
            generator = torch.Generator().manual_seed(0)
            picture = completions(model, batch.image, known, y=batch.label, generator=generator)
            save_png(picture, self.folder / "completions.png")
        parts = sorted((self.folder / "metrics").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        if parts:  # a user may have chosen another logger
            draw_curves(self.folder / "curves.png", *parts)
        names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in self.folder.iterdir())
        get_console().print(f"In {self.folder}/: {', '.join(names)}")


def fastest_precision(accelerator: Any) -> Literal["bf16-mixed", "32-true"]:
    """Whichever is faster here: on a processor without instructions for bf16 it is many times slower."""
    if accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"
