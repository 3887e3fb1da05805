"""What an image is: a tensor of integer levels, and the units in which its likelihood is reported."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Nats = TypeVar("Nats", float, Tensor)


@dataclass(frozen=True)
class ImageSpec:
    """The shape and depth of the images that a model assigns probabilities to.

    Args:
        channels: 1 for grey, 3 for colour.
        height: rows.
        width: columns.
        levels: number of values a pixel can take: 2 for binarized, 256 for 8-bit images.

    Raises:
        ValueError: a size below 1, or levels outside 2 to 256.
    """

    channels: int
    height: int
    width: int
    levels: int

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: an image needs at least 1; see {self}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels={self.levels}: images are uint8, so levels must lie in 2 to 256")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    @property
    def dims(self) -> int:
        """Number of sub-pixels, the divisor of bits per dimension."""
        return self.channels * self.height * self.width

    def bits_per_dim(self, nats: Nats) -> Nats:
        """Convert a negative log-likelihood in nats per image to bits per dimension."""
        return nats / (self.dims * math.log(2))

    def nats(self, bits_per_dim: Nats) -> Nats:
        """Convert bits per dimension to nats per image, the inverse of `bits_per_dim`."""
        return bits_per_dim * (self.dims * math.log(2))

    def scale(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map integer levels `(B, C, H, W)` to floats in [-1, 1].

        Raises:
            TypeError: the images are not uint8.
            ValueError: the images have another shape, or (on a CPU; a GPU would have to be waited for) levels that are
                too high.
        """
        if x.dtype != torch.uint8:
            raise TypeError(
                f"images are uint8 levels 0 to {self.levels - 1}, got {x.dtype}; do not scale them yourself"
            )
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"images have shape {tuple(x.shape)}, the model wants (B, {', '.join(map(str, self.shape))})"
            )
        if x.device.type == "cpu" and self.levels < 256 and not torch.compiler.is_compiling() and x.numel():
            highest = int(x.max())
            if highest >= self.levels:
                raise ValueError(f"the highest level is {highest}, wanted 0 to {self.levels - 1}")
        return self.scale_levels(x, dtype)

    def scale_levels(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same map for a part of the images, of any shape."""
        return x.to(dtype) * (2 / (self.levels - 1)) - 1

    def as_dict(self) -> dict[str, int]:
        """The four numbers by name, as a model's constructor takes them."""
        return asdict(self)


class Batch(NamedTuple):
    """Images as a data set hands them out.

    Attributes:
        image: `(B, C, H, W)` uint8 levels.
        label: `(B,)` integer classes, or None where the data has none.
        index: `(B,)` integers, each image's place in its split: the key of its noise and of its results.
    """

    image: Tensor
    label: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs of a batch
