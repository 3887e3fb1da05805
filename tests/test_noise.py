from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from torch import Tensor

from wngen.noise import Noise, derived_seed, philox

DRAWS = ["uniform", "normal"]


def draw(kind: str, noise: Noise, *shape: int) -> Tensor:
    return getattr(noise, kind)(*shape)


def correlation(a: Tensor, b: Tensor) -> float:
    return stats.pearsonr(a.flatten().double(), b.flatten().double()).statistic


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_philox_4x32_10(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    assert [int(word) for word in philox(tuple(counter), tuple(key))] == expected
    together = philox(tuple(torch.tensor([0, word]) for word in counter), tuple(key))
    assert [int(word[1]) for word in together] == expected


word = st.integers(0, 2**32 - 1)


@given(counter=st.tuples(word, word, word, word), key=st.tuples(word, word), changed=st.integers(0, 5))
def test_every_word_of_counter_and_key_changes_every_word_that_comes_out(counter, key, changed):
    a = philox(counter, key)
    words = [*counter, *key]
    words[changed] ^= 1
    b = philox(tuple(words[:4]), tuple(words[4:]))
    assert all(0 <= int(word) < 2**32 for word in a)
    assert sum(int(x) != int(y) for x, y in zip(a, b, strict=True)) == 4


# Whose numbers they are


@pytest.mark.parametrize("kind", DRAWS)
@settings(max_examples=30)
@given(order=st.permutations(range(7)), cut=st.integers(1, 6), shape=st.lists(st.integers(1, 4), max_size=3))
def test_numbers_belong_to_an_image_in_whatever_company(kind, order, cut, shape):
    index = torch.tensor([5, 0, 123456789, 7, 2**31, 49999, 3])
    order = torch.tensor(order)

    def twice(index: Tensor) -> Tensor:
        noise = Noise(42, index, draw=11)
        return torch.stack([draw(kind, noise, *shape), draw(kind, noise, *shape)], dim=1)

    whole = twice(index)
    torch.testing.assert_close(twice(index[order]), whole[order], rtol=0, atol=0)
    parts = torch.cat([twice(index[:cut]), twice(index[cut:])])
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", DRAWS)
def test_repeat_gives_each_image_its_numbers_under_each_draw(kind):
    index = torch.tensor([4, 9, 2])
    repeated = draw(kind, Noise(1, index).repeat(range(5, 9)), 6).view(4, 3, 6)
    for k, number in enumerate(range(5, 9)):
        expected = draw(kind, Noise(1, index, draw=number), 6)
        torch.testing.assert_close(repeated[k], expected, rtol=0, atol=0)
    parts = [draw(kind, Noise(1, index).repeat(chunk), 6) for chunk in (range(5, 6), range(6, 9))]
    torch.testing.assert_close(torch.cat(parts), repeated.flatten(0, 1), rtol=0, atol=0)


def test_repetitions_of_another_draw_than_the_first_are_refused():
    """They would be the numbers of draw 0's repetitions, in silence."""
    index = torch.tensor([4, 9, 2])
    for draw in (3, torch.tensor([0, 1, 0]), 2**40):
        with pytest.raises(ValueError, match="repetitions are the draws of noise with draw=0"):
            Noise(1, index, draw).repeat(range(2))
    assert torch.equal(Noise(1, index, torch.zeros(3)).repeat([7]).normal(2), Noise(1, index, 7).normal(2))


def test_one_draw_for_each_image():
    index, draws = torch.tensor([4, 4, 9]), torch.tensor([0, 1, 7])
    together = Noise(3, index, draws).normal(5)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], Noise(3, index[i : i + 1], int(draws[i])).normal(5))


@pytest.mark.parametrize("kind", DRAWS)
def test_shapes(kind):
    for shape in [(), (1,), (3,), (2, 3), (1, 28, 28)]:
        x = draw(kind, Noise(0, torch.arange(4)), *shape)
        assert x.shape == (4, *shape)
        assert x.dtype == torch.float32
    assert draw(kind, Noise(0, torch.arange(0)), 2, 3).shape == (0, 2, 3)


def test_fresh_noise_follows_the_global_seed():
    torch.manual_seed(5)
    a = Noise.fresh(3).normal(4)
    b = Noise.fresh(3).normal(4)
    torch.manual_seed(5)
    assert torch.equal(Noise.fresh(3).normal(4), a)
    assert not torch.equal(a, b)


# How they are distributed


def test_uniform_numbers_are_uniform():
    x = Noise(7, torch.arange(1000)).uniform(200).double().flatten()
    assert x.min() < 1e-4
    assert x.max() > 1 - 1e-4
    assert stats.kstest(x, "uniform").pvalue > 0.01


def test_normal_numbers_are_normal():
    x = Noise(7, torch.arange(1000)).normal(500).double().flatten()
    assert stats.kstest(x, "norm").pvalue > 0.01
    n = len(x)
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((x**power).mean() - mean) < 4 * (variance / n) ** 0.5
    expected = n * 2 * stats.norm.sf(4)
    assert abs((x.abs() > 4).sum() - expected) < 4 * expected**0.5


def test_the_numbers_of_one_image_over_many_draws_are_normal():
    x = Noise(7, torch.zeros(100_000, dtype=torch.long), torch.arange(100_000)).normal(1)
    assert stats.kstest(x.flatten(), "norm").pvalue > 0.01


def test_extreme_words_give_numbers_inside_the_range(monkeypatch):
    words = torch.tensor([[0, 1, 2**31, 2**32 - 2**9, 2**32 - 2, 2**32 - 1]])
    monkeypatch.setattr(Noise, "_words", lambda self, count: words[:, :count])
    x = Noise(0, torch.tensor([0])).uniform(6)
    assert ((x > 0) & (x < 1)).all()
    assert torch.equal(x, x.sort().values)
    assert torch.logit(x).isfinite().all()
    assert Noise(0, torch.tensor([0])).normal(6).isfinite().all()


INDEX = torch.arange(500)
FAMILIES = {
    "two calls": lambda kind: (lambda noise: (draw(kind, noise, 200), draw(kind, noise, 200)))(Noise(0, INDEX)),
    "two draws": lambda kind: (draw(kind, Noise(0, INDEX, 0), 200), draw(kind, Noise(0, INDEX, 1), 200)),
    "two images": lambda kind: (draw(kind, Noise(0, INDEX), 200), draw(kind, Noise(0, INDEX + 1), 200)),
    "two seeds": lambda kind: (draw(kind, Noise(0, INDEX), 200), draw(kind, Noise(1, INDEX), 200)),
    "seeds 2^32 apart": lambda kind: (draw(kind, Noise(0, INDEX), 200), draw(kind, Noise(2**32, INDEX), 200)),
    "halves": lambda kind: draw(kind, Noise(0, INDEX), 400).chunk(2, dim=1),
    "neighbours": lambda kind: draw(kind, Noise(0, INDEX), 200, 2).unbind(dim=2),
    "draw and image swapped": lambda kind: (
        draw(kind, Noise(0, INDEX[1:], 0), 200),
        draw(kind, Noise(0, INDEX[:1].expand(499), INDEX[1:]), 200),
    ),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_independence(family, kind):
    a, b = (x.flatten().double() for x in FAMILIES[family](kind))
    bound = 4 / len(a) ** 0.5
    assert abs(correlation(a, b)) < bound
    assert abs(correlation((a - a.mean()) ** 2, (b - b.mean()) ** 2)) < bound
    cells = (stats.rankdata(x) * 8 // (len(x) + 1) for x in (a, b))
    table = stats.contingency.crosstab(*cells).count
    assert table.shape == (8, 8)
    assert stats.chi2_contingency(table).pvalue > 0.001


def test_derived_seeds_differ_by_seed_and_purpose():
    seeds = {derived_seed(seed, purpose, epoch) for seed in range(20) for purpose in "ab" for epoch in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**64 for seed in seeds)
