"""Claims of autoregressive models: the decoder, pixel by pixel, is the forward pass."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.decoder import Decoder, Drawn, Given, Source
from wngen.distributions import PixelDistribution
from wngen.evaluation.audit.claim import Measured, Specimen, claimed
from wngen.nn import Walk
from wngen.noise import Noise

DECODED = 2  # images


@claimed(
    "The decoder predicts what the forward pass predicts",
    "relative",
    "Samples are not drawn from the model whose likelihood is reported: a cache is stale, or a step differs.",
    at_most=1e-8,
)
@torch.no_grad()
def decoder_is_forward(specimen: Specimen) -> Measured | None:
    """Largest difference of a distribution's parameter at any pixel, relative to its size if that is above 1."""
    model = specimen.exact
    if not isinstance(model, AutoregressiveModel):
        return None
    x, y = specimen.repeated(DECODED)
    groups = model.spec.channels if model.by_channel else 1
    wanted = model.predict(model.spec.scale(x, torch.double), y)
    predicted = torch.full_like(wanted, torch.nan).unflatten(1, (groups, -1))
    decoder = _decoder(model)
    predict_pixel, steps = decoder.model.predict_pixel, Counter[tuple[int, int]]()

    def watched(left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        step = predict_pixel(left, here, y, walk)
        group, place = steps[walk.row, walk.column], (walk.row, walk.column)
        predicted[:, group, :, *place] = step.unflatten(1, (groups, -1))[:, group, :, 0, 0]
        steps[place] += 1
        return step

    setattr(decoder.model, "predict_pixel", watched)  # noqa: B010  # of the copy that the decoder made
    decoder.run(len(x), Given(x, torch.ones(x.shape[2:], dtype=torch.bool), _nothing_is_unknown), y)
    difference = (predicted.flatten(1, 2) - wanted).abs() / wanted.abs().clamp(min=1)
    worst = difference.amax(dim=(0, 1)).nan_to_num(torch.inf)
    row, column = divmod(int(worst.argmax()), x.shape[3])
    return Measured(float(worst.max()), f"largest of {wanted.numel():,} parameters, at row {row}, column {column}")


@claimed(
    "The decoder's likelihood of what it draws is the model's",
    "nats",
    "Images are drawn with other probabilities than the model assigns to them.",
    at_most=1e-6,
)
@torch.no_grad()
def decoder_likelihood(specimen: Specimen) -> Measured | None:
    """Largest difference, over drawn images."""
    model = specimen.exact
    if not isinstance(model, AutoregressiveModel):
        return None
    _, y = specimen.repeated(DECODED)
    index = torch.arange(DECODED, device=specimen.x.device)
    drawn, nats = _decoder(model).run(DECODED, Drawn(Noise(specimen.seed, index), model.spec.width), y)
    wanted = model.log_likelihood(drawn, y).cpu()
    return Measured(float((nats - wanted).abs().max()), f"{DECODED} drawn images")


def _decoder(model: AutoregressiveModel) -> Decoder:
    """One whose steps are called at every pixel, and not replayed from a CUDA graph, which nobody can watch."""
    return Decoder(model, capture=(lambda step: step) if next(model.parameters()).is_cuda else None)


def _unknown(distribution: PixelDistribution, row: int, column: int) -> Tensor:
    raise AssertionError(f"pixel {row}, {column} is known")


_nothing_is_unknown: Source = _unknown
