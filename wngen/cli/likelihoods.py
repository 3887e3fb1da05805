"""The commands that measure likelihoods."""

from __future__ import annotations

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
from wngen.evaluation import Evaluation
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
    checkpoints: list[str] = options.checkpoints
    data = data_of(parser, options, checkpoints[0])
    names = [Path(where).name for where in checkpoints]
    names = names if len(set(names)) == len(names) else checkpoints
    candidates = []
    with joined() as processes:
        for where, name in zip(checkpoints, names, strict=True):
            training = read_metadata(where).training
            subject = Subject(loaded(options, where), data, training, options.weights)
            single = Path(options.out) if options.out and len(checkpoints) == 1 else None
            out = single or _report_path(where, options)
            if options.ais is not None and subject.model.is_exact:
                raise ValueError(f"--ais: the likelihood of {where} is exact, there is no bound to check; leave it out")
            measured = _measured(subject, options, out, processes)
            if options.ais is not None:
                how = (options.ais, options.ais_chains, options.ais_images, options.seed, options.chunk, processes)
                measured = subject.annealed(measured, options.split, *how)
            candidates.append(Candidate(name, measured.report, measured.evaluation))
            if processes.rank == 0:
                _show(measured, out)
        if len(candidates) > 1 and processes.rank == 0:
            compared = Comparison.of(candidates)
            get_console().print(compared)
            if options.out:
                compared.write(options.out)
                get_console().print(f"Written to {options.out}")


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
    reference = None if options.reference is None else Evaluation.read(options.reference)
    k = None if subject.model.is_exact else options.importance_samples
    if reference is not None and (reference.is_exact, reference.importance_samples) != (subject.model.is_exact, k):
        kinds = [f"K = {samples}" if samples else "no K" for samples in (reference.importance_samples, k)]
        raise ValueError(
            f"--reference {options.reference} was measured by the {reference.estimator} likelihood with {kinds[0]}, "
            f"these images would be with {kinds[1]}: measure both alike, see --importance-samples"
        )
    with joined() as processes:
        measured = _measured(subject, options, Path(options.out), processes)
        if processes.rank:
            return
    evaluation, spec = measured.evaluation, subject.model.spec
    known = None if reference is None else reference.best_nats
    write_scores(options.out, evaluation, spec, _labels(subject, options), known)
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
    """Evaluate as the options of `_add_protocol` say, or go on with it after an interruption.

    Raises:
        ValueError: interrupted by Ctrl-C; the message says how to go on.
    """
    try:
        return subject.measure(
            options.split,
            options.importance_samples,
            options.seed,
            options.chunk,
            options.limit,
            None if options.dtype is None else getattr(torch, options.dtype),
            out,
            processes,
        )
    except KeyboardInterrupt:
        raise ValueError("interrupted; the same command goes on after the images that are done") from None


def _show(measured: Measurement, out: Path) -> None:
    """Print figures, with published ones beside them, and write them."""
    get_console().print(measured.report)
    if (published := comparison(measured.report)) is not None:
        get_console().print(published, new_line_start=True)
    measured.write(out)
    get_console().print(f"Written to {out}")


def _report_path(where: str, options: Any) -> Path:
    """In the folder of the model where it has one, under a name that says in what it differs from the usual."""
    parts = [
        "report",
        options.split,
        "" if options.weights == "ema" else options.weights,
        f"k{options.importance_samples}" if options.importance_samples else "",
        f"n{options.limit}" if options.limit else "",
        options.dtype or "",
    ]
    name = f"{'-'.join(part for part in parts if part)}.json"
    if Path(where).is_dir():
        return Path(where) / name
    return Path(name if len(options.checkpoints) == 1 else f"{Path(where).stem}-{name}")
