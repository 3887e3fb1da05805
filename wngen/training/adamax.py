"""Adamax in one compiled pass over the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _pass(
    parameters: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    norms: list[Tensor],
    rates: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """A step, in place; `rates` are a tensor, so that a schedule has nothing compiled again."""
    for p, grad, average, norm, rate in zip(parameters, grads, averages, norms, rates.unbind(), strict=True):
        average.lerp_(grad, 1 - beta1)
        norm.copy_(torch.maximum(norm * beta2, grad.abs() + eps))
        p.sub_(rate * (average / norm))


class CompiledAdamax(torch.optim.Adamax):
    """The path of `torch.optim.Adamax`, but for rounding, in steps that read and write each number once.

    Torch has no fused Adamax: its operations go through all the weights one after the other, and wait for memory where
    the weights do not fit into caches. Here the whole step is compiled when it is first taken, about half a second for
    each parameter tensor, and again where other parameters have gradients than before.

    The state is that of torch's: a checkpoint of one is read by the other.

    References:
        Adam: a method for stochastic optimization (Kingma & Ba, 2015), algorithm 2.
    """

    def __init__(
        self, params: Any, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, lr, betas, eps)
        self._pass = torch.compile(_pass, fullgraph=True, dynamic=False)

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
            torch._foreach_add_(counts, 1)
            beta1, beta2 = group["betas"]
            steps = torch.stack(counts).double()
            rates = (float(group["lr"]) / (1 - beta1**steps)).to(parameters[0].device, non_blocking=True)
            leaves = [p.detach() for p in parameters]
            self._pass(leaves, grads, averages, norms, rates, beta1, beta2, group["eps"])
        return loss
