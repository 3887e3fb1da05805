"""The commands that show what a trained model draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from rich import get_console

from wngen import sampling
from wngen.autoregressive import AutoregressiveModel
from wngen.cli.options import add_data, loaded, model_parser, parse, parse_with_data, subject_of
from wngen.decoder import Watch
from wngen.model import LikelihoodModel


def sample(argv: list[str]) -> None:
    """Draw images from a model, as a grid; or variations of images that share their uppermost latents."""
    parser = model_parser(sample)
    add_data(parser)
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
    options, training = parse(parser, argv)
    keeps = options.keep_top is not None
    foreign = ("label", "columns", "animate") if keeps else ("alternatives",)
    if unused := [f"--{name}" for name in foreign if getattr(options, name) is not None]:
        parser.error(f"{', '.join(unused)}: not {'together with' if keeps else 'without'} --keep-top; leave it out")
    count = (8 if keeps else 64) if options.count is None else options.count
    alternatives = 7 if options.alternatives is None else options.alternatives
    if count < 1 or alternatives < 1:
        parser.error(f"-n {count} --alternatives {alternatives}: wanted at least 1 of each")
    if keeps:
        subject = subject_of(parser, options, training)
        batch = subject.images(options.split, count)
        generator = torch.Generator(batch.image.device).manual_seed(options.seed)
        picture = sampling.resample(
            subject.model, batch.image, options.keep_top, alternatives, batch.label, options.temperature, generator
        )
        kept = f"{alternatives} that keep {options.keep_top} of its layers"
        what = f"{count} images of the {options.split} split, beside each {kept},"
    else:
        model = loaded(options)
        with _drawing(model, options, count, options.columns) as watch:
            images = sampling.draw_samples(model, count, options.temperature, options.label, options.seed, watch)
        picture = sampling.grid(images, model.spec.levels, options.columns)
        what = f"{count} samples"
    sampling.save_png(picture, options.out)
    get_console().print(f"{what} at temperature {options.temperature}: {options.out}", markup=False)


def complete(argv: list[str]) -> None:
    """Complete half-seen images in several ways, row by row: given pixels act on those after them."""
    parser = model_parser(complete)
    add_data(parser)
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
    options, subject = parse_with_data(parser, argv)
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
    parser = model_parser(reconstruct)
    add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int, default=32, help="How many images, drawn by the data's evaluation seed."
    )
    parser.add_argument("--out", type=str, default="reconstructions.png", help="The picture.")
    options, subject = parse_with_data(parser, argv)
    batch = subject.images(options.split, options.count)
    sampling.save_png(sampling.reconstruct(subject.model, batch.image, batch.label), options.out)
    get_console().print(f"{options.count} images of the {options.split} split and their reconstructions: {options.out}")


def interpolate(argv: list[str]) -> None:
    """Walk between images along a straight line in latent space; one row for each pair."""
    parser = model_parser(interpolate)
    add_data(parser)
    parser.add_argument(
        "-n", "--count", type=int, default=8, help="Pairs of images, drawn by the data's evaluation seed."
    )
    parser.add_argument("--steps", type=int, default=12, help="Images on the way, both ends counted.")
    parser.add_argument(
        "--out", type=str, default="interpolation.png", help="The picture; a name ending in .gif makes a film."
    )
    options, subject = parse_with_data(parser, argv)
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
