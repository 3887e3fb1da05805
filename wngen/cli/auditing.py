"""The command that proves a model's claims."""

from __future__ import annotations

from dataclasses import replace

from rich import get_console

from wngen.cli.options import add_data, model_parser, parse_with_data
from wngen.evaluation.audit import audit as measure


def audit(argv: list[str]) -> None:
    """Prove a model's claims by measurement: a table of what holds, with the figure of each."""
    parser = model_parser(audit)
    add_data(parser)
    parser.add_argument("--images", type=int, default=16, help="How many images, drawn by the data's evaluation seed.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random numbers.")
    parser.add_argument("--out", type=str | None, help="Where the findings go, as JSON.")
    options, subject = parse_with_data(parser, argv)
    if options.images < 2:
        parser.error(f"--images {options.images}: wanted at least 2, such as 16")
    console = get_console()
    with console.status("Measuring") as status:
        images = subject.images(options.split, options.images)
        verdict = measure(
            subject.model, images, options.seed, watch=lambda claim: status.update(f"Measuring: {claim.claim}")
        )
    protocol = {**verdict.protocol, "data": subject.data.protocol(options.split, options.images)}
    verdict = replace(verdict, protocol=protocol)
    console.print(verdict)
    if options.out is not None:
        verdict.write(options.out)
        console.print(f"Written to {options.out}")
    if not verdict.passed:
        raise ValueError(f"{options.checkpoint}: {verdict.verdict}")
