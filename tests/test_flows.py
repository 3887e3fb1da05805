"""Flows invert, of vectors and of maps, and their densities are normalized."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from dependence import CONTEXT_DIM, draw, draw_maps, generic, jacobian
from torch import Tensor

from wngen.distributions import DiagonalGaussian
from wngen.flows import IAF, AutoregressivePrior, IAFStep, StepForm, step_outputs
from wngen.made import MADE, ConvMADE
from wngen.nn import data_dependent_init

FORMS = get_args(StepForm)


def trapezoid(log_density: Callable[[Tensor], Tensor], reach: float, points: int = 401) -> float:
    """The integral of a density of two variables over a square, from its logarithm."""
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = log_density(grid).exp().view(points, points)
    return torch.trapezoid(torch.trapezoid(density, axis), axis).item()


# Inverse autoregressive flow


def test_each_form_is_the_formula_it_is_named_after():
    z, context = draw(8, 5, CONTEXT_DIM)
    gated, location_scale, location = (
        generic(IAFStep(MADE(5, step_outputs(form), 8, 1, CONTEXT_DIM), form)) for form in FORMS
    )
    m, a = gated.conditioner(z, context)
    gate = (a + gated.forget_bias).sigmoid()
    torch.testing.assert_close(gated(z, context).value, gate * z + (1 - gate) * m, rtol=1e-12, atol=1e-12)
    m, a = location_scale.conditioner(z, context)
    torch.testing.assert_close(
        location_scale(z, context).value, (z - 0.1 * m) / (0.1 * a).exp(), rtol=1e-12, atol=1e-12
    )
    (m,) = location.conditioner(z, context)
    torch.testing.assert_close(location(z, context).value, z - 0.1 * m, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_step_log_det_is_that_of_its_triangular_jacobian(
    form: StepForm, hidden_layers: int, context_dim: int, reverse: bool
):
    dim = 5
    step = generic(IAFStep(MADE(dim, step_outputs(form), 8, hidden_layers, context_dim, reverse), form))
    z, context = draw(1, dim, context_dim)
    transformed, matrix = step(z, context), jacobian(lambda z: step(z, context).value, z)
    outside = torch.ones_like(matrix).triu(1) if not reverse else torch.ones_like(matrix).tril(-1)
    assert (matrix[outside.bool()] == 0).all()
    assert (matrix[~outside.bool()] != 0).all()
    torch.testing.assert_close(transformed.log_det[0], matrix.diagonal().log(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(transformed.log_det.sum(), matrix.slogdet().logabsdet, rtol=1e-10, atol=1e-12)
    if form == "location":
        assert not transformed.log_det.any()


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize("form", FORMS)
def test_flow_log_det_is_that_of_its_jacobian(form: StepForm, context_dim: int):
    flow = generic(IAF.of_vectors(5, 3, 8, 1, context_dim, form))
    z, context = draw(1, 5, context_dim)
    matrix = jacobian(lambda z: flow(z, context).value, z)
    torch.testing.assert_close(flow(z, context).log_det.sum(), matrix.slogdet().logabsdet, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_is_reversed_from_step_to_step(form: StepForm):
    z, _ = draw(1, 5, 0)
    one, two = (generic(IAF.of_vectors(5, steps, 8, 1, form=form)) for steps in (1, 2))
    assert torch.equal(jacobian(lambda z: one(z).value, z) != 0, torch.ones(5, 5).tril().bool())
    assert (jacobian(lambda z: two(z).value, z) != 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
@pytest.mark.parametrize("form", FORMS)
def test_inverse_recovers_the_input(form: StepForm, context_dim: int, dtype: torch.dtype, tolerance: float):
    flow = IAF.of_vectors(6, 3, 24, 1, context_dim, form).to(dtype)
    z, context = draw(64, 6, context_dim, dtype)
    data_dependent_init(flow, z, context)
    value = flow(z, context).value
    assert (value - z).abs().max() > 0.01
    for got, wanted in ((flow.inverse(value, context), z), (flow(flow.inverse(z, context), context).value, z)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    for step in flow.steps:  # each alone, in either order
        torch.testing.assert_close(step.inverse(step(z, context).value, context), z, rtol=0, atol=tolerance)


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
def test_a_gated_step_starts_as_a_mild_contraction(context_dim: int, hidden_layers: int):
    """At first z' is about sigmoid(forget_bias) z, whatever the context, and the rest is small."""
    z, context = draw(512, 6, context_dim)
    for bias in (1.0, 2.0, 30.0):
        step = IAFStep(MADE(6, 2, 32, hidden_layers, context_dim), forget_bias=bias).double()
        data_dependent_init(step, z, context)
        transformed, gate = step(z, context), 1 / (1 + math.exp(-bias))
        assert (transformed.value - gate * z).std() < 0.2 * (1 - gate) + 1e-12
        assert (transformed.log_det - math.log(gate)).std() < 0.2 * (1 - gate) + 1e-12


@pytest.mark.parametrize("form", ["location", "location_scale"])
def test_the_other_forms_start_near_the_identity(form: StepForm):
    z, context = draw(512, 6, CONTEXT_DIM)
    flow = IAF.of_vectors(6, 2, 32, 1, CONTEXT_DIM, form).double()
    data_dependent_init(flow, z, context)
    assert (flow(z, context).value - z).std() < 0.05
    assert flow(z, context).log_det.std() < 0.05


def test_a_linear_location_step_is_a_gaussian_with_full_covariance():
    """With no hidden layer z' = A z + c, so that the density is known in closed form (Kingma et al. 2016)."""
    flow = generic(IAF.of_vectors(4, 2, 1, hidden_layers=0, form="location"))
    origin, z = torch.zeros(1, 4, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    a, c = jacobian(lambda z: flow(z).value, origin), flow(origin).value[0]
    expected = torch.distributions.MultivariateNormal(c, a @ a.T)
    transformed = flow(z)
    log_q = (DiagonalGaussian.standard(z).log_prob(z) - transformed.log_det).sum(dim=1)
    assert (a @ a.T - torch.eye(4)).abs().max() > 0.01
    torch.testing.assert_close(log_q, expected.log_prob(transformed.value), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_density_after_the_flow_integrates_to_one(form: StepForm):
    flow = generic(IAF.of_vectors(2, 2, 4, 1, CONTEXT_DIM, form))
    context = torch.randn(1, CONTEXT_DIM, dtype=torch.float64)

    def log_density(value: Tensor) -> Tensor:
        everywhere = context.expand(len(value), -1)
        z = flow.inverse(value, everywhere)
        return (DiagonalGaussian.standard(z).log_prob(z) - flow(z, everywhere).log_det).sum(dim=1)

    with torch.no_grad():
        assert trapezoid(log_density, reach=12) == pytest.approx(1, abs=1e-4)


# Of maps

MAPS = (2, 3, 4)


def iaf_of_maps(steps: int, form: StepForm, hidden_layers: int = 1, with_context: bool = False) -> IAF:
    return generic(IAF.of_maps(MAPS[0], steps, 5, hidden_layers, with_context, form))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_step_log_det_of_maps_is_that_of_its_triangular_jacobian(
    form: StepForm, hidden_layers: int, with_context: bool, reverse: bool
):
    conditioner = ConvMADE(MAPS[0], step_outputs(form), 5, hidden_layers, with_context, reverse=reverse)
    step = generic(IAFStep(conditioner, form))
    z, context = draw_maps(1, MAPS, conditioner.context_channels if with_context else 0)
    numbers = torch.arange(z.numel()).view(MAPS)
    in_order = torch.stack([numbers[place] for place in conditioner.places(z)])
    assert in_order.unique().numel() == z.numel()
    matrix = jacobian(lambda z: step(z, context).value.flatten(1), z)[in_order][:, in_order]
    assert not matrix.triu(1).any()
    assert matrix.tril(-1).any()
    transformed = step(z, context)
    log_det = transformed.log_det.flatten()[in_order]
    torch.testing.assert_close(log_det, matrix.diagonal().log(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(log_det.sum(), matrix.slogdet().logabsdet, rtol=1e-10, atol=1e-12)
    assert transformed.log_det.any() == (form != "location")


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_flow_of_maps_log_det_is_that_of_its_jacobian(form: StepForm, with_context: bool):
    flow = iaf_of_maps(3, form, with_context=with_context)
    z, context = draw_maps(4, MAPS, flow.context_channels if with_context else 0)
    transformed = flow(z, context)
    for i in range(4):
        one = None if context is None else context[i : i + 1]
        matrix = jacobian(lambda z, one=one: flow(z, one).value.flatten(1), z[i : i + 1])
        torch.testing.assert_close(transformed.log_det[i].sum(), matrix.slogdet().logabsdet, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_inverse_of_maps_recovers_the_input(form: StepForm, with_context: bool):
    flow = IAF.of_maps(MAPS[0], 3, 8, 1, with_context, form).double()
    z, context = draw_maps(32, MAPS, flow.context_channels if with_context else 0)
    data_dependent_init(flow, z, context)
    value = flow(z, context).value
    assert (value - z).abs().max() > 0.01
    for got, wanted in ((flow.inverse(value, context), z), (flow(flow.inverse(z, context), context).value, z)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    for step in flow.steps:  # each alone, in either order
        torch.testing.assert_close(step.inverse(step(z, context).value, context), z, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_maps_is_reversed_from_step_to_step(form: StepForm):
    """Two steps of three convolutions each reach every corner of maps this small: the Jacobian is dense."""
    z, _ = draw_maps(1, MAPS, 0)
    one, two = (jacobian(lambda z, n=n: iaf_of_maps(n, form, 2)(z).value.flatten(1), z) for n in (1, 2))
    place = torch.arange(z.numel()).view(*MAPS[1:], MAPS[0]).movedim(2, 0).flatten()
    assert torch.equal(one != 0, (one != 0) & (place[:, None] >= place))
    assert (two != 0).all()


def test_every_step_of_maps_sees_the_context():
    flow = iaf_of_maps(3, "location_scale", with_context=True)
    z, context = draw_maps(1, MAPS, flow.context_channels)
    assert context is not None
    assert jacobian(lambda context: flow(z, context).value.flatten(1), context).any(dim=1).all()
    for step in flow.steps:
        assert (step(z, context).value != step(z, context + 1).value).all()
    with pytest.raises(ValueError, match="got no context"):
        flow(z)


def test_a_linear_location_flow_of_maps_is_a_gaussian_with_full_covariance():
    flow = generic(IAF.of_maps(MAPS[0], 2, 1, hidden_layers=0, form="location"))
    origin, (z, _) = torch.zeros(1, *MAPS, dtype=torch.float64), draw_maps(32, MAPS, 0)
    a, c = jacobian(lambda z: flow(z).value.flatten(1), origin), flow(origin).value.flatten()
    expected = torch.distributions.MultivariateNormal(c, a @ a.T)
    transformed = flow(z)
    log_q = (DiagonalGaussian.standard(z).log_prob(z) - transformed.log_det).flatten(1).sum(dim=1)
    assert (a @ a.T - torch.eye(len(a))).abs().max() > 0.01
    torch.testing.assert_close(log_q, expected.log_prob(transformed.value.flatten(1)), rtol=1e-10, atol=1e-10)


# Autoregressive prior


def small_prior(dim: int, context_dim: int, hidden_layers: int = 1) -> AutoregressivePrior:
    prior = AutoregressivePrior(dim, 16, hidden_layers, context_dim).double()
    data_dependent_init(prior.conditioner, *draw(256, dim, context_dim))
    with torch.no_grad():
        prior.conditioner.output.set_length(3 * prior.conditioner.output.length)  # or it is near the standard Gaussian
    return prior


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
def test_the_prior_density_integrates_to_one(context_dim: int, hidden_layers: int):
    prior = small_prior(2, context_dim, hidden_layers)
    context = torch.randn(1, context_dim, dtype=torch.float64) if context_dim else None

    def log_density(z: Tensor) -> Tensor:
        return prior.log_prob(z, None if context is None else context.expand(len(z), -1)).sum(dim=1)

    with torch.no_grad():
        assert trapezoid(log_density, reach=25, points=701) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
def test_the_noise_can_be_read_off_a_prior_sample(context_dim: int):
    """eps = (z - mean) / std, so that log p(z) is that of the noise less the log standard deviations."""
    prior = small_prior(5, context_dim)
    eps, context = draw(32, 5, context_dim)
    z = prior.sample(eps, context)
    mean, log_std = prior.conditioner(z, context)
    torch.testing.assert_close((z - mean) / log_std.exp(), eps, rtol=1e-10, atol=1e-10)
    expected = DiagonalGaussian.standard(eps).log_prob(eps) - log_std
    torch.testing.assert_close(prior.log_prob(z, context), expected, rtol=1e-10, atol=1e-10)


def test_a_prior_variable_depends_on_its_own_and_earlier_noise_only():
    prior = small_prior(5, 0)
    eps, _ = draw(1, 5, 0)
    z = prior.sample(eps)
    for j in range(5):
        other = eps.clone()
        other[0, j] += 1
        changed = prior.sample(other)[0] != z[0]
        assert torch.equal(changed, torch.arange(5) >= j)


def test_prior_samples_have_the_moments_of_its_density():
    prior, n = small_prior(2, 0), 50_000
    z = prior.sample(torch.randn(n, 2, dtype=torch.float64))
    axis = torch.linspace(-15, 15, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    weight = prior.log_prob(grid).sum(dim=1).exp().detach()
    weight /= weight.sum()

    def features(z: Tensor) -> Tensor:
        return torch.stack([z[:, 0], z[:, 1], z[:, 0] * z[:, 1], z[:, 0].square(), z[:, 1].square()], dim=1)

    seen, expected = features(z), (weight[:, None] * features(grid)).sum(dim=0)
    standard_error = seen.std(dim=0) / math.sqrt(n)
    assert ((seen.mean(dim=0) - expected).abs() < 4 * standard_error).all()
    assert expected[2].abs() > 10 * standard_error[2]  # the variables are really dependent


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form='affine': wanted 'gated', 'location_scale' or 'location'"):
        IAFStep(MADE(4, 2, 8, 1), form="affine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form='affine'"):
        IAF.of_maps(4, 1, 8, form="affine")  # type: ignore[arg-type]


@pytest.mark.parametrize(("form", "outputs", "wanted"), [("location", 2, 1), ("gated", 1, 2)])
def test_a_conditioner_of_another_number_of_outputs_is_refused(form: StepForm, outputs: int, wanted: int):
    for conditioner in (MADE(4, outputs, 8, 1), ConvMADE(4, outputs, 8, 1)):
        with pytest.raises(ValueError, match=f"form='{form}' wants {wanted} outputs, the conditioner's {outputs}"):
            IAFStep(conditioner, form)
