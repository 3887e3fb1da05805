"""The commands on a trained model: its figures, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich import get_console

from wngen import sampling
from wngen.arguments import Arguments, build, summary, value_of
from wngen.autoregressive import AutoregressiveModel
from wngen.checkpoint import load, read_metadata
from wngen.cli.subject import Subject
from wngen.data import ImageDataModule
from wngen.decoder import Watch
from wngen.evaluation.published import comparison
from wngen.model import LikelihoodModel


def evaluate(argv: list[str]) -> None:
    """Give a model's bound on the log-likelihood of a data set, with its uncertainty and its protocol."""
    parser = _parser(evaluate)
    _add_data(parser)
    parser.add_importance_samples("K of the importance-weighted bound; none by default.")
    parser.add_argument("--limit", type=int | None, help="Take so many images, drawn by the data's evaluation seed.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument(
        "--chunk",
        type=int | None,
        help="Images, or samples of them, at once: it bounds the memory.",
    )
    parser.add_argument(
        "--out", type=str | None, help="Where the report goes, as JSON; report-<split>.json in the run folder."
    )
    options, subject = _parse_with_data(parser, argv)
    report = subject.report(options.split, options.importance_samples, options.seed, options.chunk, options.limit)
    get_console().print(report)
    if (published := comparison(report)) is not None:
        get_console().print(published, new_line_start=True)
    where = Path(options.checkpoint)
    k = f"-k{options.importance_samples}" if options.importance_samples else ""
    name = f"report-{options.split}{'' if report.protocol['weights'] == 'ema' else '-raw'}{k}.json"
    out = Path(options.out) if options.out else (where if where.is_dir() else Path()) / name
    report.write(out)
    get_console().print(f"Written to {out}")


def sample(argv: list[str]) -> None:
    """Draw images from a model, as a grid; or variations of images that share their uppermost latents."""
    parser = _parser(sample)
    _add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int | None, help="How many images, 64 by default; with --keep-top 8 of the data."
    )
    parser.add_argument(
        "--temperature",
        type=float | list[float],
        default=1.0,
        help="Below 1: likelier, less varied images. '[1, 1, 0.7]' is one for each stochastic layer, topmost first.",
    )
    parser.add_argument(
        "--keep-top",
        "--keep_top",
        type=int | Literal["all"] | None,
        help="Keep an image's latents of so many uppermost layers, and draw the others anew.",
    )
    parser.add_argument("--alternatives", type=int | None, help="With --keep-top: of each image, 7 by default.")
    parser.add_argument("--label", type=int | None, help="The class of all images; by default all classes in turn.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random numbers.")
    parser.add_argument("--columns", type=int | None, help="Of the grid; as many as rows by default.")
    parser.add_argument("--out", type=str, default="samples.png", help="The picture.")
    parser.add_argument("--animate", type=str | None, help="A film of the pixels being drawn, a .gif.")
    options, training = _parse(parser, argv)
    keeps = options.keep_top is not None
    foreign = ("label", "columns", "animate") if keeps else ("alternatives",)
    if unused := [f"--{name}" for name in foreign if getattr(options, name) is not None]:
        parser.error(f"{', '.join(unused)}: not {'together with' if keeps else 'without'} --keep-top; leave it out")
    count = (8 if keeps else 64) if options.count is None else options.count
    alternatives = 7 if options.alternatives is None else options.alternatives
    if count < 1 or alternatives < 1:
        parser.error(f"-n {count} --alternatives {alternatives}: wanted at least 1 of each")
    if keeps:
        subject = _subject(parser, options, training)
        batch = subject.images(options.split, count)
        generator = torch.Generator(batch.image.device).manual_seed(options.seed)
        picture = sampling.resample(
            subject.model, batch.image, options.keep_top, alternatives, batch.label, options.temperature, generator
        )
        kept = f"{alternatives} that keep {options.keep_top} of its layers"
        what = f"{count} images of the {options.split} split, beside each {kept},"
    else:
        model = _load(options)
        with _drawing(model, options, count, options.columns) as watch:
            images = sampling.draw_samples(model, count, options.temperature, options.label, options.seed, watch)
        picture = sampling.grid(images, model.spec.levels, options.columns)
        what = f"{count} samples"
    sampling.save_png(picture, options.out)
    get_console().print(f"{what} at temperature {options.temperature}: {options.out}", markup=False)


def complete(argv: list[str]) -> None:
    """Complete half-seen images in several ways, row by row: given pixels act on those after them."""
    parser = _parser(complete)
    _add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int, default=8, help="How many images, drawn by the data's evaluation seed."
    )
    parser.add_argument("--rows", type=int | None, help="Give so many of the upper rows; half of them by default.")
    parser.add_argument(
        "--mask",
        type=str | None,
        help="A PNG of the images' size. Its bright pixels are given.",
    )
    parser.add_argument("--alternatives", type=int, default=8, help="Completions of each image.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Below 1: likelier, less varied completions.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random numbers.")
    parser.add_argument("--out", type=str, default="completions.png", help="The picture.")
    parser.add_argument("--animate", type=str | None, help="A film of the pixels being drawn, a .gif.")
    options, subject = _parse_with_data(parser, argv)
    if options.rows is not None and options.mask is not None:
        parser.error("--rows and --mask both say what is given: leave one out")
    if options.count < 1 or options.alternatives < 1:
        parser.error(f"-n {options.count} --alternatives {options.alternatives}: wanted at least 1 of each")
    model = sampling.autoregressive(subject.model)
    spec = model.spec
    known = (
        sampling.upper_rows(spec, spec.height // 2 if options.rows is None else options.rows)
        if options.mask is None
        else sampling.mask_from_png(options.mask, spec)
    )
    batch = subject.images(options.split, options.count)
    generator = torch.Generator().manual_seed(options.seed)
    with _drawing(model, options, options.count * options.alternatives, options.alternatives) as watch:
        picture = sampling.completions(
            model, batch.image, known, options.alternatives, batch.label, options.temperature, generator, watch
        )
    sampling.save_png(picture, options.out)
    get_console().print(
        f"{options.count} images of the {options.split} split, {options.alternatives} ways each: {options.out}"
    )


@contextmanager
def _drawing(model: LikelihoodModel, options: Any, images: int, columns: int | None) -> Iterator[Watch | None]:
    """What watches images being drawn pixel by pixel: a progress bar, and the film that was asked for."""
    if not isinstance(model, AutoregressiveModel):
        if options.animate:
            sampling.autoregressive(model)
        yield None
        return
    chunks = -(-images // model.drawn_at_once)
    if options.animate and chunks > 1:
        raise ValueError(f"--animate shows at most {model.drawn_at_once} images, these are {images}: ask for fewer")
    film = sampling.Film(model.spec, columns=columns)
    with sampling.watched(chunks * model.spec.height * model.spec.width, *([film] if options.animate else [])) as watch:
        yield watch
    if options.animate:
        sampling.save_gif(film.frames, options.animate)
        get_console().print(f"How they were drawn: {options.animate}")


def reconstruct(argv: list[str]) -> None:
    """Encode images and decode them again: each original above its reconstruction."""
    parser = _parser(reconstruct)
    _add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int, default=32, help="How many images, drawn by the data's evaluation seed."
    )
    parser.add_argument("--out", type=str, default="reconstructions.png", help="The picture.")
    options, subject = _parse_with_data(parser, argv)
    batch = subject.images(options.split, options.count)
    sampling.save_png(sampling.reconstruct(subject.model, batch.image, batch.label), options.out)
    get_console().print(f"{options.count} images of the {options.split} split and their reconstructions: {options.out}")


def interpolate(argv: list[str]) -> None:
    """Walk between images along a straight line in latent space; one row for each pair."""
    parser = _parser(interpolate)
    _add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int, default=8, help="Pairs of images, drawn by the data's evaluation seed."
    )
    parser.add_argument("--steps", type=int, default=12, help="Images on the way, both ends counted.")
    parser.add_argument(
        "--out", type=str, default="interpolation.png", help="The picture; a name ending in .gif makes a film."
    )
    options, subject = _parse_with_data(parser, argv)
    if options.count < 1 or options.steps < 2:
        parser.error(f"-n {options.count} --steps {options.steps}: wanted at least 1 pair and 2 steps")
    batch = subject.images(options.split, 2 * options.count)
    a, b = batch.image.chunk(2)
    y_a, y_b = (None, None) if batch.label is None else batch.label.chunk(2)
    ways = sampling.interpolate(subject.model, a, b, options.steps, y_a, y_b)
    if Path(options.out).suffix == ".gif":
        frames = sampling.back_and_forth(ways.transpose(0, 1))
        sampling.save_gif([sampling.grid(frame, 256) for frame in frames], options.out)
    else:
        sampling.save_png(sampling.grid(ways.flatten(0, 1), 256, columns=options.steps), options.out)
    get_console().print(
        f"{options.count} ways of {options.steps} steps between images of the {options.split} split: {options.out}"
    )


def _parser(command: Callable[[list[str]], None]) -> Arguments:
    """What every command on a trained model takes."""
    parser = Arguments(prog=f"wngen {command.__name__}", description=summary(command))
    parser.add_argument("checkpoint", type=str, help="A run folder, a .ckpt, a release folder, or a hub id.")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Averaged or raw, of a .ckpt.")
    parser.add_argument("--device", type=str, default="auto", help="Such as cpu or cuda:1.")
    return parser


def _add_data(parser: Arguments) -> None:
    """What a command on a model and images takes; see `_parse`."""
    parser.add_config()
    parser.add_subclass_arguments(
        ImageDataModule, "data", required=False, help="By default what the model was trained on."
    )
    parser.add_argument("--split", type=Literal["train", "val", "test"], default="test", help="Of the data.")


def _load(options: Any) -> LikelihoodModel:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    return load(options.checkpoint, options.weights, device)


def _parse_with_data(parser: Arguments, argv: list[str]) -> tuple[Any, Subject]:
    """The options, and the model with its data."""
    options, training = _parse(parser, argv)
    return options, _subject(parser, options, training)


def _parse(parser: Arguments, argv: list[str]) -> tuple[Any, Mapping[str, Any] | None]:
    """The options, with the data that the model was trained on where they name no other, and how it was trained."""
    argv = parser.prepared(argv)
    # The first word that is neither an option nor, as each of them takes one, an option's value.
    before = ["", *argv]
    values = {i for i, word in enumerate(argv) if before[i].startswith("-") and "=" not in before[i]}
    where = next((word for i, word in enumerate(argv) if i not in values and not word.startswith("-")), None)
    training = None
    if where is not None and not {"-h", "--help"} & set(argv):
        metadata = read_metadata(where)
        stored, training = metadata.data, metadata.training
        if stored is not None and value_of("--data", argv) in (None, stored["data"]) and not value_of("--config", argv):
            arguments = {name: value for name, value in stored.items() if name != "data"}
            parser.set_defaults({"data": {"class_path": f"wngen.data.{stored['data']}", "init_args": arguments}})
    return parser.parse_args(argv), training


def _subject(parser: Arguments, options: Any, training: Mapping[str, Any] | None) -> Subject:
    """The model together with its data."""
    if options.data is None:
        parser.error(f"{options.checkpoint} does not say what it was trained on: name the data by --data")
    return Subject(_load(options), build(options.data), training, options.weights)
