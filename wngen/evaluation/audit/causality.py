"""Claims of autoregressive models: which pixels the distribution of a pixel depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.evaluation.audit.claim import Measured, Specimen, claimed

AT_ONCE = 16  # images, whose activations are all kept
POISONED = 128  # places from which on the future is replaced
DOUBTFUL = 64  # distributions that are looked at again


@dataclass(frozen=True)
class Dependence:
    """Which sub-pixels act on which distributions, by gradient.

    A pixel has a distribution for each of its channels, G = C, or one for all of them, G = 1.

    Attributes:
        sees: `(H, W, G, C, H, W)`, whether any parameter of a distribution depends on a sub-pixel.
        order: `(C, H, W)`, the place of each sub-pixel in the order of prediction; the same if they share it.
    """

    sees: Tensor
    order: Tensor

    @property
    def is_late(self) -> Tensor:
        """`(H, W, G, C, H, W)`, whether a sub-pixel is the distribution's own or comes after it."""
        own = self.order[: self.sees.shape[2]].permute(1, 2, 0)
        return self.order >= own[..., None, None, None]

    @property
    def earlier(self) -> Tensor:
        """`(H, W, G)`, how many earlier sub-pixels act on each distribution."""
        return (self.sees & ~self.is_late).flatten(3).sum(dim=3)

    @property
    def beside(self) -> tuple[Tensor, Tensor]:
        """`(H - 1, W, G)` and `(H, W - 1, G)`, whether the upper and the left neighbour act on a distribution."""
        pixels = self.sees.any(dim=3)
        row, column = (torch.arange(n, device=pixels.device) for n in pixels.shape[:2])
        upper = pixels[row[1:, None], column, :, row[:-1, None], column]
        return upper, pixels[row[:, None], column[1:], :, row[:, None], column[:-1]]

    @property
    def doubtful(self) -> Tensor:
        """`(H, W, G)`, distributions that seem to depend on too little, which may be chance."""
        upper, left = self.beside
        missing = torch.zeros_like(self.earlier, dtype=torch.bool)
        missing[1:] |= ~upper
        missing[:, 1:] |= ~left
        return missing


@claimed(
    "No distribution depends on its own or a later sub-pixel",
    "pairs",
    "A mask leaks: the likelihood is conditioned on what it is the likelihood of, and too good to be true.",
    at_most=0,
)
def causality(specimen: Specimen) -> Measured | None:
    """Pairs with a gradient of a distribution's parameters by a sub-pixel that it may not see, of all there are."""
    if not isinstance(specimen.exact, AutoregressiveModel):
        return None
    seen = _dependence(specimen, specimen.exact)
    leaks = (seen.sees & seen.is_late).nonzero()
    if not len(leaks):
        return Measured(0, f"of {int(seen.is_late.sum()):,}, by gradient")
    row, column, _, channel, at_row, at_column = leaks[0].tolist()
    first = f"row {row}, column {column} on row {at_row}, column {at_column}, channel {channel}"
    return Measured(len(leaks), f"first: {first}")


@claimed(
    "Another future leaves parameters equal bit by bit",
    "values",
    "A distribution depends on its own or a later sub-pixel.",
    at_most=0,
)
@torch.no_grad()
def poisoned_future(specimen: Specimen) -> Measured | None:
    """Parameters that change when all sub-pixels from some place on are replaced by other levels."""
    model = specimen.exact
    if not isinstance(model, AutoregressiveModel):
        return None
    groups, order = _groups(model), _order(model, specimen.x.device)
    places = int(order.max()) + 1
    starts = torch.linspace(0, places - 1, min(places, POISONED), device=order.device).round().long()
    changed, total = 0, 0
    for part in starts.split(AT_ONCE):
        x, y = specimen.repeated(len(part))
        shift = 1 + specimen.levels(len(part)) % (model.spec.levels - 1)
        other = ((x.int() + shift) % model.spec.levels).to(torch.uint8)
        poisoned = torch.where(order >= part[:, None, None, None], other, x)
        clean, late = (
            model.predict(model.spec.scale(image, torch.double), y).unflatten(1, (groups, -1))
            for image in (x, poisoned)
        )
        reached = (order[:groups] <= part[:, None, None, None])[:, :, None].expand_as(clean)
        changed += int(((clean != late) & reached).sum())
        total += int(reached.sum())
    return Measured(changed, f"of {total:,}, futures from {len(starts)} places on")


@claimed(
    "A pixel sees its left and its upper neighbour",
    "pairs",
    "The network does not see what tells most about a pixel: masks or shifts are wrong, or the raster is reversed.",
    at_most=0,
)
def neighbours(specimen: Specimen) -> Measured | None:
    """Pairs of a pixel and a neighbour without a gradient."""
    if not isinstance(specimen.exact, AutoregressiveModel):
        return None
    seen = torch.cat([part.flatten() for part in _dependence(specimen, specimen.exact).beside])
    return Measured(int((~seen).sum()), f"of {len(seen):,}") if len(seen) else None


@claimed(
    "Earlier sub-pixels act on every one but the first pixel's",
    "sub-pixels",
    "The receptive field of some pixel is empty: nothing is predicted from anything.",
    at_least=1,
)
def receptive_field(specimen: Specimen) -> Measured | None:
    """The fewest earlier sub-pixels that act on a distribution."""
    if not isinstance(specimen.exact, AutoregressiveModel):
        return None
    counts = _dependence(specimen, specimen.exact).earlier.flatten(0, 1)
    if len(counts) == 1:
        return None
    total, mean = specimen.exact.spec.dims, float(counts.double().mean())
    return Measured(
        int(counts[1:].min()), f"the fewest; on average {mean:,.1f}, at most {int(counts.max()):,} of {total:,}"
    )


def _groups(model: AutoregressiveModel) -> int:
    """Distributions of a pixel: one for each channel, or one of all."""
    return model.spec.channels if model.by_channel else 1


def _order(model: AutoregressiveModel, device: torch.device) -> Tensor:
    """The place of each sub-pixel in the order of prediction, `(C, H, W)`; of one pixel the same if they share it."""
    channels, height, width = model.spec.shape
    pixel = torch.arange(height * width, device=device).view(1, height, width).expand(channels, -1, -1)
    return pixel * channels + torch.arange(channels, device=device).view(-1, 1, 1) if model.by_channel else pixel


def _dependence(specimen: Specimen, model: AutoregressiveModel) -> Dependence:
    return specimen.once("dependence", lambda: _measure(specimen, model))


def _measure(specimen: Specimen, model: AutoregressiveModel) -> Dependence:
    """Gradients of all distributions' parameters by all sub-pixels.

    The columns of a row are measured together, each on an image of its own, so that one pass back gives the gradients
    of a whole row. Where a neighbour did not act on an image, images of random levels are tried as well: a rectifier
    may have been off.
    """
    _, height, width = model.spec.shape
    groups, order = _groups(model), _order(model, specimen.x.device)
    sees = torch.zeros(height, width, groups, *order.shape, dtype=torch.bool, device=order.device)
    dependence = Dependence(sees, order)
    for columns in torch.arange(width, device=order.device).split(AT_ONCE):
        x, y = specimen.repeated(len(columns))
        told, predicted = _predicted(model, x, y)
        for row in range(height):
            for group in range(groups):
                sees[row, columns, group] = _acting(specimen, told, predicted, groups, group, row, columns)
    doubtful = dependence.doubtful.nonzero()
    if 0 < len(doubtful) <= DOUBTFUL:
        _, y = specimen.repeated(AT_ONCE)
        told, predicted = _predicted(model, specimen.levels(AT_ONCE), y)
        for row, column, group in doubtful.tolist():
            columns = torch.full((AT_ONCE,), column, device=order.device)
            acting = _acting(specimen, told, predicted, groups, group, row, columns)
            sees[row, column, group] |= acting.any(dim=0)
    return dependence


def _predicted(model: AutoregressiveModel, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the model is told, and what it predicts from that."""
    told = model.spec.scale(x, torch.double).requires_grad_()
    return told, model.predict(told, y)


def _acting(
    specimen: Specimen, told: Tensor, predicted: Tensor, groups: int, group: int, row: int, columns: Tensor
) -> Tensor:
    """`(B, C, H, W)`, what acts on the distribution in one column, another one or the same for each of B images.

    What goes back is a random sum of the distribution's parameters, in which nothing cancels. NaN counts as acting.
    """
    size = predicted.shape[1] // groups
    weight = torch.randn(size, dtype=torch.double, device=told.device, generator=specimen.generator())
    back = torch.zeros_like(predicted)
    batch = torch.arange(len(columns), device=told.device)
    back[batch, group * size : (group + 1) * size, row, columns] = weight
    (gradient,) = torch.autograd.grad(predicted, told, back, retain_graph=True)
    return gradient != 0
