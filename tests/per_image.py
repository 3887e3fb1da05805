"""A small training, and the gradient of each single image of a batch by brute force."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from wngen.image import Batch
from wngen.models import ConvVAE
from wngen.noise import Noise
from wngen.training import Training
from wngen.training.gradient_noise import Blocks, GradientNoise, PartSums


def make_training(**options: Any) -> Training:
    torch.manual_seed(0)
    model = ConvVAE(1, 6, 6, 256, latent_dim=4, widths=(4,), blocks=0, hidden=8, iaf_width=8)
    return Training(model, **{"init_images": 40, "warmup_steps": 0, **options})


def per_image_gradients(training: Training, batch: Batch, draw: int) -> list[Tensor]:
    """By `torch.func`, each `(B, *shape)`, of the negative ELBO under the noise that training has."""
    model = training.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, index: Tensor) -> Tensor:
        noise = Noise(training.options["seed"], index[None], draw)
        return -functional_call(model, parameters, (image[None], None), {"noise": noise}).elbo_nats.mean()

    return list(vmap(grad(loss), (None, 0, 0))(parameters, batch.image, batch.index).values())


def estimate(blocks: Blocks, each: list[Tensor], parts: Any) -> dict[str, GradientNoise]:
    sums = PartSums(blocks)
    for part in parts:
        sums.add(len(part), [gradient[part].mean(dim=0) for gradient in each])
    return sums.estimate()
