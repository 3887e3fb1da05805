"""Masked networks whose output i sees the variables before i: of vectors, and of maps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from wngen.distributions import at_least_fp32
from wngen.nn import MaskedWNConv2d, MaskedWNLinear, WNLinear, causal_mask, elu, made_degrees, made_mask


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
        self.outputs, self.reverse = outputs, reverse
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

    def places(self, z: Tensor) -> Iterator[tuple[int, ...]]:
        """Where each variable of `(B, Z)` stands, in the order."""
        places = range(z.shape[1])
        return ((i,) for i in (reversed(places) if self.reverse else places))


class ConvMADE(nn.Module):
    """A weight-normalized masked convolutional network of maps, autoregressive over space and channels.

    The variables of `(B, C, H, W)` stand in raster order, row by row, and at each place in the order of their channels.
    An output sees, of the variables before its own, those within the reach of its convolutions.

    Args:
        channels: C, of the maps.
        outputs: number of output values for each variable.
        width: feature maps of each hidden layer; at least one for each channel, that none stays unseen.
        hidden_layers: how many; 0 makes the network linear.
        with_context: whether a context `(B, context_channels, H, W)` is added to what the first layer makes.
        kernel_size: odd, of each convolution.
        reverse: whether the order runs from the last place to the first, and the channels from the last to the first.

    Attributes:
        context_channels: that the context must have: `width`, or `outputs * channels` of a linear network.

    Raises:
        ValueError: sizes that make no network, or a width that hides some channels from others.

    References:
        Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), section 4.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        width: int,
        hidden_layers: int,
        with_context: bool = False,
        kernel_size: int = 3,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1 or hidden_layers < 0 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"channels={channels}, hidden_layers={hidden_layers}, kernel_size={kernel_size}: wanted channels >= 1, "
                "hidden_layers >= 0 and an odd kernel_size"
            )
        if hidden_layers and width < channels:
            raise ValueError(f"width={width}: wanted at least channels={channels}, so that each sees all before it")
        self.outputs, self.with_context, self.reverse = outputs, with_context, reverse
        self.context_channels = width if hidden_layers else outputs * channels
        order = torch.arange(channels).flip(0) if reverse else torch.arange(channels)
        # Units of degree 0 see earlier places alone, and are what the first channel depends on.
        degrees = made_degrees(channels, [width] * hidden_layers, order, context=True)
        self.hidden = nn.ModuleList(
            MaskedWNConv2d(len(a), len(b), causal_mask(made_mask(b, a), kernel_size, reverse))
            for a, b in pairwise(degrees)
        )
        # Outputs are grouped by kind: all locations, then all scales.
        last = made_mask(order.repeat(outputs) + 1, degrees[-1], strict=True)
        self.output = MaskedWNConv2d(
            len(degrees[-1]), outputs * channels, causal_mask(last, kernel_size, reverse), init_scale=0.1
        )

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """`(B, C, H, W)` and `(B, context_channels, H, W)` to `outputs` tensors `(B, C, H, W)`.

        Raises:
            ValueError: a context that is missing, or that the network was built without.
        """
        if (context is None) == self.with_context:
            seen = "no context" if context is None else f"a context {tuple(context.shape)}"
            raise ValueError(f"got {seen}, but the network was built {'with' if self.with_context else 'without'} one")
        h = z
        for i, layer in enumerate((*self.hidden, self.output)):
            h = layer(h if i == 0 else elu(h))
            if i == 0 and context is not None:
                h = h + context
        return at_least_fp32(h).chunk(self.outputs, dim=1)

    def places(self, z: Tensor) -> Iterator[tuple[int, ...]]:
        """Where each variable of `(B, C, H, W)` stands, `(channel, row, column)` in the order."""
        channels, height, width = z.shape[1:]
        places = ((c, i, j) for i in range(height) for j in range(width) for c in range(channels))
        return reversed(list(places)) if self.reverse else places
