"""Binarized MNIST. The fixed binarization that published figures refer to is part of the package."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from wngen.data.datamodule import ImageDataModule
from wngen.data.images import Images, Split
from wngen.data.mnist import MNIST

STATIC = Path(__file__).with_name("binarized_mnist.npz")  # rows of 784 bits: train, valid, test
STATIC_BYTES = 2295919
STATIC_SHA256 = "50de2c8299a5a297789293ab2c30f6fc3cb8c359a15e5e88d5501aa18ebb8fa5"


class BinarizedMNIST(ImageDataModule):
    """Handwritten digits in black and white: 28x28, 50,000 to train on, 10,000 to validate and 10,000 to test.

    The three binarizations are three data sets: figures on one and on another cannot be compared.

    Args:
        root: the folder that holds MNIST/raw; $WNGEN_DATA or ~/.cache/wngen by default. Static binarization
            does not need it.
        validation: how many training images to hold out for validation: the last ones.
        binarization: static is the fixed binarization of Larochelle and Murray, which comes with wngen, without
            labels; dynamic draws each pixel of MNIST anew in every epoch, with its grey level as the probability;
            threshold cuts its grey levels in the middle.
        batch_size: images in a batch, over all processes.
        seed: of the order and the random draws of training.
        evaluation_seed: of the one dynamic binarization in which validation and test images are evaluated.

    Raises:
        ValueError: an argument outside what it may be.

    References:
        The neural autoregressive distribution estimator (Larochelle & Murray, 2011): static binarization.
        On the quantitative analysis of deep belief networks (Salakhutdinov & Murray, 2008): binarization by sampling.
    """

    binarizations = ("static", "dynamic", "threshold")

    def __init__(
        self,
        root: str | Path | None = None,
        validation: int = 10_000,
        binarization: Literal["static", "dynamic", "threshold"] = "static",
        batch_size: int = 128,
        seed: int = 0,
        evaluation_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, evaluation_seed, binarization)
        self.root = None if root is None else str(root)
        self.validation = validation

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 28, 28

    @property
    def num_classes(self) -> int | None:
        return None if self.binarization == "static" else 10

    def prepare_data(self) -> None:
        """Download MNIST if it is wanted and missing."""
        if self.binarization != "static":
            MNIST(self.root).prepare_data()

    def load(self) -> dict[Split, Images]:
        if self.binarization != "static":
            return MNIST(self.root, self.validation).load()
        packed = STATIC.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        if digest != STATIC_SHA256:
            raise ValueError(
                f"{STATIC} is damaged: {len(packed)} bytes with SHA-256 {digest}, wanted {STATIC_BYTES} with "
                f"{STATIC_SHA256}; install wngen again"
            )
        with np.load(io.BytesIO(packed)) as rows:
            bits = {name: np.unpackbits(rows[name], axis=1).reshape(-1, 1, 28, 28).copy() for name in rows}
        training = Images.all_of(torch.from_numpy(np.concatenate([bits["train"], bits["valid"]])))
        train, val = training.hold_out(self.validation)
        return {"train": train, "val": val, "test": Images.all_of(torch.from_numpy(bits["test"]))}
