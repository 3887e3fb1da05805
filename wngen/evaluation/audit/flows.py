"""Claims of flows and autoregressive priors within a model: densities that are those of what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wngen.distributions import DiagonalGaussian
from wngen.evaluation.audit.claim import Measured, Skipped, Specimen, claimed
from wngen.flows import IAF, AutoregressivePrior, IAFStep, Transformed
from wngen.latent import LatentVariableModel

MOST_VARIABLES = 512  # of which a whole Jacobian is computed; maps of more are cut
ROWS = 32  # of the Jacobian of whole maps
RATED = 2  # images


@dataclass(frozen=True)
class Seen:
    """A flow, or a step of one, as the model used it on its first image.

    Attributes:
        name: of the module.
        flow: the module.
        z: `(1, ...)`, what went in.
        context: `(1, ...)`, or None.
        of: variables of z before it was cut.
    """

    name: str
    flow: nn.Module
    z: Tensor
    context: Tensor | None
    of: int

    def cut(self) -> Seen | None:
        """With maps so small that a whole Jacobian can be computed; None if that cannot be.

        Convolutions do the same on smaller maps.
        """
        if self.z.numel() <= MOST_VARIABLES:
            return self
        if self.z.dim() != 4:
            return None
        side = int((MOST_VARIABLES / self.z.shape[1]) ** 0.5)
        if side < 2:
            return None
        part = (..., slice(side), slice(side))
        return replace(self, z=self.z[part], context=None if self.context is None else self.context[part])


@claimed(
    "A flow's log-determinant is that of its Jacobian",
    "nats",
    "The posterior's density is wrong, and with it the rate and every bound.",
    at_most=1e-8,
)
def log_determinant(specimen: Specimen) -> Measured | Skipped | None:
    """Largest difference from the log-determinant of the Jacobian by autograd, of flows and of their steps."""
    seen = _seen(specimen)
    whole = [(flow, small) for flow in seen if (small := flow.cut()) is not None]
    if seen and not whole:
        return Skipped(f"{seen[0].of:,} variables, wanted at most {MOST_VARIABLES}")
    differences = []
    for _, small in whole:
        with torch.no_grad():
            stated = small.flow(small.z, small.context).log_det.sum()
        differences.append(float((stated - _jacobian(small).slogdet().logabsdet).abs().nan_to_num(torch.inf)))
    return Measured(max(differences), _extent(whole)) if differences else None


@claimed(
    "A step of a flow is triangular, its diagonal as stated",
    "derivatives",
    "A variable depends on later ones: the log-determinant is not the sum over variables that it is taken for.",
    at_most=0,
)
def triangularity(specimen: Specimen) -> Measured | None:
    """Derivatives by later variables that are not 0, or by a variable itself that are not what log_det says."""
    wrong = total = 0
    steps = [seen for seen in _seen(specimen) if isinstance(seen.flow, IAFStep)]
    for seen in steps:
        assert isinstance(seen.flow, IAFStep)
        n = seen.z.numel()
        places = torch.arange(n).view(seen.z.shape[1:])
        order = torch.tensor([int(places[place]) for place in seen.flow.conditioner.places(seen.z)])
        rank = torch.empty(n, dtype=torch.long).index_put_((order,), torch.arange(n)).to(seen.z.device)
        rows = torch.linspace(0, n - 1, min(n, max(ROWS, MOST_VARIABLES * (n <= MOST_VARIABLES))), dtype=torch.double)
        rows = rows.round().long().to(seen.z.device)
        jacobian = _jacobian(seen, rows)
        with torch.no_grad():
            log_det = seen.flow(seen.z, seen.context).log_det.flatten()[rows]
        later = (rank[None] > rank[rows][:, None]) & (jacobian != 0)
        diagonal = jacobian[torch.arange(len(rows)), rows]
        wrong += int(later.sum()) + int((~torch.isclose(diagonal, log_det.exp(), rtol=1e-9, atol=1e-12)).sum())
        total += jacobian.numel()
    return Measured(wrong, f"of {total:,}, {len(steps)} steps") if steps else None


@claimed(
    "A flow's inverse gives back what went in",
    "std. of noise",
    "The flow does not invert: it is no change of variables.",
    at_most=1e-6,
)
@torch.no_grad()
def invertibility(specimen: Specimen) -> Measured | None:
    """Largest difference, one variable after the other."""
    differences, whole = [], []
    for seen in _seen(specimen):
        small = seen.cut()
        if small is None or not isinstance(small.flow, (IAF, IAFStep)):
            continue
        back = small.flow.inverse(small.flow(small.z, small.context).value, small.context)
        differences.append(float((back - small.z).abs().max().nan_to_num(torch.inf)))
        whole.append((seen, small))
    return Measured(max(differences), _extent(whole)) if differences else None


@claimed(
    "A nat of log-determinant is a nat less of rate",
    "nats",
    "The model counts a flow's log-determinant with the wrong sign, or not once: its bound is none.",
    at_most=1e-6,
)
@torch.no_grad()
def determinant_in_rate(specimen: Specimen) -> Measured | None:
    """Change of the rate, plus 1, if a nat is added to the log-determinants of one flow; the largest of all flows."""
    model = specimen.exact
    if not isinstance(model, LatentVariableModel):
        return None
    flows = [flow for flow in model.modules() if isinstance(flow, IAF)]
    inner = {step for flow in flows for step in flow.modules()}
    outermost = [*flows, *(m for m in model.modules() if isinstance(m, IAFStep) and m not in inner)]
    if not outermost:
        return None

    def add_a_nat(module: nn.Module, args: Any, output: Transformed) -> Transformed:
        return replace(output, log_det=output.log_det + 1 / output.log_det[0].numel())

    def rates() -> Tensor:
        x, y, noise = specimen.first(RATED)
        _, _, again = specimen.first(RATED)
        code = model.encode(x, y)
        return torch.stack([model.bound(x, code, y, noise).rate_nats, model(x, y, again).rate_nats])

    before, errors = rates(), []
    for flow in outermost:
        handle = flow.register_forward_hook(add_a_nat)
        try:
            errors.append(float((rates() - before + 1).abs().max().nan_to_num(torch.inf)))
        finally:
            handle.remove()
    return Measured(max(errors), f"{len(errors)} flow{'s' * (len(errors) > 1)}, each on its own")


@claimed(
    "An autoregressive prior draws what its density says",
    "nats",
    "Latents are drawn from another prior than the one in the rate.",
    at_most=1e-5,
)
@torch.no_grad()
def prior_density(specimen: Specimen) -> Measured | Skipped | None:
    """Difference of log p(z) from that of the noise that z was made of less the log-determinant, by differences."""
    differences = []
    for prior in specimen.exact.modules():
        if not isinstance(prior, AutoregressivePrior) or _wants_context(prior):
            continue
        if prior.dim > MOST_VARIABLES:
            return Skipped(f"{prior.dim:,} variables, wanted at most {MOST_VARIABLES}")
        like = next(prior.parameters())
        eps = torch.randn(1, prior.dim, dtype=like.dtype, device=like.device, generator=specimen.generator())
        step = 1e-5
        moved = step * torch.eye(prior.dim, dtype=eps.dtype, device=eps.device)
        jacobian = (prior.sample(eps + moved) - prior.sample(eps - moved)) / (2 * step)
        wanted = DiagonalGaussian.standard(eps).log_prob(eps).sum() - jacobian.slogdet().logabsdet
        stated = prior.log_prob(prior.sample(eps)).sum()
        differences.append(float((stated - wanted).abs().nan_to_num(torch.inf)))
    return Measured(max(differences), "by finite differences of what it draws") if differences else None


def _wants_context(prior: AutoregressivePrior) -> bool:
    return len(prior.conditioner.context) > 0


def _seen(specimen: Specimen) -> Sequence[Seen]:
    """Every flow and step, with what went into it when the bound of the first image was computed."""
    model = specimen.exact
    if not isinstance(model, LatentVariableModel):
        return ()
    return specimen.once("flows", lambda: _record(specimen, model))


@torch.no_grad()
def _record(specimen: Specimen, model: LatentVariableModel) -> list[Seen]:
    seen: list[Seen] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            z, context = [*args, *([kwargs["context"]] if "context" in kwargs else []), None][:2]
            seen.append(Seen(name, module, z, context, z.numel()))

        return record

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (IAF, IAFStep))
    ]
    try:
        x, y, noise = specimen.first(1)
        model.bound(x, model.encode(x, y), y, noise)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _jacobian(seen: Seen, rows: Tensor | None = None) -> Tensor:
    """`(rows, Z)`: derivatives of some of the flow's values, or of all, by what goes in.

    The batch has one copy of z for each of them, so that one pass back is enough for many.
    """
    n = seen.z.numel()
    rows = torch.arange(n, device=seen.z.device) if rows is None else rows
    parts = []
    for some in rows.split(max(1, 2**18 // n)):
        copies = seen.z.detach().expand(len(some), *seen.z.shape[1:]).clone().requires_grad_()
        context = None if seen.context is None else seen.context.expand(len(some), *seen.context.shape[1:])
        values = seen.flow(copies, context).value.flatten(1)
        (gradient,) = torch.autograd.grad(values.gather(1, some[:, None]).sum(), copies)
        parts.append(gradient.flatten(1))
    return torch.cat(parts)


def _extent(whole: Sequence[tuple[Seen, Seen]]) -> str:
    """Of how many flows, and how much of the largest of them."""
    full, small = max(whole, key=lambda pair: pair[0].of)
    cut = "" if small.z.numel() == full.of else f": maps cut to {small.z.shape[2]} x {small.z.shape[3]}"
    return f"{len(whole)} flows and steps, at most {small.z.numel():,} of {full.of:,} variables{cut}"
