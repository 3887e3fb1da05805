"""Images while they are being drawn pixel by pixel: as a film, and as a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from wngen.decoder import Watch
from wngen.image import ImageSpec
from wngen.sampling.grids import GREY, grid, to_intensity


class Film:
    """Watches images being drawn, the first chunk of them, and keeps some of the moments as frames.

    Args:
        spec: of the images.
        frames: how many to keep; fewer if nothing new is seen for a while, as on the way over pixels that were given.
        columns: of the grid that each frame is.
    """

    def __init__(self, spec: ImageSpec, frames: int = 56, columns: int | None = None) -> None:
        pixels = spec.height * spec.width
        self.spec, self.columns = spec, columns
        self.moments = {max(1, round(i * pixels / frames)) for i in range(1, frames + 1)}
        self.frames: list[Tensor] = []
        self._steps = 0

    def __call__(self, images: Tensor, there: Tensor) -> None:
        self._steps += 1
        if self._steps in self.moments:
            frame = grid(torch.where(there, to_intensity(images, self.spec.levels), GREY), 256, self.columns)
            if not self.frames or not torch.equal(frame, self.frames[-1]):
                self.frames.append(frame)


@contextmanager
def watched(pixels: int, *others: Watch) -> Iterator[Watch]:
    """A progress bar on standard error, where that is a terminal, and others that watch too.

    Args:
        pixels: how many steps there will be: the pixels of an image, for each chunk of images.
        others: are shown the images after the bar.
    """
    console = Console(stderr=True)
    columns = TextColumn("drawing"), BarColumn(), TimeElapsedColumn(), TextColumn("remaining"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=pixels)

        def watch(images: Tensor, there: Tensor) -> None:
            bar.advance(task)
            for other in others:
                other(images, there)

        yield watch
