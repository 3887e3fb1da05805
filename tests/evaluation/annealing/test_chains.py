"""Annealed importance sampling, against linear Gaussian models in closed form and against integrals on a grid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from annealing_zoo import LEAPFROG_STEPS, Problem, all_accepted, binary, component_analysis, on_a_grid

from wngen.evaluation import evaluate
from wngen.evaluation.annealing import annealed_importance_sampling, bidirectional_monte_carlo, hamiltonian
from wngen.evaluation.annealing import chains as chains_module
from wngen.evaluation.annealing.chains import TARGET_ACCEPTANCE, simulated, temperatures
from wngen.models import PixelCNN
from wngen.noise import Noise, derived_seed


def bias_of_weights(problem: Problem, steps: int, chains: int) -> float:
    """How far average weights are from the images' probabilities: of one image, or of all, in standard errors."""
    result = problem.annealed(steps, chains)
    errors = np.expm1(result.log_likelihood_nats - problem.exact.numpy()) / result.monte_carlo_error_nats
    return max(np.abs(errors).max(), abs(errors.sum()) / math.sqrt(len(errors)))


# The weights


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_average_weight_is_the_likelihood_however_few_the_steps(problem: Problem, steps: int):
    assert 0.1 < bias_of_weights(problem, steps, chains=500) < 4  # and the standard error is not merely large


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "no proposal is refused": (hamiltonian, "acceptance", all_accepted),
    "from the posterior to the prior": (chains_module, "temperatures", lambda steps: temperatures(steps)[::-1]),
    "not from the prior": (chains_module, "temperatures", lambda steps: temperatures(2 * steps)[steps:]),
    "not to the posterior": (chains_module, "temperatures", lambda steps: 0.9 * temperatures(steps)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_chains_shows_in_the_average_weight(fault: str, monkeypatch: pytest.MonkeyPatch):
    problem = component_analysis(monkeypatch)
    monkeypatch.setattr(
        chains_module._Annealing, "step_sizes", lambda self, _, index: torch.full((self.steps - 1, len(index)), 0.35)
    )
    assert bias_of_weights(problem, 5, chains=2000) < 4
    monkeypatch.setattr(*FAULTS[fault])
    assert bias_of_weights(problem, 5, chains=2000) > 6


def test_the_bound_is_within_its_error_of_the_likelihood_and_is_reached_by_more_steps(problem: Problem):
    few, many = problem.annealed(3, 50), problem.annealed(40, 50)
    errors = np.abs(problem.exact.numpy() - many.log_likelihood_nats)
    assert (errors < 4 * many.monte_carlo_error_nats).all()
    assert errors.mean() < 0.3
    assert many.monte_carlo_error_nats.mean() < 0.6 * few.monte_carlo_error_nats.mean()
    assert many.effective_chains.mean() > few.effective_chains.mean()
    assert (many.effective_chains <= 50 + 1e-9).all()


def test_it_shows_where_a_bad_posterior_leaves_the_importance_weighted_bound_loose():
    problem = binary()
    bound = evaluate(problem.model, problem.batches(), 16, importance_samples=1000).log_likelihood_nats
    result = problem.annealed(40, 16)
    assert bound is not None
    assert (problem.exact.numpy() - bound).max() > 0.5
    error = 4 * result.monte_carlo_error_nats
    assert (np.abs(result.log_likelihood_nats - problem.exact.numpy()) < error).all()
    assert (result.log_likelihood_nats - bound > error).any()


def test_one_step_is_importance_sampling_from_the_prior(problem: Problem):
    chains = 50
    result = problem.annealed(1, chains)
    noise = Noise(derived_seed(0, "forward chains"), problem.batches()[0].index).repeat(range(chains))
    eps = noise.normal(sum(math.prod(shape) for shape in problem.model.latent_shapes)).double()
    y = None if problem.y is None else problem.y.repeat(chains)
    pixels = problem.model.decode(problem.model.prior_at(eps, y), y)
    log_p = pixels.log_prob(problem.x.repeat(chains, 1, 1, 1)).flatten(1).sum(dim=1).view(chains, -1)
    expected = log_p.logsumexp(dim=0) - math.log(chains)
    np.testing.assert_allclose(result.log_likelihood_nats, expected.detach(), rtol=0, atol=1e-9)
    weights = log_p.softmax(dim=0)
    np.testing.assert_allclose(result.effective_chains, (1 / weights.square().sum(dim=0)).detach(), rtol=1e-9)
    assert (result.acceptance == 1).all()


def test_step_sizes_are_those_at_which_the_wanted_part_is_accepted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chains_module, "PILOT_STEPS", 60)
    result = component_analysis(monkeypatch).annealed(60, 16, leapfrog_steps=2)
    assert result.acceptance.mean() == pytest.approx(TARGET_ACCEPTANCE, abs=0.12)


def test_temperatures_rise_from_prior_to_posterior_by_short_steps_at_both_ends():
    for steps in (1, 2, 7, 100):
        betas = temperatures(steps)
        assert betas[0] == 0
        assert betas[-1] == 1
        assert (np.diff(betas) > 0).all()
        np.testing.assert_allclose(betas + betas[::-1], 1, rtol=0, atol=1e-12)
    odds = 0.5 + (betas - 0.5) * math.tanh(2)  # sigmoid(-4) to sigmoid(4): equation 7 of Grosse et al. (2015)
    np.testing.assert_allclose(np.log(odds / (1 - odds)), np.linspace(-4, 4, 101), rtol=0, atol=1e-9)


# Both directions


def test_the_likelihood_lies_between_both_bounds_whose_gap_closes_with_the_steps():
    model, images = binary().model, 300
    batch, _ = simulated(model, torch.arange(images))
    assert batch.label is not None
    exact = on_a_grid(model, batch.image, batch.label).numpy()
    gaps = []
    for steps in (2, 30):
        result = bidirectional_monte_carlo(model, images, steps, 1, LEAPFROG_STEPS, chunk=10_000)
        for below, above in ((result.lower.log_likelihood_nats, exact), (exact, result.upper.log_likelihood_nats)):
            margin = above - below
            assert margin.mean() > -4 * margin.std() / math.sqrt(images)
        np.testing.assert_allclose(
            result.gap_nats, result.upper.log_likelihood_nats - result.lower.log_likelihood_nats, rtol=0, atol=0
        )
        gaps.append(result.gap_nats)
    assert gaps[0].mean() > 4 * gaps[0].std() / math.sqrt(images)
    assert gaps[1].mean() < 0.3 * gaps[0].mean()
    assert np.abs(result.lower.log_likelihood_nats - exact).mean() < 0.15
    assert np.abs(result.upper.log_likelihood_nats - exact).mean() < 0.15


def test_the_average_reciprocal_weight_of_reverse_chains_is_one_over_the_likelihood(monkeypatch: pytest.MonkeyPatch):
    """Of each image, over the latents that it was drawn with; and so over all images that are drawn."""
    monkeypatch.setattr(chains_module, "PILOT_STEPS", 10)
    model, images = binary().model, 1000
    batch, _ = simulated(model, torch.arange(images))
    assert batch.label is not None
    exact = on_a_grid(model, batch.image, batch.label).numpy()
    result = bidirectional_monte_carlo(model, images, 3, 1, 2, chunk=10_000)
    for ratio in (
        np.exp(exact - result.upper.log_likelihood_nats),
        np.exp(result.lower.log_likelihood_nats - exact),
    ):
        standard_error = ratio.std() / math.sqrt(images)
        assert 1e-3 < standard_error < 0.05
        assert abs(ratio.mean() - 1) < 4 * standard_error


def test_simulated_images_follow_the_model():
    problem = binary()
    n = 20_000
    batch, eps = simulated(problem.model, torch.arange(n))
    assert batch.label is not None
    number = batch.image.flatten(1).long() @ torch.tensor([8, 4, 2, 1])
    for label in range(2):
        probs = on_a_grid(problem.model, problem.x, torch.full((16,), label)).exp()
        counts = torch.bincount(number[batch.label == label], minlength=16)
        assert ((counts - n / 2 * probs).abs() < 4.5 * (n / 2 * probs * (1 - probs)).sqrt()).all()
    some, eps_of_some = simulated(problem.model, torch.tensor([5, 2]))
    assert torch.equal(some.image, batch.image[[5, 2]])
    assert torch.equal(eps_of_some, eps[[5, 2]])
    assert not torch.equal(simulated(problem.model, torch.arange(9), seed=1)[0].image, batch.image[:9])


# The same whatever the batches


def test_batches_and_chunks_change_nothing(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chains_module, "PILOT_STEPS", 4)
    few = {name: value if value is None else value[:7] for name, value in vars(problem).items() if name != "model"}
    problem = replace(problem, **few)
    whole = problem.annealed(4, 3)
    assert whole.index.tolist() == [3 * i for i in range(len(problem.x))]
    for size, chunk in ((1, 10_000), (3, 5), (None, 4)):
        part = problem.annealed(4, 3, size, chunk=chunk)
        for name in ("log_likelihood_nats", "effective_chains", "acceptance"):
            np.testing.assert_allclose(getattr(part, name), getattr(whole, name), rtol=0, atol=1e-9)
    assert np.abs(problem.annealed(4, 3, seed=1).log_likelihood_nats - whole.log_likelihood_nats).min() > 1e-6
    more = problem.annealed(4, 4)
    assert np.abs(more.log_likelihood_nats - whole.log_likelihood_nats).min() > 1e-9


def test_chunks_change_nothing_in_either_direction(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chains_module, "PILOT_STEPS", 4)
    model = binary().model
    whole, *others = (bidirectional_monte_carlo(model, 5, 4, 3, 2, chunk=chunk) for chunk in (100, 1, 7))
    for other in others:
        np.testing.assert_allclose(other.gap_nats, whole.gap_nats, rtol=0, atol=1e-9)


def test_no_more_chains_than_the_chunk_go_through_the_model_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chains_module, "PILOT_STEPS", 2)
    problem, rows = binary(), []
    decode = problem.model.decode
    problem.model.decode = lambda z, y=None: (rows.append(len(z)), decode(z, y))[1]
    problem.annealed(2, 5, chunk=3)
    assert max(rows) == 3


def test_single_precision_agrees_with_double():
    problem = binary()
    double = problem.annealed(6, 64)
    problem.model.float()
    single = problem.annealed(6, 64)
    assert (single.dtype, double.dtype) == ("float32", "float64")
    np.testing.assert_allclose(single.log_likelihood_nats, double.log_likelihood_nats, rtol=0, atol=1e-2)


def test_the_model_is_left_as_it_was_and_progress_ends_at_one():
    problem = binary()
    forward: list[float] = []
    both: list[float] = []
    problem.model.train()
    state = torch.get_rng_state()
    problem.annealed(3, 2, 5, progress=forward.append)
    bidirectional_monte_carlo(problem.model, 3, 3, 2, 2, chunk=4, progress=both.append)
    assert problem.model.training
    assert all(parameter.grad is None for parameter in problem.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for done in (forward, both):
        assert done == sorted(done)
        assert done[-1] == pytest.approx(1)


def test_summaries_are_json():
    problem = binary()
    result = problem.annealed(3, 4)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["log_likelihood_nats"]["mean"] == pytest.approx(result.log_likelihood_nats.mean())
    assert [summary[name] for name in ("images", "steps", "chains", "is_reverse")] == [16, 3, 4, False]
    sandwich = bidirectional_monte_carlo(problem.model, 4, 3, 2, 2, chunk=100)
    gap = json.loads(json.dumps(sandwich.summary()))["gap_nats"]
    assert gap["mean"] == pytest.approx(sandwich.gap_nats.mean())
    assert gap["standard_error"] == pytest.approx(sandwich.gap_nats.std(ddof=1) / 2)
    assert (sandwich.lower.is_reverse, sandwich.upper.is_reverse) == (False, True)
    assert np.isinf(problem.annealed(2, 1).monte_carlo_error_nats).all()


# Wrong arguments


def test_models_without_latent_variables_are_refused():
    model = PixelCNN(1, 2, 2, 2)
    for call in (
        lambda: annealed_importance_sampling(model, [], 1, 5),
        lambda: bidirectional_monte_carlo(model, 1, 5),
    ):
        with pytest.raises(ValueError, match="PixelCNN has no latent variables to anneal: its likelihood is exact"):
            call()


@pytest.mark.parametrize("name", ["steps", "chains", "leapfrog_steps", "chunk", "images"])
def test_numbers_below_one_are_refused(name: str):
    model = binary().model
    sizes = {"steps": 3, "chains": 2, "leapfrog_steps": 2, "chunk": 8, "images": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0: wanted at least 1"):
        bidirectional_monte_carlo(model, **sizes)
    with pytest.raises(ValueError, match=f"{name}=0: wanted at least 1"):
        annealed_importance_sampling(model, [], **sizes)


def test_images_that_are_missing_or_wrong_are_refused():
    problem = binary()
    batch = problem.batches()[0]
    short = {"steps": 1, "chains": 1}
    with pytest.raises(ValueError, match="16 images came, wanted 17"):
        annealed_importance_sampling(problem.model, [batch], 17, **short)
    with pytest.raises(ValueError, match="the image with index 0 came twice"):
        annealed_importance_sampling(problem.model, [batch, batch], 32, **short)
    with pytest.raises(ValueError, match="images have shape"):
        annealed_importance_sampling(problem.model, [batch._replace(image=batch.image[:, :, :1])], 16, **short)
    with pytest.raises(TypeError, match="images are uint8 levels"):
        annealed_importance_sampling(problem.model, [batch._replace(image=batch.image.float())], 16, **short)
    with pytest.raises(ValueError, match="conditioned on 2 classes"):
        annealed_importance_sampling(problem.model, [batch._replace(label=None)], 16, **short)


def test_a_model_that_is_not_finite_is_an_error_that_names_an_image():
    problem = binary()
    with torch.no_grad():
        problem.model.decoder.output.bias[0] = math.nan
    with pytest.raises(ValueError, match="log_likelihood_nats of the image with index 0 is nan"):
        problem.annealed(3, 2)
