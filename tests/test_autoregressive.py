"""Probabilities that sum to one, and samples and completions that follow them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from pixel_zoo import SIZES, TINY, drawn, each_model, images, made, seeded, sized
from scipy.stats import chisquare
from torch import Tensor

from wngen.autoregressive import AutoregressiveModel
from wngen.decoder import Decoder


def every_image(model: AutoregressiveModel) -> Tensor:
    levels = itertools.product(range(model.spec.levels), repeat=model.spec.dims)
    return torch.tensor(list(levels), dtype=torch.uint8).view(-1, *model.spec.shape)


def classes(model: AutoregressiveModel) -> Iterator[int | None]:
    yield from [None] if model.num_classes is None else range(model.num_classes)


def repeated(label: int | None, n: int) -> Tensor | None:
    return None if label is None else torch.full((n,), label)


@each_model
@sized([*TINY, (3, 2, 2, 2, None)])
def test_the_probabilities_of_all_images_sum_to_one(name, size):
    model = made(name, size)
    x = every_image(model)
    for label in classes(model):
        log_prob = model.log_likelihood(x, repeated(label, len(x)))
        torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-10)
        assert log_prob.std() > 1e-3  # or this would say little


@each_model
@sized(TINY)
def test_samples_come_as_often_as_they_are_probable(name, size):
    model = made(name, size)
    x, n = every_image(model), 2000
    for label in classes(model):
        probs = model.log_likelihood(x, repeated(label, len(x))).exp()
        samples = model.sample(n, repeated(label, n), generator=seeded(), chunk=n)
        digits = model.spec.levels ** torch.arange(model.spec.dims).flip(0)
        counts = torch.bincount((samples.flatten(1) * digits).sum(dim=1), minlength=len(x)).double()
        rare = probs * n < 5  # which the test wants together
        merged = [torch.cat([part[~rare], part[rare].sum()[None]]) for part in (counts, probs * n)]
        observed, expected = (part[merged[1] > 0] for part in merged)
        assert chisquare(observed.numpy(), (expected * n / expected.sum()).numpy()).pvalue > 1e-3


@each_model
@sized(SIZES[:3])
def test_a_seed_gives_the_same_images_however_many_are_drawn_at_once(name, size):
    model = made(name, size)
    _, y = images(model, 3)
    samples = model.sample(3, y, generator=seeded(5))
    assert torch.equal(model.sample(3, y, generator=seeded(5), chunk=2), samples)
    assert not torch.equal(model.sample(3, y, generator=seeded(6)), samples)


@each_model
@sized(SIZES)
def test_the_decoder_adds_up_the_likelihood_of_its_samples(name, size):
    model = made(name, size)
    _, y = images(model, 4)
    samples, nats = Decoder(model).run(4, drawn(model, 4), y)
    torch.testing.assert_close(nats, model.log_likelihood(samples, y), rtol=1e-10, atol=1e-10)


@each_model
def test_nothing_is_random_at_temperature_zero(name):
    model = made(name, SIZES[2])
    greedy = model.sample(3, temperature=0, generator=seeded(1))
    assert torch.equal(model.sample(3, temperature=0, generator=seeded(2)), greedy)
    assert torch.equal(greedy, greedy[:1].expand_as(greedy))
    warm = model.sample(3, generator=seeded(1))
    assert not torch.equal(warm, warm[:1].expand_as(warm))


@each_model
@sized(SIZES[:2])
def test_completion_keeps_what_is_known_and_draws_the_rest(name, size):
    model = made(name, size)
    x, y = images(model, 3)
    known = torch.rand(model.spec.height, model.spec.width, generator=seeded()) < 0.5
    known[-1, -1] = False
    complete = model.complete(x, known, y, generator=seeded())
    assert torch.equal(complete[:, :, known], x[:, :, known])
    assert (complete != x)[:, :, ~known].any()
    assert torch.equal(model.complete(x, known, y, generator=seeded(), chunk=2), complete)
    other = torch.where(known, x, (x + 1) % model.spec.levels)  # what is hidden does not matter
    assert torch.equal(model.complete(other, known, y, generator=seeded()), complete)
    nothing = torch.zeros_like(known)
    assert torch.equal(model.complete(x, nothing, y, generator=seeded()), model.sample(3, y, generator=seeded()))


@each_model
def test_the_images_are_shown_as_they_grow(name):
    model = made(name, SIZES[1])
    x, y = images(model, 2)
    known = torch.zeros(4, 3, dtype=torch.bool)
    known[:2] = True
    known[3, 1] = True
    shown: list[tuple[Tensor, Tensor]] = []
    complete = model.complete(x, known, y, watch=lambda images, there: shown.append((images.clone(), there.clone())))
    assert len(shown) == 12
    for done, (image, there) in enumerate(shown, start=1):
        assert torch.equal(there, known | (torch.arange(12) < done).view(4, 3))
        assert torch.equal(image, complete * there)
    shown.clear()
    sample = model.sample(2, y, watch=lambda images, there: shown.append((images.clone(), there.clone())))
    for done, (image, there) in enumerate(shown, start=1):
        assert torch.equal(there, (torch.arange(12) < done).view(4, 3))
        assert torch.equal(image, sample * there)


def test_labels_and_levels_of_another_kind_are_refused():
    model = made("pixelcnn++", (1, 4, 4, 4, 3))
    x, y = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="the highest level is 200, wanted 0 to 3"):
        model.log_likelihood(x + 200, y)
    with pytest.raises(ValueError, match="the highest level is 4, wanted 0 to 3"):
        model.complete(x + 4, torch.zeros(4, 4, dtype=torch.bool), y)
    for wrong, kind in ((y.float(), r"torch\.float32"), ([0, 2], "list")):
        with pytest.raises(TypeError, match=f"classes y are {kind}, wanted a tensor of int64"):
            model.log_likelihood(x, wrong)


def test_completion_refuses_what_it_cannot_complete():
    model = made("pixelcnn", SIZES[1])
    x, y = images(model, 2)
    known = torch.zeros(4, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"known is torch\.uint8, wanted bool"):
        model.complete(x, known.byte(), y)
    with pytest.raises(ValueError, match=r"known has shape \(3, 4\), wanted \(4, 3\)"):
        model.complete(x, known.T, y)
    with pytest.raises(ValueError, match="there is nothing to complete"):
        model.complete(x, ~known, y)
    with pytest.raises(ValueError, match=r"the model wants \(B, 3, 4, 3\)"):
        model.complete(x[..., :2], known, y)
    with pytest.raises(TypeError, match="do not scale them yourself"):
        model.complete(x.float(), known, y)
    with pytest.raises(ValueError, match="conditioned on 3 classes"):
        model.complete(x, known)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.complete(x, known, y, temperature=-1)
