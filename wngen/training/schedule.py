"""How the learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "exponential"]


def learning_rate_factor(
    decay: Decay, warmup_steps: int, total_steps: float, decay_rate: float
) -> Callable[[int], float]:
    """The learning rate at each step, relative to its peak.

    Args:
        decay: `linear` and `cosine` reach 0 at `total_steps`; `exponential` multiplies by `decay_rate` at each step.
        warmup_steps: over which it rises linearly from 0.
        total_steps: length of the training, for `linear` and `cosine`.
        decay_rate: for `exponential`.

    Returns:
        A function of the step, counted from 0.

    Raises:
        ValueError: a training without an end cannot decay towards it.
    """
    if decay in ("linear", "cosine") and not 0 < total_steps < math.inf:
        raise ValueError(f"decay={decay!r} needs a training with an end: set trainer.max_epochs or trainer.max_steps")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        progress = min(1.0, step / total_steps) if total_steps else 0.0
        fall = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "exponential": decay_rate**step,
        }
        return rise * fall[decay]

    return factor
