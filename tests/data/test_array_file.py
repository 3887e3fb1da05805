"""NumPy files in any layout, mapped or packed, checked before they are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wngen import ImageSpec
from wngen.data import ArrayFile

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (30, 3, 8, 6), dtype=np.uint8)  # (N, C, H, W)


def everything(data: ArrayFile) -> torch.Tensor:
    """All images in the order of the file."""
    images = [data.images(split) for split in ("train", "val", "test")]
    order = torch.cat([part.rows for part in images]).argsort()
    return torch.cat([part[torch.arange(len(part))].image for part in images])[order]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("array", "layout"),
    [
        (COLOUR, "auto"),
        (COLOUR, "NCHW"),
        (COLOUR.transpose(0, 2, 3, 1), "auto"),
        (np.ascontiguousarray(COLOUR.transpose(0, 2, 3, 1)), "NHWC"),
        (np.asfortranarray(COLOUR), "auto"),
    ],
)
def test_every_layout_gives_the_same_images(tmp_path, array, layout, suffix):
    path = tmp_path / f"colour{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, images=array)
    data = ArrayFile(path, layout=layout)
    assert np.array_equal(everything(data).numpy(), COLOUR)
    assert data.spec == ImageSpec(3, 8, 6, 256)
    assert data.num_classes is None
    assert all(batch.image.is_contiguous() for batch in data.evaluation_batches("train", 4))


def test_grey_images_have_one_channel(tmp_path):
    np.save(tmp_path / "grey.npy", COLOUR[:, 0] // 8)
    data = ArrayFile(tmp_path / "grey.npy", levels=32)
    assert np.array_equal(everything(data)[:, 0].numpy(), COLOUR[:, 0] // 8)
    assert data.spec == ImageSpec(1, 8, 6, 32)


def test_a_mapped_file_is_neither_read_whole_nor_written(tmp_path):
    path = tmp_path / "large.npy"
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(2**17, 1, 32, 32))  # 128 MiB, a hole
    mapped[-1] = 7
    del mapped
    before = path.read_bytes()[:200], path.stat().st_blocks
    data = ArrayFile(path, validation=0, test=0)
    with torch.no_grad():
        image = data.images("train").image
        last = data.images("train")[torch.tensor([len(image) - 1])].image
        assert (last == 7).all()
        last.zero_()
        image[0] = 1  # a private copy of the page
    assert data.images("train")[torch.tensor([len(image) - 1])].image.min() == 7
    assert (path.read_bytes()[:200], path.stat().st_blocks) == before


def test_splits_and_labels_of_the_file(tmp_path):
    path = tmp_path / "splits.npz"
    np.savez(
        path,
        train=COLOUR[:20],
        val=COLOUR[20:24],
        test=COLOUR[24:],
        train_labels=np.arange(20) % 4,
        val_labels=np.arange(4),
        test_labels=np.array([0, 1, 2, 6, 1, 2]),
    )
    data = ArrayFile(path)
    for split, part in {"train": slice(0, 20), "val": slice(20, 24), "test": slice(24, 30)}.items():
        (batch,) = data.evaluation_batches(split, 100)
        assert np.array_equal(batch.image.numpy(), COLOUR[part])
        assert batch.label.dtype == torch.int64
    assert batch.label.tolist() == [0, 1, 2, 6, 1, 2]
    assert data.num_classes == 7


def test_splits_that_the_file_lacks_are_taken_from_training(tmp_path):
    path = tmp_path / "splits.npz"
    np.savez(path, train=COLOUR[:24], test=COLOUR[24:], train_labels=np.arange(24))
    data = ArrayFile(path, validation=0.3)
    assert data.size("train") + data.size("val") == 24
    assert 0 < data.size("val") < 16
    assert np.array_equal(data.final_images("test").image.numpy(), COLOUR[24:])
    (batch,) = data.evaluation_batches("val", 100)
    assert np.array_equal(batch.image.numpy(), COLOUR[batch.label])
    assert next(data.evaluation_batches("test", 2)).label is None


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ({"images": COLOUR / 255.0}, {}, "images of .*: float64, wanted uint8 levels 0 to 255; do not scale"),
        ({"images": COLOUR}, {"levels": 32}, "levels up to 255, wanted 0 to 31 with levels=32"),
        ({"images": COLOUR[0, 0]}, {}, r"shape \(8, 6\), wanted \(N, H, W\), \(N, H, W, C\) or"),
        ({"images": COLOUR[:, :, :, :4]}, {}, r"shape \(30, 3, 8, 4\), .* say layout=NHWC or layout=NCHW"),
        ({"images": COLOUR.repeat(2, axis=1)}, {}, r"shape \(30, 6, 8, 6\)"),
        ({"images": COLOUR}, {"layout": "NHW"}, r"shape \(30, 3, 8, 6\), wanted \(N, H, W\)"),
        ({"images": COLOUR[:0]}, {}, r"shape \(0, 3, 8, 6\), wanted \(N, C, H, W\), each at least 1"),
        ({"pictures": COLOUR}, {}, "holds pictures; wanted images and perhaps labels, or train"),
        ({"train": COLOUR, "valid": COLOUR}, {}, "holds train, valid; wanted"),
        ({"train": COLOUR, "test": COLOUR[:, :, 1:]}, {}, r"'test': \(3, 7, 6\).*wanted the same in all"),
        ({"images": COLOUR, "labels": np.arange(29)}, {}, r"labels of .*: int64 of shape \(29,\), wanted 30 integers"),
        ({"images": COLOUR, "labels": -np.arange(30)}, {}, "none below 0"),
        ({"images": COLOUR, "labels": np.ones(30)}, {}, r"float64 of shape \(30,\)"),
        ({"images": np.array([{}])}, {}, "cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, arrays, arguments, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        ArrayFile(path, **arguments).setup()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [5, 60, 1000])
def test_a_truncated_file_is_named_with_its_size(tmp_path, keep):
    np.save(tmp_path / "whole.npy", COLOUR)
    np.savez_compressed(tmp_path / "whole.npz", images=COLOUR)
    wanted = (tmp_path / "whole.npy").stat().st_size
    for suffix in ("npy", "npz"):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:keep])
        with pytest.raises(ValueError, match=f"{path} cannot be read: it has {keep} bytes") as caught:
            ArrayFile(path).setup()
    path = tmp_path / "cut.npy"
    path.write_bytes((tmp_path / "whole.npy").read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"1000 bytes, its header wants {wanted}") as caught:
        ArrayFile(path).setup()
    assert caught.value.__cause__ is not None


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"wanted a file ending in \.npy or \.npz"):
        ArrayFile(tmp_path / "images.pkl").setup()
    with pytest.raises(ValueError, match="there is no such file"):
        ArrayFile(tmp_path / "images.npy").setup()
    with pytest.raises(ValueError, match="layout='HWC': wanted auto"):
        ArrayFile(tmp_path / "images.npy", layout="HWC")  # type: ignore[arg-type]
