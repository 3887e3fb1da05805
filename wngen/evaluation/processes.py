"""The processes that share an evaluation: this one alone, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch import distributed

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """A group of processes, seen from one of them.

    Args:
        rank: which one this is, from 0.
        count: how many they are.
    """

    rank: int = 0
    count: int = 1

    def gather(self, value: Value) -> list[Value]:
        """What each process calls this with, in the order of their ranks; all must call it."""
        if self.count == 1:
            return [value]
        values: list[Value | None] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]


PATIENCE = timedelta(days=7)  # of processes that are done with their images

ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The group that torchrun has started, as its environment variables say; without them this process alone.

    Only tables of figures go between the processes, and through the processor's memory.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
