"""Pixels with which a linear model has a likelihood in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from wngen.distributions import PixelDistribution

PIXEL_STD = 2.0


class GaussianPixels(PixelDistribution):
    """A density over the levels taken as real numbers: no likelihood of images, but one that integrates by hand."""

    levels = 16

    def __init__(self, mean: Tensor) -> None:
        self._normal = torch.distributions.Normal(mean, PIXEL_STD)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._normal.log_prob(x.double())

    @property
    def _uniform_like(self) -> Tensor:
        return self.mean

    def _draw(self, uniform: Tensor, temperature: float) -> Tensor:
        value = self.mean + temperature * PIXEL_STD * torch.special.ndtri(uniform)
        return value.round().clamp(0, self.levels - 1).to(torch.uint8)

    @property
    def mean(self) -> Tensor:
        return self._normal.mean

    @property
    def mode(self) -> Tensor:
        return self.mean.round().to(torch.uint8)
