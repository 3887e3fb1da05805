"""Images drawn from a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.decoder import Watch
from wngen.latent import LatentVariableModel
from wngen.model import LikelihoodModel
from wngen.sampling.completion import autoregressive


def draw_samples(
    model: LikelihoodModel,
    count: int,
    temperature: float | Sequence[float] = 1.0,
    label: int | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> Tensor:
    """Images that follow from the seed, on the model's device: of a conditional model all classes in turn, or one.

    Args:
        model: any model.
        count: how many.
        temperature: 1 samples the model, less gives likelier and less varied images. For a model with latent variables
            it may be one for each stochastic layer, the topmost first.
        label: the class of all images.
        seed: of the random numbers.
        watch: is shown the images as they grow; only for a model that draws pixel by pixel.

    Returns:
        `(count, C, H, W)` uint8 levels.

    Raises:
        TypeError: `watch` for a model that draws all pixels at once.
        ValueError: a label that the model does not know, several temperatures for a model without latent variables or
            another number of them than it has layers, or less than one image.
    """
    device = next(model.parameters()).device
    classes = model.num_classes
    if label is not None and classes is None:
        raise ValueError(f"label={label}: this model is not conditioned on classes; leave it out")
    if label is not None and classes is not None and not 0 <= label < classes:
        raise ValueError(f"label={label}: the model knows the classes 0 to {classes - 1}")
    y = None
    if classes is not None:
        y = (
            torch.arange(count, device=device) % classes
            if label is None
            else torch.full((count,), label, device=device)
        )
    # One that draws pixel by pixel takes only a seed from it, and draws the same on every device.
    home = "cpu" if isinstance(model, AutoregressiveModel) else device
    generator = torch.Generator(home).manual_seed(seed)
    if watch is None and isinstance(model, LatentVariableModel):
        return model.sample(count, y, temperature, generator)
    if not isinstance(temperature, (int, float)):
        name = type(model).__name__
        raise ValueError(f"temperature={temperature}: {name} has no latent variables in layers; wanted one number")
    if watch is None:
        return model.sample(count, y, temperature, generator)
    return autoregressive(model).sample(count, y, temperature, generator, watch)
