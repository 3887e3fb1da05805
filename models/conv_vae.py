"""The convolutional VAE of the IAF paper's MNIST experiments: ResNets in and out, one layer of latent variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wngen.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    DiscretizedLogistic,
    PixelDistribution,
    at_least_fp32,
)
from wngen.flows import IAF, AutoregressivePrior, StepForm
from wngen.image import ImageSpec
from wngen.latent import LatentVariableModel
from wngen.model import Bound, at_least
from wngen.nn import ResidualBlock, WNConv2d, WNLinear, elu
from wngen.noise import Noise

Likelihood = Literal["auto", "bernoulli", "categorical", "discretized_logistic"]

# Of discretized logistics, whose pixels span [-1, 1]: where training begins, and what no pixel's scale falls below.
TYPICAL_LOG_SCALE, LEAST_LOG_SCALE = -2.0, -7.0


class Encoder(nn.Module):
    """Residual blocks at falling resolutions, then one fully connected layer: images to feature vectors."""

    def __init__(
        self, spec: ImageSpec, patch: int, widths: Sequence[int], blocks: int, hidden: int, num_classes: int | None
    ) -> None:
        super().__init__()
        self.stem = WNConv2d(spec.channels, widths[0], 2 * patch + 1, stride=patch, padding=patch)
        self.down = nn.ModuleList(WNConv2d(above, below, 3, stride=2, padding=1) for above, below in pairwise(widths))
        self.stages = nn.ModuleList(nn.Sequential(*(ResidualBlock(width) for _ in range(blocks))) for width in widths)
        height, width = resolutions(spec, patch, len(widths))[-1]
        self.hidden = WNLinear(widths[-1] * height * width, hidden)
        self.label = nn.Embedding(num_classes, hidden) if num_classes else None

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Images scaled to [-1, 1] `(B, C, H, W)` to features `(B, hidden)`."""
        h = self.stem(x)
        for i, stage in enumerate(self.stages):
            h = elu(stage(h if i == 0 else self.down[i - 1](h)))
        h = self.hidden(h.flatten(1))
        return elu(h if self.label is None else h + self.label(y))


class Decoder(nn.Module):
    """The encoder's mirror image: latent vectors to the parameters of every sub-pixel's distribution."""

    def __init__(
        self,
        spec: ImageSpec,
        patch: int,
        widths: Sequence[int],
        blocks: int,
        hidden: int,
        num_classes: int | None,
        latent_dim: int,
        outputs: int,
    ) -> None:
        super().__init__()
        self.spec, self.patch, self.outputs = spec, patch, outputs
        self.sizes = resolutions(spec, patch, len(widths))
        self.hidden = WNLinear(latent_dim, hidden)
        self.label = nn.Embedding(num_classes, hidden) if num_classes else None
        self.grid = WNLinear(hidden, widths[-1] * math.prod(self.sizes[-1]))
        self.stages = nn.ModuleList(nn.Sequential(*(ResidualBlock(width) for _ in range(blocks))) for width in widths)
        self.up = nn.ModuleList(WNConv2d(below, 4 * above, 3, padding=1) for above, below in pairwise(widths))
        self.output = WNConv2d(widths[0], patch**2 * spec.channels * outputs, 3, padding=1)

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Latents `(B, Z)` to parameters `(B, C, H, W, outputs)`."""
        h = self.hidden(z)
        h = elu(h if self.label is None else h + self.label(y))
        h = self.grid(h).unflatten(1, (-1, *self.sizes[-1]))
        for i in reversed(range(len(self.stages))):
            h = elu(self.stages[i](h))
            if i > 0:
                height, width = self.sizes[i - 1]
                h = F.pixel_shuffle(self.up[i - 1](h), 2)[:, :, :height, :width]
        h = F.pixel_shuffle(self.output(h), self.patch)[:, :, : self.spec.height, : self.spec.width]
        return rearrange(h, "b (c o) h w -> b c h w o", o=self.outputs)


def resolutions(spec: ImageSpec, patch: int, stages: int) -> list[tuple[int, int]]:
    """Height and width at each stage: the image's over `patch`, then halved and rounded up from stage to stage."""
    return [(-(-spec.height // (patch << i)), -(-spec.width // (patch << i))) for i in range(stages)]


class ConvVAE(LatentVariableModel):
    """A convolutional VAE with one layer of latent variables and, by choice, an IAF posterior.

    The defaults are the MNIST model of the IAF paper: three stages of two residual blocks with 16, 32 and
    32 feature maps, 450 fully connected units and 32 latent variables; binary pixels.

    Args:
        channels: of the images, 1 to 4.
        height: rows.
        width: columns.
        levels: values a sub-pixel can take.
        latent_dim: number of latent variables.
        widths: feature maps of each stage; the resolution halves from stage to stage.
        blocks: residual blocks of each stage.
        patch: the first stage works on patches of this many pixels squared; 2 takes a quarter of the time.
        hidden: units of the fully connected layers.
        posterior: `diagonal` Gaussian, or that followed by inverse autoregressive flow.
        iaf_steps: steps of the flow.
        iaf_width: units of each hidden layer of a step.
        iaf_layers: hidden layers of a step.
        iaf_form: `gated`, `location_scale` or `location`; see `wngen.flows.IAFStep`.
        prior: `standard` Gaussian, or an `autoregressive` one of `iaf_width` units.
        likelihood: of the pixels. `auto` is Bernoulli for two levels and discretized logistic for more.
        num_classes: condition on this many classes.

    Raises:
        ValueError: arguments that make no model; the message says which.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), section 6.1.
    """

    def __init__(
        self,
        channels: int = 1,
        height: int = 28,
        width: int = 28,
        levels: int = 2,
        latent_dim: int = 32,
        widths: Sequence[int] = (16, 32, 32),
        blocks: int = 2,
        patch: int = 1,
        hidden: int = 450,
        posterior: Literal["diagonal", "iaf"] = "iaf",
        iaf_steps: int = 2,
        iaf_width: int = 320,
        iaf_layers: int = 1,
        iaf_form: StepForm = "gated",
        prior: Literal["standard", "autoregressive"] = "standard",
        likelihood: Likelihood = "auto",
        num_classes: int | None = None,
    ) -> None:
        spec = ImageSpec(channels, height, width, levels)
        super().__init__(spec, num_classes)
        if likelihood == "auto":
            likelihood = "bernoulli" if levels == 2 else "discretized_logistic"
        sizes = {"latent_dim": latent_dim, "blocks": blocks, "patch": patch, "hidden": hidden}
        flow = {"iaf_steps": iaf_steps, "iaf_width": iaf_width, "iaf_layers": iaf_layers}
        _check(spec, widths, posterior, iaf_form, prior, likelihood, **sizes, **flow)
        self.likelihood, self.latent_dim = likelihood, latent_dim
        self.latent_shapes = ((latent_dim,),)
        outputs = {"bernoulli": 1, "categorical": levels, "discretized_logistic": 2}[likelihood]
        self.encoder = Encoder(spec, patch, widths, blocks, hidden, num_classes)
        self.posterior = WNLinear(hidden, 2 * latent_dim)
        flow_arguments = latent_dim, iaf_steps, iaf_width, iaf_layers, hidden, iaf_form
        self.flow = IAF.of_vectors(*flow_arguments) if posterior == "iaf" else None
        self.prior_flow = AutoregressivePrior(latent_dim, iaf_width, iaf_layers) if prior == "autoregressive" else None
        self.decoder = Decoder(spec, patch, widths, blocks, hidden, num_classes, latent_dim, outputs)

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean `(B, Z)`, log standard deviation `(B, Z)` and the flow's context `(B, hidden)`."""
        self.check_labels(y, len(x))
        context = self.encoder(self.spec.scale(x, next(self.parameters()).dtype), y)
        mean, log_std = at_least_fp32(self.posterior(context)).chunk(2, dim=1)
        return mean, log_std, context

    def bound(
        self, x: Tensor, code: tuple[Tensor, ...], y: Tensor | None, noise: Noise, sampled_rate: bool = True
    ) -> Bound:
        mean, log_std, context = code
        base = DiagonalGaussian(mean, log_std)
        z = base.sample(noise)
        if not sampled_rate and self.flow is None and self.prior_flow is None:
            kl = base.kl(DiagonalGaussian.standard(z))
        else:
            log_q = base.log_prob(z)
            if self.flow is not None:
                transformed = self.flow(z, context)
                z, log_q = transformed.value, log_q - transformed.log_det
            kl = log_q - self._prior_log_prob(z)
        distortion = -self.decode(z, y).log_prob(x).flatten(1).sum(dim=1)
        return Bound(distortion, (kl,))

    def decode(self, z: Tensor, y: Tensor | None = None) -> PixelDistribution:
        """The distribution of the images given latents `(B, Z)`."""
        self.check_labels(y, len(z))
        parameters = at_least_fp32(self.decoder(z, y))
        if self.likelihood == "bernoulli":
            return Bernoulli(parameters[..., 0])
        if self.likelihood == "categorical":
            return Categorical(parameters)
        mean, log_scale = parameters.unbind(dim=-1)
        above = F.softplus(log_scale + (TYPICAL_LOG_SCALE - LEAST_LOG_SCALE))  # never without a gradient, as a clamp is
        return DiscretizedLogistic(mean, LEAST_LOG_SCALE + above, self.spec.levels)

    @torch.no_grad()
    def prior(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        if kept := self.given_layers(given, n):
            return kept[0]
        like = next(self.parameters())
        eps = torch.randn(n, self.latent_dim, generator=generator, dtype=like.dtype, device=like.device)
        return self.prior_at(self.layer_temperatures(temperature)[0] * eps, y)

    def prior_at(self, eps: Tensor, y: Tensor | None = None) -> Tensor:
        return eps if self.prior_flow is None else self.prior_flow.sample(eps)

    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        self.check_latents(z)
        return self._prior_log_prob(z).sum(dim=1)

    def represent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The centre of the posterior `(B, Z)`: its base's mean, carried through the flow."""
        mean, _, context = self.encode(x, y)
        return mean if self.flow is None else self.flow(mean, context).value

    def _prior_log_prob(self, z: Tensor) -> Tensor:
        if self.prior_flow is None:
            return DiagonalGaussian.standard(z).log_prob(z)
        return self.prior_flow.log_prob(z)


def _check(
    spec: ImageSpec,
    widths: Sequence[int],
    posterior: str,
    iaf_form: str,
    prior: str,
    likelihood: str,
    **sizes: int,
) -> None:
    """Refuse what makes no model, in the words of the constructor's arguments."""
    choices = {
        "posterior": (posterior, ("diagonal", "iaf")),
        "iaf_form": (iaf_form, ("gated", "location_scale", "location")),
        "prior": (prior, ("standard", "autoregressive")),
        "likelihood": (likelihood, ("auto", "bernoulli", "categorical", "discretized_logistic")),
    }
    for name, (seen, wanted) in choices.items():
        if seen not in wanted:
            raise ValueError(f"{name}={seen!r}: wanted one of {', '.join(wanted)}")
    if spec.channels > 4:
        raise ValueError(f"channels={spec.channels}: wanted 1 to 4")
    if likelihood == "bernoulli" and spec.levels != 2:
        raise ValueError(f"likelihood='bernoulli' is for levels=2, got levels={spec.levels}; take 'auto' or binarize")
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"widths={list(widths)}: wanted the feature maps of at least one stage")
    for name, size in sizes.items():
        at_least(0 if name in ("blocks", "iaf_width", "iaf_layers") else 1, **{name: size})
    is_masked = posterior == "iaf" or prior == "autoregressive"
    if is_masked and sizes["iaf_layers"] and sizes["iaf_width"] < sizes["latent_dim"]:
        raise ValueError(
            f"iaf_width={sizes['iaf_width']}: wanted at least latent_dim={sizes['latent_dim']}, so that each latent "
            "variable can depend on all before it"
        )
