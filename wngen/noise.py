"""Random numbers that belong to an image: a function of (seed, image index, draw), whatever the batch.

A generator hands out numbers in the order in which they are asked for, so a bound estimated with it
changes with the batch size, the chunking and the number of processes. Counter-based numbers do not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF  # 32-bit words are kept in int64 tensors: torch has few operations on uint32


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10, a counter-based generator that passes BigCrush.

    Args:
        counter: four 32-bit words as int64 tensors (or ints) that broadcast with each other.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of independent words, uniform over 0 to 2^32 - 1.

    References:
        Parallel random numbers: as easy as 1, 2, 3 (Salmon et al., 2011), section 3.3.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which leaves every bit of the product
        c0, c1, c2, c3 = (p1 >> 32) & _WORD ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) & _WORD ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


class Noise:
    """Independent random numbers for each image of a batch.

    Two batches that hold the same image give it the same numbers, in whatever company it comes. Each
    call of `uniform` or `normal` moves on to fresh numbers, so the n-th call of one `Noise` agrees
    with the n-th call of another one made alike.

    Args:
        seed: names the whole family of numbers.
        index: `(B,)` integers, the images' places in their data set.
        draw: which repetition: the optimizer step in training, the importance sample in evaluation. One
            integer for the batch, or `(B,)`.
    """

    def __init__(self, seed: int, index: Tensor, draw: Tensor | int = 0) -> None:
        self.seed = seed
        self.index = index.long()
        # Filled where it is wanted: to copy a number there, a GPU would be waited for.
        draw = torch.full((), draw, device=index.device) if isinstance(draw, int) else draw.to(index.device)
        self.draw = draw.long().expand(index.shape)
        self._calls = 0

    @classmethod
    def fresh(cls, batch_size: int, device: torch.device | str | None = None) -> Noise:
        """Noise seeded from torch's global generator, for callers that bring none."""
        seed = int(torch.randint(2**62, ()))
        return cls(seed, torch.arange(batch_size, device=device))

    def repeat(self, draws: Iterable[int]) -> Noise:
        """Noise for every image under each of `draws`, as rows `(k b)`: the draw changes slowest.

        Raises:
            ValueError: this noise is itself another draw than 0, whose repetitions would be draws of other noise.
        """
        if self.draw.any():
            raise ValueError(
                f"noise of draw {int(self.draw.max())} cannot be repeated: repetitions are the draws of noise with "
                "draw=0; take that, and another seed where their numbers must differ from those of earlier ones"
            )
        ids = torch.tensor(list(draws), device=self.index.device)
        return Noise(self.seed, self.index.repeat(len(ids)), ids.repeat_interleave(len(self.index)))

    def _words(self, count: int) -> Tensor:
        """`(B, count)` uniform 32-bit words."""
        block = torch.arange(-(-count // 4), device=self.index.device)
        key = self.seed & _WORD, (self.seed >> 32) & _WORD
        words = philox((block, self._calls, self.draw[:, None] & _WORD, self.index[:, None] & _WORD), key)
        self._calls += 1
        return torch.stack(words, dim=-1).flatten(1)[:, :count]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in the open interval (0, 1), `(B, *shape)` float32."""
        words = self._words(math.prod(shape))
        # 23 bits and a half step, which keeps both ends out, are all that float32 resolves: of 24 the last becomes 1.
        return ((words >> 9).float() + 0.5).mul_(2**-23).view(len(self.index), *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers by the Box-Muller transform, `(B, *shape)` float32."""
        count = math.prod(shape)
        radius_word, angle_word = self._words(2 * -(-count // 2)).chunk(2, dim=1)
        radius = ((radius_word.double() + 0.5) * 2**-32).log().mul(-2).sqrt().float()
        angle = angle_word.float() * (2 * math.pi * 2**-32)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].view(len(self.index), *shape)


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed for one use of a user's seed, independent of its other uses."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
