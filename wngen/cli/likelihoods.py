"""The commands that measure likelihoods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich import get_console

from wngen.arguments import Arguments
from wngen.checkpoint import read_metadata
from wngen.cli.options import add_data, data_of, loaded, model_parser, parse, parse_with_data
from wngen.cli.subject import Measurement, Subject
from wngen.data import ImageDataModule
from wngen.evaluation import Evaluation, Report, weights_sha256
from wngen.evaluation.paired import Candidate, Comparison
from wngen.evaluation.processes import Processes, joined
from wngen.evaluation.published import comparison
from wngen.evaluation.scores import Separation, write_scores


def evaluate(argv: list[str]) -> None:
    """Give the log-likelihood of a data set, or bounds on it, with uncertainty and protocol; compare models."""
    parser = model_parser(evaluate, several=True)
    add_data(parser)
    parser.add_importance_samples("K of the importance-weighted bound; none by default.")
    _add_protocol(parser)
    _add_annealing(parser)
    parser.add_argument(
        "--out",
        type=str | None,
        help="Where the report goes, as JSON; report-<split>.json in the run folder. Of several models the comparison.",
    )
    options, _ = parse(parser, argv)
    _check(parser, options)
    checkpoints: list[str] = options.checkpoints
    data = data_of(parser, options, checkpoints[0])
    names = [Path(where).name for where in checkpoints]
    names = names if len(set(names)) == len(names) else checkpoints
    with joined() as processes:
        subjects = _subjects(options, data, processes)
        outs = [_report_path(where, subject, options) for where, subject in zip(checkpoints, subjects, strict=True)]
        if options.out and len(checkpoints) == 1:
            outs = [Path(options.out)]
        if len(set(outs)) < len(outs):
            raise ValueError(f"{', '.join(checkpoints)}: the same model twice; name each once")
        candidates = []
        for name, subject, out in zip(names, subjects, outs, strict=True):
            measured = _measured(subject, options, out, processes)
            candidates.append(Candidate(name, measured.report, measured.evaluation))
            if processes.rank == 0:
                _show(measured, out)
        if len(candidates) > 1 and processes.rank == 0:
            compared = Comparison.of(candidates)
            get_console().print(compared)
            if options.out:
                compared.write(options.out)
                get_console().print(f"Written to {options.out}")


def _check(parser: Arguments, options: Any) -> None:
    """What would fail only after hours is refused before them."""
    if options.out and (Path(options.out).suffix != ".json" or Path(options.out).is_dir()):
        parser.error(f"--out {options.out}: wanted the name of a file that ends in .json")
    if options.limit is not None and options.limit < 2:
        parser.error(f"--limit {options.limit}: a standard error needs at least 2 images")
    if options.ais is not None and (options.ais < 1 or options.ais_chains < 1 or options.ais_images < 2):
        parser.error(
            f"--ais {options.ais} --ais-chains {options.ais_chains} --ais-images {options.ais_images}: wanted at least "
            "1 step, 1 chain and 2 images"
        )


def _subjects(options: Any, data: ImageDataModule, processes: Processes) -> list[Subject]:
    """All models, each known to fit the data, which the first process gets where it has to be got."""
    if processes.rank == 0:
        data.images(options.split)
    processes.gather(None)
    subjects = [
        Subject(loaded(options, where), data, read_metadata(where).training, options.weights)
        for where in options.checkpoints
    ]
    if options.ais is not None and all(subject.model.is_exact for subject in subjects):
        raise ValueError("--ais: the likelihood is exact, there is no bound to check; leave it out")
    return subjects


def score(argv: list[str]) -> None:
    """Sort images by their likelihood into a table, and say how well it tells them from images that the model knows."""
    parser = model_parser(score)
    add_data(parser)
    parser.add_importance_samples("K of the importance-weighted bound; without it images are sorted by the ELBO.")
    _add_protocol(parser)
    parser.add_argument(
        "--reference",
        type=str | None,
        help="The per_image.npz of an evaluation of images that the model knows, to compare these with.",
    )
    parser.add_argument("--out", type=str, default="scores.csv", help="The table.")
    options, subject = parse_with_data(parser, argv)
    reference = None if options.reference is None else _reference(Path(options.reference), subject, options)
    with joined() as processes:
        measured = _measured(subject, options, Path(options.out), processes)
        if processes.rank:
            return
    evaluation, spec = measured.evaluation, subject.model.spec
    known = None if reference is None else reference.best_nats
    names = subject.data.file_names(options.split)
    write_scores(options.out, evaluation, spec, _labels(subject, options), known, names)
    measured.discard_unfinished()
    nats, data_line = evaluation.best_nats, measured.report.data_line
    get_console().print(f"{data_line}: {nats.min():.2f} to {nats.max():.2f} nats, mean {nats.mean():.2f}")
    if known is not None:
        separation = Separation.of(nats, known)
        get_console().print(
            f"Beside {len(known):,} images of mean {known.mean():.2f} nats: area under the ROC curve "
            f"{separation.unlikely:.3f} by low likelihood, {separation.untypical:.3f} by distance from that mean."
        )
    get_console().print(
        "A high likelihood does not mean that an image is like those of training: simple images have a high one under "
        "most models (Nalisnick et al. 2019, arXiv:1810.09136)."
    )
    get_console().print(f"Written to {options.out}, the likeliest first")


def _reference(path: Path, subject: Subject, options: Any) -> Evaluation:
    """Figures of other images under the same model.

    Raises:
        ValueError: they are of another model, or were measured otherwise; told by the report beside them.
    """
    evaluation = Evaluation.read(path)
    report = Report.read(path.with_name(f"{path.stem.replace('per_image', 'report')}.json"))
    k = None if subject.model.is_exact else options.importance_samples
    dtype = options.dtype or str(next(subject.model.parameters()).dtype).removeprefix("torch.")
    wanted = {"weights_sha256": weights_sha256(subject.model)[:12], "importance_samples": k, "dtype": dtype}
    seen = {
        **{name: report.protocol[name] for name in wanted},
        "weights_sha256": report.protocol["weights_sha256"][:12],
    }
    if differing := [f"{name} {seen[name]}, wanted {wanted[name]}" for name in wanted if seen[name] != wanted[name]]:
        raise ValueError(f"--reference {path} was not measured as these images are: {'; '.join(differing)}")
    return evaluation


def _labels(subject: Subject, options: Any) -> NDArray[np.int64] | None:
    """The classes of the images that were evaluated, in the order of their indices."""
    batches = list(subject.data.evaluation_batches(options.split, subject.model.chunk, options.limit))
    if batches[0].label is None:
        return None
    return np.concatenate([batch.label.numpy() for batch in batches if batch.label is not None])


def _add_protocol(parser: Arguments) -> None:
    """Add what a figure depends on, besides model and data."""
    parser.add_argument("--limit", type=int | None, help="Take so many images, drawn by the data's evaluation seed.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument("--chunk", type=int | None, help="Images, or samples of them, at once: it bounds the memory.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "float64"] | None, help="Of the evaluation; by default that of the weights."
    )


def _add_annealing(parser: Arguments) -> None:
    """Add what annealed importance sampling takes."""
    parser.add_argument(
        "--ais",
        type=int | None,
        help="Check the bound by annealed importance sampling with so many steps, in both directions; none by default.",
    )
    parser.add_argument("--ais-chains", "--ais_chains", type=int, default=16, help="For each image.")
    parser.add_argument("--ais-images", "--ais_images", type=int, default=100, help="Of those that are evaluated.")


def _measured(subject: Subject, options: Any, out: Path, processes: Processes) -> Measurement:
    """Evaluate as the options say, or go on with it after an interruption.

    Raises:
        KeyboardInterrupt: with a message that says how to go on.
    """
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    k, annealing = options.importance_samples, options.get("ais")
    try:
        measured = subject.measure(options.split, k, options.seed, options.chunk, options.limit, dtype, out, processes)
        if annealing is None or subject.model.is_exact:
            return measured
        how = options.ais_chains, options.ais_images, options.seed, options.chunk, dtype, processes
        return subject.annealed(measured, options.split, annealing, *how)
    except KeyboardInterrupt:
        anew = "" if annealing is None else "; annealing begins anew"
        raise KeyboardInterrupt(f": the same command goes on after the images that are done{anew}") from None


def _show(measured: Measurement, out: Path) -> None:
    """Print figures, with published ones beside them, and write them."""
    get_console().print(measured.report)
    if (published := comparison(measured.report)) is not None:
        get_console().print(published, new_line_start=True)
    measured.write(out)
    get_console().print(f"Written to {out}")


def _report_path(where: str, subject: Subject, options: Any) -> Path:
    """Beside the model where it has a place, under a name that says in what it differs from the usual."""
    stored, drawn = read_metadata(where).data, subject.data.evaluation_seed
    parts = [
        "report",
        "" if stored is None or _as_evaluated(stored) == _as_evaluated(subject.data.config) else _data_name(subject),
        options.split,
        "" if options.weights == "ema" else options.weights,
        f"k{options.importance_samples}" if options.importance_samples else "",
        f"n{options.limit}" if options.limit else "",
        f"seed{options.seed}" if options.seed else "",
        f"evaluation_seed{drawn}" if drawn != int((stored or {}).get("evaluation_seed", 0)) else "",
        options.dtype or "",
    ]
    name, path = f"{'-'.join(part for part in parts if part)}.json", Path(where)
    if path.is_dir():
        return path / name
    return path.with_name(f"{path.stem}-{name}") if path.is_file() else Path(f"{where.replace('/', '--')}-{name}")


def _as_evaluated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a data set's arguments those that its evaluated images depend on."""
    others = {"batch_size", "seed", "horizontal_flips", "root"}
    return {name: str(value) for name, value in config.items() if name not in others}


def _data_name(subject: Subject) -> str:
    binarization = subject.data.binarization
    return "-".join([subject.data.name.lower(), *([] if binarization == "none" else [binarization])])
