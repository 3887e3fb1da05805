"""Attention over the pixels before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wngen.nn.walk import Walk


class CausalAttention(nn.Module):
    """Each pixel's mean over the values of all pixels before it in raster order, weighted by how keys match its query.

    The weights are the softmax of query . key / sqrt(K). The first pixel has none before it and gets zeros.

    Args:
        keys: channels of a key and of a query, K.
        values: channels of a value, V.

    References:
        PixelSNAIL: an improved autoregressive generative model (Chen et al., 2018), figure 3.
    """

    def __init__(self, keys: int, values: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """`(B, V, H, W)` from queries `(B, K, H, W)` and keys and values `(B, K + V, H, W)`, as many as pixels."""
        # Queries from the second on and keys up to the last but one: what a query sees is then at or before its place.
        asked, remembered = query.flatten(2)[..., 1:], memory.flatten(2)[..., :-1]
        key, value = remembered.split([self.keys, self.values], dim=1)
        size = max(self.keys, self.values)  # fused kernels, which do without a matrix of all pairs, want one size
        q, k, v = (
            F.pad(part, (0, 0, 0, size - part.shape[1])).transpose(1, 2)[:, None] for part in (asked, key, value)
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.keys**-0.5)  # (B, 1, H W - 1, size)
        return F.pad(found[:, 0, :, : self.values], (0, 0, 1, 0)).transpose(1, 2).unflatten(2, query.shape[2:])

    def keep(self, memory: Tensor, walk: Walk) -> None:
        """Take in the key and value `(B, K + V, 1, 1)` of the pixel before the one that the walk has reached."""
        walk.put(self._memories(walk), memory)

    def step(self, query: Tensor, walk: Walk) -> Tensor:
        """`(B, V, 1, 1)` from the query `(B, K, 1, 1)` of the pixel that the walk has reached."""
        if walk.row == walk.column == 0:
            return query.new_zeros(len(query), self.values, 1, 1)
        # A pixel's memory lies at the position of the next one, and nobody's at the first.
        memories, position, sees = self._memories(walk)[:, None, 1:], walk.position, None
        if isinstance(position, Tensor):
            count = memories.shape[2]
            places = walk.once((CausalAttention, count), lambda: torch.arange(count, device=position.device))
            sees = (places < position)[None]
        else:
            memories = memories[:, :, :position]
        key, value = memories.split([self.keys, self.values], dim=3)
        found = F.scaled_dot_product_attention(query.flatten(2).transpose(1, 2)[:, None], key, value, sees)
        return found.permute(0, 3, 1, 2)  # (B, 1, 1, V) to (B, V, 1, 1)

    def _memories(self, walk: Walk) -> Tensor:
        return walk.pixels(self, self.keys + self.values)
