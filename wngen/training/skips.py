"""Steps that are left out, since their gradient would do harm."""

from __future__ import annotations

import torch
from torch import Tensor

from wngen.training.adamax import CompiledAdamax


class Skips:
    """Counts them where the gradients are, so that a GPU is not waited for at each step.

    Args:
        limit: the largest norm of a gradient that a step is taken with.
        give_up_after: so many steps in a row may not be left out.
    """

    def __init__(self, limit: float, give_up_after: int) -> None:
        self.limit, self.give_up_after = limit, give_up_after
        self._counts = torch.zeros(3, dtype=torch.int64)  # all of them, in a row just now, and most in a row
        self._norm = torch.zeros(())  # of the last one

    def decide(self, norm: Tensor) -> Tensor:
        """Whether the step of this gradient, of which `norm` is the norm, is left out: a scalar, counted.

        Gradients are the same in every process, and so is the decision.
        """
        left_out = ~(norm <= self.limit)  # so that NaN is too
        total, row, most = self._counts.to(norm.device).unbind()
        row = (row + 1) * left_out
        self._counts = torch.stack([total + left_out, row, torch.maximum(most, row)])
        self._norm = torch.where(left_out, norm, self._norm.to(norm.device))
        return left_out

    def leave_out(self, left_out: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Have the coming step of the optimizer do nothing if `left_out` says so.

        A fused optimizer looks itself, and so does `CompiledAdamax`; for any other the device is waited for.
        """
        if optimizer.param_groups[0].get("fused") or isinstance(optimizer, CompiledAdamax):
            optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]  # as a gradient scaler tells it
        elif left_out:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None  # the optimizer passes over parameters without a gradient

    @property
    def total(self) -> int:
        """How many there have been."""
        return int(self._counts[0])

    @property
    def in_a_row(self) -> int:
        """How many up to the last step."""
        return int(self._counts[1])

    @property
    def left_out(self) -> Tensor:
        """Whether the last step was, a scalar where the gradients are."""
        return self._counts[1] > 0

    def check(self, step: int) -> None:
        """Give up, if so many were left out in a row.

        Raises:
            FloatingPointError: they were.
        """
        most = int(self._counts[2])
        if most >= self.give_up_after:
            raise FloatingPointError(
                f"left out {most} steps in a row up to step {step}: the gradient's norm is {float(self._norm):.3g}, "
                f"skip_norm={self.limit:g}. Lower learning_rate, or raise warmup_steps"
            )

    def state_dict(self) -> list[int]:
        """All of them, and those in a row just now."""
        return self._counts[:2].tolist()

    def load_state_dict(self, state: list[int]) -> None:
        """Count on."""
        total, row = state
        self._counts = torch.tensor([total, row, row])
