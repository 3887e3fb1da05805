"""MNIST, Fashion-MNIST and CIFAR-10 where torchvision puts them: read, checked, and missed in clear words."""

from __future__ import annotations

import hashlib
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from filelock import FileLock
from torchvision import datasets

from wngen import ImageSpec
from wngen.data import CIFAR10, MNIST, BinarizedMNIST, FashionMNIST
from wngen.data.download import download


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def little_mnist(tmp_path, monkeypatch):
    """MNIST of 20 training and 5 test images whose pixels all have the value of their place, in torchvision's form."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 5)):
        sizes = b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        levels = np.arange(count, dtype=np.uint8).repeat(784).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + levels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + sizes[:4] + bytes(i % 10 for i in range(count))
        )
    monkeypatch.setattr(MNIST, "md5", {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in raw.iterdir()})
    return tmp_path


@pytest.fixture
def little_cifar10(tmp_path, monkeypatch):
    """CIFAR-10 of two training files and a test file with 5 images each, in torchvision's form."""
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    batches = {
        name: rng.integers(0, 256, (5, 3072), dtype=np.uint8) for name in ("data_batch_1", "data_batch_2", "test_batch")
    }
    for name, data in batches.items():
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 1, 2, 3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    known = [[file.name, hashlib.md5(file.read_bytes()).hexdigest()] for file in sorted(folder.iterdir())]
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": known[0][1]}
    )
    monkeypatch.setattr(datasets.CIFAR10, "train_list", known[1:3])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", known[3:])
    return tmp_path, batches


def test_mnist_holds_out_its_last_training_images(little_mnist, no_network):
    data = MNIST(root=little_mnist, validation=4)
    data.prepare_data()
    for split, levels in {"train": range(16), "val": range(16, 20), "test": range(5)}.items():
        (batch,) = data.evaluation_batches(split, 100)
        assert torch.equal(batch.image, torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28))
        assert batch.label.tolist() == [i % 10 for i in levels]
        assert batch.index.tolist() == list(range(len(levels)))
    assert data.num_classes == 10


def test_fewer_levels(little_mnist):
    data = MNIST(root=str(little_mnist), validation=0, levels=32)
    assert data.spec == ImageSpec(1, 28, 28, 32)
    assert [int(level) for level in data.images("train").image[:, 0, 0, 0]] == [i // 8 for i in range(20)]


def test_the_root_can_come_from_the_environment(little_mnist, monkeypatch):
    monkeypatch.setenv("WNGEN_DATA", str(little_mnist))
    data = BinarizedMNIST(binarization="threshold", validation=0)
    assert data.size("train") == 20
    assert data.config["root"] is None
    assert data.num_classes == 10
    assert data.spec.levels == 2


def test_a_damaged_file_is_named(little_mnist):
    file = little_mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file} is damaged: its {16 + 5 * 784 - 100} bytes have MD5 .* wanted"):
        MNIST(root=little_mnist).setup()


def test_missing_data_without_a_network_says_what_to_put_where(tmp_path, no_network):
    with pytest.raises(FileNotFoundError, match=rf"train-images-idx3-ubyte.gz, .* into {tmp_path / 'MNIST' / 'raw'}"):
        MNIST(root=tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match=f"cifar-10-python.tar.gz into {tmp_path}, or set WNGEN_DATA"):
        CIFAR10(root=tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte is missing: call prepare_data\(\)"):
        FashionMNIST(root=tmp_path).setup()


def test_cifar10_is_read_channels_first(little_cifar10, no_network):
    root, batches = little_cifar10
    data = CIFAR10(root=root, validation=3)
    data.prepare_data()
    everything = torch.cat([batch.image for split in ("train", "val") for batch in data.evaluation_batches(split, 4)])
    training = np.concatenate([batches["data_batch_1"], batches["data_batch_2"]])
    assert np.array_equal(everything.flatten(1).numpy(), training)  # the file has channel, row, column
    (test,) = data.evaluation_batches("test", 10)
    assert np.array_equal(test.image.flatten(1).numpy(), batches["test_batch"])
    assert test.label.tolist() == [0, 1, 2, 3, 9]
    assert (data.size("train"), data.size("val")) == (7, 3)
    assert data.spec == ImageSpec(3, 32, 32, 256)
    five_bits = CIFAR10(root=root, validation=0, levels=32)
    assert torch.equal(five_bits.images("train").image, everything // 8)


def test_a_damaged_cifar10_file_is_named(little_cifar10):
    root, _ = little_cifar10
    file = root / datasets.CIFAR10.base_folder / "data_batch_2"
    file.write_bytes(file.read_bytes() + b"?")
    with pytest.raises(ValueError, match=f"{file} is damaged: its {file.stat().st_size} bytes have MD5"):
        CIFAR10(root=root).setup()


@pytest.mark.parametrize("data_set", [MNIST, FashionMNIST])
def test_the_real_data(data_set, data_root: Path):
    data = data_set(root=data_root)
    data.prepare_data()
    data.setup()
    assert {split: data.size(split) for split in ("train", "val", "test")} == {
        "train": 50_000,
        "val": 10_000,
        "test": 10_000,
    }
    training = torch.cat([data.final_images(split)[torch.arange(data.size(split))].image for split in ("train", "val")])
    test = data.final_images("test").image
    means = {"MNIST": (0.1306604762738429, 33.791224489795916), "FashionMNIST": (0.2860405969887955, 73.14656658163265)}
    scaled_train_mean, test_mean = means[data.name]
    assert training.double().mean().item() / 255 == pytest.approx(scaled_train_mean, abs=1e-9)
    assert test.double().mean().item() == pytest.approx(test_mean, abs=1e-9)
    assert torch.bincount(data.images("test").label, minlength=10).sum() == 10_000
    if data.name == "FashionMNIST":
        assert torch.bincount(data.images("test").label).tolist() == [1000] * 10


def test_dynamic_binarization_has_the_ink_of_the_grey_images(data_root: Path):
    grey, dynamic = MNIST(root=data_root), BinarizedMNIST(root=data_root, binarization="dynamic")
    p = grey.final_images("test").image.double() / 255
    x = dynamic.final_images("test").image.double()
    deviation = (p * (1 - p)).sum().sqrt()
    assert abs((x - p).sum()) < 4 * deviation
    assert x[p == 0].sum() == 0
    assert (x[p == 1] == 1).all()
    assert dynamic.protocol("test")["seed"] == 0


def test_of_several_that_want_a_data_set_one_downloads_and_the_others_wait(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wngen.data.download.PATIENCE_S", 0.05)
    file, downloads = tmp_path / "data" / "half.bin", []

    class Slow:
        def __init__(self, root: Path, download: bool) -> None:
            downloads.append(root)
            file.write_bytes(b"the first ")
            time.sleep(0.3)
            file.write_bytes(b"the first half and the second")

    def want(_: int) -> bytes:
        download(Slow, file.parent, {file: ""}, "it there")
        return file.read_bytes()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(want, range(4))) == [b"the first half and the second"] * 4
    assert len(downloads) == 1
    assert "Waiting for another process that downloads, and holds" in capsys.readouterr().out
    again = FileLock(tmp_path / "data" / ".Slow.lock")
    again.acquire(blocking=False)
    assert again.is_locked  # so nobody holds it any more
    again.release()


def test_a_folder_that_cannot_be_written_to_may_hold_the_data(tmp_path, monkeypatch):
    class Never:
        def __init__(self, root: Path, download: bool) -> None:
            raise AssertionError("all is there")

    def refuse(path: str) -> FileLock:
        raise PermissionError(30, "Read-only file system", path)

    monkeypatch.setattr("wngen.data.download.FileLock", refuse)
    file = tmp_path / "there.bin"
    file.write_bytes(b"1")
    download(Never, tmp_path, {file: ""}, "it there")
    with pytest.raises(FileNotFoundError, match=r"put it there, or set WNGEN_DATA.*Read-only"):
        download(Never, tmp_path, {file: "", tmp_path / "absent.bin": ""}, "it there")
