"""The binarized MNIST of the package is the published one, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from wngen import ImageSpec
from wngen.data import BinarizedMNIST, binarized_mnist

AMAT_MD5 = {  # of the files as their authors published them
    "train": "db28b1a6ae0fe70cbd3da91acf46e477",
    "val": "bf37822a04e94123630de6a7dfd9c9ef",
    "test": "14e41ae11040adba6ab8cb291eda0dd8",
}


@pytest.fixture(scope="module")
def static() -> BinarizedMNIST:
    data = BinarizedMNIST()
    data.setup()
    return data


def pixels(data: BinarizedMNIST, split: str) -> torch.Tensor:
    return torch.cat([batch.image for batch in data.evaluation_batches(split, 4096)])


def test_it_is_the_published_split(static):
    assert {split: static.size(split) for split in AMAT_MD5} == {"train": 50_000, "val": 10_000, "test": 10_000}
    for split, md5 in AMAT_MD5.items():
        bits = pixels(static, split).view(-1, 784).numpy()
        text = np.full((len(bits), 784, 2), ord(" "), np.uint8)
        text[:, :, 0] = ord("0") + bits
        text[:, -1, 1] = ord("\n")
        assert hashlib.md5(text.tobytes()).hexdigest() == md5


def test_independent_pixels_cost_what_is_published(static):
    """205.79 nats for a Bernoulli of its own for each pixel, fitted to the training images."""
    p = pixels(static, "train").double().mean(0).clamp(1e-6, 1 - 1e-6)
    x = pixels(static, "test").double()
    nats = -(x * p.log() + (1 - x) * (1 - p).log()).sum(dim=(1, 2, 3))
    assert nats.mean().item() == pytest.approx(205.79, abs=0.005)


def test_what_a_model_is_told(static):
    assert static.spec == ImageSpec(1, 28, 28, 2)
    assert static.num_classes is None
    assert next(static.evaluation_batches("test", 2)).label is None
    assert static.config["binarization"] == "static"
    protocol = static.protocol("test")
    assert protocol["name"] == "BinarizedMNIST"
    assert protocol["images"] == 10_000
    assert protocol["levels"] == 2
    assert protocol["seed"] is None
    assert protocol["sha256"] == "ca0294c3b8d984c7a1dc891015a8eea6f37bae59a34e35ea0fc8c47110a8dd86"


def test_static_images_are_the_same_in_every_epoch(static):
    batch = static.images("train")[torch.arange(32)]
    assert torch.equal(static.augment(batch, 0).image, static.augment(batch, 1).image)
    assert torch.equal(static.augment(batch, 0).image, next(static.evaluation_batches("train", 32)).image)


def test_a_sample_of_the_test_split_is_not_all_zeros(static):
    """The split is sorted by class: ones, the second class, are the sparsest, and zeros the densest digits."""
    ink = pixels(static, "test").float().mean(dim=(1, 2, 3))
    prefix, whole = ink[:500].mean().item(), ink.mean().item()
    sample = (
        torch.cat([batch.image for batch in static.evaluation_batches("test", 500, limit=500)]).float().mean().item()
    )
    error = ink.std().item() / 500**0.5
    assert abs(prefix - whole) > 10 * error
    assert abs(sample - whole) < 3 * error


def test_all_of_training_can_be_trained_on():
    data = BinarizedMNIST(validation=0)
    assert (data.size("train"), data.size("val"), data.size("test")) == (60_000, 0, 10_000)
    assert data.val_dataloader() == []


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_file_is_refused(damage, tmp_path, monkeypatch):
    packed = bytearray(binarized_mnist.STATIC.read_bytes())
    packed[1_000_000] ^= 1
    file = tmp_path / "binarized_mnist.npz"
    file.write_bytes(packed[:1_500_000] if damage == "truncated" else packed)
    monkeypatch.setattr(binarized_mnist, "STATIC", file)
    size = 1_500_000 if damage == "truncated" else 2_295_919
    with pytest.raises(ValueError, match=f"{file} is damaged: {size} bytes .* wanted 2295919"):
        BinarizedMNIST().setup()


def test_no_binarization_is_another_data_set():
    with pytest.raises(ValueError, match="BinarizedMNIST knows static, dynamic, threshold"):
        BinarizedMNIST(binarization="none")
