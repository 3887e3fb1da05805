"""What a model draws, for the page: samples, reconstructions or completions, and the images it finds likeliest."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.evaluation.evaluate import Evaluation
from wngen.image import Batch
from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel
from wngen.sampling import completions, draw_samples, grid, ladder, reconstruct, upper_rows
from wngen.sampling.grids import GAP

EXTREMES = 8  # so many images are shown from either end


@dataclass(frozen=True)
class Picture:
    """A picture that lies within the page.

    Attributes:
        title: above it.
        caption: below it.
        alt: what it shows, for those who do not see it.
        width: in pixels.
        height: likewise.
        uri: its PNG, as a `data:` URI.
    """

    title: str
    caption: str
    alt: str
    width: int
    height: int
    uri: str

    @classmethod
    def of(cls, picture: Tensor, title: str, caption: str, alt: str) -> Picture:
        """Take up a picture `(height, width, 1 or 3)` uint8."""
        file = io.BytesIO()
        array = (picture[..., 0] if picture.shape[-1] == 1 else picture).numpy()
        Image.fromarray(array).save(file, format="PNG", optimize=True)
        uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        return cls(title, caption, alt, picture.shape[1], picture.shape[0], uri)


@dataclass(frozen=True)
class Extreme:
    """An image that a model finds likelier than most, or less likely.

    Attributes:
        index: its place in its split.
        nats: its log-likelihood, or the bound on it.
        picture: of it.
    """

    index: int
    nats: float
    picture: Picture


def drawn(model: LikelihoodModel, samples: int, batch: Batch | None) -> list[Picture]:
    """Pictures that show what a model has learned, always the same ones.

    Args:
        model: any; those that draw pixel by pixel take seconds.
        samples: how many to draw.
        batch: images to reconstruct or complete, on the model's device; None if there are none.
    """
    levels = model.spec.levels
    columns = 8
    images = draw_samples(model, samples)
    of_classes = "" if model.num_classes is None else ", all classes in turn"
    pictures = [
        Picture.of(
            grid(images, levels, columns),
            "Samples",
            f"{samples} samples at temperature 1, not selected{of_classes}; seed 0.",
            f"A grid of {samples} images drawn from the model.",
        )
    ]
    if batch is None:
        return pictures
    if isinstance(model, LatentVariableModel):
        pictures.append(
            Picture.of(
                reconstruct(model, batch.image, batch.label, columns),
                "Reconstructions",
                "Images of the data above what the model makes of each from the centre of its posterior.",
                f"{len(batch.image)} images of the data, and below each its reconstruction.",
            )
        )
        if len(model.latent_shapes) > 1:
            some = columns // 2
            pictures.append(
                Picture.of(
                    ladder(model, batch.image[:some], None if batch.label is None else batch.label[:some]),
                    "What each layer carries",
                    f"Each row: an image of the data, then the upper 0, 1, … {len(model.latent_shapes)} layers of its "
                    "latents kept and the others at the centre of their prior.",
                    f"{some} rows that come nearer to the image they begin with, layer by layer.",
                )
            )
    if isinstance(model, AutoregressiveModel):
        some, alternatives = columns // 2, columns - 2
        pictures.append(
            Picture.of(
                completions(
                    model,
                    batch.image[:some],
                    upper_rows(model.spec, model.spec.height // 2),
                    alternatives,
                    None if batch.label is None else batch.label[:some],
                    generator=torch.Generator().manual_seed(0),
                ),
                "Completions",
                f"Each row: an image of the data, its upper half, and {alternatives} ways to complete that; seed 0.",
                f"{some} half-seen images, completed by the model in {alternatives} ways each.",
            )
        )
    return pictures


def extreme_indices(evaluation: Evaluation) -> tuple[list[int], list[int]]:
    """Places in the split of the images with the highest values, the best first, and the lowest, the worst first."""
    order = np.argsort(evaluation.best_nats, kind="stable")
    count = min(EXTREMES, len(order) // 2)
    places = evaluation.index[order].tolist()
    return places[: -count - 1 : -1], places[:count]


def extremes(evaluation: Evaluation, batch: Batch, levels: int) -> list[Extreme]:
    """Images with their values, in the order in which they come.

    Args:
        evaluation: which holds the value of each.
        batch: the images.
        levels: of their pixels.
    """
    rows = np.searchsorted(evaluation.index, batch.index.cpu().numpy())
    return [
        Extreme(index, nats, Picture.of(_alone(image, levels), "", "", f"Image {index}"))
        for index, nats, image in zip(
            batch.index.tolist(), evaluation.best_nats[rows].tolist(), batch.image, strict=True
        )
    ]


def _alone(image: Tensor, levels: int) -> Tensor:
    """One image `(C, H, W)` without the grid's frame."""
    return grid(image[None], levels, scale=1)[GAP:-GAP, GAP:-GAP]
