"""Autoregressive transforms of latent vectors: inverse autoregressive flow, and autoregressive priors.

The same conditioner, a masked network whose output i sees the variables before i, serves both. In a *flow*
it reads the variables that go in, so that a sample and its density cost one pass, and inverting costs one
pass for each variable. In a *prior* it reads the variables that come out: density in one pass, sampling one
pass for each variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.distributions import DiagonalGaussian, at_least_fp32
from wngen.nn import MaskedWNLinear, WNLinear, elu, made_degrees, made_mask

StepForm = Literal["gated", "location_scale", "location"]


@dataclass(frozen=True)
class Transformed:
    """What an invertible transform returns.

    Attributes:
        value: `(B, Z)`.
        log_det: `(B, Z)`, log |d value_i / d input_i| of each variable; their sum is the log-determinant of
            the Jacobian, which is triangular.
    """

    value: Tensor
    log_det: Tensor


class MADE(nn.Module):
    """A weight-normalized masked network: output i depends on the variables before i in the order, and on a context.

    Args:
        dim: Z, number of variables.
        outputs: number of output values for each variable.
        width: units of each hidden layer; at least one for each variable, that none stays unseen.
        hidden_layers: how many; 0 makes the network linear.
        context_dim: size of a context vector that enters every hidden layer, and the output where there is
            no hidden layer; 0 for none.
        reverse: whether the order runs from the last variable to the first.

    Raises:
        ValueError: sizes that make no network, or a width that hides some variables from others.

    References:
        MADE: masked autoencoder for distribution estimation (Germain et al., 2015), with context as in the
        autoregressive networks of Kingma et al. (2016), section 3.
    """

    def __init__(
        self, dim: int, outputs: int, width: int, hidden_layers: int, context_dim: int = 0, reverse: bool = False
    ) -> None:
        super().__init__()
        if dim < 1 or hidden_layers < 0:
            raise ValueError(f"dim={dim}, hidden_layers={hidden_layers}: wanted dim >= 1 and hidden_layers >= 0")
        if hidden_layers and width < dim:
            raise ValueError(f"width={width}: wanted at least dim={dim}, so that each variable sees all before it")
        order = torch.arange(dim).flip(0) if reverse else torch.arange(dim)
        degrees = made_degrees(dim, [width] * hidden_layers, order, context=context_dim > 0)
        self.outputs = outputs
        self.hidden = nn.ModuleList(MaskedWNLinear(made_mask(b, a)) for a, b in pairwise(degrees))
        entries = [(width, 1.0)] * hidden_layers or [(outputs * dim, 0.1)]  # where the context enters, and how strongly
        self.context = nn.ModuleList(
            WNLinear(context_dim, n, bias=False, init_scale=scale) for n, scale in entries if context_dim
        )
        # Outputs are grouped by kind: all locations, then all scales.
        self.output = MaskedWNLinear(made_mask(order.repeat(outputs) + 1, degrees[-1], strict=True), init_scale=0.1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """`(B, Z)` and `(B, context_dim)` to `outputs` tensors `(B, Z)`.

        Raises:
            ValueError: a context that is missing, or that the network was built without.
        """
        if (context is None) == bool(self.context):
            seen = "no context" if context is None else f"a context {tuple(context.shape)}"
            raise ValueError(f"got {seen}, but the network was built {'with' if self.context else 'without'} one")
        h = z
        for i, layer in enumerate(self.hidden):
            h = layer(h)
            if self.context:
                h = h + self.context[i](context)
            h = elu(h)
        h = self.output(h)
        if self.context and not self.hidden:
            h = h + self.context[0](context)
        return at_least_fp32(h).chunk(self.outputs, dim=1)


class IAFStep(nn.Module):
    """One step of inverse autoregressive flow: one pass forward, one pass per variable to invert.

    Args:
        dim: Z, number of variables.
        width: units of each hidden layer of the conditioner.
        hidden_layers: of the conditioner.
        context_dim: size of the context vector, 0 for none.
        reverse: whether the order runs from the last variable to the first.
        form: `gated` is z' = s z + (1 - s) m with s = sigmoid(a + forget_bias), equations 13 and 14 of the
            paper; `location_scale` is z' = (z - 0.1 m) exp(-0.1 a), as in its released code; `location`
            leaves the scale out: z' = z - 0.1 m.
        forget_bias: in the gated form, how open the gate is at first; the paper says 1 to 2.

    Raises:
        ValueError: an unknown form.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), algorithm 1.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        hidden_layers: int = 1,
        context_dim: int = 0,
        reverse: bool = False,
        form: StepForm = "gated",
        forget_bias: float = 1.5,
    ) -> None:
        super().__init__()
        if form not in ("gated", "location_scale", "location"):
            raise ValueError(f"form={form!r}: wanted 'gated', 'location_scale' or 'location'")
        self.form, self.forget_bias, self.reverse = form, forget_bias, reverse
        self.conditioner = MADE(dim, 1 if form == "location" else 2, width, hidden_layers, context_dim, reverse)

    def _affine(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shift and log scale, each `(B, Z)`, of z' = exp(log_scale) z + shift."""
        if self.form == "location":
            (m,) = self.conditioner(z, context)
            return -0.1 * m, torch.zeros_like(m)
        m, a = self.conditioner(z, context)
        if self.form == "location_scale":
            return -0.1 * m * (-0.1 * a).exp(), -0.1 * a
        gate = a + self.forget_bias
        return (-gate).sigmoid() * m, F.logsigmoid(gate)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Transformed:
        """Transform `(B, Z)`, given a context `(B, context_dim)`."""
        shift, log_scale = self._affine(z, context)
        return Transformed(log_scale.exp() * z + shift, log_scale)

    @torch.no_grad()
    def inverse(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """The input `(B, Z)` that `forward` turns into `value`: one pass for each variable."""
        z = torch.zeros_like(value)
        places = range(value.shape[1])
        for i in reversed(places) if self.reverse else places:
            shift, log_scale = self._affine(z, context)
            z[:, i] = (value[:, i] - shift[:, i]) * (-log_scale[:, i]).exp()
        return z


class IAF(nn.Module):
    """A chain of IAF steps whose order is reversed from each to the next.

    Args:
        dim: Z, number of variables.
        steps: how many.
        width: units of each hidden layer of a step's conditioner.
        hidden_layers: of a step's conditioner.
        context_dim: size of the context vector, 0 for none.
        form: of the steps; see `IAFStep`.
    """

    def __init__(
        self, dim: int, steps: int, width: int, hidden_layers: int = 1, context_dim: int = 0, form: StepForm = "gated"
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            IAFStep(dim, width, hidden_layers, context_dim, reverse=i % 2 == 1, form=form) for i in range(steps)
        )

    def forward(self, z: Tensor, context: Tensor | None = None) -> Transformed:
        """Transform `(B, Z)` by all steps, given a context `(B, context_dim)` that each of them sees."""
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

    @torch.no_grad()
    def sample(self, eps: Tensor, context: Tensor | None = None) -> Tensor:
        """Turn standard normal noise `(B, Z)` into a draw: one pass for each variable."""
        z = torch.zeros_like(eps)
        for i in range(self.dim):
            mean, log_std = self.conditioner(z, context)
            z[:, i] = mean[:, i] + log_std[:, i].exp() * eps[:, i]
        return z
