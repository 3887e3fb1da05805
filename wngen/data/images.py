"""Images as they lie in memory, and how they are divided into training, validation and test images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wngen.image import Batch

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Images:
    """The images of one split: some rows of an array that may be shared with other splits, or lie on disk.

    Attributes:
        image: `(M, C, H, W)` uint8.
        label: `(M,)` integer classes, or None.
        rows: `(N,)` integers: the image of index i is `image[rows[i]]`.
    """

    image: Tensor
    label: Tensor | None
    rows: Tensor

    def __post_init__(self) -> None:
        assert self.image.dtype == torch.uint8
        assert self.image.dim() == 4
        assert self.label is None or self.label.shape == (len(self.image),)

    @classmethod
    def all_of(cls, image: Tensor, label: Tensor | None = None) -> Images:
        """Every image of an array, in its order."""
        return cls(image, label, torch.arange(len(image)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Batch:
        """The images of the given indices `(B,)`, copied out of the array."""
        rows = self.rows[index]
        label = None if self.label is None else self.label[rows]
        return Batch(self.image.index_select(0, rows).contiguous(), label, index)

    def to(self, device: torch.device) -> Images:
        """The same images on a device, which their indices must be on too."""
        label = None if self.label is None else self.label.to(device)
        return Images(self.image.to(device), label, self.rows.to(device))

    def batches(self, batch_size: int, index: Tensor | None = None) -> Iterator[Batch]:
        """The images, or those of `index`, in order; the last batch may be smaller."""
        for part in (torch.arange(len(self)) if index is None else index).split(batch_size):
            yield self[part]

    def hold_out(self, last: int) -> tuple[Images, Images]:
        """All but the last images, and the last ones.

        Raises:
            ValueError: fewer than 0 are asked for, or no image would be left.
        """
        if not 0 <= last < len(self):
            raise ValueError(f"validation={last}: wanted 0 to {len(self) - 1} of the {len(self)} training images")
        rest = len(self) - last
        return Images(self.image, self.label, self.rows[:rest]), Images(self.image, self.label, self.rows[rest:])

    def divide(self, place: Tensor, validation: float, test: float) -> dict[Split, Images]:
        """Three splits, by a number of each image's own: below `test`, the next `validation` above it, and the rest.

        Args:
            place: `(N,)`, uniform in [0, 1), as `unit_hash` makes of a name.
            validation: the fraction of images for the validation split.
            test: the fraction for the test split.

        Raises:
            ValueError: fractions outside 0 to 1, or no image left to train on.
        """
        if not (validation >= 0 and test >= 0 and validation + test < 1):
            raise ValueError(
                f"validation={validation}, test={test}: wanted two fractions that together are less than 1"
            )
        assert place.shape == (len(self),)
        masks: dict[Split, Tensor] = {
            "train": place >= test + validation,
            "val": (place >= test) & (place < test + validation),
            "test": place < test,
        }
        if not masks["train"].any():
            raise ValueError(
                f"none of {len(self)} images is left to train on: lower validation={validation} and test={test}"
            )
        return {split: Images(self.image, self.label, self.rows[mask]) for split, mask in masks.items()}


def unit_hash(names: Iterable[str]) -> Tensor:
    """For each name a number in [0, 1) of its own, uniform over names."""
    digests = (hashlib.sha256(name.encode()).digest() for name in names)
    return torch.tensor([int.from_bytes(digest[:6], "big") for digest in digests], dtype=torch.float64) / 2**48


def reduce_levels(image: Tensor, levels: int) -> Tensor:
    """8-bit levels to fewer, of equal width: level l of the result is 256 l / levels and the levels above it."""
    return image if levels == 256 else image // (256 // levels)
