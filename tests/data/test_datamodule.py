"""Binarization and flips are functions of seed, image and epoch; evaluation is fixed and stated."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from wngen.data import ArrayFile
from wngen.data.datamodule import binarize
from wngen.image import Batch
from wngen.noise import Noise

COUNT = 200


@pytest.fixture
def grey(tmp_path):
    """Grey images whose first pixel tells their number, and the file they are in."""
    array = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5), dtype=np.uint8)
    array[:, 0, 0] = np.arange(COUNT)
    np.save(tmp_path / "grey.npy", array)
    return torch.from_numpy(array)[:, None], str(tmp_path / "grey.npy")


def rows(data: ArrayFile, split: str) -> torch.Tensor:
    return data.images(split).rows


def test_dynamic_binarization_does_not_depend_on_the_batch(grey):
    _, path = grey
    data = ArrayFile(path, binarization="dynamic", horizontal_flips=True)
    train = data.images("train")
    whole = data.augment(train[torch.arange(len(train))], epoch=2).image
    order = torch.randperm(len(train))
    parts = [data.augment(train[index], epoch=2) for index in order.split(7)]
    assert torch.equal(torch.cat([part.image for part in parts]), whole[order])
    assert torch.equal(torch.cat([part.index for part in parts]), order)


@pytest.mark.parametrize("binarization", ["dynamic", "threshold"])
def test_of_a_subset_no_other_images_are_binarized(grey, binarization, monkeypatch):
    _, path = grey
    data, whole = (ArrayFile(path, binarization=binarization) for _ in range(2))
    (full,) = whole.evaluation_batches("train", COUNT)
    binarized = []

    def counting(image, *arguments):
        binarized.append(len(image))
        return binarize(image, *arguments)

    monkeypatch.setattr("wngen.data.datamodule.binarize", counting)
    (part,) = data.evaluation_batches("train", 30, limit=30)
    assert sum(binarized) == 30
    assert torch.equal(part.image, full.image[part.index])
    assert part.label is None
    (again,) = whole.evaluation_batches("train", 30, limit=30)
    assert torch.equal(again.image, part.image)
    assert data.protocol("train", 30)["sha256"] == whole.protocol("train", 30)["sha256"]


def test_dynamic_binarization_has_the_levels_as_its_mean(grey):
    _, path = grey
    data = ArrayFile(path, binarization="dynamic")
    batch = data.images("train")[torch.arange(50)]
    epochs = 400
    mean = sum(data.augment(batch, epoch).image.double() for epoch in range(epochs)) / epochs
    p = batch.image.double() / 255
    deviation = (p * (1 - p) / epochs).sqrt()
    z = (mean - p) / deviation.clamp(min=1e-12)
    assert (z.abs() < 5).all()
    inner = deviation > 0
    assert z[inner].std() == pytest.approx(1, abs=0.1)  # as much spread as independent draws have, and no less
    assert torch.equal(mean[~inner], p[~inner])


def test_black_stays_black_and_white_white():
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1).expand(50_000, 2, 1, 1)
    drawn = binarize(image, "dynamic", Noise(0, torch.arange(50_000)))
    assert not drawn[:, 0].any()
    assert drawn[:, 1].all()


def test_draws_differ_between_epochs_seeds_and_images(grey):
    _, path = grey
    flat = torch.full((2, 1, 6, 5), 128, dtype=torch.uint8)
    index = torch.tensor([0, 1])
    draws = [
        ArrayFile(path, binarization="dynamic", seed=seed).augment(Batch(flat, None, index), epoch).image[i]
        for seed in range(2)
        for epoch in range(3)
        for i in range(2)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 12


def test_evaluated_images_are_drawn_once_whatever_the_training_seed(grey):
    image, path = grey

    def final(split: str, **arguments) -> torch.Tensor:
        data = ArrayFile(path, binarization="dynamic", test=0.4, validation=0.2, **arguments)
        return torch.cat([batch.image for batch in data.evaluation_batches(split, 7)])

    for split in ("train", "val", "test"):
        assert torch.equal(final(split), final(split, seed=5, batch_size=9))
        assert not torch.equal(final(split), final(split, evaluation_seed=1))
        assert final(split).max() == 1
    data = ArrayFile(path, binarization="dynamic", test=0.4, validation=0.2)
    loaded = torch.cat([batch.image for batch in data.test_dataloader()])
    assert torch.equal(loaded, final("test"))
    expected = image[rows(data, "test")].float().mean().item() / 255
    assert final("test").float().mean().item() == pytest.approx(expected, abs=0.03)


def test_training_draws_are_not_the_evaluated_ones(grey):
    _, path = grey
    data = ArrayFile(path, binarization="dynamic", seed=0, evaluation_seed=0)
    train = data.images("train")
    batch = train[torch.arange(len(train))]
    fixed = data.final_images("train").image
    p = batch.image.float() / 255
    for epoch in range(3):
        trained = data.augment(batch, epoch).image
        covariance = ((trained - p) * (fixed - p)).mean()
        assert covariance.abs() < 4 * (p * (1 - p)).mean() / fixed.numel() ** 0.5


def test_threshold_cuts_in_the_middle(grey):
    image, path = grey
    data = ArrayFile(path, binarization="threshold")
    (batch,) = data.evaluation_batches("test", COUNT)
    assert torch.equal(batch.image, (image[rows(data, "test")] > 127.5).to(torch.uint8))
    train = data.images("train")
    assert torch.equal(
        data.augment(train[torch.arange(9)], 4).image, (image[rows(data, "train")[:9]] > 127.5).to(torch.uint8)
    )


def test_flips_mirror_half_of_the_training_images_and_no_others(grey):
    image, path = grey
    data = ArrayFile(path, horizontal_flips=True)
    train = data.images("train")
    stored = image[rows(data, "train")]
    flipped = torch.zeros(len(train))
    epochs = 100
    for epoch in range(epochs):
        seen = data.augment(train[torch.arange(len(train))], epoch).image
        mirrored = (seen == stored.flip(3)).flatten(1).all(dim=1)
        assert ((seen == stored).flatten(1).all(dim=1) != mirrored).all()
        flipped += mirrored
    assert flipped.mean() / epochs == pytest.approx(0.5, abs=4 * 0.5 / (epochs * len(train)) ** 0.5)
    assert flipped.std() == pytest.approx((epochs / 4) ** 0.5, rel=0.25)
    for split in ("train", "val", "test"):
        evaluated = torch.cat([batch.image for batch in data.evaluation_batches(split, 16)])
        assert torch.equal(evaluated, image[rows(data, split)])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_takes_every_index_once_and_in_order(grey, batch_size, world_size):
    _, path = grey
    data = ArrayFile(path)
    seen = []
    for rank in range(world_size):
        batches = list(data.evaluation_batches("train", batch_size, rank=rank, world_size=world_size))
        assert {len(batch.index) for batch in batches[:-1]} <= {batch_size}
        own = torch.cat([batch.index for batch in batches]).tolist()
        assert own == sorted(own)
        seen += own
    assert sorted(seen) == list(range(data.size("train")))


def test_a_limit_draws_a_sample_and_takes_no_prefix(grey):
    _, path = grey
    data = ArrayFile(path, validation=0, test=0)
    drawn = torch.cat([batch.index for batch in data.evaluation_batches("train", 16, limit=60)])
    assert len(drawn.unique()) == 60
    assert torch.equal(drawn, drawn.sort().values)
    assert abs(drawn.float().mean() - (COUNT - 1) / 2) < 4 * (COUNT**2 / 12 / 60) ** 0.5
    again = torch.cat(
        [batch.index for batch in ArrayFile(path, validation=0, test=0).evaluation_batches("train", 7, 60)]
    )
    assert torch.equal(drawn, again)
    other = ArrayFile(path, validation=0, test=0, evaluation_seed=1).evaluation_batches("train", 60, 60)
    assert not torch.equal(drawn, next(other).index)
    for limit in (0, COUNT + 1):
        with pytest.raises(ValueError, match=f"limit={limit}: the train split of ArrayFile grey has {COUNT} images"):
            data.evaluation_batches("train", 16, limit)


@pytest.mark.parametrize("binarization", ["none", "dynamic", "threshold"])
@pytest.mark.parametrize("limit", [None, 10])
def test_the_protocol_states_exactly_what_is_evaluated(grey, binarization, limit):
    _, path = grey
    data = ArrayFile(path, binarization=binarization, evaluation_seed=3)
    protocol = data.protocol("test", limit)
    evaluated = torch.cat([batch.image for batch in data.evaluation_batches("test", 4, limit)])
    assert protocol == {
        "name": "ArrayFile grey",
        "split": "test",
        "images": len(evaluated),
        "split_images": data.size("test"),
        "channels": 1,
        "height": 6,
        "width": 5,
        "levels": 256 if binarization == "none" else 2,
        "binarization": binarization,
        "seed": 3 if binarization == "dynamic" or limit else None,
        "sha256": hashlib.sha256(evaluated.numpy().tobytes()).hexdigest(),
    }
    assert json.loads(json.dumps(protocol)) == protocol


def test_the_configuration_builds_the_same_data_again(grey):
    _, path = grey
    data = ArrayFile(path, binarization="dynamic", validation=0.3, evaluation_seed=9, batch_size=5)
    config = json.loads(json.dumps(data.config))
    assert config.pop("data") == "ArrayFile"
    assert ArrayFile(**config).config == data.config
    assert ArrayFile(**config).protocol("val") == data.protocol("val")


def test_what_cannot_be_is_refused(grey):
    _, path = grey
    with pytest.raises(ValueError, match="batch_size=0: wanted at least 1"):
        ArrayFile(path, batch_size=0)
    with pytest.raises(ValueError, match="levels=100: wanted a power of two"):
        ArrayFile(path, levels=100)
    with pytest.raises(ValueError, match="levels=32 with binarization='dynamic'"):
        ArrayFile(path, levels=32, binarization="dynamic")
    with pytest.raises(ValueError, match="ArrayFile knows none, dynamic, threshold; only BinarizedMNIST"):
        ArrayFile(path, binarization="static")
    with pytest.raises(ValueError, match="wanted one of train, val, test"):
        ArrayFile(path).size("valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images in its test split"):
        ArrayFile(path, test=0).evaluation_batches("test", 8)


def test_it_describes_itself(grey):
    _, path = grey
    data = ArrayFile(path, validation=0)
    data.setup()
    assert str(data).startswith(f"ArrayFile grey: {data.size('train')} train, 0 val, {data.size('test')} test")
