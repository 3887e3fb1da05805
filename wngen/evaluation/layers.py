"""What each stochastic layer of a model is called, and how much of it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from wngen.image import Batch
from wngen.latent import LatentVariableModel


def layer_names(shapes: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Such as `layer_01_7x7`, which sort in their order: of latents of these shapes, the topmost layer first.

    Only maps `(Z, H, W)` have a resolution to name.
    """
    digits = len(str(len(shapes)))
    resolutions = [f"_{shape[1]}x{shape[2]}" if len(shape) == 3 else "" for shape in shapes]
    return tuple(f"layer_{i:0{digits}}{resolution}" for i, resolution in enumerate(resolutions, start=1))


def by_resolution(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The names of the layers at each resolution, such as `7x7`; empty where that would tell nothing new.

    It does where there are several resolutions, and several layers at one of them.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        for resolution in name.split("_")[2:]:
            groups[resolution] = (*groups.get(resolution, ()), name)
    return groups if 1 < len(groups) < len(names) else {}


def layer_title(name: str) -> str:
    """For readers: `layer 1, 7x7` for `layer_01_7x7`."""
    layer, number, *resolution = name.split("_")
    return ", ".join([f"{layer} {int(number)}", *resolution])


@torch.no_grad()
def active_units(model: LatentVariableModel, batches: Iterable[Batch], threshold: float = 0.01) -> tuple[int, ...]:
    """How many latent variables of each stochastic layer tell images apart.

    One does if the centre of its posterior varies over the images by more than the threshold. Below other layers, it
    may vary with them and add nothing; whether it adds, the layer's rate says.

    Args:
        model: in eval mode.
        batches: the images, two at least; labels are used if the model is conditioned on them.
        threshold: least variance.

    Returns:
        One number for each layer, the topmost first.

    Raises:
        ValueError: fewer than two images.

    References:
        Importance weighted autoencoders (Burda et al., 2015), section 5.2.
    """
    device = next(model.parameters()).device
    images, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        y = None if model.num_classes is None or batch.label is None else batch.label.to(device)
        centre = model.represent(batch.image.to(device), y).double().cpu()
        images, total, squares = images + len(centre), total + centre.sum(dim=0), squares + centre.square().sum(dim=0)
    if images < 2:
        raise ValueError(f"active units of {images} images: wanted at least 2, over which something can vary")
    variance = squares / images - (total / images).square()
    return tuple(int((layer > threshold).sum()) for layer in model.split(variance[None]))
