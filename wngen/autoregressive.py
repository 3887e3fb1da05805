"""What all models that predict pixel by pixel have in common: exact likelihoods, samples and completions."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from wngen.decoder import Decoder, Drawn, Given, Source, Watch
from wngen.distributions import PixelDistribution
from wngen.likelihood import PixelLikelihood
from wngen.model import Bound, LikelihoodModel, at_least
from wngen.nn import Walk
from wngen.noise import Noise
from wngen.precision import full_precision


class AutoregressiveModel(LikelihoodModel):
    """A model that predicts each pixel from those before it, row by row: its likelihood is exact.

    A subclass says what it predicts for all pixels at once, and the same step by step along a `wngen.nn.Walk`: first
    for a row, of which the rows above are known, then for each of its pixels. Likelihood, sampling and completion
    follow from these and are the same for all.

    Attributes:
        period: after how many rows and columns the steps repeat: 4 for a model that halves its resolution twice.
        drawn_at_once: how many images `sample` and `complete` walk over together unless told otherwise.
        head: what the network's output means; a subclass sets it.
        by_channel: whether the channels of a pixel are predicted from each other within the network, so that it takes
            a step for each of them; otherwise their distribution is one of all channels.
    """

    is_exact = True
    chunk = 64
    drawn_at_once: ClassVar[int] = 256
    head: PixelLikelihood
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

    def distribution(self, predicted: Tensor) -> PixelDistribution:
        """The distributions of pixels from what was predicted for them, `(B, P, H, W)`."""
        return self.head(predicted)

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
        chunk: int | None = None,
    ) -> Tensor:
        """log p(x) in nats, `(B,)` float64, exact unless the model is in training mode; see `LikelihoodModel`.

        Raises:
            ValueError: `chunk` below 1.
        """
        chunk = self.chunk if chunk is None else chunk
        at_least(1, chunk=chunk)
        self.check_labels(y, len(x))
        parts = torch.arange(len(x), device=x.device).split(chunk)
        with full_precision(x.device):
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
        chunk: int | None = None,
    ) -> Tensor:
        """Draw images pixel by pixel; see `LikelihoodModel`.

        Args:
            n: how many.
            y: `(n,)` integer classes; only for a conditional model.
            temperature: 1 samples the model, less gives likelier and less varied images.
            generator: where the seed of the random numbers comes from; torch's global generator by default.
            watch: is shown the images of each chunk as they grow; see `wngen.decoder.Watch`.
            chunk: how many are drawn at once, one such chunk after the other; `drawn_at_once` by default. The numbers
                that an image is drawn from do not depend on it.

        Returns:
            `(n, C, H, W)` uint8 levels.
        """
        at_least(1, n=n)
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
        chunk: int | None = None,
    ) -> Tensor:
        """Draw the pixels of images that are not known; those that are known stay as they are.

        Each pixel is drawn given all before it in raster order. Known pixels that come later do not act on it.

        Args:
            x: `(B, C, H, W)` uint8 levels; unknown pixels may hold any.
            known: `(H, W)` bool, true where the pixel is given.
            y: `(B,)` integer classes; only for a conditional model.
            temperature: as of `sample`.
            generator: as of `sample`.
            watch: as of `sample`; it sees what is known from the beginning.
            chunk: as of `sample`.

        Returns:
            `(B, C, H, W)` uint8 levels.

        Raises:
            TypeError: `known` is not bool.
            ValueError: `known` has another shape than the images or hides none of their pixels, or levels are too high.
        """
        self.spec.scale(x.cpu())  # which checks it
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
        chunk: int | None,
    ) -> Tensor:
        chunk = self.drawn_at_once if chunk is None else chunk
        at_least(1, chunk=chunk)
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature}: wanted 0 or more")
        self.check_labels(y, len(x))
        home = next(self.parameters()).device
        x, y = x.to(home), None if y is None else y.to(home)
        device = generator.device if generator is not None else None
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        decoder = Decoder(self)
        images = []
        for part in torch.arange(len(x), device=x.device).split(chunk):
            source: Source = Drawn(Noise(seed, part), self.spec.width, temperature)
            shown = watch
            if bool(known.any()):
                source = Given(x[part], known, source)
                shown = watch and source.shown_to(watch)
            images.append(decoder.run(len(part), source, None if y is None else y[part], shown)[0])
        return torch.cat(images)
