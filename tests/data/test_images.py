"""Splits: complete, disjoint, and independent of what else there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wngen.data.images import Images, reduce_levels, unit_hash


def images(count: int) -> Images:
    return Images.all_of(torch.zeros(count, 1, 1, 1, dtype=torch.uint8))


def test_held_out_images_are_the_last():
    train, held_out = images(10).hold_out(3)
    assert train.rows.tolist() == list(range(7))
    assert held_out.rows.tolist() == [7, 8, 9]
    assert len(images(10).hold_out(0)[1]) == 0


@pytest.mark.parametrize("last", [-1, 10])
def test_no_more_can_be_held_out_than_there_is(last):
    with pytest.raises(ValueError, match=f"validation={last}: wanted 0 to 9"):
        images(10).hold_out(last)


@settings(max_examples=30)
@given(count=st.integers(20, 200), validation=st.floats(0, 0.4), test=st.floats(0, 0.4))
def test_a_division_is_complete_and_disjoint(count, validation, test):
    splits = images(count).divide(unit_hash(map(str, range(count))), validation, test)
    assert sorted(torch.cat([split.rows for split in splits.values()]).tolist()) == list(range(count))


def test_a_division_has_the_stated_fractions():
    count = 20_000
    splits = images(count).divide(unit_hash(map(str, range(count))), 0.1, 0.25)
    for split, fraction in {"train": 0.65, "val": 0.1, "test": 0.25}.items():
        deviation = (fraction * (1 - fraction) / count) ** 0.5
        assert abs(len(splits[split]) / count - fraction) < 4 * deviation


def test_no_image_changes_its_split_when_others_come_or_go():
    names = [f"folder/{i}.png" for i in range(500)]

    def split_of(names: list[str]) -> dict[str, str]:
        splits = images(len(names)).divide(unit_hash(names), 0.2, 0.2)
        return {names[row]: split for split, part in splits.items() for row in part.rows}

    everything, some = split_of(names), split_of(names[::-3])
    assert some.items() <= everything.items()


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.5, 0.5), (0.1, float("nan"))])
def test_fractions_must_leave_something_to_train_on(validation, test):
    with pytest.raises(ValueError, match=f"validation={validation}, test={test}"):
        images(10).divide(unit_hash(map(str, range(10))), validation, test)


def test_an_unlucky_division_is_an_error():
    with pytest.raises(ValueError, match="none of 1 images is left to train on"):
        images(1).divide(torch.tensor([0.3]), 0.2, 0.2)


@pytest.mark.parametrize("bits", range(1, 9))
def test_reduced_levels_keep_the_highest_bits(bits):
    level = torch.arange(256, dtype=torch.uint8)
    reduced = reduce_levels(level, 2**bits)
    assert reduced.dtype == torch.uint8
    assert torch.equal(reduced, level >> (8 - bits))
    assert torch.bincount(reduced.int()).tolist() == [2 ** (8 - bits)] * 2**bits
