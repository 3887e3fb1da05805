"""Any folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from wngen.data.datamodule import GreyBinarization, ImageDataModule
from wngen.data.images import Images, Split, reduce_levels, unit_hash

EIGHT_BIT_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}


class ImageFolder(ImageDataModule):
    """Every image below a folder, resized so that the wanted size is just covered, and cropped to it in the middle.

    The split of an image follows from its file name, so that it stays when others are added. All images are
    decoded at the start and kept in memory, channels * height * width bytes each. Transparency is ignored.

    Args:
        path: the folder. Images in folders below it are found too; hidden files are left out.
        height: rows of the images.
        width: columns.
        channels: 3 for colour, 1 for grey.
        levels: levels of a pixel: 256, or a lower power of two that the 8 bits are reduced to.
        binarization: none keeps the levels; dynamic draws each pixel anew in every epoch, with its level as the
            probability; threshold cuts in the middle.
        validation: the fraction of images for validation.
        test: the fraction of images for the test.
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
        height: int,
        width: int,
        channels: Literal[1, 3] = 3,
        levels: int = 256,
        binarization: GreyBinarization = "none",
        validation: float = 0.1,
        test: float = 0.1,
        horizontal_flips: bool = False,
        batch_size: int = 64,
        seed: int = 0,
        evaluation_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, evaluation_seed, binarization, levels, horizontal_flips)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: wanted 1 for grey or 3 for colour")
        if height < 1 or width < 1:
            raise ValueError(f"height={height}, width={width}: wanted at least 1")
        self.path, self.height, self.width, self.channels = str(path), height, width, channels
        self.validation, self.test = validation, test
        self.name = f"ImageFolder {Path(path).expanduser().resolve().name}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def file_names(self, split: Split) -> Sequence[str]:
        rows = self.images(split).rows.tolist()
        names = image_names(Path(self.path).expanduser())
        return [names[row] for row in rows]

    def load(self) -> dict[Split, Images]:
        folder = Path(self.path).expanduser()
        names = image_names(folder)
        decoded = np.empty((len(names), self.height, self.width, self.channels), np.uint8)

        def decode_into(i: int) -> None:
            decoded[i] = self._decode(folder / names[i])

        with ThreadPoolExecutor() as threads:
            for _ in threads.map(decode_into, range(len(names))):
                pass
        image = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
        images = Images.all_of(reduce_levels(image, self.levels))
        return images.divide(unit_hash(names), self.validation, self.test)

    def _decode(self, file: Path) -> np.ndarray:
        """One image, `(height, width, channels)` uint8.

        Raises:
            ValueError: not an image, a damaged one, or one of more than 8 bits.
        """
        try:
            with Image.open(file) as opened:
                mode, image = opened.mode, ImageOps.exif_transpose(opened)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)
            what = "is no image that Pillow knows" if unknown else f"is damaged: {error}"
            raise ValueError(f"{file} ({file.stat().st_size} bytes) {what}; repair or remove it") from error
        if mode not in EIGHT_BIT_MODES:
            raise ValueError(f"{file} has pixels of mode {mode}, wanted 8 bits; convert it first")
        if "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns where it goes straight to a mode without
        image = image.convert("L" if self.channels == 1 else "RGB")
        fitted = ImageOps.fit(image, (self.width, self.height), Image.Resampling.LANCZOS)
        return np.asarray(fitted).reshape(self.height, self.width, self.channels)


def image_names(folder: Path) -> Sequence[str]:
    """Names of all images below a folder, relative to it, with forward slashes, in order.

    Raises:
        ValueError: there is none, or no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"path={str(folder)!r} is not a folder")
    files = [
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
    ]
    names = sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    if not names:
        raise ValueError(f"{folder} has no image in it: wanted files ending in {', '.join(IMG_EXTENSIONS)}")
    return names
