"""The ResNet VAE of the IAF paper: a ladder of stochastic layers over several resolutions, inferred from both ends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wngen.distributions import PixelDistribution, at_least_fp32
from wngen.flows import IAF, StepForm
from wngen.image import ImageSpec
from wngen.latent import LatentVariableModel
from wngen.likelihood import PixelLikelihood
from wngen.model import Bound, at_least
from wngen.nn import WNConv2d, WNConvTranspose2d, elu
from wngen.noise import Noise
from wngen.stochastic import BottomUpLayer, StdForm, TopDownLayer

# Of discretized logistics, where training begins: the pixels' own deviation, about 0.5 of [-1, 1].
FIRST_LOG_SCALE = -1.3


class Resolution(NamedTuple):
    """A resolution of the network, and the stochastic layers that stand there."""

    height: int
    width: int
    stride: int  # to the resolution before, or to the image
    layers: int
    maps: int  # of features


class ResNetVAE(LatentVariableModel):
    """A ladder of stochastic layers in a residual network, with a convolutional IAF posterior by choice.

    In bidirectional inference a deterministic pass from the image upwards leaves a code for each stochastic layer. The
    pass downwards draws each layer's latent maps, from the prior or, where an image is given, from the posterior, and
    with every draw changes the features that the layers below depend on. In bottom-up inference the posterior's draws
    are made on the way up, and the pass downwards takes them as they are.

    The defaults are those that the paper's code recommends for its Theano version, 3.28 bits/dim on CIFAR-10.

    Args:
        channels: of the images, 1 to 4.
        height: rows.
        width: columns.
        levels: values a sub-pixel can take.
        layers: height of the latent maps and number of stochastic layers at each resolution, from the image upwards,
            such as `16x10, 8x10`. Each height is that of the images, halved and rounded up any number of times.
            Several layers at height 1 want a `residual_scale` of 1: their features vary by their latents alone,
            which a smaller one hides from data-dependent init.
        feature_maps: of the network at each resolution, or one number for all.
        latent_channels: of each stochastic layer.
        inference: `bidirectional`, where each layer's latents are drawn on the way down, given the image and those
            above; or `bottom-up`, where they are drawn on the way up, given the image and those below.
        posterior: `diagonal` Gaussian, or that followed by inverse autoregressive flow over space and channels.
        iaf_steps: steps of each layer's flow.
        iaf_layers: hidden layers of a step; 0 makes it linear.
        iaf_form: `gated`, `location_scale` or `location`; see `wngen.flows.IAFStep`.
        std: standard deviations as `exponential` or base-2 `softplus` of what the network says.
        relative_posterior: parameterize the posterior's mean and deviation relative to the prior's; only for
            bidirectional inference.
        residual_scale: factor on every residual branch; None for 1 / sqrt(number of stochastic layers).
        likelihood: of the pixels: `bernoulli`; `discretized_logistic`, whose scale is learned but the same
            everywhere; `mixture` of discretized logistics; or `auto`, Bernoulli for two levels and discretized
            logistic for more.
        scale_per_channel: learn the scale of discretized logistics for each image channel.
        components: of the mixture.
        num_classes: condition on this many classes.
        recompute: keep no activations of the layers for the backward pass, but compute them again: less memory for
            more time, and the same gradients.

    Raises:
        ValueError: arguments that make no model; the message says which.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), section 4 and
        appendix C. `std` and `residual_scale` as in Efficient-VDVAE (Hazami et al., 2022) and VDVAE (Child, 2021);
        `relative_posterior` as in NVAE (Vahdat & Kautz, 2020), section 3.2.
    """

    chunk = 256

    def __init__(
        self,
        channels: int = 3,
        height: int = 32,
        width: int = 32,
        levels: int = 256,
        layers: str = "16x10, 8x10",
        feature_maps: int | Sequence[int] = 160,
        latent_channels: int = 32,
        inference: Literal["bidirectional", "bottom-up"] = "bidirectional",
        posterior: Literal["diagonal", "iaf"] = "iaf",
        iaf_steps: int = 1,
        iaf_layers: int = 2,
        iaf_form: StepForm = "location_scale",
        std: StdForm = "exponential",
        relative_posterior: bool = False,
        residual_scale: float | None = 0.1,
        likelihood: Literal["auto", "bernoulli", "discretized_logistic", "mixture"] = "auto",
        scale_per_channel: bool = False,
        components: int = 10,
        num_classes: int | None = None,
        recompute: bool = False,
    ) -> None:
        spec = ImageSpec(channels, height, width, levels)
        super().__init__(spec, num_classes)
        at_least(1, latent_channels=latent_channels, iaf_steps=iaf_steps, components=components)
        at_least(0, iaf_layers=iaf_layers)
        if channels > 4:
            raise ValueError(f"channels={channels}: wanted 1 to 4")
        choices = {
            "inference": (inference, ("bidirectional", "bottom-up")),
            "posterior": (posterior, ("diagonal", "iaf")),
            "iaf_form": (iaf_form, get_args(StepForm)),
            "std": (std, ("exponential", "softplus")),
        }
        for name, (seen, wanted) in choices.items():
            if seen not in wanted:
                raise ValueError(f"{name}={seen!r}: wanted one of {', '.join(wanted)}")
        offered = ("bernoulli", "mixture", "discretized_logistic")
        self.likelihood = PixelLikelihood(likelihood, spec, offered, components=components)
        scales = torch.full((channels if scale_per_channel else 1, 1, 1), FIRST_LOG_SCALE)
        self.log_scale = nn.Parameter(scales) if self.likelihood.name == "discretized_logistic" else None
        self.resolutions = parse_layers(layers, spec, feature_maps)
        if residual_scale is not None and not 0 < residual_scale < math.inf:
            raise ValueError(
                f"residual_scale={residual_scale}: wanted a positive number, or None for 1 / sqrt(number of layers)"
            )
        if relative_posterior and inference == "bottom-up":
            raise ValueError("relative_posterior is for bidirectional inference: bottom-up does not know the prior yet")
        fewest = min(resolution.maps for resolution in self.resolutions)
        if posterior == "iaf" and iaf_layers and fewest < latent_channels:
            raise ValueError(
                f"feature_maps={feature_maps}: wanted at least latent_channels={latent_channels}, so that each "
                "latent channel can depend on all before it"
            )
        self.inference, self.recompute = inference, recompute
        places = [resolution for resolution in self.resolutions for _ in range(resolution.layers)]
        depth = len(places)
        scale = depth**-0.5 if residual_scale is None else residual_scale
        up, down = [], []
        for i, here in enumerate(places):  # from the image upwards
            below, above = places[max(i - 1, 0)], places[min(i + 1, depth - 1)]
            flow = None
            if posterior == "iaf":
                flow = IAF.of_maps(latent_channels, iaf_steps, here.maps, iaf_layers, with_context=True, form=iaf_form)
            context = 0 if flow is None else flow.context_channels
            is_drawn_upwards = inference == "bottom-up"
            up.append(
                BottomUpLayer(
                    below.maps,
                    here.maps,
                    1 if below is here else here.stride,
                    scale,
                    latent_channels,
                    context,
                    flow if is_drawn_upwards else None,
                    std,
                    draws=is_drawn_upwards,
                    is_top=i == depth - 1,
                )
            )
            down.append(
                TopDownLayer(
                    above.maps,
                    here.maps,
                    1 if above is here else above.stride,
                    (here.height, here.width),
                    scale,
                    latent_channels,
                    context,
                    None if is_drawn_upwards else flow,
                    std,
                    draws=not is_drawn_upwards,
                    relative=relative_posterior,
                )
            )
        first, last = places[0], places[-1]
        stride, kernel = first.stride, 2 * first.stride + 1
        self.stem = WNConv2d(channels, first.maps, kernel, stride, padding=stride)
        self.bottom_up = nn.ModuleList(up)
        # Not constant over space: where nothing varies, data-dependent init could not set any scale.
        self.top = nn.Parameter(torch.randn(last.maps, last.height, last.width))
        self.top_down = nn.ModuleList(reversed(down))
        outputs = self.likelihood.outputs
        self.output = WNConvTranspose2d(first.maps, outputs, kernel, stride, padding=stride, init_scale=0.1)
        self.image_label = nn.Embedding(num_classes, first.maps) if num_classes else None
        self.top_label = nn.Embedding(num_classes, last.maps) if num_classes else None
        for label in (self.image_label, self.top_label):
            if label is not None:
                nn.init.normal_(label.weight, std=0.05)
        self.latent_shapes = tuple((latent_channels, place.height, place.width) for place in reversed(places))

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the posterior depends on.

        For bidirectional inference a code for each layer, the topmost first, `(B, 2 Z + context, H, W)`; for bottom-up
        inference, which draws on its way up, the features that it starts from, `(B, maps, H, W)`.
        """
        self.check_labels(y, len(x))
        h = at_least_fp32(self.stem(self.spec.scale(x, next(self.parameters()).dtype)))
        if self.image_label is not None:
            h = h + self.image_label(y)[:, :, None, None]
        if self.inference == "bottom-up":
            return (h,)
        codes: list[Tensor] = []
        for layer in self.bottom_up:
            assert isinstance(layer, BottomUpLayer)
            h, code = self._run(layer, h)
            codes.append(code)
        return tuple(reversed(codes))

    def bound(
        self, x: Tensor, code: tuple[Tensor, ...], y: Tensor | None, noise: Noise, sampled_rate: bool = True
    ) -> Bound:
        h, _, kl = self._infer(code, y, lambda shape: noise.normal(*shape).to(self.top), sampled_rate)
        return Bound(-self._pixels(h).log_prob(x).flatten(1).sum(dim=1), tuple(kl))

    def decode(self, z: Tensor, y: Tensor | None = None) -> PixelDistribution:
        h, _ = self._place(z, y)
        return self._pixels(h)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        at_least(1, n=n)
        h, _ = self._generate(n, y, temperature, generator, None)
        return self._pixels(h).sample(generator, self.layer_temperatures(temperature)[-1])

    def prior(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        _, latents = self._generate(n, y, temperature, generator, given)
        return torch.cat([z.flatten(1) for z in latents], dim=1)

    def prior_at(self, eps: Tensor, y: Tensor | None = None) -> Tensor:
        self.check_labels(y, len(eps))
        self.check_latents(eps)
        h, latents = self._top(len(eps), y), []
        for (layer, _), part in zip(self._ladder(), self.split(eps), strict=True):
            h, z = layer.generate(h, part)
            latents.append(z.flatten(1))
        return torch.cat(latents, dim=1)

    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        _, log_p = self._place(z, y)
        return log_p

    def represent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The centre of the posterior `(B, Z)`: each layer's base mean, carried through the flow.

        It is the centre given those of the layers that are drawn before it.
        """
        code = self.encode(x, y)
        _, latents, _ = self._infer(code, y, lambda shape: self.top.new_zeros(len(x), *shape))
        return torch.cat([z.flatten(1) for z in latents], dim=1)

    def _infer(
        self,
        code: tuple[Tensor, ...],
        y: Tensor | None,
        noise: Callable[[tuple[int, ...]], Tensor],
        sampled_rate: bool = True,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Draw from the posterior: features below the lowest layer; and of each layer, the topmost first, its rate.

        Args:
            code: what `encode` returns.
            y: `(B,)` integer classes; only for a conditional model.
            noise: makes standard normal noise of the shape of a layer's latents.
            sampled_rate: see `bound`; the rate of bottom-up inference always is.

        Returns:
            Features `(B, maps, H, W)`, latents `(B, Z, H, W)` of each layer, and rates `(B, Z)` in nats.
        """
        h, latents, rates = self._top(len(code[0]), y), [], []
        if self.inference == "bidirectional":
            for (layer, shape), part in zip(self._ladder(), code, strict=True):
                h, z, kl = self._run(layer.infer, h, part, noise(shape), sampled_rate)
                latents.append(z)
                rates.append(kl)
            return h, latents, rates
        (rising,), drawn = code, []
        for lower, shape in zip(self.bottom_up, reversed(self.latent_shapes), strict=True):
            assert isinstance(lower, BottomUpLayer)
            rising, z, log_q = self._run(lower.draw, rising, noise(shape))
            drawn.append((z, log_q))
        for (layer, _), (z, log_q) in zip(self._ladder(), reversed(drawn), strict=True):
            h, log_p = self._run(layer.place, h, z)
            latents.append(z)
            rates.append((log_q - log_p).flatten(2).sum(dim=2))
        return h, latents, rates

    def _generate(
        self,
        n: int,
        y: Tensor | None,
        temperature: float | Sequence[float],
        generator: torch.Generator | None,
        given: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Draw from the prior, as `prior` says: features below the lowest layer, and the latents of each."""
        self.check_labels(y, n)
        temperatures = self.layer_temperatures(temperature)
        latents = self.given_layers(given, n)
        h = self._top(n, y)
        for i, (layer, shape) in enumerate(self._ladder()):
            if i < len(latents):
                h, _ = layer.place(h, latents[i])
                continue
            eps = torch.randn(n, *shape, generator=generator, dtype=self.top.dtype, device=self.top.device)
            h, z = layer.generate(h, temperatures[i] * eps)
            latents.append(z)
        return h, latents

    def _place(self, z: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take latents `(B, Z)` as they are: features below the lowest layer, and the prior's log density `(B,)`."""
        self.check_labels(y, len(z))
        self.check_latents(z)
        h, each = self._top(len(z), y), []
        for (layer, _), part in zip(self._ladder(), self.split(z), strict=True):
            h, log_p = layer.place(h, part)
            each.append(log_p.flatten(1).sum(dim=1))
        return h, torch.stack(each).sum(dim=0)

    def _ladder(self) -> Iterator[tuple[TopDownLayer, tuple[int, ...]]]:
        """The stochastic layers and the shapes of their latents, the topmost first."""
        for layer, shape in zip(self.top_down, self.latent_shapes, strict=True):
            assert isinstance(layer, TopDownLayer)
            yield layer, shape

    def _top(self, n: int, y: Tensor | None) -> Tensor:
        """What the topmost layer starts from, `(n, maps, H, W)`."""
        top = self.top.expand(n, -1, -1, -1)
        return top if self.top_label is None else top + self.top_label(y)[:, :, None, None]

    def _pixels(self, h: Tensor) -> PixelDistribution:
        """The distribution of the pixels, given the features below the lowest layer."""
        predicted = self.output(elu(h), (self.spec.height, self.spec.width))
        return self.likelihood(at_least_fp32(predicted), self.log_scale)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a layer, whose activations are computed again for the backward pass if that is asked for."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)


def parse_layers(layers: str, spec: ImageSpec, feature_maps: int | Sequence[int]) -> tuple[Resolution, ...]:
    """The resolutions that `16x10, 8x10` names, from the image upwards, each with its feature maps.

    Raises:
        ValueError: text of another form, heights that images of this size do not come down to or in another order, or
            another number of feature maps.
    """
    parts = [re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", part) for part in layers.split(",")]
    named = [(int(part[1]), int(part[2])) for part in parts if part]
    halvings = {-(-spec.height // 2**k): k for k in reversed(range(spec.height.bit_length() + 1))}
    chosen = [halvings.get(height, -1) for height, _ in named]
    is_upwards = all(a < b for a, b in pairwise([-1, *chosen]))
    if len(named) < len(parts) or not is_upwards or any(count < 1 for _, count in named):
        raise ValueError(
            f"layers={layers!r}: wanted heights and numbers of layers from the image upwards, such as '16x10, 8x10'; "
            f"heights of {', '.join(map(str, sorted(halvings, reverse=True)))}, each at most once"
        )
    each = [feature_maps] if isinstance(feature_maps, int) else list(feature_maps)
    maps = each * (len(named) if len(each) == 1 else 1)
    if len(maps) != len(named) or min(maps) < 1:
        raise ValueError(f"feature_maps={feature_maps}: wanted one number, or one for each of {len(named)} heights")
    strides = [2 ** (b - a) for a, b in pairwise([0, *chosen])]
    return tuple(
        Resolution(height, -(-spec.width // 2**k), stride, count, m)
        for (height, count), k, stride, m in zip(named, chosen, strides, maps, strict=True)
    )
