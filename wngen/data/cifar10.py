"""CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import datasets

from wngen.data.datamodule import ImageDataModule
from wngen.data.download import check_files, data_root, download
from wngen.data.images import Images, Split, reduce_levels


class CIFAR10(ImageDataModule):
    """Photographs of animals and vehicles: 32x32, colour, 10 classes, 50,000 to train on and 10,000 to test.

    Args:
        root: the folder that holds cifar-10-batches-py; $WNGEN_DATA or ~/.cache/wngen by default. What is missing is
            downloaded to it.
        validation: how many training images to hold out for validation: the last ones.
        levels: levels of each colour: 256, or a lower power of two that the 8 bits are reduced to (32 for 5 bits).
        horizontal_flips: mirror half of the training images, drawn anew in every epoch. State it with a figure: it is
            more data than others trained on.
        batch_size: images in a batch, over all processes.
        seed: of the order and the flips of training.
        evaluation_seed: of subsets of the images that are evaluated.

    Raises:
        ValueError: an argument outside what it may be.

    References:
        Learning multiple layers of features from tiny images (Krizhevsky, 2009).
    """

    binarizations = ("none",)

    def __init__(
        self,
        root: str | Path | None = None,
        validation: int = 5_000,
        levels: int = 256,
        horizontal_flips: bool = False,
        batch_size: int = 64,
        seed: int = 0,
        evaluation_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, evaluation_seed, levels=levels, horizontal_flips=horizontal_flips)
        self.root = None if root is None else str(root)
        self.validation = validation

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, 32, 32

    @property
    def num_classes(self) -> int | None:
        return 10

    @property
    def _files(self) -> dict[Path, str]:
        kind = datasets.CIFAR10
        known = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        return {data_root(self.root) / kind.base_folder / name: md5 for name, md5 in known}

    def prepare_data(self) -> None:
        """Download what is missing."""
        root = data_root(self.root)
        download(datasets.CIFAR10, root, self._files, f"{datasets.CIFAR10.filename} into {root}")

    def load(self) -> dict[Split, Images]:
        check_files(self._files)
        train, val = self._read(train=True).hold_out(self.validation)
        return {"train": train, "val": val, "test": self._read(train=False)}

    def _read(self, train: bool) -> Images:
        data = datasets.CIFAR10(data_root(self.root), train=train)
        image = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return Images.all_of(reduce_levels(image, self.levels), torch.tensor(data.targets))
