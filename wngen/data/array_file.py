"""Images in a NumPy file."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wngen.data.datamodule import CHUNK, GreyBinarization, ImageDataModule
from wngen.data.images import Images, Split
from wngen.noise import Noise, derived_seed

Layout = Literal["auto", "NHW", "NHWC", "NCHW"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class ArrayFile(ImageDataModule):
    """The uint8 images of a `.npy` or `.npz` file, one array of shape (N, H, W), (N, H, W, C) or (N, C, H, W).

    A `.npy` file is mapped into memory, and only what is asked for is read from disk. A `.npz` file holds
    `images`, or the splits `train`, `val` and `test` of which it may lack the latter two; class labels may stand
    beside them as `labels`, or `train_labels` and so on. Splits that the file does not make are made of its
    (training) images, each by its place in the array.

    Args:
        path: the file.
        levels: levels of a pixel: the values in the file are 0 to levels - 1.
        binarization: none keeps the levels; dynamic draws each pixel anew in every epoch, with its level as the
            probability; threshold cuts in the middle.
        layout: which dimension is which; auto takes a size of 1 to 4 for the channels.
        validation: the fraction of images for validation, where the file does not have them apart.
        test: the fraction of images for the test, where the file does not have them apart.
        horizontal_flips: mirror half of the training images, drawn anew in every epoch.
        batch_size: images in a batch, over all processes.
        seed: of the order and the random draws of training.
        evaluation_seed: of the one dynamic binarization in which validation and test images are evaluated.

    Raises:
        ValueError: an argument outside what it may be.
    """

    def __init__(
        self,
        path: str | Path,
        levels: int = 256,
        binarization: GreyBinarization = "none",
        layout: Layout = "auto",
        validation: float = 0.1,
        test: float = 0.1,
        horizontal_flips: bool = False,
        batch_size: int = 64,
        seed: int = 0,
        evaluation_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, evaluation_seed, binarization, levels, horizontal_flips)
        if layout not in ("auto", "NHW", "NHWC", "NCHW"):
            raise ValueError(f"layout={layout!r}: wanted auto, NHW, NHWC or NCHW")
        self.path, self.layout, self.validation, self.test = str(path), layout, validation, test
        self.name = f"ArrayFile {Path(path).stem}"

    @property
    def shape(self) -> tuple[int, int, int]:
        self.setup()
        channels, height, width = self._images["train"].image.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        self.setup()
        labels = [images.label for images in self._images.values() if images.label is not None and len(images.label)]
        return max(int(label.max()) for label in labels) + 1 if labels else None

    def load(self) -> dict[Split, Images]:
        file = Path(self.path).expanduser()
        arrays = read_arrays(file)
        whole, apart = {"images", "labels"}, {*SPLITS, *(f"{split}_labels" for split in SPLITS)}
        if not ({"images"} <= arrays.keys() <= whole or {"train"} <= arrays.keys() <= apart):
            raise ValueError(
                f"{file} holds {', '.join(arrays) or 'nothing'}; wanted images and perhaps labels, or train and "
                "perhaps val, test, train_labels, val_labels, test_labels"
            )
        names: dict[Split, str] = {"train": "images"} if "images" in arrays else {s: s for s in SPLITS if s in arrays}
        given = {split: self._checked(file, arrays, name) for split, name in names.items()}
        shapes = {names[split]: tuple(images.image.shape[1:]) for split, images in given.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{file}: the splits have (C, H, W) {shapes}, wanted the same in all")
        place = Noise(derived_seed(0, "split"), given["train"].rows).uniform(1)[:, 0]
        validation = 0.0 if "val" in given else self.validation
        test = 0.0 if "test" in given else self.test
        splits = given["train"].divide(place, validation, test)
        splits.update({split: given[split] for split in given if split != "train"})
        return splits

    def _checked(self, file: Path, arrays: dict[str, np.ndarray], name: str) -> Images:
        """One array as images, with its labels if it has any."""
        where = f"{name} of {file}"
        if arrays[name].dtype != np.uint8:
            raise ValueError(
                f"{where}: {arrays[name].dtype}, wanted uint8 levels 0 to {self.levels - 1}; do not scale images"
            )
        image = with_channels_first(torch.from_numpy(arrays[name]), self.layout, where)
        if self.levels < 256:
            highest = max(int(part.max()) for part in image.split(CHUNK))
            if highest >= self.levels:
                raise ValueError(
                    f"{where}: levels up to {highest}, wanted 0 to {self.levels - 1} with levels={self.levels}"
                )
        label_name = "labels" if name == "images" else f"{name}_labels"
        if label_name not in arrays:
            return Images.all_of(image)
        label = arrays[label_name]
        if label.shape != (len(image),) or label.dtype.kind not in "iu" or label.min() < 0:
            seen = f"{label.dtype} of shape {label.shape}"
            raise ValueError(f"{label_name} of {file}: {seen}, wanted {len(image)} integers, none below 0")
        return Images.all_of(image, torch.from_numpy(label.astype(np.int64)))


def with_channels_first(array: Tensor, layout: Layout, where: str) -> Tensor:
    """`(N, C, H, W)`, a view of an array in any layout.

    Raises:
        ValueError: a shape that is not of the layout, or from which it cannot be told; the message names `where`.
    """
    shape = tuple(array.shape)
    if layout == "auto" and len(shape) == 3:
        layout = "NHW"
    elif layout == "auto" and len(shape) == 4 and (shape[1] <= 4) != (shape[3] <= 4):
        layout = "NCHW" if shape[1] <= 4 else "NHWC"
    if layout == "auto":
        raise ValueError(
            f"{where}: shape {shape}, wanted (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 to 4 channels; "
            "if it is one of them, say layout=NHWC or layout=NCHW"
        )
    if len(shape) != len(layout) or 0 in shape:
        raise ValueError(f"{where}: shape {shape}, wanted ({', '.join(layout)}), each at least 1")
    if layout == "NHW":
        return array[:, None]
    return array if layout == "NCHW" else array.permute(0, 3, 1, 2)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` by name, or that of a `.npy` as `images`, mapped into memory.

    Raises:
        ValueError: no such file, another kind of file, or a damaged one.
    """
    if file.suffix not in (".npy", ".npz"):
        raise ValueError(f"path={str(file)!r}: wanted a file ending in .npy or .npz")
    if not file.is_file():
        raise ValueError(f"path={str(file)!r}: there is no such file")
    try:
        if file.suffix == ".npz":
            with file.open("rb") as stream, np.lib.npyio.NpzFile(stream) as arrays:
                return dict(arrays)
        # Copy on write: torch warns of an array that it may not write to, and writing never reaches the file.
        return {"images": np.load(file, mmap_mode="c")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        size = file.stat().st_size
        wanted = f", its header wants {expected_bytes(file)}" if file.suffix == ".npy" else ""
        raise ValueError(f"{file} cannot be read: it has {size} bytes{wanted} ({error})") from error


def expected_bytes(file: Path) -> int | str:
    """How long the header of a `.npy` file says that it is."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with file.open("rb") as stream:
            shape, _, dtype = read_header[np.lib.format.read_magic(stream)](stream)
            return stream.tell() + math.prod(shape) * dtype.itemsize
    except (ValueError, KeyError):
        return "nothing that can be read"
