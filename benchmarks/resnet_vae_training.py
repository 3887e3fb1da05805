"""Seconds and peak memory of a training step of the ResNet VAE, beside the same network as one would first write it.

A step is forward, backward and Adam, on random images; by default of the CIFAR-10 model of the IAF paper. Four ways:

- naive fp32: weight norm as a formula left to autograd, masked rows of kernels computed, torch's ELU, NCHW, Adam as it
  comes;
- fp32: as the library trains it in single precision, channels_last;
- bf16: the same under bf16 autocast;
- bf16, recompute: that, with the activations of each layer computed again for the backward pass.

Every measurement is a process of its own, so that its peak memory is known; they take turns. Seconds are those of the
processor, of all threads together, so that with one thread they are good on a shared machine too. Memory is the peak
less what the process held when the network and its optimizer were there: activations and workspace.

Writes resnet_vae_training.json to `out`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import apart, command, count_parameters, machine, peak_mib, write_json
from rich.console import Console
from rich.table import Table

NAME = "resnet_vae_training"
WAYS = ("naive fp32", "fp32", "bf16", "bf16, recompute")

console = Console()


@dataclass(frozen=True)
class Options:
    """Training steps of the ResNet VAE in four ways.

    Args:
        out: the folder that the results go to.
        layers: heights and numbers of stochastic layers.
        feature_maps: of the network, at every resolution.
        posterior: `diagonal` or `iaf`.
        size: height and width of the images, which have three channels of 256 levels.
        batch: images in a step.
        steps: that are timed in each measurement, after one that is not.
        rounds: how often each is measured.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks")
    layers: str = "16x10, 8x10"
    feature_maps: int = 160
    posterior: str = "iaf"
    size: int = 32
    batch: int = 16
    steps: int = 2
    rounds: int = 3
    threads: int = 1


def measure(way: str, options: Options) -> dict[str, Any]:
    """Median processor seconds of a step, and the memory that it takes in MiB."""
    import torch

    import wngen.nn.activations
    import wngen.nn.normalization
    from wngen.models import ResNetVAE
    from wngen.nn import WNConv2d, data_dependent_init

    is_naive = way == "naive fp32"
    if is_naive:  # the plain formulas, which the library keeps for compilers
        wngen.nn.normalization.being_traced = wngen.nn.activations.being_traced = lambda: True
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = ResNetVAE(
        3,
        options.size,
        options.size,
        256,
        options.layers,
        [options.feature_maps],
        posterior=options.posterior,  # type: ignore[arg-type]
        recompute=way.endswith("recompute"),
    )
    x = torch.randint(0, 256, (options.batch, *model.spec.shape), dtype=torch.uint8)
    for module in model.modules() if is_naive else ():
        if isinstance(module, WNConv2d):
            module.trim = None  # with the masked rows of the kernels
    data_dependent_init(model, x[:2])
    if not is_naive:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=None if is_naive else True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # its state takes its place in memory
    before = peak_mib()
    seconds = []
    for _ in range(1 + options.steps):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=way.startswith("bf16")):
            loss = -model(x).elbo_nats.mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - started)
    return {
        "seconds": statistics.median(seconds[1:]),
        "step_mib": peak_mib() - before,
        "peak_mib": peak_mib(),
        "parameters": count_parameters(model),
        "machine": machine(),
    }


def main(options: Options) -> None:
    """Measure in turns, print a table, and write the record."""
    results = apart(WAYS, options.rounds, console)
    seconds = {way: statistics.median(r["seconds"] for r in results[way]) for way in WAYS}
    memory = {way: statistics.median(r["step_mib"] for r in results[way]) for way in WAYS}
    table = Table("way", "images/s", "times naive", "memory of a step, MiB", "of naive")
    for way in WAYS:
        speed, ratio = options.batch / seconds[way], seconds[WAYS[0]] / seconds[way]
        share = memory[way] / memory[WAYS[0]]
        table.add_row(way, f"{speed:.2f}", f"{ratio:.2f}", f"{memory[way]:,.0f}", f"{share:.2f}")
    write_json(
        options.out / f"{NAME}.json",
        {
            "options": {**asdict(options), "out": str(options.out)},
            "machine": results[WAYS[0]][0]["machine"],
            "parameters": results[WAYS[0]][0]["parameters"],
            "ways": {
                way: {name: [result[name] for result in results[way]] for name in ("seconds", "step_mib", "peak_mib")}
                for way in WAYS
            },
        },
    )
    console.print(table)


if __name__ == "__main__":
    command(Options, main, measure)
