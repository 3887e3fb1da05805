"""The step of each optimizer on the parameters of a configuration's model, with gradients that are there."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from bare_step import Way, built, read_config
from measuring import Clock, count_parameters, interleaved
from torch import nn

from wngen.training.adamax import CompiledAdamax

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam, fused": (torch.optim.Adam, {"fused": True}),
    "Adam, foreach": (torch.optim.Adam, {"foreach": True}),
    "Adam, loop": (torch.optim.Adam, {"foreach": False, "fused": False}),
    "Adamax, foreach": (torch.optim.Adamax, {"foreach": True}),
    "Adamax, loop": (torch.optim.Adamax, {"foreach": False}),
    "Adamax, compiled": (CompiledAdamax, {}),
}


def time_optimizers(name: str, device: str, rounds: int, clock: Clock, compiled: bool) -> dict[str, Any]:
    """Milliseconds of a step of each, and of how many numbers in how many tensors.

    Args:
        name: of the configuration.
        device: `cpu` or `cuda`.
        rounds: how often each is timed.
        clock: see `measuring.interleaved`.
        compiled: whether to compile the last of them, which takes minutes.
    """
    training, _ = built(read_config(name, 2), Way().on(device))
    model: nn.Module = training.model.to(device).to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = 1e-2 * torch.randn_like(parameter)

    def step_of(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    chosen = {
        way: cls(parameters, 1e-6, **more)
        for way, (cls, more) in OPTIMIZERS.items()
        if compiled or cls is not CompiledAdamax
    }
    calls = {way: (lambda optimizer=optimizer: step_of(optimizer)) for way, optimizer in chosen.items()}
    seconds = interleaved(calls, rounds, clock=clock)
    return {
        "config": name,
        "parameters": count_parameters(model),
        "tensors": len(parameters),
        "step_ms": {way: 1e3 * statistics.median(times) for way, times in seconds.items()},
    }
