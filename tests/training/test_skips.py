"""Steps that are left out: counted without waiting for the device, and with no effect on weights and optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from wngen.training.skips import Skips

OPTIMIZERS = {
    "fused adam": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.1),
}


def trained(optimizer: str, norms: list[float]) -> tuple[list[torch.Tensor], dict, Skips]:
    """Weights and optimizer after a step for each gradient; of norm 10 and more, the gradient is not finite."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2)]
    taken, skips = OPTIMIZERS[optimizer](weights), Skips(10.0, 100)
    for i, norm in enumerate(norms):
        for p in weights:
            p.grad = torch.full_like(p, (i + 1) * 0.1 if norm <= 10 else math.nan)
        skips.leave_out(skips.decide(torch.tensor(norm)), taken)
        taken.step()
    return [p.detach() for p in weights], taken.state_dict()["state"], skips


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_and_moments_are_those_of_a_training_without_the_steps(optimizer: str):
    bad = [1.0, math.inf, 2.0, math.nan, 11.0, 3.0]
    weights, state, skips = trained(optimizer, bad)
    generator = torch.Generator().manual_seed(0)
    alone = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2)]
    reference = OPTIMIZERS[optimizer](alone)
    for i in (0, 2, 5):
        for p in alone:
            p.grad = torch.full_like(p, (i + 1) * 0.1)
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, alone, strict=True))
    for mine, other in zip(state.values(), reference.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)
    assert (skips.total, skips.in_a_row) == (3, 0)


def test_counts_of_any_sequence_are_those_of_a_plain_count():
    generator = torch.Generator().manual_seed(1)
    skips, total, row, most = Skips(1.0, 1000), 0, 0, 0
    for bad in (torch.rand(300, generator=generator) < 0.6).tolist():
        left_out = skips.decide(torch.tensor(2.0 if bad else 1.0))
        total, row = total + bad, (row + 1) * bad
        most = max(most, row)
        assert bool(left_out) == bad
        assert (skips.total, skips.in_a_row) == (total, row)
    assert most > 5
    resumed = Skips(1.0, row + 2)
    resumed.load_state_dict(skips.state_dict())
    resumed.check(300)
    resumed.decide(torch.tensor(math.nan))
    resumed.decide(torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match=rf"left out {row + 2} steps in a row up to step 302.*norm is nan"):
        resumed.check(302)


def test_a_row_that_has_ended_before_the_check_is_given_up_on_too():
    skips = Skips(1.0, 3)
    for norm in (5.0, 5.0, 7.0, 0.5):
        skips.decide(torch.tensor(norm))
    with pytest.raises(FloatingPointError, match=r"left out 3 steps in a row.*norm is 7"):
        skips.check(4)
