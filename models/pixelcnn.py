"""Gated PixelCNN: a vertical and a horizontal stack of causal convolutions, and a softmax for each sub-pixel."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.autoregressive import AutoregressiveModel
from wngen.image import ImageSpec
from wngen.likelihood import PixelLikelihood
from wngen.model import at_least
from wngen.nn import CausalConv2d, Pointwise, Walk, down_shift, made_mask, right_shift

FIRST_KERNEL = 7


class GatedLayer(nn.Module):
    """One layer of both stacks, figure 2 of the paper.

    The vertical stack `v` sees the rows above a pixel; the horizontal one `h` sees the pixels on its left, and through
    `across` what the vertical one has found. Only the horizontal stack has residual connections.

    Args:
        vertical: convolution of the vertical stack to twice `filters` channels.
        horizontal: the same of the horizontal stack.
        filters: feature maps of each stack.
        mask: of the 1 x 1 convolution that ends the horizontal stack's branch, or None.
        residual: whether the horizontal stack adds its input, which the first layer cannot.
        num_classes: of the labels that bias the gates, or None.
    """

    def __init__(
        self,
        vertical: CausalConv2d,
        horizontal: CausalConv2d,
        filters: int,
        mask: Tensor | None,
        residual: bool,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.vertical, self.horizontal, self.residual = vertical, horizontal, residual
        self.across = Pointwise(2 * filters, 2 * filters)
        self.output = Pointwise(filters, filters, mask)
        self.label = nn.Embedding(num_classes, 4 * filters) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.05)

    def forward(self, v: Tensor, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both stacks `(B, filters, H, W)` to the same."""
        v_bias, h_bias = self._biases(y)
        v = self.vertical(v) + v_bias
        gated = _gate(self.horizontal(h) + self.across(v) + h_bias)
        return _gate(v), self.output(gated) + (h if self.residual else 0)

    def row(self, v: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        """The vertical stack at a row, `(B, filters, 1, W)` to the same; what goes across is stored for `pixel`."""
        v = self.vertical(v, walk) + self._biases(y)[0]
        walk.store(self, self.across(v, walk))
        return _gate(v)

    def pixel(self, h: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        """The horizontal stack at a pixel, `(B, filters, 1, 1)` to the same."""
        gated = _gate(self.horizontal(h, walk) + walk.stored(self) + self._biases(y)[1])
        return self.output(gated, walk) + (h if self.residual else 0)

    def _biases(self, y: Tensor | None) -> tuple[Tensor | int, Tensor | int]:
        """What the class adds to the gates of the vertical and of the horizontal stack (equation 4)."""
        if self.label is None:
            return 0, 0
        v_bias, h_bias = self.label(y)[:, :, None, None].chunk(2, dim=1)
        return v_bias, h_bias


class PixelCNN(AutoregressiveModel):
    """Gated PixelCNN: two stacks of causal convolutions that together see every pixel before, without a blind spot.

    The levels of a sub-pixel have a probability each. With several channels the features of the horizontal stack belong
    to one of them each, and masks let a channel see only those before it within its pixel. The paper's models of
    ImageNet have 20 layers of 384 filters and 5 x 5 kernels.

    Args:
        channels: of the images.
        height: rows.
        width: columns.
        levels: values a sub-pixel can take.
        filters: feature maps of each stack.
        blocks: gated layers, of which the first has a 7 x 7 kernel.
        kernel_size: of the other layers; odd.
        likelihood: of the sub-pixels. `auto` is Bernoulli for two levels and categorical for more.
        num_classes: condition on this many classes.

    Raises:
        ValueError: arguments that make no model; the message says which.

    References:
        Conditional image generation with PixelCNN decoders (van den Oord et al., 2016), sections 2.1 to 2.3; masks
        between channels and the head as in Pixel recurrent neural networks (van den Oord et al., 2016), section 3.4.
    """

    def __init__(
        self,
        channels: int = 3,
        height: int = 32,
        width: int = 32,
        levels: int = 256,
        filters: int = 120,
        blocks: int = 15,
        kernel_size: int = 3,
        likelihood: Literal["auto", "bernoulli", "categorical"] = "auto",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(ImageSpec(channels, height, width, levels), num_classes)
        if filters < channels:
            raise ValueError(f"filters={filters}: wanted at least one for each of the channels={channels}")
        at_least(1, blocks=blocks)
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: wanted an odd number from 3 on")
        self.head = PixelLikelihood(likelihood, self.spec, ("bernoulli", "categorical"), dependent=True)
        self.by_channel = channels > 1
        channel = torch.arange(channels)
        group = torch.arange(filters) * channels // filters  # the channel that a feature of the horizontal stack is of
        value = channel.repeat_interleave(self.head.outputs // channels)  # and one that is predicted

        within = self._mask(group, group)
        own = self._mask(group.repeat(2), group)  # repeated for tanh and for sigmoid
        first = self._mask(group.repeat(2), channel, strict=True)
        reach = FIRST_KERNEL // 2
        vertical = CausalConv2d(channels, 2 * filters, (reach, FIRST_KERNEL), "down")
        horizontal = CausalConv2d(channels, 2 * filters, (1, reach))
        if first is not None:  # the pixels on the left, and beside the nearest of them this one
            both = torch.cat([torch.ones_like(first).expand(-1, -1, -1, reach), F.pad(first, (reach - 1, 0))], dim=1)
            horizontal = CausalConv2d(2 * channels, 2 * filters, (1, reach), mask=both)
        layers = [GatedLayer(vertical, horizontal, filters, within, False, num_classes)]

        reach = kernel_size // 2 + 1
        mask = None if own is None else F.pad(own, (reach - 1, 0), value=1.0)
        for _ in range(blocks - 1):
            vertical = CausalConv2d(filters, 2 * filters, (reach, kernel_size), "down")
            horizontal = CausalConv2d(filters, 2 * filters, (1, reach), mask=mask)
            layers.append(GatedLayer(vertical, horizontal, filters, within, True, num_classes))
        self.layers = nn.ModuleList(layers)
        self.hidden = Pointwise(filters, filters, within)
        self.output = Pointwise(filters, len(value), self._mask(value, group), autocast=False)

    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        v, h = down_shift(x), self._beside(right_shift(x), x)
        for layer in self.layers:
            v, h = layer(v, h, y)
        return self.output(F.relu(self.hidden(F.relu(h))))

    def predict_row(self, above: Tensor, y: Tensor | None, walk: Walk) -> None:
        v = above
        for layer in self.layers:
            assert isinstance(layer, GatedLayer)
            v = layer.row(v, y, walk)

    def predict_pixel(self, left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        h = self._beside(left, here)
        for layer in self.layers:
            assert isinstance(layer, GatedLayer)
            h = layer.pixel(h, y, walk)
        return self.output(F.relu(self.hidden(F.relu(h), walk)), walk)

    def _mask(self, outputs: Tensor, inputs: Tensor, strict: bool = False) -> Tensor | None:
        """`(out, in, 1, 1)`: what is of a channel sees what is of this one and those before, or if strict those before.

        None for a single channel, of which all sees all.
        """
        return made_mask(outputs, inputs, strict)[:, :, None, None].float() if self.by_channel else None

    def _beside(self, left: Tensor, here: Tensor) -> Tensor:
        """What the horizontal stack is given: a single channel is never told of its own pixel."""
        return torch.cat([left, here], dim=1) if self.by_channel else left


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()
