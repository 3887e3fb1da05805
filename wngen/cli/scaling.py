"""The command that says from several runs how large a batch pays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        help="The validation bound to be reached, in nats such as -95; by default the best that all runs reached.",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="Of the interval.")
    parser.add_argument("--out", type=str | None, help="Where the picture goes, a PNG; without it none is drawn.")
    options = parser.parse_args(argv)
    runs = [Trained.read(Path(folder)) for folder in options.run]
    check_comparable(runs)
    bound = min(run.best_nats for run in runs) if options.bound is None else options.bound
    reached = Reached.by(runs, bound)
    get_console().print(_table(reached, bound))
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
        """The best bound of validation."""
        finite = [value for value in self.curve[1].tolist() if math.isfinite(value)]
        return max(finite, default=-math.inf)

    @property
    def recipe(self) -> dict[str, Any]:
        """How it was trained, which may be chosen anew for each batch size; not the seed."""
        return {name: value for name, value in (self.config.get("training") or {}).items() if name != "seed"}


@dataclass(frozen=True)
class Reached:
    """A run, and the steps that it took to the bound.

    Attributes:
        run: the run.
        steps: optimizer steps.
        counts: whether it is fitted: it is not if another recipe was faster with the same batch size.
    """

    run: Trained
    steps: float
    counts: bool

    @classmethod
    def by(cls, runs: Sequence[Trained], bound_nats: float) -> list[Reached]:
        """All runs in the order of their batch sizes.

        Of each batch size those runs count that were trained in the fastest way; of several that differ in nothing but
        the seed the geometric mean of the steps decides.

        Raises:
            ValueError: some never reached the bound, or before they were validated; the message names them.
        """
        steps: list[float] = []
        wrong: list[str] = []
        for run in runs:
            try:
                taken = steps_to(bound_nats, run.curve)
            except ValueError as error:
                wrong.append(f"{run.name}: {error}")
                continue
            if taken is None:
                wrong.append(f"{run.name} never reached it, its best was {run.best_nats:.2f}")
            else:
                steps.append(taken)
        if wrong:
            raise ValueError(
                f"--bound {bound_nats:.2f}: {'; '.join(wrong)}. Choose a bound that all runs pass on their way, or "
                "leave these runs out"
            )
        means: dict[tuple[int, str], list[float]] = {}
        for run, taken in zip(runs, steps, strict=True):
            means.setdefault((run.batch_size, str(run.recipe)), []).append(math.log(taken))
        slowest_first = sorted(means, key=lambda key: -sum(means[key]) / len(means[key]))
        fastest = dict(slowest_first)
        pairs = sorted(zip(runs, steps, strict=True), key=lambda pair: (pair[0].batch_size, pair[1]))
        return [cls(run, taken, fastest[run.batch_size] == str(run.recipe)) for run, taken in pairs]


def check_comparable(runs: Sequence[Trained]) -> None:
    """Runs may differ in batch size, seed and the way of training, but not in what is trained on what.

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


def _flat(part: Any, free: set[str]) -> dict[str, Any]:
    arguments = {name: value for name, value in (part or {}).get("init_args", {}).items() if name not in free}
    return {"class_path": (part or {}).get("class_path"), **arguments}


def _table(reached: Sequence[Reached], bound_nats: float) -> Table:
    numbers = "batch size", "learning rate", "steps", "images"
    table = Table(Column("run", no_wrap=True), *(Column(name, justify="right") for name in numbers))
    table.title, table.title_justify = f"To a validation bound of {bound_nats:.2f} nats", "left"
    if not all(each.counts for each in reached):
        table.add_column("")
    for each in reached:
        size, rate = each.run.batch_size, each.run.recipe.get("learning_rate")
        note = [] if each.counts else ["not fitted: slower than another"]
        rate = f"{rate:g}" if isinstance(rate, float) else ""
        table.add_row(each.run.name, f"{size:,}", rate, f"{each.steps:,.0f}", f"{each.steps * size:,.0f}", *note)
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
