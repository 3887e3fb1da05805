"""The command that trains: its options, and the run that follows from them."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace

import wngen.models  # noqa: F401  # its classes are known by name once they are imported
from wngen.arguments import Arguments, build, summary, value_of
from wngen.checkpoint import LAST
from wngen.cli.processes import alone, end_with
from wngen.cli.run import Run, fastest_precision
from wngen.cli.subject import SPEC, check_fit
from wngen.data import ImageDataModule
from wngen.model import LikelihoodModel
from wngen.training import Checkpoints, ImageGrids, Training

OURS = {  # options of Lightning's trainer whose place is taken by ours
    "default_root_dir",
    "enable_autolog_hparams",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "model_registry",
    "use_distributed_sampler",
}
DEFAULT_CONFIG = "quickstart"


def fit(argv: list[str]) -> None:
    """Train a model, evaluate its averaged weights on the test images, and write everything into a run folder."""
    parser = _parser()
    resumed = value_of("--resume", argv)
    if resumed is not None:
        if value_of("--run", argv) is not None:
            parser.error("--run and --resume name one folder each, and there can be only one: leave --run out")
        missing = [name for name in ("config.yaml", LAST) if not (Path(resumed) / name).is_file()]
        if "config.yaml" in missing:
            absent = "it is a file" if Path(resumed).is_file() else f"there is no {' and no '.join(missing)} in it"
            parser.error(f"--resume {resumed}: {absent}; wanted the folder of an interrupted run")
        argv = ["--config", str(Path(resumed) / "config.yaml"), *argv]
    argv = parser.prepared(argv, DEFAULT_CONFIG)
    options = parser.parse_args(argv)
    config = Path(value_of("--config", argv) or "run").stem
    run = Run(_folder(parser, resumed, options.run, config), resumed is not None)

    pl.seed_everything(options.training.seed, workers=True, verbose=False)
    data = build(options.data)
    model = build(options.model, **data.spec.as_dict())
    check_fit(model, data)
    training = Training(model, **options.training.as_dict())
    options.trainer.precision = options.trainer.precision or fastest_precision(options.trainer.accelerator)
    data.prepare_data()
    images, checkpoints = ImageGrids(**options.images.as_dict()), Checkpoints(**options.checkpoints.as_dict())
    trainer = run.trainer(_instantiated(options.trainer), images, checkpoints, has_validation=data.size("val") > 0)
    options.run = options.resume = options.config = None
    configuration = parser.dump(options)
    if resumed is not None:
        before = yaml.safe_load((Path(resumed) / "config.yaml").read_text())
        run.check_resumable(training, data, trainer, before, yaml.safe_load(configuration))
    with alone(run.folder, trainer.is_global_zero):
        run.train(trainer, training, data, checkpoints, configuration)
        if trainer.is_global_zero and not options.trainer.fast_dev_run:
            run.finish(data, options.importance_samples, trainer.strategy.root_device)


def _parser() -> Arguments:
    parser = Arguments(prog="wngen fit", description=summary(fit))
    parser.add_config()
    parser.add_argument("--run", type=str | None, help="The run folder; runs/<config>-<time> by default.")
    parser.add_argument("--resume", type=str | None, help="Continue the run in this folder, with its configuration.")
    parser.add_importance_samples("K of the bound at the end; without it the ELBO.")
    parser.add_subclass_arguments(LikelihoodModel, "model", skip=SPEC, required=True, help="What is trained.")
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="What it is trained on.")
    parser.add_class_arguments(Training, "training", skip={"model"})
    parser.add_class_arguments(ImageGrids, "images")
    parser.add_class_arguments(Checkpoints, "checkpoints")
    parser.add_class_arguments(pl.Trainer, "trainer", skip=OURS)
    parser.usage = (
        "wngen fit [--config NAME|PATH] [--run FOLDER] [--resume FOLDER] [--importance-samples K]\n"
        "                 [--model NAME] [--model.*] [--data NAME] [--data.*] [--training.*] [--images.*]\n"
        "                 [--checkpoints.*] [--trainer.*]\n\n"
        "`wngen fit --model.help NAME` and `--data.help NAME` list the options of a model and of a data set."
    )
    return parser


def _instantiated(options: Namespace) -> dict[str, Any]:
    """The trainer's options with the objects, such as callbacks, that a configuration names by class."""
    parser = Arguments()
    parser.add_class_arguments(pl.Trainer, "trainer", skip=OURS, instantiate=False)
    try:
        built: dict[str, Any] = parser.instantiate(Namespace(trainer=options)).trainer.as_dict()
    except ValueError as error:  # what an object said is the first of what each type that it might be of says
        found = re.search(r"Union subtypes\n.*?Errors:\n  - (.*?)\n  - Not a valid", str(error), re.DOTALL)
        raise ValueError(found.group(1) if found else str(error)) from error
    return built


def _folder(parser: Arguments, resumed: str | None, named: str | None, config: str) -> Path:
    """The folder of the run, the same in all its processes: Lightning starts the others by the same command line."""
    started = max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_NTASKS"))  # by something else
    if started == 1:
        os.environ["WNGEN_RUN"] = f"runs/{config}-{datetime.now():%Y%m%d-%H%M%S}"
        os.environ["WNGEN_PARENT"] = str(os.getpid())
    elif os.environ.get("WNGEN_PARENT") == str(os.getppid()):
        end_with(os.getppid())
    folder = resumed or named or os.environ.get("WNGEN_RUN")
    if folder is None:
        parser.error("processes that something else than wngen starts need a folder in common: name it by --run")
    if resumed is None and any(Path(folder).glob("*.ckpt")):
        parser.error(f"--run {folder}: holds a run already; continue it by --resume {folder}, or name another folder")
    return Path(folder)
