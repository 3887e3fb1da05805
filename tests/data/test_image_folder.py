"""A folder of images of any kind becomes images of one size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from wngen import ImageSpec
from wngen.data import ImageFolder


def save(path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def only(data: ImageFolder) -> torch.Tensor:
    (batch,) = data.evaluation_batches("train", 100)
    return batch.image


def test_images_of_the_wanted_size_are_taken_bit_for_bit_and_in_order(tmp_path):
    arrays = {name: noise(8, 6, 3, seed=i) for i, name in enumerate(["b.png", "a/z.PNG", "a/b/c.bmp", "c.webp"])}
    for name, array in arrays.items():
        save(tmp_path / name, array, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._b.png").write_text("what some systems leave behind")
    data = ImageFolder(tmp_path, height=8, width=6, validation=0, test=0)
    expected = np.stack([arrays[name] for name in sorted(arrays)]).transpose(0, 3, 1, 2)
    assert np.array_equal(only(data).numpy(), expected)
    assert data.spec == ImageSpec(3, 8, 6, 256)
    assert data.num_classes is None
    assert data.name == f"ImageFolder {tmp_path.name}"


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 8), (8, 4)])
def test_the_middle_is_kept_and_the_shorter_side_fits(tmp_path, height, width):
    """Red left, green middle, blue right, for a width of three heights: what remains lies in the middle."""
    image = np.zeros((40, 120, 3), np.uint8)
    for third in range(3):
        image[:, 40 * third : 40 * (third + 1), third] = 255
    save(tmp_path / "stripes.png", image)
    seen = only(ImageFolder(tmp_path, height=height, width=width, validation=0, test=0))[0]
    kept = 40 * width / height  # of the 120 columns
    for third in range(3):
        overlap = max(0, min(40 * (third + 1), 60 + kept / 2) - max(40 * third, 60 - kept / 2)) / kept
        assert seen[third].double().mean().item() / 255 == pytest.approx(overlap, abs=0.05)
    assert torch.equal(seen.flip(2)[[2, 1, 0]], seen)  # symmetric, as the stripes are


def test_grey_and_fewer_levels(tmp_path):
    array = noise(5, 5)
    save(tmp_path / "grey.png", array)
    grey = ImageFolder(tmp_path, height=5, width=5, channels=1, levels=8, validation=0, test=0)
    assert np.array_equal(only(grey)[0, 0].numpy(), array // 32)
    colour = ImageFolder(tmp_path, height=5, width=5, validation=0, test=0)
    assert np.array_equal(only(colour)[0].numpy(), np.stack([array] * 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_8_bit_mode_is_read(tmp_path, mode):
    """Through a TIFF, which stores all of them."""
    grey = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((3, 3), np.uint8))
    Image.fromarray(grey).convert("RGB").convert("L" if mode == "LA" else mode).convert(mode).save(
        tmp_path / "image.tif"
    )
    seen = only(ImageFolder(tmp_path, height=6, width=6, validation=0, test=0))[0]
    assert np.abs(seen.numpy().astype(int) - grey).max() <= 1


def test_transparency_is_ignored(tmp_path):
    image = Image.fromarray(noise(6, 6)).convert("P")
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "palette.png") as opened:
        assert isinstance(opened.info["transparency"], bytes)
    seen = only(ImageFolder(tmp_path, height=6, width=6, channels=1, validation=0, test=0))[0, 0]
    assert np.array_equal(seen.numpy(), noise(6, 6))


def test_a_photograph_is_turned_the_way_it_says(tmp_path):
    array = noise(6, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    save(tmp_path / "turned.png", array, exif=exif)
    seen = only(ImageFolder(tmp_path, height=6, width=4, validation=0, test=0))[0]
    assert np.array_equal(seen.numpy(), array[::-1, ::-1].transpose(2, 0, 1))


def test_the_split_follows_from_the_name(tmp_path):
    for i in range(60):
        save(tmp_path / "some" / f"{i}.png", np.full((2, 2), i, np.uint8))

    def splits() -> dict[str, set[int]]:
        data = ImageFolder(tmp_path, height=2, width=2, channels=1, validation=0.3, test=0.3)
        names = ("train", "val", "test")
        return {s: {int(v) for b in data.evaluation_batches(s, 9) for v in b.image[:, 0, 0, 0]} for s in names}

    before = splits()
    assert set.union(*before.values()) == set(range(60))
    assert all(len(split) > 5 for split in before.values())
    for i in range(60, 120):
        save(tmp_path / "more" / f"{i}.png", np.full((2, 2), i, np.uint8))
    after = splits()
    assert all(before[split] < after[split] for split in before)


def test_a_damaged_file_is_named(tmp_path):
    save(tmp_path / "good.png", noise(30, 30, 3))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2])
    data = ImageFolder(tmp_path, height=4, width=4)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'bad.png'} \({len(whole) // 2} bytes\) is damaged"):
        data.setup()
    (tmp_path / "bad.png").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"bad.png \(22 bytes\) is no image"):
        data.setup()
    (tmp_path / "bad.png").unlink()
    save(tmp_path / "deep.png", noise(4, 4).astype(np.uint16) * 256)
    with pytest.raises(ValueError, match=r"deep.png has pixels of mode I;16, wanted 8 bits"):
        data.setup()


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no image in it: wanted files ending in \.jpg"):
        ImageFolder(tmp_path, height=4, width=4).setup()
    with pytest.raises(ValueError, match="nowhere' is not a folder"):
        ImageFolder(tmp_path / "nowhere", height=4, width=4).setup()
    with pytest.raises(ValueError, match="channels=2: wanted 1 for grey or 3"):
        ImageFolder(tmp_path, height=4, width=4, channels=2)
    with pytest.raises(ValueError, match="height=0, width=4"):
        ImageFolder(tmp_path, height=0, width=4)
