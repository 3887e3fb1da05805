"""The commands that measure likelihoods."""

from __future__ import annotations

from pathlib import Path

from rich import get_console

from wngen.cli.options import add_data, model_parser, parse_with_data
from wngen.evaluation.published import comparison


def evaluate(argv: list[str]) -> None:
    """Give a model's bound on the log-likelihood of a data set, with its uncertainty and its protocol."""
    parser = model_parser(evaluate)
    add_data(parser)
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
    options, subject = parse_with_data(parser, argv)
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
