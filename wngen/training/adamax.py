"""Adamax in one compiled pass over the weights."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


def _pass(
    parameters: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    norms: list[Tensor],
    rates: Tensor,
    left_out: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """A step, in place; `rates` are a tensor, so that a schedule has nothing compiled again."""
    for p, grad, average, norm, rate in zip(parameters, grads, averages, norms, rates.unbind(), strict=True):
        new_average = torch.lerp(average, grad, 1 - beta1)
        new_norm = torch.maximum(norm * beta2, grad.abs() + eps)
        p.copy_(torch.where(left_out, p, p - rate * (new_average / new_norm)))
        average.copy_(torch.where(left_out, average, new_average))
        norm.copy_(torch.where(left_out, norm, new_norm))


class CompiledAdamax(torch.optim.Adamax):
    """The path of `torch.optim.Adamax`, but for rounding, in steps that read and write each number once.

    Torch has no fused Adamax: its operations go through all the weights one after the other, and wait for memory where
    the weights do not fit into caches. Here the whole step is compiled when it is first taken, about half a second for
    each parameter tensor, and again where other parameters have gradients than before.

    The state is that of torch's: a checkpoint of one is read by the other.

    Attributes:
        found_inf: a scalar where the weights are; a step does nothing where it is not 0. None for 0.

    References:
        Adam: a method for stochastic optimization (Kingma & Ba, 2015), algorithm 2.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Any, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, lr, betas, eps)
        # What torch has compiled it keeps by the code, of which it would give up after some optimizers.
        own = FunctionType(_pass.__code__.replace(), _pass.__globals__, closure=_pass.__closure__)
        self._pass = torch.compile(own, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients there are, after those that `closure`, where it is given, computes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, *lists)
            parameters, grads, averages, norms, counts = lists
            if not parameters:
                continue
            device = parameters[0].device
            if counts[0].device != device:  # torch has them on the CPU, and there a step that is left out is not known
                counts = [count.to(device) for count in counts]
                for p, count in zip(parameters, counts, strict=True):
                    self.state[p]["step"] = count
            left_out = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
            left_out = left_out != 0
            torch._foreach_add_(counts, [(~left_out).float()] * len(counts))
            beta1, beta2 = group["betas"]
            # Before the first step that is taken there is nothing to divide by.
            rates = float(group["lr"]) / (1 - beta1 ** torch.stack(counts).double().clamp_min(1))
            leaves = [p.detach() for p in parameters]
            self._pass(leaves, grads, averages, norms, rates, left_out, beta1, beta2, group["eps"])
        return loss
