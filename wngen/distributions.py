"""Likelihoods over integer levels, and the diagonal Gaussian of the latent variables. All in nats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from wngen.noise import Noise


def at_least_fp32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are: likelihoods are never computed in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class PixelDistribution(ABC):
    """Independent distributions over the levels 0 to `levels` - 1, one for each sub-pixel.

    Attributes:
        levels: number of values a sub-pixel can take.
    """

    levels: int

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats of each sub-pixel, for `(B, C, H, W)` uint8 levels."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw `(B, C, H, W)` uint8 levels; a temperature below 1 sharpens the distribution."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The expected level, a float between 0 and `levels` - 1, `(B, C, H, W)`."""

    @property
    @abstractmethod
    def mode(self) -> Tensor:
        """The likeliest level, `(B, C, H, W)` uint8."""


def _rand_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def _logistic_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return _rand_like(x, generator).logit(eps=torch.finfo(x.dtype).eps)


class Bernoulli(PixelDistribution):
    """Two levels, with the log-odds of level 1.

    Args:
        logits: `(B, C, H, W)`.
    """

    levels = 2

    def __init__(self, logits: Tensor) -> None:
        self.logits = at_least_fp32(logits)

    def log_prob(self, x: Tensor) -> Tensor:
        return F.logsigmoid(torch.where(x > 0, self.logits, -self.logits))

    def sample(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        return (self.logits + temperature * _logistic_like(self.logits, generator) > 0).to(torch.uint8)

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(torch.uint8)


class Categorical(PixelDistribution):
    """Any distribution over the levels.

    Args:
        logits: `(B, C, H, W, levels)`.
    """

    def __init__(self, logits: Tensor) -> None:
        self.levels = logits.shape[-1]
        self.logits = at_least_fp32(logits).log_softmax(dim=-1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.logits.gather(-1, x.long()[..., None]).squeeze(-1)

    def sample(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        # Gumbel-max: the arg max of logits plus Gumbel noise is distributed as their softmax.
        uniform = _rand_like(self.logits, generator).clamp_min(torch.finfo(self.logits.dtype).tiny)
        return (self.logits - temperature * (-uniform.log()).log()).argmax(dim=-1).to(torch.uint8)

    @property
    def mean(self) -> Tensor:
        level = torch.arange(self.levels, dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits.exp() * level).sum(dim=-1)

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(dim=-1).to(torch.uint8)


class DiscretizedLogistic(PixelDistribution):
    """A logistic distribution on [-1, 1] cut into one bin for each level, the two edge bins open.

    Levels lie at 2 x / (levels - 1) - 1, bins reach half-way to the neighbours, and the outermost ones to
    infinity, so that the levels' probabilities sum to one wherever the mean lies. The log of a bin's mass
    is the exact difference of two logistic functions, with no switch to the density at the centre.

    Args:
        mean: `(B, C, H, W)`, location on the scale of [-1, 1].
        log_scale: broadcasts to `mean`.
        levels: number of bins.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), appendix C;
        open edge bins as in PixelCNN++ (Salimans et al., 2017), equation 2.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor, levels: int) -> None:
        self.levels = levels
        self.location, self.log_scale = torch.broadcast_tensors(at_least_fp32(mean), at_least_fp32(log_scale))
        # In units of a level the bins' edges are exact numbers, so that neighbours meet and no mass is lost between.
        self._centre = (self.location + 1) * ((levels - 1) / 2)
        self._precision = (-self.log_scale).exp() * (2 / (levels - 1))

    def log_prob(self, x: Tensor) -> Tensor:
        level = x.to(self.location.dtype)
        below_upper = F.logsigmoid((level + 0.5 - self._centre) * self._precision)
        above_lower = F.logsigmoid((self._centre - level + 0.5) * self._precision)
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), where u - l depends on the scale alone
        inside = below_upper + above_lower + torch.log(-torch.expm1(-self._precision))
        return torch.where(x == 0, below_upper, torch.where(x == self.levels - 1, above_lower, inside))

    def sample(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        noise = _logistic_like(self.location, generator)
        return self._nearest_level(self._centre + temperature * noise / self._precision)

    @property
    def mean(self) -> Tensor:
        # sum_x x p(x) = sum over the inner bin edges of the probability above them
        edge = torch.arange(self.levels - 1, dtype=self.location.dtype, device=self.location.device) + 0.5
        return ((self._centre[..., None] - edge) * self._precision[..., None]).sigmoid().sum(dim=-1)

    @property
    def mode(self) -> Tensor:
        # An open edge bin can outweigh the bin that holds the location, so compare the three candidates.
        inner = self._nearest_level(self._centre)
        candidates = torch.stack([inner, torch.zeros_like(inner), torch.full_like(inner, self.levels - 1)])
        best = torch.stack([self.log_prob(x) for x in candidates]).argmax(dim=0, keepdim=True)
        return candidates.gather(0, best).squeeze(0)

    def _nearest_level(self, value: Tensor) -> Tensor:
        return value.round().clamp(0, self.levels - 1).to(torch.uint8)


class DiagonalGaussian:
    """Independent Gaussians, as posterior and prior of latent variables.

    Args:
        mean: `(B, Z)`, or any shape with the batch first.
        log_std: broadcasts to `mean`.
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = torch.broadcast_tensors(at_least_fp32(mean), at_least_fp32(log_std))

    @classmethod
    def standard(cls, like: Tensor) -> DiagonalGaussian:
        """Mean 0 and standard deviation 1, in the shape of `like`."""
        zero = torch.zeros_like(at_least_fp32(like))
        return cls(zero, zero)

    def log_prob(self, z: Tensor) -> Tensor:
        """log density of each element, in the shape of `z`."""
        return -0.5 * ((z - self.mean) * (-self.log_std).exp()).square() - self.log_std - 0.5 * math.log(2 * math.pi)

    def sample(self, noise: Noise) -> Tensor:
        """A reparameterized draw, differentiable in mean and log_std."""
        return self.mean + self.log_std.exp() * noise.normal(*self.mean.shape[1:]).to(self.mean)

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """KL(self || other) of each element in closed form (Kingma & Welling 2013, appendix B)."""
        ratio = (2 * (self.log_std - other.log_std)).exp()
        shift = ((self.mean - other.mean) * (-other.log_std).exp()).square()
        return 0.5 * (ratio + shift - 1) + other.log_std - self.log_std
