"""The audit of models with latent variables: sound ones pass, planted faults are caught by the claims they break."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import auditing
import ladder_zoo
import pytest
import torch
from auditing import failures, faulty
from torch import Tensor

from wngen.distributions import DiagonalGaussian
from wngen.evaluation.audit import Audit
from wngen.flows import AutoregressivePrior, IAFStep, Transformed
from wngen.latent import LatentVariableModel
from wngen.model import Bound
from wngen.models import ConvVAE
from wngen.nn import data_dependent_init
from wngen.noise import Noise

TINY: dict[str, Any] = {
    "height": 5, "width": 4, "latent_dim": 3, "widths": (4,), "blocks": 1, "hidden": 8, "iaf_width": 6,
}  # fmt: skip
FLOWS = {"log_determinant", "triangularity", "invertibility", "determinant_in_rate"}
EVERY = {"exact_samples", "rising_bounds", "closed_form", "surprise", "brightness", "simulated_bound"}


def images(model: LatentVariableModel, n: int) -> tuple[Tensor, Tensor | None]:
    x = torch.randint(model.spec.levels, (n, *model.spec.shape), dtype=torch.uint8)
    return x, None if model.num_classes is None else torch.arange(n) % model.num_classes


def vae(**changes: Any) -> ConvVAE:
    """A small model, initialized on noise."""
    torch.manual_seed(0)
    model = ConvVAE(**(TINY | changes))
    x, y = images(model, 32)
    data_dependent_init(model, x, y, Noise(1, torch.arange(32)))
    with torch.no_grad():  # a posterior near the prior, so that few draws say something
        model.posterior.g *= 0.2
        model.posterior.bias *= 0.2
    return model


def ladder(**changes: Any) -> LatentVariableModel:
    torch.manual_seed(0)
    return auditing.as_if_initialized(ladder_zoo.tiny(**changes).float())


def audited(model: LatentVariableModel, n: int = 6) -> Audit:
    torch.manual_seed(1)
    return auditing.audited(model, *images(model, n))


SOUND: list[tuple[Callable[..., LatentVariableModel], dict[str, Any]]] = [
    (vae, {}),
    (vae, {"posterior": "diagonal", "channels": 3, "levels": 8, "num_classes": 3}),
    (vae, {"prior": "autoregressive", "levels": 256, "height": 3, "iaf_form": "location_scale"}),
    (vae, {"height": 2, "width": 2, "posterior": "diagonal"}),
    (ladder, {}),
    (ladder, {"inference": "bottom-up", "posterior": "diagonal"}),
    (ladder, {"channels": 2, "levels": 3, "likelihood": "mixture", "components": 2, "posterior": "diagonal"}),
]


@pytest.mark.parametrize(("make", "changes"), SOUND)
def test_a_sound_model_passes_every_claim(make, changes):
    model = make(**changes)
    verdict = audited(model)
    assert not verdict.failed
    found = {finding.name for finding in verdict.findings}
    has_flow = changes.get("posterior") != "diagonal"
    assert found & FLOWS == (FLOWS if has_flow else set())
    assert ("prior_density" in found) == (changes.get("prior") == "autoregressive")
    assert ("estimated_image_probabilities" in found) == (model.spec.levels**model.spec.dims <= 4096)
    assert found >= EVERY


# Flows


class WrongSign(IAFStep):
    def forward(self, z: Tensor, context: Tensor | None = None) -> Transformed:
        transformed = super().forward(z, context)
        return replace(transformed, log_det=-transformed.log_det)


class Leaking(IAFStep):
    """Its first variable depends, a little, on the last one."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Transformed:
        transformed = super().forward(z, context)
        first = torch.zeros_like(z)
        first.flatten(1)[:, 0] = 1e-4 * z.flatten(1)[:, -1]
        return replace(transformed, value=transformed.value + first)


def with_step(model: LatentVariableModel, kind: type[IAFStep]) -> LatentVariableModel:
    """The first step of its flows is one of another kind."""
    step = next(module for module in model.modules() if isinstance(module, IAFStep))
    step.__class__ = kind
    return model


@pytest.mark.parametrize("make", [vae, ladder])
def test_a_log_determinant_of_the_wrong_sign_is_caught(make):
    assert {"log_determinant", "triangularity"} <= failures(audited(with_step(make(), WrongSign)))


@pytest.mark.parametrize("make", [vae, ladder])
def test_a_step_that_is_not_triangular_is_caught(make):
    caught = failures(audited(with_step(make(), Leaking)))
    assert {"triangularity", "invertibility"} <= caught <= {"triangularity", "invertibility", "log_determinant"}


def test_maps_of_many_variables_are_cut_and_the_table_says_so():
    model = ladder(height=20, width=20, layers="20x1", latent_channels=4, feature_maps=(4,))
    finding = next(f for f in audited(model, 2).findings if f.name == "log_determinant")
    assert finding.status == "passed"
    assert finding.detail.endswith("at most 484 of 1,600 variables: maps cut to 11 x 11")
    broken = audited(with_step(model, WrongSign), 2)
    assert "log_determinant" in failures(broken)


def counted(sign: float) -> Callable[..., Bound]:
    """The bound, with the flow's log-determinant times `sign`, where -1 is right."""

    def bound(self: Any, x: Tensor, code: Any, y: Any, noise: Noise, sampled_rate: bool = True) -> Bound:
        mean, log_std, context = code
        base = DiagonalGaussian(mean, log_std)
        z = base.sample(noise)
        transformed = self.flow(z, context)
        kl = base.log_prob(z) + sign * transformed.log_det - self._prior_log_prob(transformed.value)
        return Bound(-self.decode(transformed.value, y).log_prob(x).flatten(1).sum(dim=1), (kl,))

    return bound


def test_a_log_determinant_that_the_bound_counts_with_the_wrong_sign_is_caught():
    assert not failures(audited(faulty(vae(), bound=counted(-1))))
    for sign, excess in ((1, 2), (0, 1), (-2, 1)):
        verdict = audited(faulty(vae(), bound=counted(sign)))
        caught = {finding.name: finding for finding in verdict.failed}
        assert caught["determinant_in_rate"].measured == pytest.approx(excess)
    tiny = faulty(vae(height=2, width=2), bound=counted(1))
    assert "estimated_image_probabilities" in failures(audited(tiny))


def test_a_prior_that_draws_with_another_scale_is_caught():
    class TooWide(AutoregressivePrior):
        def sample(self, eps: Tensor, context: Tensor | None = None) -> Tensor:
            return super().sample(1.1 * eps, context)

    model = vae(prior="autoregressive")
    model.prior_flow.__class__ = TooWide
    (finding,) = audited(model).failed
    assert finding.name == "prior_density"
    assert finding.measured > 0.1


# Bounds


def log_weights(self: Any, x: Tensor, y: Any, noise: Noise, k: int) -> Tensor:
    code = self.encode(x, y)
    draws = [self.bound(x, code, y, noise.repeat([i])).elbo_nats.double() for i in range(k)]
    return torch.stack(draws).logsumexp(dim=0)


def likelihood(of: Callable[[int, int], tuple[int, float]]) -> Callable[..., Tensor]:
    """The importance-weighted bound, with the samples that are really drawn and what is really subtracted."""

    def log_likelihood(
        self: Any, x: Tensor, y: Any = None, importance_samples: int = 1, noise: Any = None, chunk: int = 1024
    ) -> Tensor:
        drawn, subtracted = of(importance_samples, max(1, chunk // len(x)))
        return log_weights(self, x, y, noise or Noise.fresh(len(x)), drawn) - subtracted

    return log_likelihood


def test_a_bound_of_another_number_of_samples_is_caught():
    right = likelihood(lambda k, at_once: (k, math.log(k)))
    floored = likelihood(lambda k, at_once: (max(k // at_once, 1) * min(at_once, k), math.log(k)))
    forgetful = likelihood(lambda k, at_once: (k, 0))
    doubly = likelihood(lambda k, at_once: (k, 2 * math.log(k)))
    assert not failures(audited(faulty(vae(), log_likelihood=right)))
    for wrong in (floored, forgetful, doubly):
        assert "exact_samples" in failures(audited(faulty(vae(), log_likelihood=wrong)))
    assert "rising_bounds" in failures(audited(faulty(vae(), log_likelihood=doubly)))


def test_a_divergence_in_closed_form_that_is_wrong_is_caught(monkeypatch):
    kl = DiagonalGaussian.kl
    monkeypatch.setattr(DiagonalGaussian, "kl", lambda self, other: 2 * kl(self, other))
    for model in (vae(posterior="diagonal"), ladder(posterior="diagonal")):
        if isinstance(model, ConvVAE):
            with torch.no_grad():  # far from the prior, where there is something to double
                model.posterior.bias[: model.latent_dim] += 2
        assert "closed_form" in failures(audited(model))


def test_a_bound_that_is_too_good_is_caught():
    def bound(self: Any, *args: Any, **kwargs: Any) -> Bound:
        right = super(type(self), self).bound(*args, **kwargs)
        return replace(right, distortion_nats=0.5 * right.distortion_nats)

    assert failures(audited(faulty(vae(), bound=bound))) == {"simulated_bound"}


# Batches, random numbers, samples


def test_statistics_of_the_batch_are_caught():
    def encode(self: Any, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        mean, *others = super(type(self), self).encode(x, y)
        return (mean - 0.1 * mean.mean(dim=0), *others)

    assert "batch_composition" in failures(audited(faulty(vae(), encode=encode)))


def test_noise_that_belongs_to_no_image_is_caught():
    def bound(self: Any, x: Tensor, code: Any, y: Any, noise: Noise, sampled_rate: bool = True) -> Bound:
        return super(type(self), self).bound(x, code, y, Noise.fresh(len(x)), sampled_rate)

    assert {"batch_composition", "determinism", "exact_samples"} <= failures(audited(faulty(vae(), bound=bound)))


def test_samples_from_another_prior_are_caught():
    def sample(self: Any, n: int, y: Any = None, temperature: float = 1.0, generator: Any = None) -> Tensor:
        return self.decode(self.prior(n, y, generator=generator) + 1, y).sample(generator)

    assert failures(audited(faulty(vae(), sample=sample))) == {"brightness"}


def test_a_model_that_raises_an_error_has_failed_that_claim_and_the_others_are_still_measured():
    def represent(self: Any, x: Tensor, y: Tensor | None = None) -> Tensor:
        raise RuntimeError("no centre\nnowhere")

    verdict = audited(faulty(vae(), represent=represent))
    (finding,) = verdict.failed
    assert (finding.name, finding.detail, finding.measured) == ("level_probabilities", "RuntimeError: no centre", None)
    assert len(verdict.findings) > 15
