"""PixelSNAIL: causal convolutions for what is near, causal attention for what is far."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from wngen.autoregressive import AutoregressiveModel
from wngen.image import ImageSpec
from wngen.likelihood import PixelLikelihood
from wngen.model import at_least
from wngen.nn import CausalAttention, CausalConv2d, GatedResidualBlock, Pointwise, Stem, Walk, elu

COORDINATES = 2


class SnailLayer(nn.Module):
    """Residual blocks, and attention to all pixels before: one layer of the paper's figure 2.

    What is remembered of a pixel, its key and value, depends on the pixel itself; what is asked at it, the query, only
    on those before.

    Args:
        channels: of the images.
        filters: feature maps.
        blocks: residual blocks.
        keys: channels of a key.
        values: channels of a value.
        dropout: in the blocks.
        num_classes: of the labels that bias every block, or None.
    """

    def __init__(
        self, channels: int, filters: int, blocks: int, keys: int, values: int, dropout: float, num_classes: int | None
    ) -> None:
        super().__init__()
        block = partial(GatedResidualBlock, dropout=dropout, num_classes=num_classes)
        convolution = partial(CausalConv2d, kernel_size=(2, 2), reach="down_right")
        asking, remembered = filters + COORDINATES, channels + filters + COORDINATES
        self.blocks = nn.ModuleList(block(filters, convolution) for _ in range(blocks))
        self.memory_block, self.memory = block(remembered, Pointwise), Pointwise(remembered, keys + values)
        self.query_block, self.query = block(asking, Pointwise), Pointwise(asking, keys)
        self.attention = CausalAttention(keys, values)
        self.merge = block(filters, Pointwise, aux_channels=values)

    def forward(self, x: Tensor, features: Tensor, background: Tensor, y: Tensor | None) -> Tensor:
        """Features `(B, filters, H, W)` to the same, with the images `(B, C, H, W)` and coordinates `(B, 2, H, W)`."""
        for block in self.blocks:
            features = block(features, y=y)
        placed = torch.cat([features, background], dim=1)
        memory = self.memory(self.memory_block(torch.cat([x, placed], dim=1), y=y))
        query = self.query(self.query_block(placed, y=y))
        return self.merge(features, self.attention(query, memory), y)

    def keep(self, x: Tensor, y: Tensor | None, walk: Walk) -> None:
        """Remember the pixel before the one that the walk has reached, now that its value `(B, C, 1, 1)` is known."""
        row = self._row(walk)
        last = row[:, 0, -1:] if walk.by_row else walk.patches(row, 1)
        content = torch.cat([x, last.transpose(1, 2)[..., None]], dim=1)
        self.attention.keep(self.memory(self.memory_block(content, y=y, walk=walk), walk), walk)

    def pixel(self, features: Tensor, background: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        """The features at a pixel, `(B, filters, 1, 1)` to the same."""
        for block in self.blocks:
            features = block(features, y=y, walk=walk)
        placed = torch.cat([features, background], dim=1)
        walk.write(self._row(walk), placed, left=1)
        query = self.query(self.query_block(placed, y=y, walk=walk), walk)
        return self.merge(features, self.attention.step(query, walk), y, walk)

    def _row(self, walk: Walk) -> Tensor:
        """Features and coordinates along this row, until the pixels they belong to are known."""
        return walk.rows(self, 1, self.query.conv.in_channels, left=1)


class PixelSNAIL(AutoregressiveModel):
    """PixelSNAIL: layers of causal residual blocks and attention to every pixel before.

    The paper's CIFAR-10 model has 12 layers of 4 blocks with 256 filters, keys of 16 and values of 128 channels, 10
    components and dropout 0.5. The defaults make one of 4 million parameters.

    Args:
        channels: of the images.
        height: rows.
        width: columns.
        levels: values a sub-pixel can take.
        filters: feature maps.
        layers: of residual blocks and attention.
        blocks: gated residual blocks of each layer.
        keys: channels of a key of the attention.
        values: channels of a value.
        components: of the mixture.
        likelihood: of the pixels. `auto` is Bernoulli for one channel of two levels and the mixture for all else.
        dropout: in every block, after its first convolution.
        num_classes: condition on this many classes.

    Raises:
        ValueError: arguments that make no model; the message says which.

    References:
        PixelSNAIL: an improved autoregressive generative model (Chen et al., 2018), and the released code.
    """

    background: Tensor

    def __init__(
        self,
        channels: int = 3,
        height: int = 32,
        width: int = 32,
        levels: int = 256,
        filters: int = 64,
        layers: int = 8,
        blocks: int = 4,
        keys: int = 16,
        values: int = 64,
        components: int = 10,
        likelihood: Literal["auto", "bernoulli", "mixture"] = "auto",
        dropout: float = 0.5,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(ImageSpec(channels, height, width, levels), num_classes)
        at_least(1, filters=filters, layers=layers, blocks=blocks, keys=keys, values=values, components=components)
        self.head = PixelLikelihood(likelihood, self.spec, components=components)
        self.stem = Stem(channels, filters)
        self.layers = nn.ModuleList(
            SnailLayer(channels, filters, blocks, keys, values, dropout, num_classes) for _ in range(layers)
        )
        self.output = Pointwise(filters, self.head.outputs, autocast=False)
        rows, columns = torch.arange(height) / height - 0.5, torch.arange(width) / width - 0.5
        background = torch.cartesian_prod(rows, columns)[None]  # (1, H W, 2)
        self.register_buffer("background", background, persistent=False)

    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        features = self.stem(x)
        background = self.background.transpose(1, 2).unflatten(2, x.shape[2:]).expand(len(x), -1, -1, -1)
        for layer in self.layers:
            features = layer(x, features, background, y)
        return self.output(elu(features))

    def predict_row(self, above: Tensor, y: Tensor | None, walk: Walk) -> None:
        self.stem.row(above, walk)
        if walk.row > 0:
            self._keep(above[..., -1:], y, walk)

    def predict_pixel(self, left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor:
        if walk.column > 0:
            self._keep(left, y, walk)
        features = self.stem.pixel(left, walk)
        background = walk.pick(self.background).expand(len(left), -1, -1, -1)
        for layer in self.layers:
            assert isinstance(layer, SnailLayer)
            features = layer.pixel(features, background, y, walk)
        return self.output(elu(features), walk)

    def _keep(self, before: Tensor, y: Tensor | None, walk: Walk) -> None:
        """Have all layers remember the pixel before the one that the walk has reached."""
        for layer in self.layers:
            assert isinstance(layer, SnailLayer)
            layer.keep(before, y, walk)
