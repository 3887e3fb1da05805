"""PixelCNN++: two streams of causal convolutions through a U-shaped network, and a mixture of logistics."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from wngen.autoregressive import AutoregressiveModel
from wngen.image import ImageSpec
from wngen.likelihood import PixelLikelihood
from wngen.model import at_least
from wngen.nn import CausalConv2d, CausalConvTranspose2d, GatedResidualBlock, Pointwise, ShiftedConv2d, Stem, Walk, elu


class Scale(nn.Module):
    """The network at one resolution, and within it, between the way down and the way up, at half of it.

    The stream `u` sees the rows above a pixel, the stream `ul` also what is on its left. On the way back each block
    has a short-cut from the block that it mirrors.

    Args:
        scales: number of resolutions, this one included.
        blocks: of each stream on the way down; on the way up there is one more, but not at the lowest resolution.
        filters: feature maps of each stream.
        dropout: in the blocks.
        num_classes: of the labels that bias every block, or None.
    """

    def __init__(self, scales: int, blocks: int, filters: int, dropout: float, num_classes: int | None) -> None:
        super().__init__()
        block = partial(GatedResidualBlock, filters, dropout=dropout, num_classes=num_classes)
        u_conv = partial(CausalConv2d, kernel_size=(2, 3), reach="down")
        ul_conv = partial(CausalConv2d, kernel_size=(2, 2), reach="down_right")
        back = blocks + 1 if scales > 1 else blocks
        self.u_down = nn.ModuleList(block(u_conv) for _ in range(blocks))
        self.ul_down = nn.ModuleList(block(ul_conv, aux_channels=filters) for _ in range(blocks))
        self.u_up = nn.ModuleList(block(u_conv, aux_channels=filters) for _ in range(back))
        self.ul_up = nn.ModuleList(block(ul_conv, aux_channels=2 * filters) for _ in range(back))
        self.inner: Scale | None = None
        if scales > 1:
            self.u_shrink, self.ul_shrink = u_conv(filters, filters, stride=2), ul_conv(filters, filters, stride=2)
            self.inner = Scale(scales - 1, blocks, filters, dropout, num_classes)
            self.u_grow, self.ul_grow = CausalConvTranspose2d(filters, 3), CausalConvTranspose2d(filters, 2)

    def forward(self, u: Tensor, ul: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both streams `(B, filters, H, W)` to the same."""
        height, width = u.shape[-2:]
        us, uls = [u], [ul]
        for u_block, ul_block in zip(self.u_down, self.ul_down, strict=True):
            us.append(u_block(us[-1], y=y))
            uls.append(ul_block(uls[-1], us[-1], y))
        if self.inner is None:
            u, ul = us.pop(), uls.pop()
        else:
            u, ul = self.inner(self.u_shrink(us[-1]), self.ul_shrink(uls[-1]), y)
            u, ul = self.u_grow(u, height, width), self.ul_grow(ul, height, width)
        for u_block, ul_block in zip(self.u_up, self.ul_up, strict=True):
            u = u_block(u, us.pop(), y)
            ul = ul_block(ul, torch.cat([u, uls.pop()], dim=1), y)
        return u, ul

    def row(self, u: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        """The stream u at a row, `(B, filters, 1, W)` to the same; it is stored for `pixel` block by block."""
        us = [u]
        for block in self.u_down:
            us.append(block(us[-1], y=y, walk=walk))
            walk.store(block, us[-1])
        if self.inner is None:
            u = us.pop()
        else:
            self.u_shrink.keep(us[-1], walk)
            if walk.on_half:
                self.u_grow.keep(self.inner.row(self.u_shrink.step(walk), y, walk.half), walk)
            u = self.u_grow.step(walk)
        for block in self.u_up:
            u = block(u, us.pop(), y, walk)
            walk.store(block, u)
        return u

    def pixel(self, ul: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        """The stream ul at a pixel, `(B, filters, 1, 1)` to the same."""
        uls = [ul]
        for u_block, block in zip(self.u_down, self.ul_down, strict=True):
            uls.append(block(uls[-1], walk.stored(u_block), y, walk))
        if self.inner is None:
            ul = uls.pop()
        else:
            self.ul_shrink.keep(uls[-1], walk)
            if walk.on_half:
                self.ul_grow.keep(self.inner.pixel(self.ul_shrink.step(walk), y, walk.half), walk)
            ul = self.ul_grow.step(walk)
        for u_block, block in zip(self.u_up, self.ul_up, strict=True):
            ul = block(ul, torch.cat([walk.stored(u_block), uls.pop()], dim=1), y, walk)
        return ul


class PixelCNNPP(AutoregressiveModel):
    """PixelCNN++: whole pixels predicted by two streams at three resolutions, as a discretized mixture of logistics.

    The defaults are the paper's CIFAR-10 model as it was released, 53.66 million parameters. Any size will do: where a
    resolution is odd, half of it is rounded up, and what grows from it is cut.

    Args:
        channels: of the images.
        height: rows.
        width: columns.
        levels: values a sub-pixel can take.
        filters: feature maps of each stream.
        blocks: gated residual blocks of each stream at each resolution, on the way down.
        scales: number of resolutions.
        components: of the mixture.
        likelihood: of the pixels. `auto` is Bernoulli for one channel of two levels and the mixture for all else.
        dropout: in every block, after its first convolution.
        num_classes: condition on this many classes.

    Raises:
        ValueError: arguments that make no model; the message says which.

    References:
        PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood and other modifications
        (Salimans et al., 2017), and the released code.
    """

    def __init__(
        self,
        channels: int = 3,
        height: int = 32,
        width: int = 32,
        levels: int = 256,
        filters: int = 160,
        blocks: int = 5,
        scales: int = 3,
        components: int = 10,
        likelihood: Literal["auto", "bernoulli", "mixture"] = "auto",
        dropout: float = 0.5,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(ImageSpec(channels, height, width, levels), num_classes)
        at_least(1, filters=filters, blocks=blocks, scales=scales, components=components)
        self.head = PixelLikelihood(likelihood, self.spec, components=components)
        self.period = 2 ** (scales - 1)
        self.above = ShiftedConv2d(channels, filters, (2, 3), "down")
        self.stem = Stem(channels, filters)
        self.network = Scale(scales, blocks, filters, dropout, num_classes)
        self.output = Pointwise(filters, self.head.outputs, autocast=False)

    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        _, ul = self.network(self.above(x), self.stem(x), y)
        return self.output(elu(ul))

    def predict_row(self, above: Tensor, y: Tensor | None, walk: Walk) -> None:
        self.stem.row(above, walk)
        self.network.row(self.above(above, walk), y, walk)

    def predict_pixel(self, left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        ul = self.network.pixel(self.stem.pixel(left, walk), y, walk)
        return self.output(elu(ul), walk)
