"""The command line: `wngen fit | evaluate | sample | reconstruct | interpolate | models | configs`."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.table import Table

import wngen.models  # its classes are known by name once they are imported
from wngen.arguments import Arguments, concrete_subclasses, nearest, packaged_configs
from wngen.checkpoint import load, read_metadata, save_release
from wngen.data import ImageDataModule, Split
from wngen.evaluation import Report, evaluate
from wngen.evaluation.figures import draw_curves
from wngen.image import Batch
from wngen.model import LatentVariableModel, LikelihoodModel
from wngen.sampling import back_and_forth, grid, interpolate, reconstruct, save_gif, save_png
from wngen.training import AtomicCheckpointIO, ImageGrids, Training

SPEC = {"channels", "height", "width", "levels"}  # a model takes these four from the data
OURS = {  # options of Lightning's trainer whose place is taken by ours
    "default_root_dir",
    "enable_autolog_hparams",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "model_registry",
    "use_distributed_sampler",
}
DEFAULT_CONFIG = "quickstart"
IMPORTANCE_SAMPLES = ("--importance-samples", "--importance_samples")  # either spelling

console = Console()


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 for an error with a message, 2 for a mistake in the arguments."""
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: wngen COMMAND ...\n")
        for command, function in COMMANDS.items():
            print(f"  {command:12} {summary(function)}")
        print("\n`wngen COMMAND --help` says more.")
        return 0
    if name not in COMMANDS:
        print(f"wngen: error: no command {name!r}{nearest(name, COMMANDS)}; `wngen --help` lists them", file=sys.stderr)
        return 2
    _quieten()
    try:
        COMMANDS[name](rest)
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get("WNGEN_TRACEBACK"):
            raise
        print(f"wngen {name}: error: {error}", file=sys.stderr)
        print("With WNGEN_TRACEBACK=1 in the environment it says where.", file=sys.stderr)
        return 1
    return 0


def _quieten() -> None:
    """Leave out what Lightning says about itself, and torch to Lightning, so that one sees what wngen says."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        "Checkpoint directory .* exists",
        "`isinstance\\(treespec, LeafSpec\\)`",
        "The number of training batches",
        "It is recommended to use .*sync_dist=True",  # what is logged is the same in every process already
    ):
        warnings.filterwarnings("ignore", message)


def summary(function: Callable[..., Any] | type) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


# Training


def fit(argv: list[str]) -> None:
    """Train a model, evaluate its averaged weights on the test images, and write everything into a run folder."""
    parser = Arguments(prog="wngen fit", description=summary(fit))
    parser.add_config()
    parser.add_argument("--run", type=str | None, help="The run folder; runs/<config>-<time> by default.")
    parser.add_argument("--resume", type=str | None, help="Continue the run in this folder, with its configuration.")
    parser.add_argument(*IMPORTANCE_SAMPLES, type=int | None, help="K of the bound at the end; without it the ELBO.")
    parser.add_subclass_arguments(LikelihoodModel, "model", skip=SPEC, required=True, help="What is trained.")
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="What it is trained on.")
    parser.add_class_arguments(Training, "training", skip={"model"})
    parser.add_class_arguments(pl.Trainer, "trainer", skip=OURS)
    parser.usage = (
        "wngen fit [--config NAME|PATH] [--run FOLDER] [--resume FOLDER] [--importance-samples K]\n"
        "                 [--model NAME] [--model.*] [--data NAME] [--data.*] [--training.*] [--trainer.*]\n\n"
        "`wngen fit --model.help NAME` and `--data.help NAME` list the options of a model and of a data set."
    )

    resumed = _value_of("--resume", argv)
    if resumed is not None:
        if _value_of("--run", argv) is not None:
            parser.error("--run and --resume name one folder each, and there can be only one: leave --run out")
        if not (Path(resumed) / "last.ckpt").is_file():
            parser.error(f"--resume {resumed}: there is no last.ckpt in it; wanted the folder of an interrupted run")
        argv = ["--config", str(Path(resumed) / "config.yaml"), *argv]
    argv = parser.with_config(argv, default=DEFAULT_CONFIG)
    options = parser.parse_args(argv)
    config = Path(_value_of("--config", argv) or "run").stem
    # Lightning starts further processes by the same command line: they share the first one's folder.
    is_first_process = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if is_first_process:
        os.environ["WNGEN_RUN"] = f"runs/{config}-{datetime.now():%Y%m%d-%H%M%S}"
    named = resumed or options.run or os.environ.get("WNGEN_RUN")
    if named is None:
        parser.error("processes that something else than wngen starts need a folder in common: name it by --run")
    run = Path(named)
    if resumed is None and is_first_process and any(run.glob("*.ckpt")):
        parser.error(f"--run {run}: holds a run already; continue it by --resume {run}, or name another folder")

    pl.seed_everything(options.training.seed, workers=True, verbose=False)
    data = _build(options.data)
    model = _build(options.model, **data.spec.as_dict())
    _check_classes(model, data)
    training = Training(model, **options.training.as_dict())
    if resumed is not None:
        _check_resumable(run, training)
    options.trainer.precision = options.trainer.precision or _fastest_precision(options.trainer.accelerator)
    data.prepare_data()
    trainer = _trainer(_instantiated(options.trainer), run, has_validation=data.size("val") > 0)
    if trainer.is_global_zero:
        run.mkdir(parents=True, exist_ok=True)
        options.run = options.resume = options.config = None
        (run / ".config.yaml.partial").write_text(parser.dump(options))
        (run / ".config.yaml.partial").replace(run / "config.yaml")
        parameters = sum(p.numel() for p in model.parameters())
        console.print(f"{type(model).__name__}, {parameters:,} parameters, on {data.name}; writing to {run}/")
    checkpoint = str(run / "last.ckpt") if resumed else None
    try:
        trainer.fit(training, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # how Lightning ends after Ctrl-C
        saved = (run / "last.ckpt").is_file()
        raise ValueError(
            f"interrupted; `wngen fit --resume {run}` goes on from its last epoch" if saved else "interrupted"
        ) from None
    if trainer.is_global_zero and not options.trainer.fast_dev_run:
        _finish(run, data, options.importance_samples, trainer.strategy.root_device)


def _check_resumable(run: Path, training: Training) -> None:
    """What was trained so far must be what is to be trained on: neither model nor training may have changed."""
    held = read_metadata(run / "last.ckpt")
    for part, before, now in (
        ("model", held.model, training.model.config),
        ("training", held.training or {}, training.options),
    ):
        differing = [f"{part}.{name}={value}" for name, value in before.items() if name in now and now[name] != value]
        if differing:
            raise ValueError(f"--resume {run}: it was begun with {', '.join(differing)} and can only go on so")


def _instantiated(options: Namespace) -> dict[str, Any]:
    """The trainer's options with the objects, such as callbacks, that a configuration names by class."""
    parser = Arguments()
    parser.add_class_arguments(pl.Trainer, "trainer", skip=OURS, instantiate=False)
    built: dict[str, Any] = parser.instantiate(Namespace(trainer=options)).trainer.as_dict()
    return built


def _trainer(options: dict[str, Any], run: Path, has_validation: bool) -> pl.Trainer:
    """Lightning's trainer, writing into the run folder."""
    if options["logger"] in (None, True):
        options["logger"] = [CSVLogger(run, name="metrics"), TensorBoardLogger(run, name="tensorboard")]
    if options["accelerator"] == "auto" and not torch.cuda.is_available():
        options["accelerator"] = "cpu"  # Apple's GPUs lack the double precision that figures are summed in
    folder: dict[str, Any] = {"dirpath": run, "enable_version_counter": False}
    checkpoints = [ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **folder)]
    if has_validation:
        checkpoints.append(ModelCheckpoint(filename="best", monitor="val/elbo_nats", mode="max", **folder))
    else:
        options["limit_val_batches"] = 0
    given = options["callbacks"] or []
    given = given if isinstance(given, list) else [given]
    bar = [] if options["enable_progress_bar"] is False else [RichProgressBar(refresh_rate=10)]
    options["callbacks"] = [*given, ImageGrids(), *bar, *checkpoints]
    plugins = options["plugins"] or []
    options["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
    options["enable_model_summary"] = options["enable_model_summary"] or False
    options["use_distributed_sampler"] = False  # the data module divides the images among processes itself
    options["default_root_dir"] = str(run)
    return pl.Trainer(**options)


def _fastest_precision(accelerator: Any) -> Literal["bf16-mixed", "32-true"]:
    """Whichever is faster here: on a processor without instructions for bf16 it is many times slower."""
    if accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"


def _finish(run: Path, data: ImageDataModule, importance_samples: int | None, device: torch.device) -> None:
    """Evaluate the best averaged weights on the test images, make a release, and draw pictures."""
    model = load(run, device=device)
    images = data.size("test")
    report = _evaluate(model, data, "test", importance_samples) if images else None
    if report is not None:
        report.write(run / "report.json")
    save_release(model, run / "release", report, read_metadata(run))
    console.print(report or "There are no test images, and so no report.")
    save_png(grid(_sample(model, 64), model.spec.levels), run / "samples.png")
    if isinstance(model, LatentVariableModel) and images:
        batch = _images(model, data, "test", min(32, images))
        save_png(reconstruct(model, batch.image, batch.label), run / "reconstructions.png")
    parts = sorted((run / "metrics").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if parts:  # a user may have chosen another logger
        draw_curves(run / "curves.png", *parts)
    console.print(
        f"In {run}/: " + ", ".join(sorted(f"{path.name}/" if path.is_dir() else path.name for path in run.iterdir()))
    )


# What is done with a trained model


def evaluate_command(argv: list[str]) -> None:
    """Give a model's bound on the log-likelihood of a data set, with its uncertainty and its protocol."""
    parser = _with_model("wngen evaluate", evaluate_command)
    _add_data(parser)
    parser.add_argument(
        *IMPORTANCE_SAMPLES, type=int | None, help="K of the importance-weighted bound; none by default."
    )
    parser.add_argument("--limit", type=int | None, help="Take so many images, drawn by the data's evaluation seed.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument("--chunk", type=int, default=1024, help="Samples decoded at once; bounds the memory.")
    parser.add_argument(
        "--out", type=str | None, help="Where the report goes, as JSON; report-<split>.json in the run folder."
    )
    options, model, data = _parse_with_data(parser, argv)
    report = _evaluate(
        model,
        data,
        options.split,
        options.importance_samples,
        options.seed,
        options.chunk,
        options.limit,
        options.weights,
    )
    console.print(report)
    where = Path(options.checkpoint)
    k = f"-k{options.importance_samples}" if options.importance_samples else ""
    name = f"report-{options.split}{'' if options.weights == 'ema' else '-raw'}{k}.json"
    out = Path(options.out) if options.out else (where if where.is_dir() else Path()) / name
    report.write(out)
    console.print(f"Written to {out}")


def sample_command(argv: list[str]) -> None:
    """Draw images from a model, as a grid."""
    parser = _with_model("wngen sample", sample_command)
    parser.add_argument("-n", "--count", type=int, default=64, help="How many images.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Below 1: likelier, less varied images.")
    parser.add_argument("--label", type=int | None, help="The class of all images; by default all classes in turn.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random numbers.")
    parser.add_argument("--columns", type=int | None, help="Of the grid; as many as rows by default.")
    parser.add_argument("--out", type=str, default="samples.png", help="The picture.")
    options = parser.parse_args(argv)
    model = _load(options)
    if options.count < 1:
        parser.error(f"-n {options.count}: wanted at least 1")
    images = _sample(model, options.count, options.temperature, options.label, options.seed)
    save_png(grid(images, model.spec.levels, options.columns), options.out)
    console.print(f"{options.count} samples at temperature {options.temperature:g}: {options.out}")


def reconstruct_command(argv: list[str]) -> None:
    """Encode images and decode them again: each original above its reconstruction."""
    parser = _with_model("wngen reconstruct", reconstruct_command)
    _add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int, default=32, help="How many images, drawn by the data's evaluation seed."
    )
    parser.add_argument("--out", type=str, default="reconstructions.png", help="The picture.")
    options, model, data = _parse_with_data(parser, argv)
    batch = _images(model, data, options.split, options.count)
    save_png(reconstruct(model, batch.image, batch.label), options.out)
    console.print(f"{options.count} images of the {options.split} split and their reconstructions: {options.out}")


def interpolate_command(argv: list[str]) -> None:
    """Walk between images along a straight line in latent space; one row for each pair."""
    parser = _with_model("wngen interpolate", interpolate_command)
    _add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int, default=8, help="Pairs of images, drawn by the data's evaluation seed."
    )
    parser.add_argument("--steps", type=int, default=12, help="Images on the way, both ends counted.")
    parser.add_argument(
        "--out", type=str, default="interpolation.png", help="The picture; a name ending in .gif makes a film."
    )
    options, model, data = _parse_with_data(parser, argv)
    if options.count < 1 or options.steps < 2:
        parser.error(f"-n {options.count} --steps {options.steps}: wanted at least 1 pair and 2 steps")
    batch = _images(model, data, options.split, 2 * options.count)
    a, b = batch.image.chunk(2)
    label = None if batch.label is None else batch.label[: options.count]  # of where the way starts
    ways = interpolate(model, a, b, options.steps, label)
    if Path(options.out).suffix == ".gif":
        save_gif([grid(frame, 256) for frame in back_and_forth(ways.transpose(0, 1))], options.out)
    else:
        save_png(grid(ways.flatten(0, 1), 256, columns=options.steps), options.out)
    console.print(
        f"{options.count} ways of {options.steps} steps between images of the {options.split} split: {options.out}"
    )


def _with_model(command: str, function: Callable[..., Any]) -> Arguments:
    parser = Arguments(prog=command, description=summary(function))
    parser.add_argument("checkpoint", type=str, help="A run folder, a .ckpt, a release folder, or a hub id.")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Averaged or raw, of a .ckpt.")
    parser.add_argument("--device", type=str, default="auto", help="Such as cpu or cuda:1.")
    return parser


def _add_data(parser: Arguments) -> None:
    parser.add_config()
    parser.add_subclass_arguments(
        ImageDataModule, "data", required=False, help="By default what the model was trained on."
    )
    parser.add_argument("--split", type=Literal["train", "val", "test"], default="test", help="Of the data.")


def _load(options: Any) -> LikelihoodModel:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    return load(options.checkpoint, options.weights, device)


def _parse_with_data(parser: Arguments, argv: list[str]) -> tuple[Any, LikelihoodModel, ImageDataModule]:
    """The options, the model on its device, and the data: what it was trained on, but for what the options change."""
    # The first word that is neither an option nor, as each of them takes one, an option's value.
    before = ["", *argv]
    values = {i for i, word in enumerate(argv) if before[i].startswith("-") and "=" not in before[i]}
    where = next((word for i, word in enumerate(argv) if i not in values and not word.startswith("-")), None)
    if where is not None and not {"-h", "--help"} & set(argv):
        stored = read_metadata(where).data
        if (
            stored is not None
            and _value_of("--data", argv) in (None, stored["data"])
            and not _value_of("--config", argv)
        ):
            arguments = {name: value for name, value in stored.items() if name != "data"}
            parser.set_defaults({"data": {"class_path": f"wngen.data.{stored['data']}", "init_args": arguments}})
    options = parser.parse_args(parser.with_config(argv))
    model = _load(options)
    if options.data is None:
        parser.error(f"{options.checkpoint} does not say what it was trained on: name the data by --data")
    data = _build(options.data)
    if data.spec != model.spec:
        raise ValueError(f"the model takes images of {model.spec}, the data has {data.spec}")
    _check_classes(model, data)
    return options, model, data


def _check_classes(model: LikelihoodModel, data: ImageDataModule) -> None:
    """A conditional model needs data with labels, of no more classes than it knows."""
    if model.num_classes is not None and not 0 < (data.num_classes or 0) <= model.num_classes:
        raise ValueError(
            f"the model knows {model.num_classes} classes, {data.name} has {data.num_classes or 'no'} labels"
        )


def _evaluate(
    model: LikelihoodModel,
    data: ImageDataModule,
    split: Split,
    importance_samples: int | None,
    seed: int = 0,
    chunk: int = 1024,
    limit: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
) -> Report:
    protocol = data.protocol(split, limit)
    batches = data.evaluation_batches(split, chunk, limit)
    evaluation = evaluate(
        model, batches, protocol["images"], importance_samples, seed, chunk, progress=console.is_terminal
    )
    return Report.of(evaluation, model, protocol, weights)


def _images(model: LikelihoodModel, data: ImageDataModule, split: Split, count: int) -> Batch:
    """Some images of a split, on the model's device, with labels only where the model wants them."""
    batch = next(iter(data.evaluation_batches(split, count, limit=count)))
    device = next(model.parameters()).device
    label = None if model.num_classes is None or batch.label is None else batch.label.to(device)
    return Batch(batch.image.to(device), label, batch.index)


def _sample(
    model: LikelihoodModel, count: int, temperature: float = 1.0, label: int | None = None, seed: int = 0
) -> torch.Tensor:
    device = next(model.parameters()).device
    y = None
    if model.num_classes is not None:
        y = (
            torch.arange(count, device=device) % model.num_classes
            if label is None
            else torch.full((count,), label, device=device)
        )
    elif label is not None:
        raise ValueError(f"--label {label}: this model is not conditioned on classes")
    return model.sample(count, y, temperature, torch.Generator(device).manual_seed(seed))


# What there is


def models_command(argv: list[str]) -> None:
    """List the architectures, and the released models with the figure each reached."""
    Arguments(prog="wngen models", description=summary(models_command)).parse_args(argv)
    table = Table("model", "what it is", "paper", "parameters", title="Architectures", title_justify="left")
    for cls in concrete_subclasses(LikelihoodModel):
        if cls.__module__.startswith("wngen."):
            paper = (inspect.getdoc(cls) or "").partition("References:")[2].strip().partition("\n")[0]
            table.add_row(cls.__name__, summary(cls), paper, f"{sum(p.numel() for p in cls().parameters()):,}")
    console.print(table)
    released = Table("released model", "data", "bound or likelihood, nats", title="Released", title_justify="left")
    for path in sorted((Path(wngen.__file__).parents[1] / "checkpoints").glob("*/report.json")):
        report = Report.read(path)
        figures = "; ".join(f"{title} {nats}" for title, nats, *_ in report.rows if title not in ("distortion", "rate"))
        released.add_row(f"checkpoints/{path.parent.name}", report.data_line, figures)
    if released.row_count:
        console.print(released)
    else:
        console.print("Released models lie in the folder checkpoints/ of the repository.")


def configs_command(argv: list[str]) -> None:
    """List the packaged configurations: what each trains, and the figure it reaches."""
    Arguments(prog="wngen configs", description=summary(configs_command)).parse_args(argv)
    table = Table("config", "what it trains, and what it reaches")
    for name, path in packaged_configs().items():
        lines = path.read_text().splitlines()
        comment = [
            line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines)
        ]
        table.add_row(name, " ".join(comment))
    console.print(table)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fit": fit,
    "evaluate": evaluate_command,
    "sample": sample_command,
    "reconstruct": reconstruct_command,
    "interpolate": interpolate_command,
    "models": models_command,
    "configs": configs_command,
}


def _build(options: Any, **more: Any) -> Any:
    """An object from its `class_path` and `init_args`, and more arguments."""
    module, _, name = options.class_path.rpartition(".")
    arguments = options.get("init_args") or {}
    return getattr(import_module(module), name)(**{**more, **dict(arguments)})


def _value_of(flag: str, argv: list[str]) -> str | None:
    """The value after `flag`, or behind its equals sign."""
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
