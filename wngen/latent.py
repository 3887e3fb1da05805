"""What all models with latent variables have in common: bounds through an approximate posterior."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from wngen.distributions import PixelDistribution
from wngen.model import Bound, LikelihoodModel
from wngen.noise import Noise


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
