"""Likelihoods over integer levels, and the diagonal Gaussian of the latent variables. All in nats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from wngen.noise import Noise


def at_least_fp32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are: likelihoods are never computed in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class PixelDistribution(ABC):
    """Distributions over the levels 0 to `levels` - 1 of sub-pixels. The pixels are independent of each other.

    A subclass says in `_draw` how uniform numbers become levels, and in `_uniform_like` of what shape they are.

    Attributes:
        levels: number of values a sub-pixel can take.
    """

    levels: int

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats of each sub-pixel, for `(B, C, H, W)` uint8 levels.

        Where the channels of a pixel depend on each other, each one's is given the channels before it, so that
        the sum is always that of the whole image.
        """

    @property
    def uniforms(self) -> int:
        """How many uniform numbers the draw of one pixel takes."""
        return self._uniform_like.shape[1]

    def draw(self, uniform: Tensor, temperature: float = 1.0) -> Tensor:
        """The sample that these random numbers lead to, each pixel's a function of its own numbers alone.

        Args:
            uniform: `(B, uniforms, H, W)` numbers between 0 and 1, the end 1 excluded.
            temperature: below 1 it sharpens the distribution, and at 0 nothing is random.

        Returns:
            `(B, C, H, W)` uint8 levels.

        Raises:
            ValueError: numbers of another shape, or a negative temperature.
        """
        wanted = self._uniform_like.shape
        if uniform.shape != wanted:
            raise ValueError(f"uniform of shape {tuple(uniform.shape)}, wanted {tuple(wanted)}: see `uniforms`")
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature}, wanted 0 or more: 1 draws from the distribution as it is")
        return self._draw(uniform, temperature)

    def sample(self, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw `(B, C, H, W)` uint8 levels; a temperature below 1 sharpens the distribution."""
        like = self._uniform_like
        return self.draw(torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator), temperature)

    @property
    @abstractmethod
    def _uniform_like(self) -> Tensor:
        """Any tensor in the shape, of the type and on the device of the numbers that a draw takes."""

    @abstractmethod
    def _draw(self, uniform: Tensor, temperature: float) -> Tensor:
        """`draw`, for arguments that have been checked."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The expected level, a float between 0 and `levels` - 1, `(B, C, H, W)`."""

    @property
    @abstractmethod
    def mode(self) -> Tensor:
        """The likeliest level, `(B, C, H, W)` uint8."""


def _logistic_quantile(uniform: Tensor) -> Tensor:
    return uniform.logit(eps=torch.finfo(uniform.dtype).eps)


def _index_quantile(logits: Tensor, uniform: Tensor, temperature: float, dim: int) -> Tensor:
    """Where the cumulative softmax of logits / temperature first exceeds `uniform`; `dim` is kept, of size 1."""
    if temperature == 0:
        return logits.argmax(dim, keepdim=True)
    if temperature != 1:  # the largest becomes 0, which no temperature makes infinite
        logits = (logits - logits.amax(dim, keepdim=True)) / temperature
    probs = logits.softmax(dim)
    # A sum in single precision may end beside 1 and, done in parallel, may even fall. So it is measured by its own
    # height and counts only where there is mass: no rounding then leads past the end or to an impossible index.
    cumulative = probs.cumsum(dim) * (probs > 0)
    return (cumulative > uniform * cumulative.amax(dim, keepdim=True)).byte().argmax(dim, keepdim=True)


def _log_bin_mass(level: Tensor, centre: Tensor, precision: Tensor, levels: int) -> Tensor:
    """log of the logistic mass between level - 1/2 and level + 1/2, the edge bins open.

    In units of a level the bins' edges are exact numbers, so that neighbours meet and no mass is lost between.

    Args:
        level: integers as floats.
        centre: location, in levels.
        precision: one over the scale, in levels.
        levels: number of bins.
    """
    below_upper = F.logsigmoid((level + 0.5 - centre) * precision)
    above_lower = F.logsigmoid((centre - level + 0.5) * precision)
    # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), where u - l depends on the scale alone
    inside = below_upper + above_lower + torch.log(-torch.expm1(-precision))
    return torch.where(level == 0, below_upper, torch.where(level == levels - 1, above_lower, inside))


def _mass_above_edges(centre: Tensor, precision: Tensor, levels: int) -> Iterator[Tensor]:
    """The logistic mass above each of the levels - 1 inner edges of the bins, `(n, *centre.shape)` for n at a time.

    Its sum over the edges is the expected level, and its differences are the levels' probabilities.
    """
    edge = torch.arange(levels - 1, dtype=centre.dtype, device=centre.device) + 0.5
    for edges in edge.view(-1, *[1] * centre.dim()).split(16):  # more at a time are no faster
        yield ((centre - edges) * precision).sigmoid()


def _expected_level(centre: Tensor, precision: Tensor, levels: int) -> Tensor:
    return torch.stack([part.sum(dim=0) for part in _mass_above_edges(centre, precision, levels)]).sum(dim=0)


def _nearest_level(value: Tensor, levels: int) -> Tensor:
    return value.round().clamp(0, levels - 1)


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

    @property
    def _uniform_like(self) -> Tensor:
        return self.logits

    def _draw(self, uniform: Tensor, temperature: float) -> Tensor:
        return (self.logits + temperature * _logistic_quantile(uniform) > 0).to(torch.uint8)

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

    @property
    def _uniform_like(self) -> Tensor:
        return self.logits[..., 0]

    def _draw(self, uniform: Tensor, temperature: float) -> Tensor:
        return _index_quantile(self.logits, uniform[..., None], temperature, dim=-1).squeeze(-1).to(torch.uint8)

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
        self._centre = (self.location + 1) * ((levels - 1) / 2)
        self._precision = (-self.log_scale).exp() * (2 / (levels - 1))

    def log_prob(self, x: Tensor) -> Tensor:
        return _log_bin_mass(x.to(self.location.dtype), self._centre, self._precision, self.levels)

    @property
    def _uniform_like(self) -> Tensor:
        return self.location

    def _draw(self, uniform: Tensor, temperature: float) -> Tensor:
        value = self._centre + temperature * _logistic_quantile(uniform) / self._precision
        return _nearest_level(value, self.levels).to(torch.uint8)

    @property
    def mean(self) -> Tensor:
        return _expected_level(self._centre, self._precision, self.levels)

    @property
    def mode(self) -> Tensor:
        # An open edge bin can outweigh the bin that holds the location, so compare the three candidates.
        inner = _nearest_level(self._centre, self.levels).to(torch.uint8)
        candidates = torch.stack([inner, torch.zeros_like(inner), torch.full_like(inner, self.levels - 1)])
        best = torch.stack([self.log_prob(x) for x in candidates]).argmax(dim=0, keepdim=True)
        return candidates.gather(0, best).squeeze(0)


class DiscretizedLogisticMixture(PixelDistribution):
    """A mixture of logistic distributions for each pixel, whose channels follow each other.

    One component is chosen for the whole pixel. In it each channel is a `DiscretizedLogistic`, with a mean that is
    linear in the channels before: mean_c + sum over j < c of coefficient_cj x_j, where x_j is the level drawn for
    channel j on the scale of [-1, 1].

    Args:
        logits: `(B, K, H, W)`, of the component.
        mean: `(B, K, C, H, W)`, on the scale of [-1, 1].
        log_scale: `(B, K, C, H, W)`.
        coefficients: `(B, K, C (C - 1) / 2, H, W)`, in the order of channels (1, 0), (2, 0), (2, 1), (3, 0) and so on.
        levels: number of bins of a channel.

    Raises:
        ValueError: parameters of other shapes.

    References:
        PixelCNN++ (Salimans et al., 2017), equations 2 and 3; its released code is where the limits of
        `from_parameters` come from. Unlike there, bins are never approximated by the density at their centre, and
        each channel is drawn as one of its levels before the next one sees it.
    """

    def __init__(self, logits: Tensor, mean: Tensor, log_scale: Tensor, coefficients: Tensor, levels: int) -> None:
        self.channels = mean.shape[2]
        batch, components, *size = logits.shape
        pairs = self.channels * (self.channels - 1) // 2
        shapes = [tuple(parameter.shape) for parameter in (mean, log_scale, coefficients)]
        wanted = [(batch, components, n, *size) for n in (self.channels, self.channels, pairs)]
        if shapes != wanted:
            raise ValueError(f"mean, log_scale and coefficients of shapes {shapes}, wanted {wanted}")
        self.levels = levels
        self.logits, self.location, self.log_scale, self.coefficients = map(
            at_least_fp32, (logits, mean, log_scale, coefficients)
        )

    @staticmethod
    def parameters_per_pixel(components: int, channels: int) -> int:
        """How many numbers of a network describe one pixel: 10 components of 3 channels take 100, of 1 channel 30."""
        return components * (1 + 2 * channels + channels * (channels - 1) // 2)

    @classmethod
    def from_parameters(
        cls, parameters: Tensor, channels: int, levels: int, min_log_scale: float = -7.0
    ) -> DiscretizedLogisticMixture:
        """The distribution that a network's output describes.

        Args:
            parameters: `(B, P, H, W)` with P = `parameters_per_pixel(K, channels)`: the K logits, then the means, the
                log-scales and the coefficients before their tanh, each of these as K numbers for the first channel
                or pair of channels, K for the second, and so on.
            channels: C of the images.
            levels: number of values a sub-pixel can take.
            min_log_scale: lower ones are raised to it.

        Raises:
            ValueError: P is not that of a whole number of components.
        """
        pairs = channels * (channels - 1) // 2
        components, rest = divmod(parameters.shape[1], cls.parameters_per_pixel(1, channels))
        if rest or not components:
            one = cls.parameters_per_pixel(1, channels)
            raise ValueError(
                f"{parameters.shape[1]} parameters per pixel, wanted a multiple of {one}, one for each component"
            )
        # One copy of what comes channels_last costs less than every operation below would lose on its strides.
        parameters = at_least_fp32(parameters).contiguous()
        groups = parameters.unflatten(1, (-1, components)).transpose(1, 2)  # (B, K, P / K, H, W)
        logits, mean, log_scale, coefficients = groups.split([1, channels, channels, pairs], dim=2)
        return cls(logits.squeeze(2), mean, log_scale.clamp(min=min_log_scale), coefficients.tanh(), levels)

    def log_prob(self, x: Tensor) -> Tensor:
        levels = x.to(self.logits.dtype).split(1, dim=1)
        log_joint, log_probs = self.logits.log_softmax(dim=1), []
        for c, level in enumerate(levels):
            centre = self._centre(c, levels[:c])
            log_joint = log_joint + _log_bin_mass(level, centre, self._precisions[c], self.levels)
            log_probs.append(log_joint.logsumexp(dim=1))
        total = torch.stack(log_probs, dim=1)  # log p(x_0, ..., x_c)
        return total.diff(dim=1, prepend=torch.zeros_like(total[:, :1]))

    @property
    def _uniform_like(self) -> Tensor:
        return self.logits[:, :1].expand(-1, 1 + self.channels, -1, -1)

    def _draw(self, uniform: Tensor, temperature: float) -> Tensor:
        chosen = self._only(_index_quantile(self.logits, uniform[:, :1], temperature, dim=1))
        noise = (temperature * _logistic_quantile(uniform[:, 1:])).split(1, dim=1)
        levels: list[Tensor] = []
        for c in range(self.channels):
            value = chosen._centre(c, levels).addcdiv(noise[c], chosen._precisions[c])
            levels.append(_nearest_level(value, self.levels))
        return torch.cat(levels, dim=1).to(torch.uint8)

    @property
    def mean(self) -> Tensor:
        """The expected level, `(B, C, H, W)`: exact for the first channel.

        In each component a later channel is taken as if the earlier ones had their expected levels. That leaves out
        only what the open edges bend: away from them the expectation is linear in the channels before.
        """
        expected: list[Tensor] = []
        for c in range(self.channels):
            expected.append(_expected_level(self._centre(c, expected), self._precisions[c], self.levels))
        weights = self.logits.softmax(dim=1)
        return torch.stack([(weights * level).sum(dim=1) for level in expected], dim=1)

    @property
    def mode(self) -> Tensor:
        """The likeliest level, `(B, C, H, W)` uint8: of the first channel, then of the next one given it, and so on.

        For one channel that is the likeliest pixel. For more there may be a likelier one, which begins with a level
        that is not itself the likeliest.
        """
        log_joint, levels = self.logits.log_softmax(dim=1), list[Tensor]()
        for c in range(self.channels):
            weights, centre, precision = log_joint.softmax(dim=1), self._centre(c, levels), self._precisions[c]
            above = [(weights * part).sum(dim=2) for part in _mass_above_edges(centre, precision, self.levels)]
            ends = torch.ones_like(above[0][:1]), torch.zeros_like(above[0][:1])
            mass = -torch.cat(above).diff(dim=0, prepend=ends[0], append=ends[1])  # (levels, B, H, W)
            levels.append(mass.argmax(dim=0)[:, None].to(self.logits.dtype))
            log_joint = log_joint + _log_bin_mass(levels[c], centre, precision, self.levels)
        return torch.cat(levels, dim=1).to(torch.uint8)

    @cached_property
    def _centres(self) -> tuple[Tensor, ...]:
        """Location of each channel in levels, `(B, K, H, W)`, before the channels before it move it."""
        return ((self.location + 1) * ((self.levels - 1) / 2)).unbind(dim=2)

    @cached_property
    def _precisions(self) -> tuple[Tensor, ...]:
        return ((-self.log_scale).exp() * (2 / (self.levels - 1))).unbind(dim=2)

    @cached_property
    def _pairs(self) -> tuple[Tensor, ...]:
        return self.coefficients.unbind(dim=2)

    def _centre(self, c: int, before: Sequence[Tensor]) -> Tensor:
        """Location of channel c in levels, `(B, K, H, W)`, given the levels of the channels before it."""
        centre, first = self._centres[c], c * (c - 1) // 2
        for j, level in enumerate(before):
            centre = centre.addcmul(self._pairs[first + j], level - (self.levels - 1) / 2)
        return centre

    def _only(self, component: Tensor) -> DiscretizedLogisticMixture:
        """The mixture of one that is left when each pixel's component is known, `(B, 1, H, W)`."""
        index = component[:, :, None]
        location, log_scale, coefficients = (
            parameter.gather(1, index.expand(-1, -1, parameter.shape[2], -1, -1))
            for parameter in (self.location, self.log_scale, self.coefficients)
        )
        return DiscretizedLogisticMixture(self.logits[:, :1], location, log_scale, coefficients, self.levels)


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
        return self.at(noise.normal(*self.mean.shape[1:]))

    def at(self, eps: Tensor) -> Tensor:
        """The point that is `eps` standard deviations from the mean."""
        return self.mean + self.log_std.exp() * eps.to(self.mean)

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """KL(self || other) of each element in closed form (Kingma & Welling 2013, appendix B)."""
        ratio = (2 * (self.log_std - other.log_std)).exp()
        shift = ((self.mean - other.mean) * (-other.log_std).exp()).square()
        return 0.5 * (ratio + shift - 1) + other.log_std - self.log_std
