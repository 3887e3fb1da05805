"""The contract that every model keeps, and what its forward pass returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from wngen.decoder import Decoder, Drawn, Given, Source, Watch
from wngen.distributions import PixelDistribution
from wngen.image import ImageSpec
from wngen.nn import Walk
from wngen.noise import Noise


@dataclass(frozen=True)
class Bound:
    """A lower bound on the log-likelihood of each image, taken apart, in nats.

    Attributes:
        distortion_nats: `(B,)`, -log p(x | z); for an exact model -log p(x).
        kl_nats: for each stochastic layer `(B, channels)`, the divergence of posterior from prior
            (or its one-sample estimate) of each latent channel. Empty for an exact model.
    """

    distortion_nats: Tensor
    kl_nats: tuple[Tensor, ...] = ()

    @property
    def layer_kl_nats(self) -> Tensor:
        """`(B, L)`, the divergence of each stochastic layer."""
        if not self.kl_nats:
            return self.distortion_nats.new_zeros(len(self.distortion_nats), 0)
        return torch.stack([kl.sum(dim=1) for kl in self.kl_nats], dim=1)

    @property
    def rate_nats(self) -> Tensor:
        """`(B,)`, the divergence of posterior from prior over all layers; 0 for an exact model."""
        return self.layer_kl_nats.sum(dim=1)

    @property
    def elbo_nats(self) -> Tensor:
        """`(B,)`, the evidence lower bound: -(distortion + rate)."""
        return -(self.distortion_nats + self.rate_nats)


def at_least(least: int, **sizes: int) -> None:
    """Check arguments of a constructor, each given by its name.

    Raises:
        ValueError: one of them is too small; the message names it.
    """
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name}={size}: wanted at least {least}")


class LikelihoodModel(nn.Module, PyTorchModelHubMixin, ABC):
    """A model that assigns a probability, or a bound on it, to images of integer levels.

    The constructor of a model takes flat, JSON-able arguments, the four numbers of its `ImageSpec`
    first. The same arguments are its YAML, its `config.json` and the hyperparameters in its checkpoint.

    Attributes:
        spec: the images it takes.
        is_exact: whether `log_likelihood` is exact, not a bound.
        num_classes: number of classes it is conditioned on, or None.
        chunk: how many images, or samples of them, an evaluation puts through it at once unless told otherwise.
    """

    is_exact: ClassVar[bool]
    chunk: ClassVar[int] = 1024
    spec: ImageSpec
    num_classes: int | None

    def __init__(self, spec: ImageSpec, num_classes: int | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: wanted at least 1, or None for a model without labels")
        self.spec = spec
        self.num_classes = num_classes

    @property
    def config(self) -> dict[str, Any]:
        """The class name as `model`, and every constructor argument: what `config.json` holds."""
        arguments = self._hub_mixin_config or {}
        assert isinstance(arguments, dict)
        return {"model": type(self).__name__, **arguments}

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """The bound on log p(x), or on log p(x | y) for a conditional model.

        Args:
            x: `(B, C, H, W)` uint8 levels.
            y: `(B,)` integer classes; only for a conditional model.
            noise: where random numbers come from; fresh ones by default.
        """

    @abstractmethod
    def log_likelihood(
        self,
        x: Tensor,
        y: Tensor | None = None,
        importance_samples: int = 1,
        noise: Noise | None = None,
        chunk: int = 1024,
    ) -> Tensor:
        """log p(x) in nats, `(B,)`: exact, or the importance-weighted bound with exactly that many samples.

        Args:
            x: `(B, C, H, W)` uint8 levels.
            y: `(B,)` integer classes; only for a conditional model.
            importance_samples: K of the bound; an exact model has no use for it.
            noise: where random numbers come from; fresh ones by default.
            chunk: how many samples of all images together are held in memory at once. The result does
                not depend on it.
        """

    @abstractmethod
    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw `n` images `(n, C, H, W)` uint8, of classes `y` for a conditional model.

        Args:
            n: how many.
            y: `(n,)` integer classes; only for a conditional model.
            temperature: 1 samples the model, less gives likelier and less varied images.
            generator: where random numbers come from; torch's global generator by default.
        """

    def check_labels(self, y: Tensor | None, n: int) -> None:
        """Check that class labels are given exactly where the model is conditioned on them.

        Raises:
            ValueError: labels missing, unwanted, of another number than the images, or (on a CPU; a GPU would have
                to be waited for) out of range.
        """
        if self.num_classes is None and y is not None:
            raise ValueError("this model was built without num_classes and takes no labels y")
        if self.num_classes is not None and (y is None or y.shape != (n,)):
            seen = None if y is None else tuple(y.shape)
            raise ValueError(
                f"this model is conditioned on {self.num_classes} classes: y must have shape ({n},), got {seen}"
            )
        if self.num_classes is not None and y is not None and y.device.type == "cpu" and n:
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"classes y run from {low} to {high}, wanted 0 to {self.num_classes - 1}")


class LatentVariableModel(LikelihoodModel):
    """A model with latent variables: its likelihood is bounded through an approximate posterior.

    A subclass says how a batch is encoded and how the bound follows from the code. `forward` and the
    importance-weighted bound are the same for all, and run the encoder once for each image.
    """

    is_exact = False

    @abstractmethod
    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the posterior of `(B, C, H, W)` levels depends on: tensors with the batch first."""

    @abstractmethod
    def bound(
        self, x: Tensor, code: tuple[Tensor, ...], y: Tensor | None, noise: Noise, sampled_rate: bool = True
    ) -> Bound:
        """The bound at one latent drawn from the posterior that `code` describes.

        Args:
            x: `(B, C, H, W)` uint8 levels.
            code: what `encode` returns.
            y: `(B,)` integer classes; only for a conditional model.
            noise: where the latent comes from.
            sampled_rate: take the rate as log q(z | x) - log p(z) at that latent, so that `elbo_nats` is the
                log importance weight; otherwise in closed form where there is one, which varies less.
        """

    @abstractmethod
    def represent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The centre of the posterior of each image, latents `(B, ...)` that `decode` takes."""

    @abstractmethod
    def decode(self, z: Tensor, y: Tensor | None = None) -> PixelDistribution:
        """The distribution of the images given their latents."""

    @abstractmethod
    def prior(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` latents from the prior; a temperature below 1 keeps them near its centre."""

    def forward(self, x: Tensor, y: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """The evidence lower bound, estimated with one sample of the posterior; see `LikelihoodModel`."""
        self.check_labels(y, len(x))
        return self.bound(x, self.encode(x, y), y, noise or Noise.fresh(len(x), x.device), sampled_rate=False)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw latents from the prior, and the pixels given them; see `LikelihoodModel`."""
        if n < 1 or temperature < 0:
            raise ValueError(f"n={n}, temperature={temperature}: wanted at least 1 image and no negative temperature")
        self.check_labels(y, n)
        return self.decode(self.prior(n, temperature, generator), y).sample(generator, temperature)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        y: Tensor | None = None,
        importance_samples: int = 1,
        noise: Noise | None = None,
        chunk: int = 1024,
    ) -> Tensor:
        """The importance-weighted bound log 1/K sum_k p(x, z_k) / q(z_k | x); see `LikelihoodModel`.

        Sample k of an image is the k-th draw of its noise, so that K = 1 gives the ELBO of draw 0 and
        the first samples are the same whatever K is.

        Raises:
            ValueError: `importance_samples` or `chunk` below 1.

        References:
            Importance weighted autoencoders (Burda et al., 2015), equation 8.
        """
        if importance_samples < 1 or chunk < 1:
            raise ValueError(f"importance_samples={importance_samples}, chunk={chunk}: both must be at least 1")
        self.check_labels(y, len(x))
        noise = noise or Noise.fresh(len(x), x.device)
        if len(x) > chunk:  # fewer images at a time
            bounds = []
            for part in torch.arange(len(x), device=x.device).split(chunk):
                labels = None if y is None else y[part]
                part_noise = Noise(noise.seed, noise.index[part], noise.draw[part])
                bounds.append(self.log_likelihood(x[part], labels, importance_samples, part_noise, chunk))
            return torch.cat(bounds)
        code = self.encode(x, y)
        total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        step = max(1, chunk // len(x))
        for start in range(0, importance_samples, step):
            draws = range(start, min(start + step, importance_samples))
            k = len(draws)
            rows = [torch.cat([part] * k) for part in (x, *code)]  # (k b) ...
            labels = None if y is None else y.repeat(k)
            bound = self.bound(rows[0], tuple(rows[1:]), labels, noise.repeat(draws))
            log_weight = bound.elbo_nats.double().view(k, len(x))
            total = torch.logaddexp(total, log_weight.logsumexp(dim=0))
        return total - math.log(importance_samples)


class AutoregressiveModel(LikelihoodModel):
    """A model that predicts each pixel from those before it, row by row: its likelihood is exact.

    A subclass says what it predicts for all pixels at once, and the same step by step along a `wngen.nn.Walk`: first
    for a row, of which the rows above are known, then for each of its pixels. Likelihood, sampling and completion
    follow from these and are the same for all.

    Attributes:
        period: after how many rows and columns the steps repeat: 4 for a model that halves its resolution twice.
        drawn_at_once: how many images `sample` and `complete` walk over together unless told otherwise.
        by_channel: whether the channels of a pixel are predicted from each other within the network, so that it takes
            a step for each of them; otherwise their distribution is one of all channels.
    """

    is_exact = True
    chunk = 64
    drawn_at_once: ClassVar[int] = 256
    period: int = 1
    by_channel: bool = False

    @abstractmethod
    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What `distribution` takes for each pixel: `(B, C, H, W)` in [-1, 1] to `(B, P, H, W)`, from those before."""

    @abstractmethod
    def predict_row(self, above: Tensor, y: Tensor | None, walk: Walk) -> None:
        """Do what can be done for the row that the walk has reached before any of its pixels is known.

        Args:
            above: `(B, C, 1, W)` in [-1, 1], the row above.
            y: `(B,)` integer classes; only for a conditional model.
            walk: where, and what was kept of the rows before.
        """

    @abstractmethod
    def predict_pixel(self, left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        """What `predict` gives at the pixel that the walk has reached.

        Args:
            left: `(B, C, 1, 1)` in [-1, 1], the pixel on the left.
            here: `(B, C, 1, 1)`, the pixel itself as far as its channels are known.
            y: `(B,)` integer classes; only for a conditional model.
            walk: where, and what was kept of the pixels before.

        Returns:
            `(B, P, 1, 1)`.
        """

    @abstractmethod
    def distribution(self, predicted: Tensor) -> PixelDistribution:
        """The distributions of pixels from what was predicted for them, `(B, P, H, W)`."""

    def forward(self, x: Tensor, y: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """The exact log-likelihood, as a bound without rate; see `LikelihoodModel`."""
        self.check_labels(y, len(x))
        predicted = self.predict(self.spec.scale(x, next(self.parameters()).dtype), y)
        return Bound(-self.distribution(predicted).log_prob(x).flatten(1).sum(dim=1))

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        y: Tensor | None = None,
        importance_samples: int = 1,
        noise: Noise | None = None,
        chunk: int = chunk,
    ) -> Tensor:
        """log p(x) in nats, `(B,)` float64, exact; see `LikelihoodModel`.

        Raises:
            ValueError: `chunk` below 1.
        """
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: wanted at least 1")
        self.check_labels(y, len(x))
        parts = torch.arange(len(x), device=x.device).split(chunk)
        bounds = [self(x[part], None if y is None else y[part]).elbo_nats.double() for part in parts]
        return torch.cat(bounds) if bounds else x.new_zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        watch: Watch | None = None,
        chunk: int = drawn_at_once,
    ) -> Tensor:
        """Draw images pixel by pixel; see `LikelihoodModel`.

        Args:
            n: how many.
            y: `(n,)` integer classes; only for a conditional model.
            temperature: 1 samples the model, less gives likelier and less varied images.
            generator: where the seed of the random numbers comes from; torch's global generator by default.
            watch: is shown the images as they grow; see `wngen.decoder.Watch`.
            chunk: how many are drawn at once. The numbers that an image is drawn from do not depend on it.

        Returns:
            `(n, C, H, W)` uint8 levels.
        """
        if n < 1:
            raise ValueError(f"n={n}: wanted at least 1 image")
        device = next(self.parameters()).device
        blank = torch.zeros(n, *self.spec.shape, dtype=torch.uint8, device=device)
        known = torch.zeros(self.spec.height, self.spec.width, dtype=torch.bool)
        return self._drawn(blank, known, y, temperature, generator, watch, chunk)

    @torch.no_grad()
    def complete(
        self,
        x: Tensor,
        known: Tensor,
        y: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        watch: Watch | None = None,
        chunk: int = drawn_at_once,
    ) -> Tensor:
        """Draw the pixels of images that are not known; those that are known stay as they are.

        Each pixel is drawn given all before it in raster order. Known pixels that come later do not act on it.

        Args:
            x: `(B, C, H, W)` uint8 levels; unknown pixels may hold any.
            known: `(H, W)` bool, true where the pixel is given.
            y: `(B,)` integer classes; only for a conditional model.
            temperature: as of `sample`.
            generator: as of `sample`.
            watch: as of `sample`.
            chunk: as of `sample`.

        Returns:
            `(B, C, H, W)` uint8 levels.

        Raises:
            TypeError: `known` is not bool.
            ValueError: `known` has another shape than the images, or hides none of their pixels.
        """
        self.spec.scale(x)  # which checks it
        if known.dtype != torch.bool:
            raise TypeError(f"known is {known.dtype}, wanted bool: true where a pixel is given")
        if tuple(known.shape) != (self.spec.height, self.spec.width):
            raise ValueError(f"known has shape {tuple(known.shape)}, wanted {(self.spec.height, self.spec.width)}")
        if bool(known.all()):
            raise ValueError("known is true everywhere: there is nothing to complete")
        return self._drawn(x, known, y, temperature, generator, watch, chunk)

    def _drawn(
        self,
        x: Tensor,
        known: Tensor,
        y: Tensor | None,
        temperature: float,
        generator: torch.Generator | None,
        watch: Watch | None,
        chunk: int,
    ) -> Tensor:
        if temperature < 0 or chunk < 1:
            raise ValueError(f"temperature={temperature}, chunk={chunk}: wanted no negative temperature and 1 or more")
        self.check_labels(y, len(x))
        device = generator.device if generator is not None else None
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        decoder = Decoder(self)
        images = []
        for part in torch.arange(len(x), device=x.device).split(chunk):
            source: Source = Drawn(Noise(seed, part), self.spec.width, temperature)
            if bool(known.any()):
                source = Given(x[part], known, source)
            images.append(decoder.run(len(part), source, None if y is None else y[part], watch)[0])
        return torch.cat(images)
