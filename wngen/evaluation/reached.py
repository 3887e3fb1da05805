"""When runs with several batch sizes reached the same bound, and which of them tell how large a batch pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from wngen.evaluation.critical_batch import steps_to
from wngen.evaluation.trained import Trained


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


def rates_at_an_edge(reached: Sequence[Reached]) -> str:
    """Which batch sizes may not be tuned: those with several learning rates, of which an outermost was the fastest."""
    found = []
    for size, fastest in {each.run.batch_size: each.run.rate for each in reached if each.counts}.items():
        rates = (each.run.rate for each in reached if each.run.batch_size == size)
        tried = {rate for rate in rates if rate is not None}
        if fastest is not None and len(tried) > 1 and fastest in (min(tried), max(tried)):
            found.append(f"{'lowest' if fastest == min(tried) else 'highest'} with batches of {size:,}")
    return f"Of the learning rates tried the fastest is the {', the '.join(found)}: try beyond." if found else ""
