"""The noise in a gradient, estimated from those of parts of a batch, in a gauge that fits weight normalization."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from wngen.nn.layers import WeightNormalized


@dataclass(frozen=True)
class GradientNoise:
    """How much the gradient of one image scatters around the gradient of all.

    Attributes:
        covariance_trace: tr(Sigma), the variance of a single image's gradient, summed over the parameters.
        squared_gradient: |G|^2 of the gradient over all images there are. An estimate of it can be negative.
    """

    covariance_trace: float
    squared_gradient: float

    @property
    def noise_scale(self) -> float:
        """B_simple = tr(Sigma) / |G|^2 in images; infinite where no gradient shows above the noise."""
        return self.covariance_trace / self.squared_gradient if self.squared_gradient > 0 else math.inf

    @classmethod
    def of_parts(cls, images: int, parts: int, sum_of_squares: float, square_of_mean: float) -> GradientNoise:
        """Both without bias, from the mean gradients g_i of parts of b_i images.

        Since E|g_i|^2 = |G|^2 + tr(Sigma) / b_i, and likewise for the gradient of all N images,

            tr(Sigma) = (sum_i b_i |g_i|^2 - N |g|^2) / (parts - 1)
            |G|^2 = |g|^2 - tr(Sigma) / N

        For parts of one size these are the paper's estimators from two batch sizes, b and N.

        Args:
            images: N, in all parts together.
            parts: how many there are; at least two.
            sum_of_squares: sum_i b_i |g_i|^2.
            square_of_mean: |g|^2 of the mean gradient g = sum_i b_i g_i / N.

        References:
            An Empirical Model of Large-Batch Training (McCandlish et al., 2018), appendix A.1.
        """
        assert parts > 1
        trace = (sum_of_squares - images * square_of_mean) / (parts - 1)
        return cls(trace, square_of_mean - trace / images)


class Blocks:
    """The trainable parameters of a model, by block, and the squared norms of their gradients in a fixed gauge.

    A block is a child of the model, or an entry of a list of modules such as stochastic layers.

    A weight-normalized layer computes the same function for v and c v, but its gradient for v is 1 / c of what it was;
    for the same model, noise scales could come out at anything between those of v and of the other parameters. So the
    gradient is taken for the direction v / ||v|| of each output unit, which is ||v|| times the gradient for v; g, bias
    and all other parameters count as they are.

    Args:
        model: whose parameters; those that need no gradient are left out.

    Attributes:
        parameters: each once.
        names: of the blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        lists = {name for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
        blocks = [".".join(name.split(".")[: 1 + (name.split(".")[0] in lists)]) for name in named]
        self.names = list(dict.fromkeys(blocks))
        self._block_of = [self.names.index(block) for block in blocks]
        layers = {id(layer.v): layer for layer in model.modules() if isinstance(layer, WeightNormalized)}
        self._layer_of = [layers.get(id(p)) for p in self.parameters]

    @torch.no_grad()
    def lengths(self) -> list[Tensor | None]:
        """||v|| of the output units, for each of `parameters` that is the v of a layer; None for the others."""
        return [None if layer is None else layer.norm(layer.direction) for layer in self._layer_of]

    @torch.no_grad()
    def squared_norms(self, gradients: Sequence[Tensor], lengths: Sequence[Tensor | None]) -> Tensor:
        """`(len(names),)` in double precision.

        Args:
            gradients: one for each of `parameters`.
            lengths: what `lengths` gave when they were computed.
        """
        device = gradients[0].device
        norms = [
            torch.linalg.vector_norm(gradient) if layer is None or length is None else layer.norm(gradient) * length
            for gradient, layer, length in zip(gradients, self._layer_of, lengths, strict=True)
        ]
        squares = torch.stack([norm.double().square().sum() for norm in norms])
        total = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        return total.index_add_(0, torch.tensor(self._block_of, device=device), squares)


class PartSums:
    """What the estimators need of the parts' gradients, added up part by part, with the parameters as they are now.

    Args:
        blocks: of the model that the gradients are of.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._lengths = blocks.lengths()
        self._gradients = [torch.zeros_like(p) for p in blocks.parameters]
        self._squares = torch.zeros(len(blocks.names), dtype=torch.float64, device=self._gradients[0].device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=self._squares.device)  # of images and parts

    @torch.no_grad()
    def add(self, images: int, gradients: Sequence[Tensor]) -> None:
        """The mean gradient of a part of so many images."""
        torch._foreach_add_(self._gradients, list(gradients), alpha=images)
        self._squares += images * self.blocks.squared_norms(gradients, self._lengths)
        self._counts += torch.tensor([images, 1], device=self._counts.device)

    def estimate(self, sum_over_processes: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, GradientNoise]:
        """The noise of each block, and of `total`; empty if there are too few parts to tell.

        Args:
            sum_over_processes: adds a tensor to those of the other processes.
        """
        counts, squares = sum_over_processes(self._counts), sum_over_processes(self._squares)
        images, parts = counts.tolist()
        gradients = [sum_over_processes(gradient) / images for gradient in self._gradients]
        if parts < 2:
            return {}
        means = self.blocks.squared_norms(gradients, self._lengths)
        pairs = torch.stack([squares, means], dim=1)
        rows = torch.cat([pairs, pairs.sum(dim=0, keepdim=True)]).tolist()
        names = [*self.blocks.names, "total"]
        return {name: GradientNoise.of_parts(images, parts, *row) for name, row in zip(names, rows, strict=True)}


class RunningNoise:
    """Means of tr(Sigma) and of |G|^2 over the last measurements, each by itself.

    Their ratio is the noise scale. A mean of single ratios would be far too high or low, or negative: |G|^2 of one
    measurement is often close to zero. Nor would it do to let old measurements fade out: at the beginning of training
    |G|^2 can be a hundred times what it is later, and would be seen in the average for a long time.

    Args:
        window: how many measurements; at least one.
    """

    def __init__(self, window: int) -> None:
        self._last: deque[dict[str, GradientNoise]] = deque(maxlen=window)

    @property
    def count(self) -> int:
        """Measurements that the means are over; fewer than `window` in the beginning."""
        return len(self._last)

    def add(self, measured: dict[str, GradientNoise]) -> None:
        """Take in one measurement of each block, in place of the oldest where there are enough."""
        self._last.append(measured)

    def averages(self) -> dict[str, GradientNoise]:
        """Of each block; empty before the first measurement."""
        return {
            name: GradientNoise(
                fmean(measured[name].covariance_trace for measured in self._last),
                fmean(measured[name].squared_gradient for measured in self._last),
            )
            for name in (self._last[-1] if self._last else ())
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, from which `load_state_dict` goes on."""
        return {"measurements": [{name: astuple(noise) for name, noise in each.items()} for each in self._last]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; of more measurements than `window` the last count."""
        self._last.clear()
        self._last.extend({name: GradientNoise(*pair) for name, pair in each.items()} for each in state["measurements"])
