"""Pixel by pixel: one walk over the images, and the sources that the next pixel's value is taken from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from wngen.distributions import PixelDistribution
from wngen.image import ImageSpec
from wngen.nn import Walk, fold
from wngen.noise import Noise
from wngen.precision import full_precision

Source = Callable[[PixelDistribution, int, int], Tensor]
"""Gives the levels `(B, C, 1, 1)` uint8 of the pixel at a row and a column, whose distribution it is told."""

Watch = Callable[[Tensor, Tensor], None]
"""Is shown the images `(B, C, H, W)` after each pixel, and told which of their pixels are there, `(H, W)` bool."""

Step = Callable[[], Any]
"""Reads tensors that stay where they are, and returns one."""

Capture = Callable[[Step], Step]
"""Makes of a step one that does the same to what its tensors hold by then."""


@runtime_checkable
class Incremental(Protocol):
    """What the decoder asks of a model; `wngen.autoregressive.AutoregressiveModel` says what each part is."""

    spec: ImageSpec
    period: int
    by_channel: bool

    def predict_row(self, above: Tensor, y: Tensor | None, walk: Walk) -> None: ...
    def predict_pixel(self, left: Tensor, here: Tensor, y: Tensor | None, walk: Walk) -> Tensor: ...
    def distribution(self, predicted: Tensor) -> PixelDistribution: ...


class Drawn:
    """A source that draws each pixel, by random numbers that belong to the image and the pixel.

    Args:
        noise: of the images; its seed and indices are used.
        width: columns of the images.
        temperature: below 1 sharpens the distributions.
    """

    def __init__(self, noise: Noise, width: int, temperature: float = 1.0) -> None:
        self.noise, self.width, self.temperature = noise, width, temperature
        self._row = -1

    def __call__(self, distribution: PixelDistribution, row: int, column: int) -> Tensor:
        if row != self._row:  # a whole row's numbers take as long as those of a pixel
            noise = Noise(self.noise.seed, self.noise.index, row)
            self._row, self._uniform = row, noise.uniform(distribution.uniforms, 1, self.width)
        return distribution.draw(self._uniform[..., column : column + 1], self.temperature)


class Given:
    """A source that takes the pixels that are known from images, and the others from another source.

    Args:
        x: `(B, C, H, W)` uint8 levels.
        known: `(H, W)` bool, true where the pixel is given.
        otherwise: gives the rest.
    """

    def __init__(self, x: Tensor, known: Tensor, otherwise: Source) -> None:
        self.x, self.known, self.otherwise = x, known.to(x.device), otherwise
        self._known = known.tolist()

    def __call__(self, distribution: PixelDistribution, row: int, column: int) -> Tensor:
        if self._known[row][column]:
            return self.x[:, :, row : row + 1, column : column + 1]
        return self.otherwise(distribution, row, column)

    def shown_to(self, watch: Watch) -> Watch:
        """What has another watch see all pixels that are known from the first one on."""
        return lambda images, there: watch(torch.where(self.known, self.x, images), there | self.known)


class Decoder:
    """Walks over images pixel by pixel, at about the cost of one forward pass for each image.

    It works on a copy of the model with folded weights. On a GPU the step at a pixel is captured as a CUDA graph: once
    for each kind of pixel, as layers at half resolution take part in every second one only.

    Args:
        model: any autoregressive model.
        capture: records a step for replay; on a GPU as a CUDA graph, elsewhere not at all, by default.
    """

    def __init__(self, model: Incremental, capture: Capture | None = None) -> None:
        assert isinstance(model, nn.Module)
        folded: Any = fold(model).eval()
        self.model: Incremental = folded
        self.like = next(p for p in folded.parameters() if p.is_floating_point())
        self.capture = CUDAGraphs() if capture is None and self.like.is_cuda else capture

    @torch.no_grad()
    def run(self, n: int, source: Source, y: Tensor | None = None, watch: Watch | None = None) -> tuple[Tensor, Tensor]:
        """Take every pixel of `n` images from a source.

        Args:
            n: number of images.
            source: of the pixels' values.
            y: `(n,)` integer classes; only for a conditional model.
            watch: is called after each pixel.

        Returns:
            The images `(n, C, H, W)` uint8 on the model's device, and their log-likelihoods in nats `(n,)` float64 on
            the CPU, of which those of given pixels are a part.
        """
        device = self.like.device
        with full_precision(device), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._walk(n, source, y, watch)

    def _walk(self, n: int, source: Source, y: Tensor | None, watch: Watch | None) -> tuple[Tensor, Tensor]:
        model, spec, like = self.model, self.model.spec, self.like
        walk = Walk(n, spec.height, spec.width, like, static=self.capture is not None)
        steps = _Steps(self.capture)
        images = torch.zeros(n, *spec.shape, dtype=torch.uint8, device=like.device)
        there = torch.zeros(spec.height, spec.width, dtype=torch.bool, device=like.device)
        nats = torch.zeros(n, dtype=torch.float64)
        above, left, here = (like.new_zeros(n, spec.channels, 1, width) for width in (spec.width, 1, 1))
        groups = [slice(c, c + 1) for c in range(spec.channels)] if model.by_channel else [slice(None)]
        for row in range(spec.height):
            walk.enter_row(row)
            steps.run(self._kind(row), lambda: model.predict_row(above, y, walk))
            left.zero_()
            predictions = []
            for column in range(spec.width):
                walk.enter_pixel(column)
                here.zero_()
                for channels in groups:
                    kind = self._kind(row) + self._kind(column)
                    predicted = steps.run(kind, lambda: model.predict_pixel(left, here, y, walk))
                    level = source(model.distribution(predicted), row, column)[:, channels]
                    images[:, channels, row, column] = level[..., 0, 0]
                    here[:, channels] = spec.scale_levels(level, like.dtype)
                left.copy_(here)
                predictions.append(predicted.clone())
                if watch is not None:
                    there[row, column] = True
                    watch(images, there)
            levels = images[:, :, row : row + 1]
            above.copy_(spec.scale_levels(levels, like.dtype))
            row_nats = model.distribution(torch.cat(predictions, dim=3)).log_prob(levels).flatten(1).sum(dim=1)
            nats += row_nats.cpu().double()
        return images, nats

    def _kind(self, position: int) -> tuple[bool, int]:
        """All that a step can make of its row, or its column, beside using it as an address."""
        return position > 0, position % self.model.period


class _Steps:
    """Runs steps as they stand, or captures each kind of them when it comes for the first time and then replays it."""

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture
        self.replays: dict[tuple[object, ...], Step] = {}

    def run(self, kind: tuple[object, ...], step: Step) -> Any:
        below_first_row = kind[0]  # its kinds would be captured for a single use
        if kind in self.replays:
            return self.replays[kind]()
        output = step()  # makes the buffers too; what it does twice comes to the same as once
        if self.capture is not None and below_first_row:
            try:
                self.replays[kind] = self.capture(step)
            except RuntimeError as error:
                warnings.warn(f"sampling goes on without CUDA graphs, more slowly: {error}", stacklevel=2)
                self.capture = None
                self.replays.clear()
        return output


class CUDAGraphs:
    """Captures steps on the current GPU, each to be replayed at the cost of a single launch.

    What a step returns lies in memory that all of them share: it holds until the next one is replayed.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            output = step()

        def replay() -> Any:
            graph.replay()
            return output

        return replay
