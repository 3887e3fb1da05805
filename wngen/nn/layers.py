"""Weight normalization, weight = g v / ||v||, one g per output unit; linear layers with it.

A simple reparameterization to accelerate training of deep neural networks (Salimans & Kingma, 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.nn.normalization import at_least_single, normalize

Gain = Literal["linear", "exponential"]


class WeightNormalized(nn.Module):
    """What all weight-normalized layers share: the parameters `v`, `g` and `bias`, and the weight made of them.

    With `gain="exponential"` the parameter is `log_g`, and there is no `g`.

    Args:
        shape: of the weight.
        dims: the dimensions over which the norm runs, all but the output units'.
        out_features: length of the bias.
        bias: whether there is one.
        gain: `linear` keeps g itself as a parameter, `exponential` its logarithm `log_g`, so that g stays
            positive and an optimizer's step multiplies it.
        init_scale: standard deviation of the pre-activations that data-dependent init sets.
        mask: zeros where the weight is to be zero; it broadcasts to `shape` and acts before the norm. It is fixed: what
            follows from it is worked out once.

    Raises:
        ValueError: an unknown gain, or a mask that does not fit.
    """

    v: nn.Parameter
    g: nn.Parameter
    log_g: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor | None
    lone: Tensor | None  # which units have a single input
    initialized: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        dims: tuple[int, ...],
        out_features: int,
        bias: bool,
        gain: Gain,
        init_scale: float,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gain not in ("linear", "exponential"):
            raise ValueError(f"gain={gain!r}: wanted 'linear' or 'exponential'")
        self.dims, self.gain, self.init_scale = dims, gain, init_scale
        self.v = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        length = [1 if dim in dims else out_features for dim in range(len(shape))]
        g = nn.Parameter(torch.empty(*length, device=device, dtype=dtype))
        self.register_parameter("g" if gain == "linear" else "log_g", g)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        if mask is not None:
            try:
                mask = mask.to(self.v).expand(*shape).clone()
            except RuntimeError:
                raise ValueError(
                    f"a mask of shape {tuple(mask.shape)} does not broadcast to the weight's {tuple(shape)}"
                ) from None
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("lone", self._units_of_one_input(out_features), persistent=False)
        # Persistent, so that neither a resumed run nor a released model is ever initialized again.
        self.register_buffer("initialized", torch.tensor(False, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """v from N(0, 0.05^2) as in the paper, g = 1 and bias = 0, not yet initialized from data."""
        nn.init.normal_(self.v, std=0.05)
        nn.init.constant_(self.gain_parameter, 1 if self.gain == "linear" else 0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.initialized.fill_(False)

    @property
    def gain_parameter(self) -> nn.Parameter:
        """`g` or `log_g`, whichever there is."""
        return self.g if self.gain == "linear" else self.log_g

    @property
    def length(self) -> Tensor:
        """g, the norm of each output unit's weight, 1 along the dimensions it is taken over."""
        return self.g if self.gain == "linear" else self.log_g.exp()

    def _units_of_one_input(self, out_features: int) -> Tensor | None:
        """Which there are, in a shape that goes with v's; None if there are none."""
        if self.mask is None:
            return torch.ones((), dtype=torch.bool, device=self.v.device) if self.v.numel() == out_features else None
        if self.mask.is_meta:
            return None
        lone = (self.mask != 0).sum(self.dims, keepdim=True) == 1
        return lone if bool(lone.any()) else None

    @property
    def direction(self) -> Tensor:
        """v, or v under the mask.

        That of a unit with a single input is a sign, and cannot turn. Its v has no gradient but rounding errors, which
        Adam would magnify to full steps, until the sign jumps; so it gets none.
        """
        return self._direction(self.v, self.mask)

    def _direction(self, v: Tensor, mask: Tensor | None) -> Tensor:
        """Of v, or of a part of its inputs."""
        v = v if self.lone is None else torch.where(self.lone, v.detach(), v)
        return v if mask is None else v * mask

    @property
    def weight(self) -> Tensor:
        """The effective weight g v / ||v||."""
        return self.weight_of_length(self.length)

    def weight_of_length(self, g: Tensor) -> Tensor:
        """The weight for another g, of the same shape."""
        return normalize(self.direction, g, self.dims)

    def norm(self, weight: Tensor) -> Tensor:
        """The norm of each output unit's weight, in the shape of g."""
        return torch.linalg.vector_norm(weight, dim=self.dims, keepdim=True, dtype=at_least_single(weight.dtype))

    @torch.no_grad()
    def set_length(self, g: Tensor) -> None:
        """Set g, whichever way it is parameterized.

        Raises:
            ValueError: a negative or zero length for an exponential gain.
        """
        if self.gain == "linear":
            self.g.copy_(g)
        elif bool((g > 0).all()):
            self.log_g.copy_(g.log())
        else:
            raise ValueError(f"an exponential gain cannot hold g = {g.min():.3g}: use gain='linear'")

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Choose v and g such that the effective weight is this one, as far as the mask lets it through.

        A row of zeros gets g = 0 and keeps its direction, so that it can still learn.

        Raises:
            ValueError: another shape, or a row of zeros for an exponential gain.
        """
        if weight.shape != self.v.shape:
            raise ValueError(f"the weight has shape {tuple(weight.shape)}, the layer wants {tuple(self.v.shape)}")
        norm = self.norm(weight)
        if self.mask is not None:
            weight = weight * self.mask
            norm = torch.where(self.norm(self.mask) > 0, self.norm(weight), self.length)
        self.set_length(norm)
        self.v.copy_(weight + self.weight_of_length((norm == 0).to(self.v.dtype)))

    @property
    def fan_ratio(self) -> float:
        """fan_in / fan_out: the numbers of inputs that an output sees, and of outputs that see an input."""
        raise NotImplementedError

    def per_unit(self, values: Tensor) -> Tensor:
        """Values of the output units `(out,)` in the shape of g."""
        return values.view_as(self.gain_parameter)


class WNLinear(WeightNormalized):
    """`nn.Linear` with weight normalization.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether to add a learned bias.
        gain: `linear` or `exponential` parameterization of g.
        init_scale: standard deviation of the outputs that data-dependent init sets.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gain: Gain = "linear",
        init_scale: float = 1.0,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), (1,), out_features, bias, gain, init_scale, mask, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @property
    def fan_ratio(self) -> float:
        return self.in_features / self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, gain={self.gain}"


class MaskedWNLinear(WNLinear):
    """A linear layer whose weight is zero where `mask` is, normalized over what is left.

    Args:
        mask: `(out_features, in_features)`, zero or one.
        bias: whether to add a learned bias.
        gain: `linear` or `exponential` parameterization of g.
        init_scale: standard deviation of the outputs that data-dependent init sets.
    """

    def __init__(self, mask: Tensor, bias: bool = True, gain: Gain = "linear", init_scale: float = 1.0) -> None:
        if mask.dim() != 2:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, wanted (out_features, in_features)")
        super().__init__(mask.shape[1], mask.shape[0], bias, gain, init_scale, mask)
