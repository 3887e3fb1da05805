"""The command that reports on runs and releases."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from rich import get_console

import wngen.data
from wngen.arguments import Arguments, summary
from wngen.checkpoint import load, read_metadata
from wngen.cli.subject import Subject
from wngen.data import ImageDataModule, Split
from wngen.evaluation import Evaluation, Report, active_units, page, weights_sha256
from wngen.evaluation.card import model_card
from wngen.evaluation.figures import learning_curves, metrics_of
from wngen.evaluation.page import Entry
from wngen.evaluation.report import per_image_path
from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel

Found = TypeVar("Found")

REPORT = "report.json"
SHOWN = 16  # images of the data that are reconstructed
VARIED = 1000  # images over which units are active
ROUNDING = 1e-6  # relative, of a mean of the same figures


def report(argv: list[str]) -> None:
    """Write the figures of runs and releases, and what they draw, as a page that lies in one file."""
    parser = Arguments(prog="wngen report", description=summary(report))
    parser.add_argument(
        "run",
        type=str,
        nargs="+",
        help="The folder of a run or of a release, or a report-*.json in it. Several are compared.",
    )
    parser.add_argument(
        "--format",
        type=Literal["html", "markdown", "json"],
        default="html",
        help="A page; the model card of a release; or all figures for machines.",
    )
    parser.add_argument(
        "--out", type=str | None, help="Where it goes: report.html for a page, otherwise the standard output."
    )
    parser.add_argument("--samples", type=int, default=32, help="How many images each model draws for a page.")
    parser.add_argument("--device", type=str, default="cpu", help="Where it draws them.")
    options = parser.parse_args(argv)
    if options.samples < 1:
        parser.error(f"--samples {options.samples}: wanted at least 1")
    if options.format == "markdown" and len(options.run) > 1:
        parser.error(f"a model card is of one model, these are {len(options.run)}: name one of them")
    sources = [Source(run) for run in options.run]
    out = "report.html" if options.out is None and options.format == "html" else options.out
    if out is not None and Path(out).exists() and any(Path(out).samefile(source.path) for source in sources):
        parser.error(f"--out {out}: that is the report itself; name another file")
    if options.format == "markdown":
        text = sources[0].card()
    else:
        entries = []
        for name, source in zip(_names(sources), sources, strict=True):
            with get_console().status(f"{name} ..."):
                entry = source.measured(name)
                entries.append(
                    source.drawn(entry, options.samples, options.device) if options.format == "html" else entry
                )
            for reason in entry.missing.values():
                print(f"{name}: {reason}", file=sys.stderr)
        text = (
            page.page(entries)
            if options.format == "html"
            else json.dumps(page.summary(entries), indent=2, allow_nan=False) + "\n"
        )
    if out is None:
        print(text, end="")
        return
    _write(Path(out), text)
    get_console().print(f"Written to {out}", markup=False, soft_wrap=True)


class Source:
    """Where a report lies, and what lies beside it.

    Args:
        where: the folder of a run or of a release, or a report in it.

    Raises:
        ValueError: there is no report, or it is damaged.
    """

    def __init__(self, where: str) -> None:
        self.path = _located(Path(where))
        self.folder = self.path.parent if Path(where).is_file() else Path(where)
        self.report = Report.read(self.path)
        self._missing: dict[str, str] = {}

    def card(self) -> str:
        """The model card as `wngen.checkpoint.save_release` writes it into the folder.

        Raises:
            ValueError: the model cannot be loaded, or is not the one that the report is of.
        """
        return str(model_card(self._model("cpu"), self.folder.absolute().name, self.report))

    def measured(self, name: str) -> Entry:
        """Its figures."""
        model = self._tried("model", lambda: self._model("cpu"))
        parameters = None if model is None else sum(p.numel() for p in model.parameters())
        return Entry(name, self.report, parameters, self._tried("evaluation", self._evaluation), missing=self._missing)

    def drawn(self, entry: Entry, samples: int, device: str) -> Entry:
        """The same with its learning curves, and with pictures of as much as is there."""
        metrics = metrics_of(self.folder)
        if metrics and self._tried("metrics", lambda: learning_curves(*metrics)) is not None:
            entry = replace(entry, metrics=metrics)
        if entry.parameters is None:
            return entry
        model = self._model(device)
        subject = self._tried("data", lambda: self._subject(model))
        if subject is None:
            return replace(entry, pictures=tuple(page.drawn(model, samples, None)))
        data, split = subject.data, self._split
        batch = subject.images(split, min(SHOWN, data.size(split)))
        entry = replace(entry, pictures=tuple(page.drawn(model, samples, batch)))
        if isinstance(model, LatentVariableModel) and len(model.latent_shapes) > 1 and data.size(split) > 1:
            varied = data.evaluation_batches(split, model.chunk, limit=min(VARIED, data.size(split)))
            entry = replace(entry, active=active_units(model, varied))
        if entry.evaluation is not None:
            images = data.final_images(split)
            best, worst = (
                tuple(page.extremes(entry.evaluation, images[torch.tensor(places)], model.spec.levels))
                for places in page.extreme_indices(entry.evaluation)
            )
            entry = replace(entry, best=best, worst=worst)
        return entry

    @property
    def _split(self) -> Split:
        split: Split = self.report.protocol["data"].get("split", "test")
        return split

    @property
    def _again(self) -> str:
        """The command that measures the report anew, and keeps what is missing beside it."""
        protocol = self.report.protocol
        k, images = protocol["importance_samples"], protocol["images"]
        options = [
            f"--split {self._split}" if self._split != "test" else "",
            f"--importance-samples {k}" if k else "",
            f"--limit {images}" if images < protocol["data"].get("split_images", images) else "",
            f"--seed {protocol['seed']}" if protocol["seed"] else "",
            "--weights raw" if protocol["weights"] == "raw" else "",
            "" if protocol["dtype"] == "float32" else f"--dtype {protocol['dtype']}",
            f"--out {self.path}",
        ]
        return " ".join(["`wngen evaluate", str(self.folder), *filter(None, options)]) + "`"

    def _tried(self, part: str, find: Callable[[], Found]) -> Found | None:
        """What could be found, or None and a note of why it could not."""
        try:
            return find()
        except (ValueError, TypeError, OSError) as error:
            self._missing[part] = str(error)
            return None

    def _evaluation(self) -> Evaluation:
        path = per_image_path(self.path)
        if not path.is_file():
            raise ValueError(f"The figures of each image were not kept; {self._again} keeps them.")
        evaluation = Evaluation.read(path)
        told = self.report.nats.get("elbo" if evaluation.log_likelihood_nats is None else "log_likelihood")
        if told is None or abs(told.mean - evaluation.best_nats.mean()) > ROUNDING * abs(told.mean):
            raise ValueError(f"{path} is of another evaluation than {self.path}; {self._again} writes both.")
        return evaluation

    def _model(self, device: str) -> LikelihoodModel:
        protocol = self.report.protocol
        wanted, dtype = protocol["weights_sha256"], getattr(torch, protocol["dtype"])
        model = load(self.folder, device=device)
        if protocol["weights"] == "raw" and weights_sha256(model) != wanted:
            model = load(self.folder, "raw", device)
        seen = weights_sha256(model)
        if wanted not in (seen, weights_sha256(model.to(dtype))):
            raise ValueError(
                f"{self.folder} holds other weights than those that {self.path.name} is of: their SHA-256 is "
                f"{seen[:12]}, wanted {wanted[:12]}; {self._again} measures them."
            )
        return model

    def _subject(self, model: LikelihoodModel) -> Subject:
        """The model with the images that it was evaluated on."""
        metadata = read_metadata(self.folder)
        arguments = dict(metadata.data or {})
        name = str(arguments.pop("data", "data"))
        kind = getattr(wngen.data, name, None)
        if not (isinstance(kind, type) and issubclass(kind, ImageDataModule)):
            raise ValueError(f"{self.folder} does not say on which data it was trained, so none are shown.")
        subject = Subject(model, kind(**arguments), metadata.training)
        told, images = self.report.protocol["data"], self.report.protocol["images"]
        limit = None if images == told.get("split_images", images) else images
        seen, wanted = subject.data.protocol(self._split, limit)["sha256"], told.get("sha256")
        if seen != wanted:
            raise ValueError(
                f"The images of {name} that are there are not those that were evaluated, so none are shown: their "
                f"SHA-256 is {seen[:12]}, wanted {str(wanted)[:12]}."
            )
        return subject


def _located(where: Path) -> Path:
    """The report that is meant.

    Raises:
        ValueError: there is none; the message says how to come by one.
    """
    if where.is_file() and where.suffix == ".json":
        return where
    if not where.is_dir():
        raise ValueError(f"{where}: wanted the folder of a run or of a release, or a report-*.json in it")
    for path in (where / REPORT, where / "release" / REPORT):
        if path.is_file():
            return path
    others = ", ".join(str(path) for path in sorted(where.glob("report-*.json")))
    hint = f"; there is {others}: name that" if others else ""
    raise ValueError(
        f"{where} holds no {REPORT}{hint}. `wngen evaluate {where} --out {where / REPORT}` measures the figures that "
        "stand in it"
    )


def _names(sources: Sequence[Source]) -> list[str]:
    """Of each its folder's name, or as much of the path as tells all apart, and of a further report its name too.

    Raises:
        ValueError: a report is named twice.
    """
    paths = [source.path.absolute() for source in sources]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))}: one of them is there twice")
    suffixes = ["" if path.name == REPORT else f" ({path.stem})" for path in paths]
    folders = [source.folder.absolute().parts for source in sources]
    names: list[str] = []
    for parts in range(1, max(map(len, folders)) + 1):
        names = ["/".join(folder[-parts:]) + suffix for folder, suffix in zip(folders, suffixes, strict=True)]
        if len(set(names)) == len(names):
            break
    return names


def _write(out: Path, text: str) -> None:
    """Write beside the target first, so that no half of it is ever there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
