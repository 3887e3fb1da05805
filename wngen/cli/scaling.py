"""The command that says from several runs how large a batch pays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from rich import get_console
from rich.table import Column, Table

from wngen.arguments import Arguments, summary
from wngen.evaluation.batch_figures import draw_trade_off
from wngen.evaluation.critical_batch import Curve, TradeOff, fit_trade_off, steps_to
from wngen.evaluation.figures import read_curves

BOUND = "val/elbo_nats"
MAY_DIFFER = {"batch_size", "seed", "evaluation_seed", "root", "path"}  # of data


def critical_batch(argv: list[str]) -> None:
    """Fit how steps and images are traded for each other to runs with several batch sizes.

    What counts is when each run's validation bound reaches the same value. With a schedule towards an end,
    `decay=linear` or `cosine`, that depends on where the end was set: a constant learning rate tells more.
    """
    parser = Arguments(prog="wngen critical-batch", description=summary(critical_batch))
    parser.add_argument("run", type=str, nargs="+", help="The folders of runs, of at least three batch sizes.")
    parser.add_argument(
        "--bound",
        type=float | None,
        help="The validation bound to be reached, in nats such as -95; by default the best that each batch "
        "size reached, slower runs of it aside.",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="Of the interval.")
    parser.add_argument("--out", type=str | None, help="Where the picture goes, a PNG; without it none is drawn.")
    options = parser.parse_args(argv)
    runs = [Trained.read(Path(folder)) for folder in options.run]
    check_comparable(runs)
    bound = common_bound_nats(runs) if options.bound is None else options.bound
    reached = Reached.by(runs, bound)
    get_console().print(_table(reached, bound))
    if edges := rates_at_an_edge(reached):
        get_console().print(edges, markup=False, soft_wrap=True)
    counted = [each for each in reached if each.counts]
    sizes, steps = [each.run.batch_size for each in counted], [each.steps for each in counted]
    fit = fit_trade_off(sizes, steps, options.confidence)
    get_console().print(_verdict(fit), markup=False, soft_wrap=True)
    if options.out is not None:
        draw_trade_off(options.out, fit, sizes, steps)
        get_console().print(f"Written to {options.out}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Trained:
    """What a run's folder says of its batches and of the way its bound went.

    Attributes:
        name: of the folder.
        batch_size: images in a step, over all processes and micro-batches.
        config: its `config.yaml`.
        curve: the numbers of steps after which it was validated, and the bound in nats.
    """

    name: str
    batch_size: int
    config: Mapping[str, Any]
    curve: Curve

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """From `config.yaml` and `metrics/`.

        Raises:
            ValueError: they are not there, or without batch size or validations.
        """
        path = folder / "config.yaml"
        parts = sorted(folder.glob("metrics/version_*/metrics.csv"), key=lambda part: part.stat().st_mtime)
        missing = [what for what, there in (("config.yaml", path.is_file()), ("metrics/", parts)) if not there]
        if missing:
            raise ValueError(
                f"{folder}: no {' and no '.join(missing)} in it; wanted the folder of a run of `wngen fit`"
            )
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            batch_size = int(config["data"]["init_args"]["batch_size"])
            batch_size *= int(config["trainer"].get("accumulate_grad_batches") or 1)
        except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} does not say the batch size of the run: {error!r}") from error
        curves = read_curves(*parts)
        if BOUND not in curves:
            raise ValueError(f"{folder}: {BOUND} is not in its metrics.csv; wanted a run that was validated")
        steps, values = curves[BOUND]
        return cls(
            folder.name or str(folder), batch_size, config, (steps + 1, values)
        )  # `step` is the last one's number

    @property
    def best_nats(self) -> float:
        """The best bound of validation; -inf if none is finite."""
        return self.best_until(math.inf)

    def best_until(self, step: float) -> float:
        """The same of the validations after so many steps or fewer."""
        steps, values = self.curve
        return float(values[(steps <= step) & np.isfinite(values)].max(initial=-math.inf))

    @property
    def recipe(self) -> dict[str, Any]:
        """How it was trained, which may be chosen anew for each batch size; not the seed."""
        return {name: value for name, value in (self.config.get("training") or {}).items() if name != "seed"}

    @property
    def rate(self) -> float | None:
        """Its learning rate, if its configuration tells."""
        rate = self.recipe.get("learning_rate")
        return rate if isinstance(rate, float) else None

    @property
    def validated_on(self) -> str:
        """How many images its validations were of, in words."""
        limit = self.config["trainer"].get("limit_val_batches")
        if limit is None or limit == 1:
            return "all images"
        size = self.config["data"]["init_args"]["batch_size"]
        return f"{limit * size:,.0f} images" if limit > 1 else f"{limit:g} of all images"


@dataclass(frozen=True)
class Reached:
    """A run, and the steps that it took to the bound.

    Attributes:
        run: the run.
        steps: optimizer steps; infinite if it never came so far.
        counts: whether it is fitted: it is not if it never came so far, or another recipe was faster with the same
            batch size.
    """

    run: Trained
    steps: float
    counts: bool

    @classmethod
    def by(cls, runs: Sequence[Trained], bound_nats: float) -> list[Reached]:
        """All runs in the order of their batch sizes.

        Of each batch size those runs count that were trained in the fastest way; of several that differ in nothing but
        the seed the geometric mean of the steps decides, and before it, how many of them reached the bound at all.

        Raises:
            ValueError: of some batch size none ever reached the bound, or one ended too early to be called slower than
                those that did, or reached it before it was validated; the message names them.
        """
        steps: list[float] = []
        wrong: list[str] = []
        for run in runs:
            try:
                steps.append(steps_to(bound_nats, run.curve) or math.inf)
            except ValueError as error:
                wrong.append(f"{run.name}: {error}")
                steps.append(0)
        wrong += left_open(runs, bound_nats)
        if wrong:
            raise ValueError(
                f"--bound {bound_nats:.2f}: {'; '.join(wrong)}. Choose a bound that these runs pass on their way, or "
                "leave them out"
            )
        seeds: dict[tuple[int, str], list[float]] = {}
        for run, taken in zip(runs, steps, strict=True):
            seeds.setdefault((run.batch_size, str(run.recipe)), []).append(math.log(taken))

        def slowness(key: tuple[int, str]) -> tuple[float, float]:
            finite = [each for each in seeds[key] if each < math.inf]
            return 1 - len(finite) / len(seeds[key]), fmean(finite or [math.inf])

        fastest = dict(sorted(seeds, key=slowness, reverse=True))
        pairs = sorted(zip(runs, steps, strict=True), key=lambda pair: (pair[0].batch_size, pair[1]))
        return [
            cls(run, taken, taken < math.inf and fastest[run.batch_size] == str(run.recipe)) for run, taken in pairs
        ]


def left_open(runs: Sequence[Trained], bound_nats: float) -> list[str]:
    """What keeps one from telling how fast a batch size reaches the bound: runs that ended before, each in a sentence.

    Not those that were behind a run of the same batch size that did reach it: they are slower. Nor those that
    ended before it was first validated: no bound would let them be compared.
    """
    found: list[str] = []
    for size in sorted({run.batch_size for run in runs}):
        same = [run for run in runs if run.batch_size == size]
        there = [run for run in same if run.best_nats >= bound_nats]
        first = min(there, key=lambda run: run.curve[0][run.curve[1] >= bound_nats][0], default=None)
        for run in same:
            if run.best_nats >= bound_nats:
                continue
            if first is None:
                found.append(f"{run.name} never reached it, its best was {run.best_nats:.2f}")
            elif run.best_nats > first.best_until(run.curve[0][-1]) > -math.inf:
                found.append(f"{run.name} ended at {run.best_nats:.2f}, where it was ahead of {first.name}")
    return found


def common_bound_nats(runs: Sequence[Trained]) -> float:
    """The best bound by which the runs of each batch size can be compared: one reached it, and the others were slower.

    Raises:
        ValueError: none of a batch size has a finite bound.
    """
    best: dict[int, float] = {}
    for run in runs:
        best[run.batch_size] = max(run.best_nats, best.get(run.batch_size, -math.inf))
    if diverged := [f"{size:,}" for size, nats in best.items() if nats == -math.inf]:
        raise ValueError(
            f"batches of {', '.join(diverged)}: no validation of any run has a finite bound; leave them out, or train "
            "with a lower learning rate"
        )
    bounds = sorted((run.best_nats for run in runs if run.best_nats > -math.inf), reverse=True)
    return next(bound for bound in bounds if not left_open(runs, bound))


def rates_at_an_edge(reached: Sequence[Reached]) -> str:
    """Which batch sizes may not be tuned: those with several learning rates, of which an outermost was the fastest."""
    found = []
    for size, fastest in {each.run.batch_size: each.run.rate for each in reached if each.counts}.items():
        rates = (each.run.rate for each in reached if each.run.batch_size == size)
        tried = {rate for rate in rates if rate is not None}
        if fastest is not None and len(tried) > 1 and fastest in (min(tried), max(tried)):
            found.append(f"{'lowest' if fastest == min(tried) else 'highest'} with batches of {size:,}")
    return f"Of the learning rates tried the fastest is the {', the '.join(found)}: try beyond." if found else ""


def check_comparable(runs: Sequence[Trained]) -> None:
    """Runs may differ in batch size, seed and the way of training, but not in what is trained on what, and validated.

    Raises:
        ValueError: they do; the message says in what.
    """
    first, *others = runs
    for run in others:
        for part, free in (("model", set()), ("data", MAY_DIFFER)):
            mine, theirs = (_flat(each.config.get(part), free) for each in (run, first))
            wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            if wrong:
                name = wrong[0]
                raise ValueError(
                    f"{run.name} has {part}.{name}={mine.get(name)}, {first.name} has {theirs.get(name)}: wanted runs "
                    "of one model on the same data, with other batch sizes"
                )
        if run.validated_on != first.validated_on:
            raise ValueError(
                f"{run.name} was validated on {run.validated_on}, {first.name} on {first.validated_on}: wanted the "
                "same for all; train with --trainer.limit_val_batches set to one number of images divided by "
                "data.batch_size, or without it"
            )


def _flat(part: Any, free: set[str]) -> dict[str, Any]:
    arguments = {name: value for name, value in (part or {}).get("init_args", {}).items() if name not in free}
    return {"class_path": (part or {}).get("class_path"), **arguments}


def _table(reached: Sequence[Reached], bound_nats: float) -> Table:
    numbers = "batch\nsize", "learning\nrate", "steps", "images"
    table = Table(Column("run", no_wrap=True), *(Column(name, justify="right") for name in numbers))
    table.title, table.title_justify = f"To a validation bound of {bound_nats:.2f} nats", "left"
    if not all(each.counts for each in reached):
        table.add_column("not\nfitted")
    for each in reached:
        size, rate = each.run.batch_size, "" if each.run.rate is None else f"{each.run.rate:g}"
        if each.steps < math.inf:
            taken, note = (f"{each.steps:,.0f}", f"{each.steps * size:,.0f}"), "slower"
        else:
            taken, note = ("", ""), "never"
        table.add_row(each.run.name, f"{size:,}", rate, *taken, *[] if each.counts else [note])
    return table


def _verdict(fit: TradeOff) -> str:
    percent = f"{100 * fit.confidence:g} %"
    scatter = f"The runs scatter by {100 * math.expm1(fit.residual):.0f} % around the hyperbola"
    if not fit.low and fit.high == math.inf:
        return (
            f"These runs do not tell the critical batch size: the {percent} interval has no limits, although the best "
            f"guess is {fit.critical_batch:,.0f} images. {scatter}: add batch sizes further apart, or the same with "
            "other seeds, each with a learning rate that was tuned for it."
        )
    low = f"{fit.low:,.0f}" if fit.low else "no lower limit"
    high = f"{fit.high:,.0f}" if fit.high < math.inf else "no upper limit"
    return (
        f"Critical batch size: {fit.critical_batch:,.0f} images ({percent} interval: {low} to {high}). However large "
        f"the batch, it takes {fit.least_steps:,.0f} steps; however small, {fit.least_examples:,.0f} images; at the "
        f"critical size twice of both. {scatter}. All this means little unless the learning rate was tuned for each "
        "batch size."
    )
