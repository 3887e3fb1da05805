"""Small models of every kind that predicts pixel by pixel, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wngen import load
from wngen.autoregressive import AutoregressiveModel
from wngen.data import BinarizedMNIST
from wngen.decoder import Drawn
from wngen.models import PixelCNN, PixelCNNPP, PixelSNAIL
from wngen.noise import Noise

MODELS: dict[str, tuple[type[AutoregressiveModel], dict[str, Any]]] = {
    "pixelcnn": (PixelCNN, {"filters": 9, "blocks": 4}),
    "pixelcnn++": (PixelCNNPP, {"filters": 4, "blocks": 1, "components": 3}),
    "pixelsnail": (PixelSNAIL, {"filters": 5, "layers": 2, "blocks": 1, "keys": 3, "values": 4, "components": 2}),
}
DEEP: dict[str, tuple[type[AutoregressiveModel], dict[str, Any]]] = {  # enough to see all of the sizes below
    "pixelcnn": (PixelCNN, {"filters": 24, "blocks": 5}),
    "pixelcnn-5x5": (PixelCNN, {"filters": 24, "blocks": 4, "kernel_size": 5}),
    "pixelcnn++": (PixelCNNPP, {"filters": 4, "blocks": 2, "components": 3}),
    "pixelcnn++-flat": (PixelCNNPP, {"filters": 4, "blocks": 4, "components": 2, "scales": 1}),
    "pixelsnail": MODELS["pixelsnail"],
}
SIZES = [  # channels, height, width, levels, classes
    (1, 6, 5, 2, None),
    (3, 4, 3, 4, 3),
    (2, 3, 5, 3, None),
    (1, 1, 6, 5, 2),
    (3, 5, 1, 2, None),
]
TINY = [(1, 2, 2, 2, None), (3, 1, 2, 2, None), (2, 2, 1, 3, 2), (1, 1, 1, 7, None)]
Size = tuple[int, int, int, int, int | None]


def sized(sizes: list[Size]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size[:4])))


each_model = pytest.mark.parametrize("name", MODELS)
each_deep_model = pytest.mark.parametrize("name", DEEP)


def made(
    name: str, size: Size, dtype: torch.dtype = torch.double, among: dict[str, Any] = MODELS
) -> AutoregressiveModel:
    """A small model whose parameters are all far from where they begin, as after training."""
    torch.manual_seed(0)
    kind, arguments = among[name]
    channels, height, width, levels, num_classes = size
    model = kind(channels, height, width, levels, num_classes=num_classes, **arguments).double()
    with torch.no_grad():
        for called, parameter in model.named_parameters():
            if called.endswith(".g"):
                parameter.uniform_(0.8, 1.6)
            elif called.endswith(".v"):
                parameter.normal_()
            else:
                parameter.normal_(std=0.3)
    return model.eval().to(dtype)


def released() -> tuple[AutoregressiveModel, Tensor]:
    """The PixelCNN++ that was trained on binarized MNIST, and some digits that it was tested on."""
    model = load(Path(__file__).parents[1] / "checkpoints" / "pixelcnn-pp-mnist-static")
    assert isinstance(model, AutoregressiveModel)
    data = BinarizedMNIST()
    data.setup()
    return model, next(iter(data.evaluation_batches("test", 4))).image


def images(model: AutoregressiveModel, n: int) -> tuple[Tensor, Tensor | None]:
    """Random levels, and labels where the model wants them."""
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return torch.randint(model.spec.levels, (n, *model.spec.shape), dtype=torch.uint8), y


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(model: AutoregressiveModel, n: int) -> Drawn:
    return Drawn(Noise(3, torch.arange(n)), model.spec.width)
