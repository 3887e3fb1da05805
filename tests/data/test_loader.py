"""The order of training is a function of (seed, epoch); evaluation takes every image once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wngen.data import EvaluationLoader, Images, TrainingLoader


def numbered(count: int) -> Images:
    """Images whose pixels, label and index all tell the same number."""
    numbers = torch.arange(count)
    return Images.all_of(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), numbers)


def indices(loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), world_size=st.integers(1, 4))
def test_evaluation_takes_every_image_once_for_any_batch_size_and_number_of_processes(count, batch_size, world_size):
    loaders = [EvaluationLoader(numbered(count), batch_size, rank, world_size) for rank in range(world_size)]
    seen = [indices(loader) for loader in loaders]
    assert sorted(i for process in seen for batch in process for i in batch) == list(range(count))
    assert [len(loader) for loader in loaders] == [len(process) for process in seen]
    assert all(0 < len(batch) <= batch_size for process in seen for batch in process)
    batches = -(-count // batch_size)
    if count // batches >= world_size:
        assert {len(process) for process in seen} == {batches}


def test_images_labels_and_indices_belong_together():
    for batch in TrainingLoader(numbered(50), 8, seed=3):
        assert batch.image.dtype == torch.uint8
        assert batch.image.is_contiguous()
        assert torch.equal(batch.image, batch.index.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2))
        assert torch.equal(batch.label, batch.index)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_global_batches_are_the_same_for_any_number_of_processes(world_size):
    alone = indices(TrainingLoader(numbered(100), 12, seed=1))
    parts = [indices(TrainingLoader(numbered(100), 12, 1, 0, rank, world_size)) for rank in range(world_size)]
    assert [len(batch) for batch in alone] == [12] * 8
    for batch, *shares in zip(alone, *parts, strict=True):
        assert {len(share) for share in shares} == {12 // world_size}
        assert sorted(i for share in shares for i in share) == sorted(batch)


def test_an_epoch_takes_no_image_twice_and_another_leaves_out_others():
    loader, seen = TrainingLoader(numbered(100), 12, seed=0), []
    for epoch in range(2):
        seen.append([i for batch in indices(loader) for i in batch])
        assert len(set(seen[-1])) == len(seen[-1]) == 96
        assert loader.epoch == epoch
    assert set(seen[0]) != set(seen[1])


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        torch.manual_seed(seed * 7 + epoch)  # to which it pays no heed
        return tuple(indices(TrainingLoader(numbered(40), 40, seed, position=epoch))[0])

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert all(order(seed, epoch) == seen for (seed, epoch), seen in reversed(orders.items()))


def test_every_image_is_as_often_first_as_any_other():
    epochs, images = 3000, 10
    loader = TrainingLoader(numbered(images), images, seed=0)
    counts = torch.zeros(images, images)  # of image i at place j
    for epoch in range(epochs):
        counts[loader.global_batches(epoch)[0], torch.arange(images)] += 1
    expected = epochs / images
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (images - 1) ** 2
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def take(loader: TrainingLoader, count: int) -> list[tuple[int, list[int]]]:
    """The next batches, in one pass that is broken off, each with its epoch."""
    return [(loader.epoch, batch.index.tolist()) for _, batch in zip(range(count), loader, strict=False)]


@settings(max_examples=30)
@given(passes=st.lists(st.integers(0, 8), max_size=8))
def test_however_a_run_is_cut_into_passes_it_sees_the_same_batches(passes):
    """Epochs of 8 batches; a pass may be broken off, and the next goes on."""
    loader = TrainingLoader(numbered(100), 12, seed=5)
    whole = [batch for _ in range(8) for batch in take(loader, 8)]
    assert [epoch for epoch, _ in whole] == [n // 8 for n in range(64)]
    loader = TrainingLoader(numbered(100), 12, seed=5)
    seen = [batch for count in passes for batch in take(loader, count)]
    assert seen == whole[: sum(passes)]


@settings(max_examples=30)
@given(handed_out=st.lists(st.integers(0, 8), max_size=6), world_size=st.integers(1, 3))
def test_however_often_a_run_is_resumed_it_sees_the_same_batches(handed_out, world_size):
    """Also where another number of processes resumes than was interrupted."""
    loader = TrainingLoader(numbered(100), 12, seed=5)
    whole = [sorted(index) for _ in range(6) for _, index in take(loader, 8)]
    state, seen = TrainingLoader(numbered(100), 12, seed=5).state_dict(), []
    for count, world in zip(handed_out, [1, world_size] * 3, strict=False):
        loaders = [TrainingLoader(numbered(100), 12, 5, 0, rank, world) for rank in range(world)]
        for loader in loaders:
            loader.load_state_dict(state)
            assert len(loader) == 8  # the length of an epoch, as Lightning wants it, not of the rest
        shares = [[index for _, index in take(loader, count)] for loader in loaders]
        seen += [sorted(i for share in batch for i in share) for batch in zip(*shares, strict=True)]
        assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
        state = loaders[0].state_dict()
    assert seen == whole[: sum(handed_out)]


def test_a_position_in_another_order_is_refused():
    loader = TrainingLoader(numbered(100), 12, seed=5)
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(ValueError, match="batch_size=12, this run has batch_size=10"):
        TrainingLoader(numbered(100), 10, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=5, this run has seed=6"):
        TrainingLoader(numbered(100), 12, seed=6).load_state_dict(state)
    indices(loader := TrainingLoader(numbered(100), 12, seed=5))
    other = TrainingLoader(numbered(100), 10, seed=6)
    other.load_state_dict(loader.state_dict())  # of an epoch's end
    assert indices(other) == other.global_batches(1).tolist()


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="cannot be shared equally by 3; use 9"):
        TrainingLoader(numbered(100), 10, 0, world_size=3)
    with pytest.raises(ValueError, match="batch_size=200: wanted at most the 100 training images"):
        TrainingLoader(numbered(100), 200, 0)
