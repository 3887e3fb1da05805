"""A tiny ResNet VAE, and what its tests ask of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wngen.flows import IAF
from wngen.models import ResNetVAE
from wngen.nn import WeightNormalized
from wngen.noise import Noise

TINY: dict[str, Any] = {
    "channels": 1,
    "height": 5,
    "width": 7,
    "levels": 2,
    "layers": "3x2, 2x1",
    "feature_maps": (4,),
    "latent_channels": 2,
    "iaf_layers": 1,
}
SIZES = [  # channels, height, width, layers, feature maps
    (1, 5, 7, "5x1, 3x2", (4, 6)),
    (3, 13, 10, "7x1, 4x1, 2x1", (3, 4, 5)),
    (1, 8, 9, "8x1, 2x1", (4,)),
    (2, 9, 4, "3x1", (4,)),
    (4, 6, 5, "6x2", (4,)),
    (1, 7, 3, "1x2", (4,)),
    (1, 1, 6, "1x2", (4,)),
]
INFERENCES = ["bidirectional", "bottom-up"]
POSTERIORS = ["diagonal", "iaf"]
LIKELIHOODS: list[dict[str, Any]] = [
    {"likelihood": "bernoulli"},
    {"likelihood": "bernoulli", "channels": 3},
    {"likelihood": "discretized_logistic", "levels": 256},
    {"likelihood": "discretized_logistic", "levels": 5, "channels": 3, "scale_per_channel": True},
    {"likelihood": "mixture", "levels": 256, "channels": 3, "components": 2},
]


def tiny(**changes: Any) -> ResNetVAE:
    """A small model in double precision, every parameter of which is far from where it begins, as after training."""
    model = ResNetVAE(**(TINY | changes)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".g"):
                parameter.uniform_(0.3, 1)
            elif name != "log_scale":
                parameter.normal_(std=0.3)
    return model


def images(model: ResNetVAE, n: int) -> tuple[Tensor, Tensor | None]:
    """Random levels, and labels where the model wants them."""
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return torch.randint(model.spec.levels, (n, *model.spec.shape), dtype=torch.uint8), y


def noise(n: int, draw: int = 0) -> Noise:
    return Noise(7, torch.arange(n), draw)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent_sizes(model: ResNetVAE) -> list[int]:
    return [math.prod(shape) for shape in model.latent_shapes]


def generated(model: ResNetVAE, eps: Tensor) -> Tensor:
    """The latents `(B, Z)` that the prior makes of noise `(B, Z)`."""
    h, latents = model._top(len(eps), None), []
    for layer, part in zip(model.top_down, model.split(eps), strict=True):
        h, z = layer.generate(h, part)
        latents.append(z.flatten(1))
    return torch.cat(latents, dim=1)


def inferred(model: ResNetVAE, code: tuple[Tensor, ...], eps: Tensor) -> tuple[Tensor, Tensor]:
    """What the posterior of one image makes of noise `(B, Z)`: latents `(B, Z)` and the rate of each layer `(B, L)`."""
    parts = model.split(eps)
    in_order = iter(parts if model.inference == "bidirectional" else reversed(parts))
    rows = tuple(part.expand(len(eps), -1, -1, -1) for part in code)
    _, latents, rates = model._infer(rows, None, lambda shape: next(in_order))
    return torch.cat([z.flatten(1) for z in latents], dim=1), torch.stack([kl.sum(dim=1) for kl in rates], dim=1)


@torch.no_grad()
def silence(layer: WeightNormalized, *rows: slice, bias: float | None = 0.0) -> None:
    """Make output channels constant; of the bias that they have if it is None."""
    for row in rows:
        layer.g[row] = 0
        if bias is not None and layer.bias is not None:
            layer.bias[row] = bias


def silence_flows(model: ResNetVAE) -> None:
    """Let no step of a flow depend on anything."""
    for module in model.modules():
        for step in module.steps if isinstance(module, IAF) else ():
            silence(step.conditioner.output, slice(None))


@torch.no_grad()
def near(model: ResNetVAE, distance: float) -> None:
    """Bring the posterior nearer to the prior that it is relative to, or both to the standard Gaussian.

    Importance weights then vary less.
    """
    own = slice(4, 8) if model.inference == "bidirectional" else slice(0, 4)
    for up, down in zip(model.bottom_up, model.top_down, strict=True):
        for layer, part in ((up.first, slice(0, 4)), (down.first, own)):
            layer.g[part] *= distance
            layer.bias[part] *= distance


def assert_reaches_every_parameter(model: ResNetVAE, objective: Tensor) -> None:
    objective.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def assert_agrees(draws: Tensor, expected: Tensor, precision: float = 0.02) -> None:
    """The mean over draws `(N, ...)` is the expected one, and known well enough to say so."""
    standard_error = draws.std(dim=0) / math.sqrt(len(draws))
    assert (standard_error < precision * expected.abs().clamp(min=1)).all()
    assert ((draws.mean(dim=0) - expected).abs() < 4 * standard_error + 1e-10).all()
