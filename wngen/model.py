"""The contract that every model keeps, and what its forward pass returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from wngen.image import ImageSpec
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
            TypeError: labels that are no tensor of integers.
            ValueError: labels missing, unwanted, of another number than the images, or (on a CPU; a GPU would have
                to be waited for) out of range.
        """
        if y is not None and (not isinstance(y, Tensor) or y.dtype not in (torch.int32, torch.int64)):
            kind = str(y.dtype) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"classes y are {kind}, wanted a tensor of int64")
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
