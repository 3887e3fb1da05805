"""A run: what happens in its folder from the first step to the release."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from rich import get_console

from wngen.autoregressive import AutoregressiveModel
from wngen.checkpoint import BEST, LAST, PREVIOUS, Metadata, load, newest_state, read_metadata, save_release
from wngen.cli.processes import check_strategy, end_all
from wngen.cli.subject import Subject
from wngen.data import ImageDataModule
from wngen.evaluation import active_units
from wngen.evaluation.batch_figures import draw_noise_scale
from wngen.evaluation.figures import draw_curves, draw_rates, metrics_of, read_curves
from wngen.evaluation.weight_norm_figures import draw_weight_norm_health
from wngen.latent import LatentVariableModel
from wngen.sampling import completions, draw_samples, grid, ladder, reconstruct, save_png, upper_rows
from wngen.training import AtomicCheckpointIO, Checkpoints, ImageGrids, Training, write_safely

PLACES = {"root", "path"}  # of data, which may be moved
OF_A_STEP = {"accumulate_grad_batches", "limit_train_batches", "overfit_batches"}  # of a trainer, or of an epoch


class Run:
    """One training, and the folder that everything about it goes to.

    Args:
        folder: made when the training begins.
        resumed: whether it goes on from the folder's newest checkpoint, or begins anew where there is none yet.

    Raises:
        ValueError: it is to go on, but all checkpoints are damaged.

    Attributes:
        begun: the checkpoint that it goes on from; None if it begins.
    """

    def __init__(self, folder: Path, resumed: bool = False) -> None:
        self.folder, self.resumed = folder, resumed
        self.begun: Path | None = None
        self._held: Metadata | None = None
        self._complaint: str | None = None
        if resumed and any((folder / name).exists() for name in (LAST, PREVIOUS)):
            try:
                self.begun, self._held, self._complaint = newest_state(folder)
            except ValueError as error:
                best = f"; {folder / BEST} can still be evaluated" if (folder / BEST).is_file() else ""
                raise ValueError(f"--resume {folder}: there is nothing to go on from: {error}{best}") from error

    def check_resumable(
        self,
        training: Training,
        data: ImageDataModule,
        trainer: pl.Trainer,
        before: Mapping[str, Any],
        now: Mapping[str, Any],
    ) -> None:
        """What was trained so far must be what is to be trained on. What else has changed is said.

        Args:
            training: the model, and how it is to be trained.
            data: what it is to be trained on.
            trainer: with its processes.
            before: the configuration that the run was begun with.
            now: that with which it is to go on.

        Raises:
            ValueError: model, data, training or precision have changed, or what a step or an epoch consists of.
        """
        if self._held is None:
            return
        here = {**training.options, "precision": trainer.precision}
        parts = (
            ("model", self._held.model, training.model.config),
            ("data", self._held.data or {}, data.config),
            ("training", self._held.training or {}, here),
            ("trainer", dict.fromkeys(now["trainer"]) | before["trainer"], now["trainer"]),
            *((part, before.get(part) or {}, now[part]) for part in ("images", "checkpoints")),
            ("", {"processes": self._held.processes or trainer.world_size}, {"processes": trainer.world_size}),
        )
        changes = [
            (part, name, f"{part}{'.' * bool(part)}{name}={_brief(value)}", _brief(given.get(name)))
            for part, then, given in parts
            for name, value in sorted(then.items())
            if value != given.get(name, None if part == "trainer" else value)
        ]
        fixed = [
            f"{seen} (not {other})"
            for part, name, seen, other in changes
            if name in OF_A_STEP or (part in ("model", "data", "training") and name not in PLACES)
        ]
        if fixed:
            raise ValueError(f"--resume {self.folder}: it was begun with {', '.join(fixed)} and can only go on so")
        for _, name, seen, other in changes:
            if trainer.is_global_zero and name != "precision":  # that is said of the training
                get_console().print(f"Begun with {seen}, goes on with {other}.", soft_wrap=True, markup=False)

    def trainer(
        self, options: dict[str, Any], images: ImageGrids, checkpoints: Checkpoints, has_validation: bool
    ) -> pl.Trainer:
        """Lightning's trainer, writing into the folder.

        Args:
            options: of `pl.Trainer`, all of them.
            images: the callback that draws pictures at each validation.
            checkpoints: the callback that writes what the run goes on from.
            has_validation: whether there are images to validate on, and so a best checkpoint.

        Raises:
            ValueError: a strategy that divides the model.
        """
        check_strategy(options["strategy"])
        if options["logger"] in (None, True):
            options["logger"] = [
                CSVLogger(self.folder, name="metrics"),
                TensorBoardLogger(self.folder, name="tensorboard"),
            ]
        if options["accelerator"] == "auto" and not torch.cuda.is_available():
            options["accelerator"] = "cpu"  # Apple's GPUs lack the double precision that figures are summed in
        best = ModelCheckpoint(
            self.folder,
            Path(BEST).stem,
            monitor="val/elbo_nats",
            mode="max",
            save_on_train_epoch_end=False,  # so that `last.ckpt`, written at an epoch's end, knows of it
            enable_version_counter=False,
        )
        if not has_validation:
            options["limit_val_batches"] = 0
        given = options["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        stateful = [callback for callback in given if type(callback).state_dict is not pl.Callback.state_dict]
        names = Counter(callback.state_key for callback in stateful)
        if twice := [type(callback).__name__ for callback in stateful if names[callback.state_key] > 1]:
            raise ValueError(
                f"trainer.callbacks: {twice[0]} is there twice; a resumed run has those of its config.yaml already"
            )
        bar = [] if options["enable_progress_bar"] is False else [RichProgressBar(refresh_rate=2)]
        options["callbacks"] = [*given, images, *bar, *[best] * has_validation, checkpoints]
        plugins = options["plugins"] or []
        options["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        options["enable_model_summary"] = options["enable_model_summary"] or False
        options["use_distributed_sampler"] = False  # the data module divides the images among processes itself
        options["default_root_dir"] = str(self.folder)
        trainer = pl.Trainer(**options)
        check_strategy(trainer.strategy)
        return trainer

    def train(
        self,
        trainer: pl.Trainer,
        training: Training,
        data: ImageDataModule,
        checkpoints: Checkpoints,
        configuration: str,
    ) -> None:
        """Train, from the beginning or from where the run was interrupted, with `configuration` as `config.yaml`.

        Raises:
            SystemExit: interrupted by a signal, with the status that says by which.
            OSError: something could not be written; the message says how to go on.
        """
        training.options["precision"] = trainer.precision  # into the checkpoints, and from there into reports
        if trainer.is_global_zero:
            if self._complaint and (self.folder / LAST).exists():
                (self.folder / LAST).replace(self.folder / f"{LAST}.damaged")
            if self.resumed:  # what is refused before training begins must leave the run as it was
                trainer.callbacks.append(_Beginning(lambda: self._configure(configuration)))  # type: ignore[attr-defined]
            else:
                self._configure(configuration)
            self._announce(training, data)
        again = f"`wngen fit --resume {self.folder}`"
        try:
            trainer.fit(training, datamodule=data, ckpt_path=self.begun, weights_only=True)
        except SystemExit as stop:
            lightnings: dict[Any, int] = {1: 130, None: 143}  # at once after Ctrl-C, and before the first step
            status = lightnings.get(stop.code, stop.code)
            if trainer.is_global_zero:
                how = "interrupted" if status in (130, 143) else f"ended with status {status}"
                print(f"wngen fit: {how}; {again} goes on from {self._place(checkpoints)}", file=sys.stderr)
            raise SystemExit(status) from None
        except Exception as error:
            if isinstance(error, OSError):
                right = f"With that put right, {again} goes on from {self._place(checkpoints)}"
                error.strerror = f"{error.strerror or error}. {right}"
            if trainer.world_size > 1:
                children = getattr(trainer.strategy.launcher, "procs", [])
                end_all(trainer.global_rank, trainer.world_size, children)
                if re.search(r"connection (closed|reset|refused)", str(error), re.IGNORECASE):
                    raise RuntimeError(
                        "another process of the training has ended; unless it was killed, it has told why above"
                    ) from error
            raise

    def _configure(self, configuration: str) -> None:
        write_safely(self.folder / "config.yaml", lambda file: file.write(configuration.encode()))

    def _place(self, checkpoints: Checkpoints) -> str:
        """Where a resumption goes on from."""
        if checkpoints.saved_step is None:
            return "the same checkpoint" if self.begun else "the beginning"
        return f"step {checkpoints.saved_step}"

    def _announce(self, training: Training, data: ImageDataModule) -> None:
        """Say what is trained, and from where on."""
        parameters = sum(p.numel() for p in training.model.parameters())
        name = type(training.model).__name__
        said = [f"{name}, {parameters:,} parameters, on {data.name}; writing to {self.folder}/"]
        if self._complaint:
            said.append(f"{self._complaint}. It goes on from the one before, {self.begun}.")
        if self.resumed and self.begun is None:
            said.append("There is no checkpoint yet to go on from: it begins anew.")
        for line in said:
            get_console().print(line, soft_wrap=True, markup=False)

    def finish(self, data: ImageDataModule, importance_samples: int | None, device: torch.device) -> None:
        """Evaluate the best averaged weights on the test images, make a release, and draw pictures."""
        metadata = read_metadata(self.folder)
        model = load(self.folder, device=device)
        subject = Subject(model, data, metadata.training)
        images = data.size("test")
        report = evaluation = None
        if images:
            measured = subject.measure("test", importance_samples, out=self.folder / "report.json")
            measured.write(self.folder / "report.json")
            report, evaluation = measured.report, measured.evaluation
        save_release(model, self.folder / "release", report, metadata, evaluation)
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
        parts = metrics_of(self.folder)
        if parts:  # a user may have chosen another logger
            logged = read_curves(*parts).keys()
            if logged & {"train/elbo_nats", "val/elbo_nats"}:  # a short run ends before either is logged
                draw_curves(self.folder / "curves.png", *parts)
            if "noise_scale/total" in logged:
                draw_noise_scale(self.folder / "noise_scale.png", *parts)
            if "v_norm/median" in logged:
                draw_weight_norm_health(self.folder / "weight_norm_health.png", *parts)
        paths = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in paths)
        get_console().print(f"In {self.folder}/: {', '.join(names)}")


class _Beginning(pl.Callback):
    """Tells that training begins, to which no callback before it has objected."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tell()


def _brief(value: Any) -> Any:
    """Of objects that a configuration names by class, their classes."""
    if isinstance(value, list):
        return f"[{', '.join(str(_brief(each)) for each in value)}]"
    return value["class_path"].rpartition(".")[2] if isinstance(value, dict) and "class_path" in value else value


def fastest_precision(accelerator: Any) -> Literal["bf16-mixed", "32-true"]:
    """Whichever is faster here: on a processor without instructions for bf16 it is many times slower."""
    if accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"
