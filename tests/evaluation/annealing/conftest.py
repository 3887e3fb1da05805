"""What all tests of annealing run on."""

from __future__ import annotations

import pytest
from annealing_zoo import PROBLEMS, Problem

from wngen.evaluation.annealing import chains as chains_module


@pytest.fixture(autouse=True)
def _short_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains_module, "PILOT_STEPS", 20)


@pytest.fixture(params=PROBLEMS, ids=lambda problem: problem.__name__)
def problem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Problem:
    return request.param(monkeypatch)
