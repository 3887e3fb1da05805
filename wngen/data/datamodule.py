"""What all data sets share: three splits, the order of training, binarization and flips, and a stated protocol."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from wngen.data.images import Images, Split
from wngen.data.loader import EvaluationLoader, TrainingLoader
from wngen.image import Batch, ImageSpec
from wngen.noise import Noise, derived_seed

GreyBinarization = Literal["none", "dynamic", "threshold"]
Binarization = Literal["static"] | GreyBinarization

CHUNK = 1024  # images handled at once where all of a split are gone through
RESIDENT_BYTES = 2**30  # an array of at most this size is kept on the GPU while its images are trained on


def binarize(image: Tensor, binarization: Binarization, noise: Noise) -> Tensor:
    """8-bit levels to 0 and 1.

    Args:
        image: `(B, C, H, W)` uint8, 0 to 255.
        binarization: `dynamic` draws 1 with probability level / 255, `threshold` gives 1 from level 128 on,
            `none` and `static` leave the image as it is.
        noise: where `dynamic` takes its numbers from.
    """
    if binarization == "dynamic":
        return (noise.uniform(*image.shape[1:]) * 255 < image).to(torch.uint8)
    return (image >= 128).to(torch.uint8) if binarization == "threshold" else image


class ImageDataModule(pl.LightningDataModule, ABC):
    """Images of integer levels in memory, in three splits, for training with Lightning and evaluation without.

    Every random choice is a function of a seed and of what it is made for, never of what came before:

    - the order of training, of `(seed, epoch)`;
    - dynamic binarization and flips of a training image, of `(seed, index, epoch)`, whatever its batch;
    - dynamic binarization of an image that is evaluated, of `(evaluation_seed, split, index)`: it is drawn
      once, and the same in every run that does not ask for another.

    Training images leave the loader as stored and are binarized and flipped on the device; those of the
    other loaders and of `evaluation_batches` are final.

    A subclass takes flat, JSON-able constructor arguments, keeps each under its name, and says how its
    images are loaded.

    Args:
        batch_size: images in a batch, over all processes.
        seed: of the order, the binarization and the flips in training.
        evaluation_seed: of the binarization of evaluated images, and of subsets.
        binarization: one of the class's `binarizations`.
        levels: values of a pixel; 256 if it is to be binarized.
        horizontal_flips: whether half of the training images are mirrored.

    Raises:
        ValueError: an argument outside what it may be.

    Attributes:
        name: what the data set is called in reports.
        binarizations: the ways of binarization it knows.
    """

    name: str
    binarizations: ClassVar[tuple[Binarization, ...]] = ("none", "dynamic", "threshold")

    def __init__(
        self,
        batch_size: int,
        seed: int,
        evaluation_seed: int,
        binarization: Binarization = "none",
        levels: int = 256,
        horizontal_flips: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: wanted at least 1")
        if binarization not in self.binarizations:
            known = ", ".join(self.binarizations)
            hint = "; only BinarizedMNIST has a static one" if binarization == "static" else ""
            raise ValueError(f"binarization={binarization!r}: {type(self).__name__} knows {known}{hint}")
        if levels < 2 or 256 % levels:
            raise ValueError(f"levels={levels}: wanted a power of two, 2 to 256")
        if binarization != "none" and levels != 256:
            raise ValueError(
                f"levels={levels} with binarization={binarization!r}: it makes 2 levels of all 256, leave 256"
            )
        self.name = type(self).__name__
        self.batch_size, self.seed, self.evaluation_seed = batch_size, seed, evaluation_seed
        self.binarization, self.levels, self.horizontal_flips = binarization, levels, horizontal_flips
        self._images: dict[Split, Images] = {}
        self._final: dict[Split, Images] = {}
        self._training_loader: TrainingLoader | EvaluationLoader
        self._resumed_at = 0  # batches that the run had before it was resumed

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""

    @property
    def spec(self) -> ImageSpec:
        """The images that a model of this data takes."""
        return ImageSpec(*self.shape, levels=self.levels if self.binarization == "none" else 2)

    @property
    def num_classes(self) -> int | None:
        """How many classes the labels tell apart; None without labels."""
        return None

    @property
    def config(self) -> dict[str, Any]:
        """The class name as `data`, and every constructor argument."""
        return {
            "data": type(self).__name__,
            **{name: getattr(self, name) for name in inspect.signature(type(self)).parameters},
        }

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(images)} {split}" for split, images in self._images.items()) or "not loaded"
        return f"{self.name}: {sizes}; binarization {self.binarization}; {self.spec}"

    @abstractmethod
    def load(self) -> dict[Split, Images]:
        """Read the three splits, of `levels` levels or of 256 that are to be binarized."""

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once."""
        if stage == "fit":
            self._resumed_at = 0
        if not self._images:
            self._images = self.load()
            assert all(images.image.shape[1:] == self.shape for images in self._images.values())

    def images(self, split: Split) -> Images:
        """A split as loaded, before binarization. Loads the data where nothing else has.

        Raises:
            ValueError: there is no such split.
        """
        if not self._images:
            self.prepare_data()
            self.setup()
        if split not in self._images:
            raise ValueError(f"split={split!r}: wanted one of {', '.join(self._images)}")
        return self._images[split]

    def final_images(self, split: Split) -> Images:
        """A split as it is evaluated, binarized by draw 0 of the evaluation seed."""
        images = self.images(split)
        if self.binarization in ("none", "static"):
            return images
        if split not in self._final:
            parts = [self._binarized(batch, split, None) for batch in images.batches(CHUNK)]
            image = torch.cat(parts) if parts else images.image[:0]
            label = None if images.label is None else images.label[images.rows]
            self._final[split] = Images.all_of(image, label)
        return self._final[split]

    def _binarized(self, batch: Batch, split: Split, epoch: int | None) -> Tensor:
        """Training draws are numbered epoch + 1, the draw that is evaluated 0."""
        seed, draw = (self.evaluation_seed, 0) if epoch is None else (self.seed, epoch + 1)
        noise = Noise(derived_seed(seed, "binarization", split), batch.index, draw)
        return binarize(batch.image, self.binarization, noise)

    def _final_batches(self, split: Split, batch_size: int, index: Tensor) -> Iterator[Batch]:
        """Images `(N,)` of a split as they are evaluated. Of a part of it, no others are binarized."""
        if len(index) == self.size(split) or split in self._final:
            return self.final_images(split).batches(batch_size, index)
        batches = self.images(split).batches(batch_size, index)
        return (batch._replace(image=self._binarized(batch, split, None)) for batch in batches)

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """A training batch as epoch number `epoch` sees it: binarized, and flipped where the coin says so."""
        image = self._binarized(batch, "train", epoch)
        if self.horizontal_flips:
            coin = Noise(derived_seed(self.seed, "flips"), batch.index, epoch + 1).uniform(1, 1, 1)
            image = torch.where(coin < 0.5, image.flip(3), image)
        return batch._replace(image=image)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment training batches on the device, for the epoch that their loader is in."""
        training = self.trainer is not None and self.trainer.training
        return self.augment(batch, self._training_loader.epoch) if training else batch

    def _processes(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> TrainingLoader | EvaluationLoader:
        images, position = self.images("train"), 0
        if self.trainer is not None:
            if self.trainer.overfit_batches:  # type: ignore[attr-defined]
                self._training_loader = EvaluationLoader(images, self.batch_size, *self._processes())
                return self._training_loader
            position = max(self._resumed_at, self.trainer.fit_loop.total_batch_idx + 1)
            if images.image.nbytes <= RESIDENT_BYTES:
                images = images.to(self.trainer.strategy.root_device)
        self._training_loader = TrainingLoader(images, self.batch_size, self.seed, position, *self._processes())
        return self._training_loader

    def state_dict(self) -> dict[str, int]:
        """The place in the order of training: how many batches have been trained on, and what that order depends on."""
        assert self.trainer is not None
        done: int = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()["total"]["processed"]
        return {"batches": done, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a place. Lightning's own count is not there yet when a schedule asks for the epoch's length.

        Raises:
            ValueError: a place in another order, or in none.
        """
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError("overfit_batches goes through the same batches again and again: begin anew, not resumed")
        for name, mine in (("batch_size", self.batch_size), ("seed", self.seed)):
            if state[name] != mine:
                raise ValueError(
                    f"the checkpoint was trained with data.{name}={state[name]}, this data has {mine}: resume with "
                    f"{state[name]}"
                )
        self._resumed_at = state["batches"]

    def val_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> EvaluationLoader | list[EvaluationLoader]:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: Split) -> EvaluationLoader | list[EvaluationLoader]:
        """A loader, or none where there are no images: Lightning takes an empty list for nothing to do."""
        images = self.final_images(split)
        return EvaluationLoader(images, self.batch_size, *self._processes()) if len(images) else []

    def size(self, split: Split) -> int:
        """How many images a split has."""
        return len(self.images(split))

    def file_names(self, split: Split) -> Sequence[str] | None:
        """Of the images of a split, in the order of their indices; None where they have no files of their own."""
        return None

    def _chosen(self, split: Split, limit: int | None) -> Tensor:
        """Indices in order: all of a split, or `limit` drawn without replacement."""
        size = self.size(split)
        if not size:
            raise ValueError(f"{self.name} has no images in its {split} split: hold some out for it")
        if limit is None:
            return torch.arange(size)
        if not 1 <= limit <= size:
            raise ValueError(f"limit={limit}: the {split} split of {self.name} has {size} images, wanted 1 to {size}")
        generator = torch.Generator().manual_seed(derived_seed(self.evaluation_seed, "subset", split))
        return torch.randperm(size, generator=generator)[:limit].sort().values

    def evaluation_batches(
        self, split: Split, batch_size: int, limit: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """The images of a split as they are evaluated: in index order, each once, without padding.

        Args:
            split: `train`, `val` or `test`. Training images are binarized once too, and not flipped.
            batch_size: images in a batch; the last may be smaller.
            limit: take only so many images, drawn without replacement by the evaluation seed: a split may be
                sorted by class, and its first images are no sample of it.
            rank: which of several processes this is, that share the images.
            world_size: how many they are.

        Raises:
            ValueError: no such split, an empty one, or more images asked for than it has.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: wanted at least 1")
        return self._final_batches(split, batch_size, self._chosen(split, limit)[rank::world_size])

    def protocol(self, split: Split, limit: int | None = None) -> dict[str, Any]:
        """What a figure measured on `evaluation_batches(split, limit=limit)` was measured on.

        Returns:
            A JSON-able dict: `name`; `split`; `images`, the number evaluated; `split_images`, of how many;
            `channels`, `height`, `width` and `levels`; `binarization`; `seed`, the evaluation seed, or None where
            nothing was drawn; `sha256` of the evaluated images' levels, in index order.
        """
        digest = hashlib.sha256()
        index = self._chosen(split, limit)
        for batch in self._final_batches(split, CHUNK, index):
            digest.update(batch.image.numpy().data)
        drawn = len(index) < self.size(split) or self.binarization == "dynamic"
        return {
            "name": self.name,
            "split": split,
            "images": len(index),
            "split_images": self.size(split),
            **self.spec.as_dict(),
            "binarization": self.binarization,
            "seed": self.evaluation_seed if drawn else None,
            "sha256": digest.hexdigest(),
        }
