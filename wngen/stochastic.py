"""Stochastic layers of a hierarchy of latent variables: residual blocks from the image and to it."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.distributions import DiagonalGaussian, at_least_fp32
from wngen.flows import IAF
from wngen.nn import WNConv2d, WNConvTranspose2d, elu

StdForm = Literal["exponential", "softplus"]


class StochasticLayer(nn.Module):
    """A residual block with latent variables, and how a posterior of them is made.

    Args:
        latents: Z, channels of the latent variables.
        flow: the posterior's, or None.
        std: how standard deviations are parameterized.
    """

    def __init__(self, latents: int, flow: IAF | None, std: StdForm) -> None:
        super().__init__()
        self.latents, self.flow, self.std = latents, flow, std

    def posterior(
        self, code: Tensor, eps: Tensor, relative_to: DiagonalGaussian | None = None
    ) -> tuple[Tensor, Tensor, DiagonalGaussian]:
        """Draw latents from the posterior that `code` `(B, 2 Z + context, H, W)` describes.

        Args:
            code: parameters of a Gaussian, and the flow's context.
            eps: standard normal noise `(B, Z, H, W)`.
            relative_to: what the Gaussian's mean and deviation are relative to.

        Returns:
            Latents and their log density, both `(B, Z, H, W)`, and the Gaussian that the flow starts from.
        """
        parameters, context = code.tensor_split([2 * self.latents], dim=1)
        base = self.gaussian(parameters, relative_to)
        z, log_q = base.at(eps), DiagonalGaussian.standard(eps).log_prob(eps) - base.log_std
        if self.flow is not None:
            transformed = self.flow(z, context)
            z, log_q = transformed.value, log_q - transformed.log_det
        return z, log_q, base

    def gaussian(self, parameters: Tensor, relative_to: DiagonalGaussian | None = None) -> DiagonalGaussian:
        """From what the network says of mean and deviation, `(B, 2 Z, H, W)`."""
        mean, log_std = at_least_fp32(parameters).chunk(2, dim=1)
        if self.std == "softplus":  # to the base 2: of 0 it is 1, and far below 0 it is 2^x / ln 2
            std = F.softplus(log_std.clamp_min(-20), beta=math.log(2))
            log_std = torch.where(log_std > -20, std.log(), math.log(2) * log_std - math.log(math.log(2)))
        if relative_to is None:
            return DiagonalGaussian(mean, log_std)
        return DiagonalGaussian(relative_to.at(mean), relative_to.log_std + log_std)


class BottomUpLayer(StochasticLayer):
    """A residual block on the way from the image.

    It leaves a code for the posterior on the way down, or, in bottom-up inference, draws from the posterior itself.

    Args:
        below: feature maps that come in.
        maps: feature maps of the block.
        stride: to the layer below.
        scale: factor on the residual branch.
        latents: Z, channels of the layer's latent variables.
        context: channels of the context of the posterior's flow.
        flow: the posterior's, if it draws and there is one.
        std: how standard deviations are parameterized.
        draws: whether it draws.
        is_top: whether no layer comes after it, so that nothing is handed on.
    """

    def __init__(
        self,
        below: int,
        maps: int,
        stride: int,
        scale: float,
        latents: int,
        context: int,
        flow: IAF | None,
        std: StdForm,
        draws: bool,
        is_top: bool,
    ) -> None:
        super().__init__(latents, flow, std)
        self.scale = scale
        self.parts = [2 * latents + context, 0 if is_top else maps]
        self.shrink = WNConv2d(below, maps, stride + 1, stride, padding=stride // 2) if stride > 1 else None
        self.first = WNConv2d(maps, sum(self.parts), 3, padding="same", init_scale=0.1)
        inputs = maps + latents if draws else maps
        self.second = None if is_top else WNConv2d(inputs, maps, 3, padding="same", init_scale=0.1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, below, H, W)` to features for the layer above, and the posterior's code."""
        h, code, features = self._read(h)
        return self._merge(h, features), code

    def draw(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features for the layer above, latents drawn with noise `(B, Z, H, W)`, and their log density."""
        h, code, features = self._read(h)
        z, log_q, _ = self.posterior(code, eps)
        return self._merge(h, z.to(features.dtype), features), z, log_q

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at this resolution, the posterior's code, and features for the second convolution."""
        if self.shrink is not None:
            h = at_least_fp32(self.shrink(elu(h)))
        code, features = self.first(elu(h)).split(self.parts, dim=1)
        return h, code, features

    def _merge(self, h: Tensor, *inputs: Tensor) -> Tensor:
        return h if self.second is None else h + self.scale * self.second(elu(torch.cat(inputs, dim=1)))


class TopDownLayer(StochasticLayer):
    """A residual block on the way to the image, and the stochastic layer that enters it.

    Args:
        above: feature maps that come in.
        maps: feature maps of the block.
        stride: to the layer above.
        size: height and width of its maps.
        scale: factor on the residual branch.
        latents: Z, channels of its latent variables.
        context: channels of the context of the posterior's flow.
        flow: the posterior's, if it draws from it and there is one.
        std: how standard deviations are parameterized.
        draws: whether it draws from the posterior.
        relative: whether the posterior is parameterized relative to the prior.
    """

    def __init__(
        self,
        above: int,
        maps: int,
        stride: int,
        size: tuple[int, int],
        scale: float,
        latents: int,
        context: int,
        flow: IAF | None,
        std: StdForm,
        draws: bool,
        relative: bool,
    ) -> None:
        super().__init__(latents, flow, std)
        self.size, self.scale, self.relative = size, scale, relative
        # The prior; a part of the posterior's code; the features beside the latents.
        self.parts = [2 * latents, 2 * latents + context if draws else 0, maps]
        self.enlarge = WNConvTranspose2d(above, maps, stride + 1, stride, padding=stride // 2) if stride > 1 else None
        self.first = WNConv2d(maps, sum(self.parts), 3, padding="same", init_scale=0.1)
        self.second = WNConv2d(latents + maps, maps, 3, padding="same", init_scale=0.1)

    def infer(self, h: Tensor, code: Tensor, eps: Tensor, sampled_rate: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draw from the posterior.

        Args:
            h: features from above `(B, above, H, W)`.
            code: of the image, what `BottomUpLayer` returns.
            eps: standard normal noise `(B, Z, H, W)`.
            sampled_rate: see `LatentVariableModel.bound`.

        Returns:
            Features for the layer below, latents `(B, Z, H, W)`, and the rate of each channel `(B, Z)` in nats.
        """
        h, prior, inferred, features = self._read(h)
        z, log_q, base = self.posterior(code + inferred, eps, prior if self.relative else None)
        kl = base.kl(prior) if self.flow is None and not sampled_rate else log_q - prior.log_prob(z)
        return self._merge(h, features, z), z, kl.flatten(2).sum(dim=2)

    def generate(self, h: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from the prior, with noise `(B, Z, H, W)`: features for the layer below, and latents."""
        h, prior, _, features = self._read(h)
        z = prior.at(eps)
        return self._merge(h, features, z), z

    def place(self, h: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Take latents as they are: features for the layer below, and the prior's log density, both `(B, Z, H, W)`."""
        h, prior, _, features = self._read(h)
        return self._merge(h, features, z), prior.log_prob(z)

    def _read(self, h: Tensor) -> tuple[Tensor, DiagonalGaussian, Tensor, Tensor]:
        """Features at this resolution, the prior, a part of the posterior, and features that go beside the latents."""
        if self.enlarge is not None:
            h = at_least_fp32(self.enlarge(elu(h), self.size))
        prior, inferred, features = self.first(elu(h)).split(self.parts, dim=1)
        return h, self.gaussian(prior), inferred, features

    def _merge(self, h: Tensor, features: Tensor, z: Tensor) -> Tensor:
        return h + self.scale * self.second(elu(torch.cat([z.to(features.dtype), features], dim=1)))
