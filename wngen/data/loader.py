"""Loaders that cut batches out of memory, in an order that depends on no process, worker or interruption."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wngen.data.images import Images, derived_seed
from wngen.image import Batch


class EvaluationLoader:
    """Every image once, in index order, shared out among the processes without padding.

    The images are cut into the fewest batches of at most `batch_size`, of sizes that differ by at most
    one, and of each batch the processes take every `world_size`-th image. So all processes run the same
    number of batches (unless there are fewer images in a batch than processes).

    Args:
        images: what to go through.
        batch_size: images in a batch, over all processes.
        rank: which process this is.
        world_size: how many there are.
    """

    def __init__(self, images: Images, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.images = images
        batches = torch.arange(len(images)).tensor_split(max(1, -(-len(images) // batch_size)))
        self.batches = [batch[rank::world_size] for batch in batches if len(batch) > rank]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for index in self.batches:
            yield self.images[index]


class TrainingLoader:
    """Batches of one size, in an order that is a function of (seed, epoch) alone.

    The order is that of *global* batches, of which every process takes its part: training with one
    process or with several sees the same images in the same steps. What does not fill the last batch of
    an epoch is left out; the next epoch leaves out others.

    Lightning tells the loader the epoch, and keeps its position in the checkpoint, so that a run resumed
    within an epoch goes on with the images that it had not seen.

    Args:
        images: what to go through.
        batch_size: images in a batch, over all processes.
        seed: names the order.
        rank: which process this is.
        world_size: how many there are.
        shuffle: whether to shuffle at all.

    Raises:
        ValueError: a batch that cannot be filled, or cannot be shared out equally.
    """

    def __init__(
        self, images: Images, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, shuffle: bool = True
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} is the size over all processes and cannot be shared equally by {world_size}; "
                f"use {max(1, batch_size // world_size) * world_size}"
            )
        if batch_size > len(images):
            raise ValueError(
                f"batch_size={batch_size}, but there are {len(images)} training images: wanted at most that"
            )
        self.images, self.batch_size, self.seed, self.shuffle = images, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.position = 0  # batches of this epoch that were handed out
        self._start = 0  # where the next pass begins: past 0 only after a state was loaded

    @property
    def sampler(self) -> TrainingLoader:
        """The loader itself: Lightning calls `set_epoch` of what it finds under this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. A new one begins with its first batch, the present one where it was left."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def global_batches(self, epoch: int) -> Tensor:
        """`(len(self), batch_size)`, the indices of every batch of an epoch, over all processes."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            order = torch.randperm(len(self.images), generator=generator)
        else:
            order = torch.arange(len(self.images))
        return order[: len(self) * self.batch_size].view(-1, self.batch_size)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        batches = self.global_batches(self.epoch)
        start, self._start = self._start, 0
        for number in range(start, len(batches)):
            self.position = number + 1
            yield self.images[batches[number, self.rank :: self.world_size]]

    def state_dict(self) -> dict[str, int]:
        """The position, the same in every process, and what it is a position in."""
        return {"epoch": self.epoch, "position": self.position, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position, with any number of processes.

        Raises:
            ValueError: the position is within an epoch of another order.
        """
        within = 0 < state["position"] < len(self)
        for name in ("batch_size", "seed"):
            if within and state[name] != (mine := getattr(self, name)):
                raise ValueError(
                    f"the checkpoint lies within an epoch run with {name}={state[name]}, this run has {name}={mine}: "
                    f"resume with {name}={state[name]}, or from a checkpoint of an epoch's end"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._start = self.position
