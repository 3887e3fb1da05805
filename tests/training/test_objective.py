"""The objective is the bound, and free bits and warm-up change it as the paper says without touching the bound."""

import pytest
import torch

from wngen.model import Bound
from wngen.training import learning_rate_factor, objective_nats


def make_bound() -> Bound:
    distortion = torch.tensor([3.0, 5.0])
    first = torch.tensor([[0.1, 2.0], [0.3, 4.0]], requires_grad=True)  # means 0.2 and 3 over the batch
    second = torch.tensor([[0.4], [0.8]], requires_grad=True)  # mean 0.6
    return Bound(distortion, (first, second))


def test_without_options_it_is_the_negative_elbo():
    bound = make_bound()
    torch.testing.assert_close(objective_nats(bound), -bound.elbo_nats.mean())


def test_free_bits_floor_each_channels_batch_mean():
    bound = make_bound()
    objective = objective_nats(bound, free_bits=0.5)
    torch.testing.assert_close(objective, torch.tensor(4.0 + 0.5 + 3.0 + 0.6))
    objective.backward()
    # Below the floor no gradient; above it that of the mean, for all images alike, also those that use less.
    torch.testing.assert_close(bound.kl_nats[0].grad, torch.tensor([[0.0, 0.5], [0.0, 0.5]]))
    torch.testing.assert_close(bound.kl_nats[1].grad, torch.tensor([[0.5], [0.5]]))


def test_free_bits_per_layer_pool_the_channels():
    torch.testing.assert_close(
        objective_nats(make_bound(), free_bits=1.0, free_bits_per="layer"), torch.tensor(4.0 + 3.2 + 1.0)
    )


def test_the_mean_over_all_processes_decides_what_is_below_the_floor():
    bound = make_bound()
    objective = objective_nats(bound, free_bits=0.5, average=lambda mean: mean + 10)
    torch.testing.assert_close(objective, -bound.elbo_nats.mean())


def test_warm_up_weighs_the_rate_and_leaves_the_bound_alone():
    bound = make_bound()
    before = bound.elbo_nats.clone()
    torch.testing.assert_close(objective_nats(bound, kl_weight=0.25), torch.tensor(4.0 + 0.25 * 3.8))
    assert torch.equal(bound.elbo_nats, before)


def test_learning_rate_rises_and_falls():
    linear = learning_rate_factor("linear", 10, 100, 1.0)
    assert [linear(0), linear(4)] == pytest.approx([0.1, 0.5 * 0.96])
    assert linear(50) == pytest.approx(0.5)
    assert linear(100) == 0.0
    assert learning_rate_factor("cosine", 0, 100, 1.0)(50) == pytest.approx(0.5)
    assert learning_rate_factor("exponential", 0, 0, 0.9)(3) == pytest.approx(0.9**3)
    assert learning_rate_factor("constant", 0, 0, 0.9)(1000) == 1.0
    with pytest.raises(ValueError, match="max_epochs"):
        learning_rate_factor("linear", 0, -1, 1.0)
