"""Residual blocks of weight-normalized convolutions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from wngen.nn.activations import concat_elu, elu
from wngen.nn.causal import Pointwise
from wngen.nn.convolutions import WNConv2d
from wngen.nn.walk import Walk


class ResidualBlock(nn.Module):
    """x + scale * conv(elu(conv(elu(x)))), the block of the IAF paper's networks (Kingma et al. 2016, figure 3).

    Args:
        channels: of input and output.
        kernel_size: odd, so that the image keeps its size.
        scale: factor on the residual branch.
        dropout: probability of dropping an activation between the two convolutions.
    """

    def __init__(self, channels: int, kernel_size: int = 3, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.first = WNConv2d(channels, channels, kernel_size, padding="same")
        self.dropout = nn.Dropout(dropout)
        self.second = WNConv2d(channels, channels, kernel_size, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same."""
        branch = self.second(self.dropout(elu(self.first(elu(x)))))
        return x + self.scale * branch


def same_convolution(in_channels: int, out_channels: int, init_scale: float = 1.0) -> nn.Module:
    """3 x 3, which keeps height and width."""
    return WNConv2d(in_channels, out_channels, 3, padding="same", init_scale=init_scale)


class GatedResidualBlock(nn.Module):
    """x + a * sigmoid(b), with (a, b) from two convolutions: the block of PixelCNN++.

    Args:
        channels: of input and output.
        convolution: makes the two convolutions from their channels and `init_scale`, such as `CausalConv2d`s.
        aux_channels: channels of a second input, as of a short-cut, or 0 for none.
        num_classes: of a class label that adds a learned bias to the gates, or None.
        dropout: probability of dropping an activation between the two convolutions.
        activation: `concat_elu` doubles the channels it is given; another one keeps them.

    Raises:
        ValueError: a dropout that is no probability below 1.

    References:
        PixelCNN++ (Salimans et al., 2017), section 2 and the released code: `init_scale` 0.1 on the second
        convolution starts the block near the identity.
    """

    def __init__(
        self,
        channels: int,
        convolution: Callable[..., nn.Module] = same_convolution,
        aux_channels: int = 0,
        num_classes: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = concat_elu,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: wanted a probability below 1")
        widening = 2 if activation is concat_elu else 1
        self.activation = activation
        self.first = convolution(widening * channels, channels)
        self.aux = Pointwise(widening * aux_channels, channels) if aux_channels else None
        self.dropout = nn.Dropout(dropout)
        self.second = convolution(widening * channels, 2 * channels, init_scale=0.1)
        self.label = nn.Embedding(num_classes, 2 * channels) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.05)

    def forward(
        self, x: Tensor, aux: Tensor | None = None, y: Tensor | None = None, walk: Walk | None = None
    ) -> Tensor:
        """`(B, C, H, W)` to the same, with `aux` `(B, aux_channels, H, W)` and classes `y` `(B,)`.

        Along a walk it takes a row or a pixel of them; the convolutions must be causal then.

        Raises:
            ValueError: `aux` or `y` missing, or given to a block built without.
        """
        if (aux is None) != (self.aux is None) or (y is None) != (self.label is None):
            raise ValueError(
                f"the block wants {'an' if self.aux else 'no'} aux input and {'' if self.label else 'no '}classes y, "
                f"got {'none' if aux is None else 'one'} and {'none' if y is None else 'some'}"
            )
        along = () if walk is None else (walk,)
        h = self.first(self.activation(x), *along)
        if self.aux is not None and aux is not None:
            h = h + self.aux(self.activation(aux), *along)
        h = self.second(self.dropout(self.activation(h)), *along)
        if self.label is not None:
            h = h + self.label(y)[:, :, None, None]
        a, b = h.chunk(2, dim=1)
        return x + a * b.sigmoid()
