"""Evaluation of a data set, proved on a model whose likelihood an integral over one latent variable gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wngen.distributions import Bernoulli, DiagonalGaussian, PixelDistribution
from wngen.evaluation import Evaluation, evaluate
from wngen.image import Batch, ImageSpec
from wngen.latent import LatentVariableModel
from wngen.model import Bound, LikelihoodModel
from wngen.noise import Noise

ALL = torch.tensor([[i >> bit & 1 for bit in range(4)] for i in range(16)], dtype=torch.uint8).view(16, 1, 2, 2)


class OneLatent(LatentVariableModel):
    """2 x 2 binary pixels, each with log-odds bent by the same latent variable; the posterior is a rough guess."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__(ImageSpec(1, 2, 2, 2), num_classes)
        self.bend = nn.Parameter(torch.tensor([2.0, -1.5, 1.0, 0.7]))
        self.bias = nn.Parameter(torch.tensor([0.3, -0.2, 0.0, 0.5]))
        self.dropout = nn.Dropout(0.5)
        self.latent_shapes = ((1,),)
        self.most_rows = 0
        self.seen: list[object] = []

    def encode(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        self.most_rows = max(self.most_rows, len(x))
        signs = x.flatten(1).to(self.bend) * 2 - 1
        return (0.1 * (signs * self.bend).sum(dim=1, keepdim=True),)

    def bound(
        self, x: Tensor, code: tuple[Tensor, ...], y: Tensor | None, noise: Noise, sampled_rate: bool = True
    ) -> Bound:
        self.most_rows = max(self.most_rows, len(x))
        q = DiagonalGaussian(code[0], torch.full_like(code[0], 0.3))
        z, prior = q.sample(noise), DiagonalGaussian.standard(code[0])
        rate = q.log_prob(z) - prior.log_prob(z) if sampled_rate else q.kl(prior)
        return Bound(-self.dropout(self.decode(z, y).log_prob(x).flatten(1)).sum(dim=1), (0.25 * rate, 0.75 * rate))

    def represent(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.encode(x, y)[0]

    def decode(self, z: Tensor, y: Tensor | None = None) -> PixelDistribution:
        return Bernoulli((torch.tanh(z) * 2 * self.bend + self.bias).view(-1, 1, 2, 2))

    def prior(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        return torch.randn(n, 1, generator=generator) * self.layer_temperatures(temperature)[0]

    def prior_at(self, eps: Tensor, y: Tensor | None = None) -> Tensor:
        return eps

    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return DiagonalGaussian.standard(z).log_prob(z).sum(dim=1)

    @torch.no_grad()
    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """By Gauss-Hermite quadrature."""
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(150))
        log_p = [self.decode(z.to(self.bend)).log_prob(x).flatten(1).sum(dim=1) for z in nodes]
        return (torch.stack(log_p) + (weights / math.sqrt(2 * math.pi)).log()[:, None]).logsumexp(dim=0)


class Coins(LikelihoodModel):
    """An exact model: independent pixels."""

    is_exact = True

    def __init__(self) -> None:
        super().__init__(ImageSpec(1, 2, 2, 2))
        self.logits = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.0]).view(1, 1, 2, 2))

    def forward(self, x: Tensor, y: Tensor | None = None, noise: Noise | None = None) -> Bound:
        return Bound(-Bernoulli(self.logits.expand(x.shape)).log_prob(x).flatten(1).sum(dim=1))

    def log_likelihood(
        self,
        x: Tensor,
        y: Tensor | None = None,
        importance_samples: int = 1,
        noise: Noise | None = None,
        chunk: int = 1024,
    ) -> Tensor:
        return self(x, y).elbo_nats

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return Bernoulli(self.logits.expand(n, -1, -1, -1)).sample(generator, temperature)


def batches(index: Tensor, batch_size: int, label: bool = False) -> list[Batch]:
    """The image of index i is number i modulo 16 of all there are."""
    return [Batch(ALL[i % 16], i % 3 if label else None, i) for i in index.split(batch_size)]


def tables(e: Evaluation) -> list[np.ndarray]:
    values = [e.elbo_nats, e.distortion_nats, e.rate_nats, e.layer_kl_nats]
    return [*values, e.log_likelihood_nats] if e.log_likelihood_nats is not None else values


def test_the_quadrature_is_exact():
    assert OneLatent().double().exact_log_likelihood(ALL).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_elbo_below_importance_weighted_bound_below_exact_likelihood():
    """On average over noise; and the importance-weighted bound converges (Burda et al. 2015, theorem 1)."""
    model, n = OneLatent().double(), 16 * 40
    exact = model.exact_log_likelihood(ALL).numpy()[np.arange(n) % 16]
    few, many = (evaluate(model, batches(torch.arange(n), 64), n, importance_samples=k) for k in (2, 1000))
    np.testing.assert_array_equal(few.elbo_nats, many.elbo_nats)

    gaps = [exact - e for e in (few.elbo_nats, few.log_likelihood_nats, many.log_likelihood_nats) if e is not None]
    means = [gap.mean() for gap in gaps]
    errors = [gap.std() / math.sqrt(n) for gap in gaps]
    assert means[0] > means[1] + 4 * math.hypot(errors[0], errors[1])
    assert means[1] > 4 * errors[1]
    assert abs(means[2]) < 0.01 < means[1]
    assert np.abs(gaps[2]).max() < 0.3


def test_figures_add_up():
    e = evaluate(OneLatent(), batches(torch.arange(32), 10), 32)
    assert e.layer_kl_nats.shape == (32, 2)
    assert {table.dtype for table in tables(e)} == {np.dtype(np.float64)}
    np.testing.assert_allclose(e.rate_nats, e.layer_kl_nats.sum(axis=1), rtol=0, atol=0)
    np.testing.assert_allclose(e.elbo_nats, -e.distortion_nats - e.rate_nats, rtol=0, atol=0)
    assert e.log_likelihood_nats is None
    assert (e.importance_samples, e.is_exact, e.seed, e.dtype) == (None, False, 0, "float32")
    assert e.wall_seconds > 0
    with torch.no_grad():
        bound = OneLatent().eval()(ALL, noise=Noise(0, torch.arange(16)))
    np.testing.assert_allclose(e.elbo_nats[:16], bound.elbo_nats, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_same_for_any_batch_size_order_and_chunk(dtype: torch.dtype, tolerance: float):
    model, n, k = OneLatent().to(dtype), 80, 5
    index = torch.arange(n)
    shuffled = torch.randperm(n)
    reference = evaluate(model, batches(index, 64), n, k, seed=7)
    assert reference.dtype == str(dtype).removeprefix("torch.")
    for order, batch_size, chunk in (
        (index, 1, 1024),
        (index, 7, 1024),
        (index, 7, 50),
        (index, 64, 10),
        (shuffled, 64, 64),
        (shuffled, 7, 1),
    ):
        result = evaluate(model, batches(order, batch_size), n, k, seed=7, chunk=chunk)
        np.testing.assert_array_equal(result.index, np.arange(n))
        for table, expected in zip(tables(result), tables(reference), strict=True):
            np.testing.assert_allclose(table, expected, rtol=0, atol=tolerance)
    other_seed = evaluate(model, batches(index, 64), n, k, seed=8)
    assert (np.abs(other_seed.elbo_nats - reference.elbo_nats) > 1e-3).mean() > 0.9


def test_one_importance_sample_is_a_bound_too():
    e = evaluate(OneLatent(), batches(torch.arange(16), 16), 16, importance_samples=1)
    assert e.log_likelihood_nats is not None
    assert np.isfinite(e.log_likelihood_nats).all()


def test_a_subset_keeps_its_indices():
    chosen = torch.tensor([907, 3, 250, 16])
    e = evaluate(OneLatent(), batches(chosen, 2), 4)
    assert e.index.tolist() == [3, 16, 250, 907]
    everything = evaluate(OneLatent(), batches(torch.arange(908), 100), 908)
    np.testing.assert_allclose(e.elbo_nats, everything.elbo_nats[[3, 16, 250, 907]], atol=1e-5)


@pytest.mark.parametrize("k", [3, 100])
def test_memory_is_bounded_by_the_chunk(k: int):
    """Neither the encoder nor the decoder sees more rows at once, also where the bound is asked for directly."""
    model = OneLatent()
    evaluate(model, batches(torch.arange(20), 20), 20, importance_samples=k, chunk=16)
    assert model.most_rows == 16
    model.most_rows = 0
    model.log_likelihood(ALL, importance_samples=k, chunk=6)
    assert model.most_rows == 6


def test_an_exact_model_needs_no_samples():
    model = Coins().double()
    e = evaluate(model, batches(torch.arange(16), 5), 16, importance_samples=50)
    assert e.is_exact
    assert e.importance_samples is None
    assert e.log_likelihood_nats is not None
    assert np.exp(e.log_likelihood_nats).sum() == pytest.approx(1, abs=1e-12)
    assert e.layer_kl_nats.shape == (16, 0)
    np.testing.assert_array_equal(e.log_likelihood_nats, e.elbo_nats)


def test_labels_go_to_a_conditional_model_only():
    evaluate(OneLatent(), batches(torch.arange(16), 5, label=True), 16)
    e = evaluate(OneLatent(num_classes=3), batches(torch.arange(16), 5, label=True), 16, importance_samples=2)
    assert e.log_likelihood_nats is not None
    with pytest.raises(ValueError, match="conditioned on 3 classes"):
        evaluate(OneLatent(num_classes=3), batches(torch.arange(16), 5), 16)


def test_an_index_that_is_missing_or_repeated_is_named():
    index = torch.arange(20)
    twice, missing = index.clone(), torch.cat([index[:13], index[14:]])
    twice[17] = 4
    with pytest.raises(ValueError, match="index 4 came twice"):
        evaluate(OneLatent(), batches(twice, 7), 20)
    with pytest.raises(ValueError, match="19 images came, wanted 20; missing are the indices 13"):
        evaluate(OneLatent(), batches(missing, 7), 20)
    with pytest.raises(ValueError, match="index 19 is one more than the 19"):
        evaluate(OneLatent(), batches(index, 7), 19)
    with pytest.raises(ValueError, match=r"3 images came, wanted 4$"):
        evaluate(OneLatent(), batches(torch.tensor([5, 80, 900]), 7), 4)
    with pytest.raises(ValueError, match="0 images came, wanted 2"):
        evaluate(OneLatent(), [], 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("importance_samples", [None, 2])
def test_a_figure_that_is_not_finite_is_named(value: float, importance_samples: int | None):
    class Broken(OneLatent):
        def bound(self, x: Tensor, *args: object, **kwargs: object) -> Bound:
            bound = super().bound(x, *args, **kwargs)  # type: ignore[arg-type]
            concerned = (x.flatten(1).sum(dim=1) == 4) & (importance_samples is None or not kwargs)
            return Bound(bound.distortion_nats.masked_fill(concerned, value), bound.kl_nats)

    what = "distortion_nats" if importance_samples is None else "log_likelihood_nats"
    with pytest.raises(ValueError, match=rf"{what} of the image with index 15 is (nan|-?inf).*1 of the"):
        evaluate(Broken(), batches(torch.arange(32), 32), 32, importance_samples)


def test_nothing_else_changes():
    """Modes, random numbers and precision are as before, also when evaluation fails."""
    precision = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    class Watched(OneLatent):
        def decode(self, z: Tensor, y: Tensor | None = None) -> PixelDistribution:
            self.seen += [(self.training, self.dropout.training), torch.is_autocast_enabled("cpu")]
            self.seen += [precision.fp32_precision, torch.is_grad_enabled()]
            return super().decode(z, y)

    model = Watched()
    model.train()
    model.dropout.eval()
    state, before = torch.get_rng_state(), precision.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(model, batches(torch.arange(16), 16), 16, importance_samples=2)
        with pytest.raises(ValueError, match="came twice"):
            evaluate(model, batches(torch.zeros(2, dtype=torch.long), 2), 2)
    assert set(model.seen) == {(False, False), False, "ieee"}
    assert (model.training, model.dropout.training) == (True, False)
    assert precision.fp32_precision == before
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_is_told_within_a_batch():
    fractions: list[float] = []
    evaluate(OneLatent(), batches(torch.arange(16), 16), 16, 100, chunk=64, progress=fractions.append)
    assert len(fractions) >= 17
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    assert max(np.diff(fractions)) < 0.07


def test_the_bar_tells_images_and_remaining_time(capsys: pytest.CaptureFixture[str]):
    evaluate(OneLatent(), batches(torch.arange(16), 4), 16, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert "16 of 16 images" in output.err
    assert "remaining" in output.err


def test_wrong_arguments_are_refused():
    for name in ("images", "chunk", "importance_samples"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            evaluate(OneLatent(), [], **{"images": 1, name: 0})  # type: ignore[arg-type]
