"""What is claimed of a model, how it is measured, and what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from wngen.model import LikelihoodModel
from wngen.noise import Noise, derived_seed

Made = TypeVar("Made")
Status = Literal["passed", "FAILED", "skipped"]


@dataclass(frozen=True, eq=False)
class Specimen:
    """A model under audit, as two copies in eval mode, and the images that it is measured on.

    Attributes:
        model: a copy in the dtype that the model has.
        exact: a copy in double precision, where a claim that holds shows no rounding to speak of.
        x: `(B, C, H, W)` uint8 levels.
        y: `(B,)` integer classes; None for a model without.
        index: `(B,)` the images' places in their split.
        seed: of all random numbers.
    """

    model: LikelihoodModel
    exact: LikelihoodModel
    x: Tensor
    y: Tensor | None
    index: Tensor
    seed: int = 0
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def first(self, n: int) -> tuple[Tensor, Tensor | None, Noise]:
        """At most `n` of the images, as a copy, their labels and their noise."""
        return self.x[:n].clone(), None if self.y is None else self.y[:n], Noise(self.seed, self.index[:n])

    def repeated(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Exactly `n` images and labels, those that there are in turn."""
        rows = torch.arange(n, device=self.x.device) % len(self.x)
        return self.x[rows], None if self.y is None else self.y[rows]

    def generator(self, purpose: int = 0) -> torch.Generator:
        """Of random numbers where the model is, the same ones whenever it is asked for."""
        return torch.Generator(self.x.device).manual_seed(derived_seed(self.seed, "audit", purpose))

    def levels(self, n: int, purpose: int = 0) -> Tensor:
        """`n` images of independent random levels."""
        shape, generator = (n, *self.model.spec.shape), self.generator(purpose)
        drawn = torch.randint(self.model.spec.levels, shape, generator=generator, device=self.x.device)
        return drawn.to(torch.uint8)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives when it is first asked for under this key: for claims that share a measurement."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


@dataclass(frozen=True)
class Measured:
    """What a measurement gave.

    Attributes:
        figure: in the claim's unit.
        detail: of what, or where the worst of it was.
    """

    figure: float
    detail: str = ""


@dataclass(frozen=True)
class Skipped:
    """Why something that is claimed was not measured."""

    reason: str


Measure = Callable[[Specimen], Measured | Skipped | None]


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it.

    Attributes:
        name: of the claim, an identifier.
        claim: in words.
        status: `passed`, `FAILED` or `skipped`.
        measured: figure in `unit`; None where there is none.
        unit: of figure and limit.
        limit: that the figure must keep to.
        at_least: whether the figure must be at least the limit; otherwise at most.
        detail: of what it was measured, or why it was not.
        meaning: what it means if the claim failed.
    """

    name: str
    claim: str
    status: Status
    measured: float | None
    unit: str
    limit: float
    at_least: bool
    detail: str
    meaning: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; a figure that is not finite is given in words, which JSON has no number for."""
        values = asdict(self)
        if self.measured is not None and not math.isfinite(self.measured):
            values["measured"] = str(self.measured)
        return values


@dataclass(frozen=True)
class Claim:
    """A claim that every model of a kind makes; see `Finding` for what its words say.

    Attributes:
        measure: measures it; gives None where a model makes no such claim.
    """

    name: str
    claim: str
    unit: str
    limit: float
    at_least: bool
    meaning: str
    measure: Measure

    def check(self, specimen: Specimen) -> Finding | None:
        """Measure it; None where the model makes no such claim.

        A model that raises an error in a place where it may not has failed the claim.
        """
        status: Status
        try:
            seen = self.measure(specimen)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as e:
            first = str(e).partition("\n")[0]
            seen, figure, detail, status = None, None, f"{type(e).__name__}: {first}", "FAILED"
        else:
            if seen is None:
                return None
            if isinstance(seen, Skipped):
                figure, detail, status = None, seen.reason, "skipped"
            else:
                figure, detail = float(seen.figure), seen.detail
                holds = figure >= self.limit if self.at_least else figure <= self.limit  # not of NaN
                status = "passed" if holds else "FAILED"
        return Finding(
            self.name, self.claim, status, figure, self.unit, self.limit, self.at_least, detail, self.meaning
        )


def claimed(
    claim: str, unit: str, meaning: str, at_most: float | None = None, at_least: float | None = None
) -> Callable[[Measure], Claim]:
    """Make a claim of the function that measures it, under its name.

    Args:
        claim: in words.
        unit: of the figure.
        meaning: what it means if it fails.
        at_most: what the figure must not exceed.
        at_least: what it must reach; one of these two.
    """
    assert (at_most is None) != (at_least is None)
    limit = at_most if at_most is not None else at_least
    assert limit is not None
    return lambda measure: Claim(measure.__name__, claim, unit, limit, at_least is not None, meaning, measure)


def standard_errors(difference: Tensor) -> float:
    """How many standard errors the mean of `(N,)` differences lies above 0; 0 where they all are."""
    mean = float(difference.mean())
    if not math.isfinite(mean):
        return math.nan
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    if error > 0:
        return mean / error
    return 0.0 if mean == 0 else math.copysign(math.inf, mean)
