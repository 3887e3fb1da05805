"""The command that says from several runs how large a batch pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich import get_console
from rich.table import Column, Table

from wngen.arguments import Arguments, summary
from wngen.evaluation.batch_figures import draw_trade_off
from wngen.evaluation.critical_batch import TradeOff, fit_trade_off
from wngen.evaluation.reached import Reached, common_bound_nats, rates_at_an_edge
from wngen.evaluation.trained import Trained, check_comparable


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
