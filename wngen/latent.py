"""What all models with latent variables have in common: bounds through an approximate posterior."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from wngen.distributions import PixelDistribution
from wngen.model import Bound, LikelihoodModel
from wngen.noise import Noise


class LatentVariableModel(LikelihoodModel):
    """A model with latent variables: its likelihood is bounded through an approximate posterior.

    A subclass says how a batch is encoded and how the bound follows from the code. `forward` and the
    importance-weighted bound are the same for all, and run the encoder once for each image.

    Attributes:
        latent_shapes: of each stochastic layer's latents, the topmost first.
    """

    is_exact = False
    latent_shapes: tuple[tuple[int, ...], ...]

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
        """The centre of the posterior of each image, latents `(B, Z)` that `decode` takes."""

    @abstractmethod
    def decode(self, z: Tensor, y: Tensor | None = None) -> PixelDistribution:
        """The distribution of the images given latents `(B, Z)`, all layers side by side, the topmost first."""

    @abstractmethod
    def prior(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """Draw latents `(n, Z)` from the prior.

        Args:
            n: how many.
            y: `(n,)` integer classes; only for a conditional model.
            temperature: factor on the prior's standard deviation, one for all stochastic layers or one for each, the
                topmost first.
            generator: where random numbers come from; torch's global generator by default.
            given: `(n, Z')`, latents of the uppermost layers, which are kept.

        Raises:
            ValueError: another number of temperatures than layers or of given latents than `n`, or latents that end
                within a layer.
        """

    @abstractmethod
    def prior_at(self, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """The latents `(B, Z)` that standard normal noise `(B, Z)` leads to under the prior, differentiable in it.

        Args:
            eps: noise of all layers side by side, the topmost first.
            y: `(B,)` integer classes; only for a conditional model.
        """

    @abstractmethod
    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(z) in nats, `(B,)`, of latents `(B, Z)` that `decode` takes, differentiable in them.

        Args:
            z: latents of all layers side by side, the topmost first.
            y: `(B,)` integer classes; only for a conditional model.

        Raises:
            ValueError: latents of another size than that of all layers.
        """

    def layer_temperatures(self, temperature: float | Sequence[float]) -> list[float]:
        """One for each stochastic layer, the topmost first.

        Raises:
            ValueError: another number of them, or a negative one.
        """
        depth = len(self.latent_shapes)
        each = [float(temperature)] * depth if isinstance(temperature, (int, float)) else list(temperature)
        if len(each) != depth or not all(t >= 0 for t in each):
            raise ValueError(f"temperature={temperature}: wanted one, or one for each of {depth} layers, none negative")
        return each

    def given_layers(self, given: Tensor | None, n: int) -> list[Tensor]:
        """The latents of each of the uppermost layers that are given `(n, Z')`.

        Raises:
            ValueError: another number of them, or latents that end within a layer.
        """
        if given is None:
            return []
        if len(given) != n:
            raise ValueError(f"n={n}, but {len(given)} rows of latents are given")
        return list(self.split(given))

    def check_latents(self, z: Tensor) -> None:
        """Check that latents are those of all layers side by side.

        Raises:
            ValueError: they are not.
        """
        if len(self.split(z)) < len(self.latent_shapes):
            raise ValueError(f"latents of shape {tuple(z.shape)}: wanted those of all {len(self.latent_shapes)} layers")

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """Latents side by side `(B, Z)`, of all layers or of the uppermost ones, to those of each layer `(B, ...)`.

        Raises:
            ValueError: they end within a layer.
        """
        sizes = [math.prod(shape) for shape in self.latent_shapes]
        ends = [0, *accumulate(sizes)]
        if z.dim() != 2 or z.shape[1] not in ends:
            raise ValueError(
                f"latents of shape {tuple(z.shape)}: wanted (B, Z), where layers end at {', '.join(map(str, ends))}"
            )
        layers = ends.index(z.shape[1])
        parts = z.split(sizes[:layers], dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=False))

    def forward(self, x: Tensor, y: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """The evidence lower bound, estimated with one sample of the posterior; see `LikelihoodModel`."""
        self.check_labels(y, len(x))
        return self.bound(x, self.encode(x, y), y, noise or Noise.fresh(len(x), x.device), sampled_rate=False)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw latents from the prior, and the pixels given them; see `LikelihoodModel`.

        Of several temperatures, one for each stochastic layer, the last is the pixels' too.
        """
        if n < 1:
            raise ValueError(f"n={n}: wanted at least 1 image")
        self.check_labels(y, n)
        lowest = self.layer_temperatures(temperature)[-1]
        return self.decode(self.prior(n, y, temperature, generator), y).sample(generator, lowest)

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
            rows = [torch.cat([part] * k) if k > 1 else part for part in (x, *code)]  # (k b) ...
            labels = None if y is None else y.repeat(k)
            bound = self.bound(rows[0], tuple(rows[1:]), labels, noise.repeat(draws))
            log_weight = bound.elbo_nats.double().view(k, len(x))
            total = torch.logaddexp(total, log_weight.logsumexp(dim=0))
        return total - math.log(importance_samples)
