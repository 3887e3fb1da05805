"""Autoregressive transforms of latent variables: inverse autoregressive flow, and autoregressive priors.

The same conditioner, a masked network whose output i sees the variables before i, serves both. In a *flow*
it reads the variables that go in, so that a sample and its density cost one pass, and inverting costs one
pass for each variable. In a *prior* it reads the variables that come out: density in one pass, sampling one
pass for each variable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.distributions import DiagonalGaussian
from wngen.made import MADE, ConvMADE

StepForm = Literal["gated", "location_scale", "location"]


@dataclass(frozen=True)
class Transformed:
    """What an invertible transform returns.

    Attributes:
        value: `(B, ...)`.
        log_det: the same, log |d value_i / d input_i| of each variable; their sum is the log-determinant of
            the Jacobian, which is triangular.
    """

    value: Tensor
    log_det: Tensor


def step_outputs(form: StepForm) -> int:
    """Values for each variable that a step of this form wants of its conditioner.

    Raises:
        ValueError: an unknown form.
    """
    if form not in get_args(StepForm):
        raise ValueError(f"form={form!r}: wanted 'gated', 'location_scale' or 'location'")
    return 1 if form == "location" else 2


class IAFStep(nn.Module):
    """One step of inverse autoregressive flow: one pass forward, one pass per variable to invert.

    Args:
        conditioner: of `outputs` 2 for each variable, or 1 for the form `location`.
        form: `gated` is z' = s z + (1 - s) m with s = sigmoid(a + forget_bias), equations 13 and 14 of the
            paper; `location_scale` is z' = (z - 0.1 m) exp(-0.1 a), as in its released code; `location`
            leaves the scale out: z' = z - 0.1 m.
        forget_bias: in the gated form, how open the gate is at first; the paper says 1 to 2.

    Raises:
        ValueError: an unknown form, or a conditioner of another number of outputs.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), algorithm 1.
    """

    def __init__(self, conditioner: MADE | ConvMADE, form: StepForm = "gated", forget_bias: float = 1.5) -> None:
        super().__init__()
        if conditioner.outputs != step_outputs(form):
            raise ValueError(
                f"form={form!r} wants {step_outputs(form)} outputs, the conditioner's {conditioner.outputs}"
            )
        self.form, self.forget_bias, self.conditioner = form, forget_bias, conditioner

    def _affine(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shift and log scale, each in the shape of `z`, of z' = exp(log_scale) z + shift."""
        if self.form == "location":
            (m,) = self.conditioner(z, context)
            return -0.1 * m, torch.zeros_like(m)
        m, a = self.conditioner(z, context)
        if self.form == "location_scale":
            return -0.1 * m * (-0.1 * a).exp(), -0.1 * a
        gate = a + self.forget_bias
        return (-gate).sigmoid() * m, F.logsigmoid(gate)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Transformed:
        """Transform variables `(B, ...)`, given the conditioner's context."""
        shift, log_scale = self._affine(z, context)
        return Transformed(log_scale.exp() * z + shift, log_scale)

    @torch.no_grad()
    def inverse(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """The input that `forward` turns into `value`: one pass for each variable."""
        z = torch.zeros_like(value)
        for place in self.conditioner.places(z):
            shift, log_scale = self._affine(z, context)
            at: tuple[slice | int, ...] = (slice(None), *place)
            z[at] = (value[at] - shift[at]) * (-log_scale[at]).exp()
        return z


class IAF(nn.Module):
    """A chain of IAF steps whose order is reversed from each to the next.

    Args:
        steps: made by `of_vectors` or `of_maps`.
    """

    def __init__(self, steps: Iterable[IAFStep]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    @classmethod
    def of_vectors(
        cls, dim: int, steps: int, width: int, hidden_layers: int = 1, context_dim: int = 0, form: StepForm = "gated"
    ) -> IAF:
        """Of `(B, Z)` with a context `(B, context_dim)`; see `MADE`.

        Args:
            dim: Z, number of variables.
            steps: how many.
            width: units of each hidden layer of a step's conditioner.
            hidden_layers: of a step's conditioner.
            context_dim: size of the context vector, 0 for none.
            form: of the steps; see `IAFStep`.
        """
        conditioners = (
            MADE(dim, step_outputs(form), width, hidden_layers, context_dim, reverse=i % 2 == 1) for i in range(steps)
        )
        return cls(IAFStep(conditioner, form) for conditioner in conditioners)

    @classmethod
    def of_maps(
        cls,
        channels: int,
        steps: int,
        width: int,
        hidden_layers: int = 1,
        with_context: bool = False,
        form: StepForm = "gated",
    ) -> IAF:
        """Of `(B, C, H, W)`, autoregressive over space and channels; see `ConvMADE`.

        Args:
            channels: C, of the maps.
            steps: how many.
            width: feature maps of each hidden layer of a step's conditioner.
            hidden_layers: of a step's conditioner.
            with_context: whether the steps take a context `(B, context_channels, H, W)`.
            form: of the steps; see `IAFStep`.
        """
        conditioners = (
            ConvMADE(channels, step_outputs(form), width, hidden_layers, with_context, reverse=i % 2 == 1)
            for i in range(steps)
        )
        return cls(IAFStep(conditioner, form) for conditioner in conditioners)

    @property
    def context_channels(self) -> int:
        """That the context of maps must have."""
        step = self.steps[0]
        assert isinstance(step, IAFStep)
        assert isinstance(step.conditioner, ConvMADE)
        return step.conditioner.context_channels

    def forward(self, z: Tensor, context: Tensor | None = None) -> Transformed:
        """Transform variables by all steps, given a context that each of them sees."""
        log_det = torch.zeros_like(z)
        for step in self.steps:
            transformed = step(z, context)
            z, log_det = transformed.value, log_det + transformed.log_det
        return Transformed(z, log_det)

    def inverse(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """The input that `forward` turns into `value`: one pass for each step and variable."""
        for step in reversed(self.steps):
            assert isinstance(step, IAFStep)
            value = step.inverse(value, context)
        return value


class AutoregressivePrior(nn.Module):
    """A Gaussian for each variable whose mean and scale depend on the variables before it.

    Args:
        dim: Z, number of variables.
        width: units of each hidden layer of the conditioner.
        hidden_layers: of the conditioner.
        context_dim: size of a context vector, as of a class, 0 for none.

    References:
        Masked autoregressive flow (Papamakarios et al., 2017), section 3.1; as a prior, Variational lossy
        autoencoder (Chen et al., 2017), section 3.2.
    """

    def __init__(self, dim: int, width: int, hidden_layers: int = 1, context_dim: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.conditioner = MADE(dim, 2, width, hidden_layers, context_dim)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(z_i | variables before i) of each variable, `(B, Z)`: one pass."""
        mean, log_std = self.conditioner(z, context)
        return DiagonalGaussian(mean, log_std).log_prob(z)

    def sample(self, eps: Tensor, context: Tensor | None = None) -> Tensor:
        """Turn standard normal noise `(B, Z)` into a draw, differentiable in it: one pass for each variable."""
        z = eps[:, :0]
        for i in range(self.dim):
            mean, log_std = self.conditioner(F.pad(z, (0, self.dim - i)), context)
            z = torch.cat([z, mean[:, i : i + 1] + log_std[:, i : i + 1].exp() * eps[:, i : i + 1]], dim=1)
        return z
