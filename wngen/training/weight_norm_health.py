"""How fast the directions of weight-normalized layers turn, and how long v has become."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from rich import get_console
from torch import Tensor

from wngen.nn.layers import WeightNormalized
from wngen.training.forced_norm import trained_layers
from wngen.training.module import Training

SAME = 1.1  # below this factor ||v|| counts as unchanged


class LayerHealth(NamedTuple):
    """Of a layer at one step, each the mean over its output units.

    Attributes:
        v_norm: ||v|| under the mask, before the step.
        angle: in radians, by which the step turned v.
        effective_learning_rate: learning_rate / ||v||.
    """

    v_norm: float
    angle: float
    effective_learning_rate: float


class WeightNormHealth(pl.Callback):
    """Logs ||v||, the angle of a step and the effective learning rate of each weight-normalized layer.

    A layer uses the direction of v alone. Only the angle by which a step turns it has an effect; and since steps make
    ||v|| grow, the same learning rate turns it less and less. `v_norm/<layer>`, `angle/<layer>` in radians and
    `effective_learning_rate/<layer>` are means over the output units; `.../median` is over the layers.

    The effective learning rate is learning_rate / ||v||. It is what governs the angle under an optimizer whose step
    does not depend on the gradient's size, as Adam and Adamax, which move each entry by about the learning rate: a
    unit of n inputs turns by up to sqrt(n) times it. For plain gradient descent it is learning_rate / ||v||^2, since
    the gradient is proportional to 1 / ||v||.

    ||v|| is taken before the step, masked entries left out. What cannot turn does not count: units without inputs, or
    with a single one. A step that is left out is not measured. Training takes the same path to the last bit with and
    without it; a measurement costs two passes over the weights, and a copy of them during the step.

    Args:
        every_n_steps: how often to measure, in optimizer steps.

    Raises:
        ValueError: `every_n_steps` below 1; or, when training begins, a strategy that splits up parameters, or a model
            without weight-normalized layers.

    Attributes:
        begun: ||v|| of each layer before the first step that was seen.
        last: what was measured last, of each layer.
        angles: of each layer the angle of a step, added up over the measurements.
        count: of the measurements.

    References:
        L2 regularization versus batch and weight normalization (van Laarhoven, 2017), for both effective rates.
        Rotational equilibrium (Kosson et al., 2024), for the angle of a step as what matters.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: wanted at least 1")
        self.every_n_steps = every_n_steps
        self.begun: dict[str, float] = {}
        self.last: dict[str, LayerHealth] = {}
        self.angles: dict[str, float] = {}
        self.count = 0
        self._layers: dict[str, WeightNormalized] = {}
        self._before: list[Tensor] = []  # directions, during a step that is measured
        self._learning_rate = 0.0  # of it
        self._skipped = 0  # steps before it that were left out

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._layers, self._before = trained_layers(trainer, pl_module, type(self).__name__), []
        if trainer.ckpt_path is None:
            self.begun, self.last, self.angles, self.count = {}, {}, {}, 0

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, Training)
        if not self.begun:
            directions = [layer.direction for layer in self._layers.values()]
            self.begun = {name: each.v_norm for name, each in self._health(directions, 0.0).items()}
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            self._before = [layer.direction.clone() for layer in self._layers.values()]
            self._learning_rate, self._skipped = pl_module.learning_rate, pl_module.skips.total

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Training)
        before, self._before = self._before, []
        if not before or pl_module.skips.total > self._skipped:
            return
        measured = self._health(before, self._learning_rate)
        if measured:
            self.last, self.count = measured, self.count + 1
            self.angles = {name: self.angles.get(name, 0.0) + health.angle for name, health in measured.items()}
            self._log(trainer, trainer.global_step - 1)

    def _health(self, before: list[Tensor], learning_rate: float) -> dict[str, LayerHealth]:
        """Of the layers that have a unit that counts."""
        pairs = zip(self._layers.values(), before, strict=True)
        rows = torch.stack([layer_health(layer, direction, learning_rate) for layer, direction in pairs]).tolist()
        found = {name: LayerHealth(*row) for name, row in zip(self._layers, rows, strict=True)}
        return {name: health for name, health in found.items() if all(map(math.isfinite, health))}

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        figures: dict[str, float] = {}
        for i, quantity in enumerate(LayerHealth._fields):
            figures |= {f"{quantity}/{name}": health[i] for name, health in self.last.items()}
            figures[f"{quantity}/median"] = median(health[i] for health in self.last.values())
        for logger in trainer.loggers:
            logger.log_metrics(figures, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            get_console().print(self.verdict(), soft_wrap=True, markup=False)

    def verdict(self) -> str:
        """How unevenly the layers turn, and what became of ||v||, in a sentence."""
        if not self.last:
            return f"Weight-norm health was not measured: no step fell due by every_n_steps={self.every_n_steps}."
        slowest, fastest = (pick(self.angles, key=self.angles.__getitem__) for pick in (min, max))
        angles = [f"{self.angles[name] / self.count:.2g} rad ({name})" for name in (slowest, fastest)]
        turned = f"Weight-norm health, over {self.count} measured steps: one turned v by {' to '.join(angles)}"
        growth = {name: health.v_norm / self.begun[name] for name, health in self.last.items() if name in self.begun}
        most = max(growth, key=lambda name: abs(math.log(growth[name])))
        factor = growth[most]
        if max(factor, 1 / factor) < SAME:
            return f"{turned}; ||v|| is within {math.ceil(100 * abs(factor - 1))}% of where it began."
        if factor < 1:
            return f"{turned}; ||v|| shrank by up to {1 / factor:.1f} times ({most}): the effective learning rate rose."
        return (
            f"{turned}; ||v|| grew by up to {factor:.1f} times ({most}), and by as much the effective learning rate "
            "fell, besides the schedule: ForcedWeightNorm keeps it."
        )

    def state_dict(self) -> dict[str, Any]:
        last = {name: list(health) for name, health in self.last.items()}
        return {"begun": self.begun, "last": last, "angles": self.angles, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun, self.angles, self.count = state_dict["begun"], state_dict["angles"], state_dict["count"]
        self.last = {name: LayerHealth(*each) for name, each in state_dict["last"].items()}


@torch.no_grad()
def layer_health(layer: WeightNormalized, before: Tensor, learning_rate: float) -> Tensor:
    """The figures of `LayerHealth`, `(3,)` in double precision; NaN if no unit counts.

    With a and b the norms of v before and after a step, and c that of their difference, the angle between them is
    2 asin sqrt((c^2 - (a - b)^2) / 4ab), which is exact for small angles too (the half-angle law of a triangle).

    Args:
        layer: as it is after the step.
        before: its `direction` before it.
        learning_rate: of the step.
    """
    before, after = before.double(), layer.direction.double()
    a, b, c = layer.norm(before), layer.norm(after), layer.norm(after - before)
    counts = (a > 0) & (b > 0)
    if layer.lone is not None:
        counts = counts & ~layer.lone
    stretch = (a - b).abs()
    square = (c - stretch).clamp_min(0) * (c + stretch) / (4 * a * b)
    figures = torch.stack([a, 2 * square.sqrt().clamp_max(1).asin(), learning_rate / a])
    return figures.where(counts, 0).flatten(1).sum(dim=1) / counts.sum()
