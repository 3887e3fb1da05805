"""MNIST, and Fashion-MNIST, which has its form."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torchvision import datasets

from wngen.data.datamodule import GreyBinarization, ImageDataModule
from wngen.data.download import check_files, data_root, download
from wngen.data.images import Images, Split, reduce_levels


class MNIST(ImageDataModule):
    """Handwritten digits: 28x28, grey, 10 classes, 60,000 to train on and 10,000 to test.

    Args:
        root: the folder that holds MNIST/raw; $WNGEN_DATA or ~/.cache/wngen by default. What is missing is
            downloaded to it.
        validation: how many training images to hold out for validation: the last ones.
        binarization: none keeps grey levels; dynamic draws each pixel anew in every epoch, with its level as the
            probability; threshold cuts in the middle.
        levels: grey levels: 256, or a lower power of two that the 8 bits are reduced to.
        batch_size: images in a batch, over all processes.
        seed: of the order and the random draws of training.
        evaluation_seed: of the one dynamic binarization in which validation and test images are evaluated.

    Raises:
        ValueError: an argument outside what it may be.

    References:
        Gradient-based learning applied to document recognition (LeCun et al., 1998).
    """

    torchvision_class: ClassVar[type[datasets.MNIST]] = datasets.MNIST
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def __init__(
        self,
        root: str | Path | None = None,
        validation: int = 10_000,
        binarization: GreyBinarization = "none",
        levels: int = 256,
        batch_size: int = 128,
        seed: int = 0,
        evaluation_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, evaluation_seed, binarization, levels)
        self.root = None if root is None else str(root)
        self.validation = validation

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 28, 28

    @property
    def num_classes(self) -> int | None:
        return 10

    @property
    def _folder(self) -> Path:
        return data_root(self.root) / self.torchvision_class.__name__ / "raw"

    @property
    def _files(self) -> dict[Path, str]:
        return {self._folder / name: md5 for name, md5 in self.md5.items()}

    def prepare_data(self) -> None:
        """Download what is missing."""
        archives = ", ".join(name for name, _ in self.torchvision_class.resources)
        download(self.torchvision_class, data_root(self.root), self._files, f"{archives} into {self._folder}")

    def load(self) -> dict[Split, Images]:
        check_files(self._files)
        train, val = self._read(train=True).hold_out(self.validation)
        return {"train": train, "val": val, "test": self._read(train=False)}

    def _read(self, train: bool) -> Images:
        data = self.torchvision_class(data_root(self.root), train=train)
        return Images.all_of(reduce_levels(data.data[:, None], self.levels), data.targets)


class FashionMNIST(MNIST):
    """Pictures of clothes: 28x28, grey, 10 classes, 60,000 to train on and 10,000 to test.

    Args:
        root: the folder that holds FashionMNIST/raw; $WNGEN_DATA or ~/.cache/wngen by default. What is missing is
            downloaded to it.
        validation: how many training images to hold out for validation: the last ones.
        binarization: none keeps grey levels; dynamic draws each pixel anew in every epoch, with its level as the
            probability; threshold cuts in the middle.
        levels: grey levels: 256, or a lower power of two that the 8 bits are reduced to.
        batch_size: images in a batch, over all processes.
        seed: of the order and the random draws of training.
        evaluation_seed: of the one dynamic binarization in which validation and test images are evaluated.

    Raises:
        ValueError: an argument outside what it may be.

    References:
        Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms (Xiao et al., 2017).
    """

    torchvision_class = datasets.FashionMNIST
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }
