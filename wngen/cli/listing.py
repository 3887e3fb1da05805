"""The commands that say what there is: architectures, released models, configurations, published figures."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import torch
from rich import get_console
from rich.table import Column, Table

import wngen.models
from wngen.arguments import Arguments, build, concrete_subclasses, nearest, packaged_configs, summary
from wngen.cli.subject import SPEC
from wngen.data import ImageDataModule
from wngen.evaluation import Report, published_figures
from wngen.evaluation.published import listing, published_data
from wngen.model import LikelihoodModel


def models(argv: list[str]) -> None:
    """List the architectures, and the released models with the figure each reached."""
    Arguments(prog="wngen models", description=summary(models)).parse_args(argv)
    table = Table(
        Column("model", no_wrap=True), "what it is", "paper", "parameters", title="Architectures", title_justify="left"
    )
    for cls in concrete_subclasses(LikelihoodModel):
        if cls.__module__.startswith("wngen."):
            paper = (inspect.getdoc(cls) or "").partition("References:")[2].strip().partition("\n")[0]
            with torch.device("meta"):
                table.add_row(cls.__name__, summary(cls), paper, f"{_parameters(cls()):,}")
    get_console().print(table)
    folder = Path(wngen.__file__).parents[1] / "checkpoints"
    released = Table(Column("released model", no_wrap=True), "data", "bound or likelihood, nats", title_justify="left")
    released.title = f"Released, in {folder}"
    for path in sorted(folder.glob("*/report.json")):
        report = Report.read(path)
        figures = "\n".join(
            f"{report.title(name)}: {nats.mean:.2f} ± {nats.standard_error:.2f}"
            for name, nats in report.nats.items()
            if name in ("elbo", "log_likelihood")
        )
        released.add_row(path.parent.name, report.data_line, figures)
    if released.row_count:
        get_console().print(released)
    else:
        get_console().print(
            "Released models are not part of the package: they lie in the folder checkpoints/ of wngen's repository, "
            "and a command takes the path of one, as in `wngen sample checkpoints/NAME`."
        )


def configs(argv: list[str]) -> None:
    """List the packaged configurations: what each trains, and the figure it reaches."""
    Arguments(prog="wngen configs", description=summary(configs)).parse_args(argv)
    parser = Arguments()
    parser.add_subclass_arguments(LikelihoodModel, "model", skip=SPEC)
    parser.add_subclass_arguments(ImageDataModule, "data")
    for other in ("training", "images", "trainer"):
        parser.add_argument(f"--{other}", type=dict)
    table = Table(Column("config", no_wrap=True), "model,\nparameters", "what it trains, and what it reaches")
    for name, path in packaged_configs().items():
        options = parser.parse_path(path)
        with torch.device("meta"):
            model = build(options.model, **build(options.data).spec.as_dict())
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
        comment = " ".join(line.removeprefix("#").strip() for line in lines)
        table.add_row(name, f"{type(model).__name__}\n{_parameters(model):,}", comment)
    get_console().print(table)


def published(argv: list[str]) -> None:
    """List the likelihoods that others published of a data set, each with its estimator and its source."""
    parser = Arguments(prog="wngen published", description=summary(published))
    parser.add_argument("name", type=str | None, nargs="?", help="Of the data set; without it the sets are listed.")
    name = parser.parse_args(argv).name
    known = published_data()
    if name is None:
        sets = Table(Column("data set", no_wrap=True), "what it is", Column("figures", justify="right"))
        for data in known.values():
            sets.add_row(data.name, data.title, str(len(published_figures(data.name))))
        get_console().print(sets)
        get_console().print(f"`{parser.prog} NAME` lists those of a data set.")
    elif name in known:
        get_console().print(listing(known[name]))
    else:
        hint = nearest(name, known) or f"; figures are known of {', '.join(known)}"
        parser.error(f"no data set {name!r}{hint}")


def _parameters(model: LikelihoodModel) -> int:
    return sum(p.numel() for p in model.parameters())
