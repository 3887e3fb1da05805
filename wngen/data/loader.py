"""Loaders that cut batches out of memory, in an order that depends on no process, worker or interruption."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wngen.data.images import Images
from wngen.image import Batch
from wngen.noise import derived_seed


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

    epoch = 0  # also where it stands in for a TrainingLoader: every pass is the same

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
    """Batches of one size without end, of which number n is a function of (seed, n) alone.

    Epoch after epoch, all images are shuffled and cut into *global* batches, of which every process takes
    its part: training with one process or with several sees the same images in the same steps. What does
    not fill the last batch of an epoch is left out; the next epoch leaves out others.

    One pass over the loader hands out as many batches as an epoch has, from where the last pass was left.
    So neither an interruption nor the way in which a trainer counts its epochs changes what comes next.

    Args:
        images: what to go through.
        batch_size: images in a batch, over all processes.
        seed: names the order.
        position: how many batches the run has had.
        rank: which process this is.
        world_size: how many there are.

    Raises:
        ValueError: a batch that cannot be filled, or cannot be shared out equally.
    """

    def __init__(
        self, images: Images, batch_size: int, seed: int, position: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} is the size over all processes and cannot be shared equally by {world_size}; "
                f"use {max(1, batch_size // world_size) * world_size}"
            )
        if batch_size > len(images):
            raise ValueError(f"batch_size={batch_size}: wanted at most the {len(images)} training images there are")
        self.images, self.batch_size, self.seed, self.position = images, batch_size, seed, position
        self.rank, self.world_size = rank, world_size

    @property
    def epoch(self) -> int:
        """Of the batch that was handed out last."""
        return max(0, self.position - 1) // len(self)

    def global_batches(self, epoch: int) -> Tensor:
        """`(len(self), batch_size)`, the indices of every batch of an epoch, over all processes."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        order = torch.randperm(len(self.images), generator=generator)
        return order[: len(self) * self.batch_size].view(-1, self.batch_size)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        end = self.position + len(self)
        while self.position < end:
            epoch, number = divmod(self.position, len(self))
            for batch in self.global_batches(epoch).to(self.images.image.device)[number : number + end - self.position]:
                self.position += 1
                yield self.images[batch[self.rank :: self.world_size]]

    def state_dict(self) -> dict[str, int]:
        """The place of the next batch, the same in every process, and what it is a place in."""
        epoch, number = divmod(self.position, len(self))
        return {"epoch": epoch, "batch": number, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a place, with any number of processes.

        Raises:
            ValueError: the place is within an epoch of another order.
        """
        for name, mine in (("batch_size", self.batch_size), ("seed", self.seed)):
            if state["batch"] and state[name] != mine:
                raise ValueError(
                    f"the checkpoint lies within an epoch run with {name}={state[name]}, this run has {name}={mine}: "
                    f"resume with {name}={state[name]}, or from a checkpoint of an epoch's end"
                )
        self.position = state["epoch"] * len(self) + state["batch"]
