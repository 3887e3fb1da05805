"""What weight normalization costs: seconds of a training step with it and without, in turns.

A step is forward, backward and Adam. Four networks of one size take turns, in fp32 and bf16 (autocast), at each
batch size, in channels_last:

- ConvVAE, weight norm: as the library trains it, with an IAF posterior;
- ConvVAE, plain: the same network in plain layers, its masks kept; the overhead is taken against it;
- ConvVAE, diagonal: weight norm, without the flow;
- torch VAE: the same convolutions written by hand in plain torch, without a flow.

Below that, for each shape of weight in the model, the forward and backward pass of `wngen.nn.normalize`, with warm
caches, beside the formula g v / ||v|| left to autograd and torch's own fused `torch._weight_norm`.

Writes weight_norm_overhead.json to `out`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from measuring import Clock, count_parameters, interleaved, machine, overhead_percent, write_json
from plain_layers import plain_copy
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wngen.data import BinarizedMNIST
from wngen.image import Batch
from wngen.models import ConvVAE
from wngen.nn import WeightNormalized, data_dependent_init, normalize
from wngen.noise import Noise

NAME = "weight_norm_overhead"
WEIGHT_NORM, PLAIN = "ConvVAE, weight norm", "ConvVAE, plain"
DIAGONAL, TORCH = "ConvVAE, diagonal", "torch VAE"
Normalization = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]  # of v by g, over dims
REPEATS = 10  # of a weight's normalization in one timing

console = Console()


@dataclass(frozen=True)
class Options:
    """Seconds of a training step with weight normalization and without.

    Args:
        out: the folder that the results go to.
        batch_sizes: images in a step.
        precisions: fp32, or bf16 by autocast.
        widths: feature maps of each stage of the model.
        blocks: residual blocks of each stage.
        patch: the first stage works on patches of so many pixels squared.
        hidden: units of the fully connected layers.
        iaf_width: units of the hidden layer of each of the two steps of the flow.
        rounds: how often each step is timed.
        clock: wall, or cpu for processor time, which other processes disturb less; with one thread only.
        threads: of torch.
        seed: of the weights and the noise.
    """

    out: Path = Path("runs/benchmarks")
    batch_sizes: list[int] = field(default_factory=lambda: [128, 256])
    precisions: list[Literal["fp32", "bf16"]] = field(default_factory=lambda: ["fp32", "bf16"])
    widths: list[int] = field(default_factory=lambda: [16, 32])
    blocks: int = 0
    patch: int = 2
    hidden: int = 450
    iaf_width: int = 320
    rounds: int = 41
    clock: Clock = "wall"
    threads: int = 1
    seed: int = 0


class TorchBlock(nn.Module):
    """x + conv(elu(conv(elu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same."""
        return x + self.second(F.elu(self.first(F.elu(x))))


class TorchVAE(nn.Module):
    """The network of ConvVAE as one would write it in plain torch, with a diagonal Gaussian posterior.

    Args:
        options: of the benchmark.
        latent_dim: number of latent variables.
    """

    def __init__(self, options: Options, latent_dim: int = 32) -> None:
        super().__init__()
        widths, patch, hidden = options.widths, options.patch, options.hidden
        sizes = [-(-28 // (patch << i)) for i in range(len(widths))]
        down: list[nn.Module] = [nn.Conv2d(1, widths[0], 2 * patch + 1, patch, patch)]
        up: list[nn.Module] = []
        for i, width in enumerate(widths):
            down += [*(TorchBlock(width) for _ in range(options.blocks)), nn.ELU()]
            up = [*(TorchBlock(width) for _ in range(options.blocks)), nn.ELU(), *up]
            if i + 1 < len(widths):
                down.append(nn.Conv2d(width, widths[i + 1], 3, 2, 1))
                up = [nn.Conv2d(widths[i + 1], 4 * width, 3, padding=1), nn.PixelShuffle(2), Crop(sizes[i]), *up]
        features = widths[-1] * sizes[-1] ** 2
        self.encoder = nn.Sequential(
            *down, nn.Flatten(), nn.Linear(features, hidden), nn.ELU(), nn.Linear(hidden, 2 * latent_dim)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.ELU(),
            nn.Linear(hidden, features),
            nn.Unflatten(1, (widths[-1], sizes[-1], sizes[-1])),
            *up,
            nn.Conv2d(widths[0], patch**2, 3, padding=1),
            nn.PixelShuffle(patch),
            Crop(28),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Levels `(B, 1, 28, 28)` to the mean negative bound in nats."""
        x = image.float()
        mean, log_std = self.encoder(2 * x - 1).float().chunk(2, dim=1)
        logits = self.decoder(mean + log_std.exp() * torch.randn_like(mean)).float()
        distortion = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        rate = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum()
        return (distortion + rate) / len(x)


class Crop(nn.Module):
    """The upper left corner of an image."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, size, size)`."""
        return x[:, :, : self.size, : self.size]


def networks(options: Options, init: Batch) -> dict[str, nn.Module]:
    """Those that are compared, initialized from the same images."""
    sizes = {name: getattr(options, name) for name in ("widths", "blocks", "patch", "hidden", "iaf_width")}
    torch.manual_seed(options.seed)
    flow, diagonal = ConvVAE(**sizes), ConvVAE(**sizes, posterior="diagonal")
    for model in (flow, diagonal):
        data_dependent_init(model, init.image, noise=Noise(options.seed, init.index))
    models = {WEIGHT_NORM: flow, PLAIN: plain_copy(flow), DIAGONAL: diagonal, TORCH: TorchVAE(options)}
    return {name: model.to(memory_format=torch.channels_last) for name, model in models.items()}


def training_step(model: nn.Module, batch: Batch, precision: str, seed: int) -> Callable[[], None]:
    """A function that takes one step, each time with new noise."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    draw = 0

    def step() -> None:
        nonlocal draw
        draw += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if isinstance(model, TorchVAE):
                loss = model(batch.image)
            else:
                loss = -model(batch.image, noise=Noise(seed, batch.index, draw)).elbo_nats.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def time_steps(options: Options) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    """A row for each batch size, precision and network, and the networks."""
    data = BinarizedMNIST()
    size = max(*options.batch_sizes, 256)
    images = next(iter(data.evaluation_batches("train", size, size)))
    models = networks(options, images)
    calls = {}
    for batch_size in options.batch_sizes:
        batch = Batch(images.image[:batch_size], None, images.index[:batch_size])
        for precision in options.precisions:
            for name, model in models.items():
                calls[batch_size, precision, name] = training_step(model, batch, precision, options.seed)
    seconds = interleaved(calls, options.rounds, clock=options.clock)
    rows = []
    for (batch_size, precision, name), times in seconds.items():
        median = statistics.median(times)
        plain = seconds[batch_size, precision, PLAIN]
        rows.append(
            {
                "network": name,
                "batch_size": batch_size,
                "precision": precision,
                "step_ms": 1e3 * median,
                "images_per_second": batch_size / median,
                "overhead_percent": overhead_percent(times, plain) if name == WEIGHT_NORM else None,
            }
        )
    return rows, models


def _back_and_forth(function: Normalization, v: Tensor, g: Tensor, dims: tuple[int, ...], grad: Tensor) -> None:
    for _ in range(REPEATS):
        torch.autograd.grad(function(v, g, dims), (v, g), grad)


def time_normalize(model: nn.Module, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """A row for each shape of weight: microseconds of forward and backward, and how many layers have it."""
    layers = [layer for layer in model.modules() if isinstance(layer, WeightNormalized)]
    shapes = Counter((tuple(layer.v.shape), layer.dims) for layer in layers)
    functions: dict[str, Normalization] = {
        "normalize": normalize,
        "formula": lambda v, g, dims: g * v / torch.linalg.vector_norm(v, dim=dims, keepdim=True),
        "torch": lambda v, g, dims: torch._weight_norm(v, g, 0),
    }
    calls = {}
    for shape, dims in shapes:
        v = torch.randn(shape)
        if len(shape) == 4:
            v = v.to(memory_format=torch.channels_last)
        v.requires_grad_()
        g = torch.ones([1 if dim in dims else n for dim, n in enumerate(shape)], requires_grad=True)
        for name, function in functions.items():
            calls[shape, name] = partial(_back_and_forth, function, v, g, dims, torch.randn_like(v))
    seconds = interleaved(calls, rounds, clock=clock)
    return [
        {
            "shape": list(shape),
            "layers": count,
            **{f"{name}_us": 1e6 * statistics.median(seconds[shape, name]) / REPEATS for name in functions},
        }
        for (shape, _), count in shapes.items()
    ]


def show(record: dict[str, Any]) -> None:
    """Both tables."""
    table = Table("network", "batch", "precision", "ms/step", "images/s", "overhead", title="Training step")
    for row in record["steps"]:
        overhead = row["overhead_percent"]
        table.add_row(
            row["network"],
            str(row["batch_size"]),
            row["precision"],
            f"{row['step_ms']:.1f}",
            f"{row['images_per_second']:,.0f}",
            ""
            if overhead is None
            else f"{overhead['median']:+.1f} % ({overhead['low_quartile']:+.1f} to {overhead['high_quartile']:+.1f})",
        )
    console.print(table)
    table = Table("weight", "layers", "normalize", "formula", "torch", title="Normalizing a weight, µs")
    for row in record["normalize"]:
        times = [f"{row[f'{name}_us']:.0f}" for name in ("normalize", "formula", "torch")]
        table.add_row("x".join(map(str, row["shape"])), str(row["layers"]), *times)
    console.print(table)


def main() -> None:
    """Measure and report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_class_arguments(Options)
    options = Options(**parser.parse_args().as_dict())
    if options.clock == "cpu" and options.threads > 1:
        parser.error(f"--clock cpu --threads {options.threads}: processor time adds up over threads; take one")
    torch.set_num_threads(options.threads)
    about = machine()
    steps, models = time_steps(options)
    record = {
        "benchmark": NAME,
        "machine": about,
        "options": {**asdict(options), "out": str(options.out)},
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "steps": steps,
        "normalize": time_normalize(models[WEIGHT_NORM], 5 * options.rounds, options.clock),
    }
    write_json(options.out / f"{NAME}.json", record)
    show(record)
    console.print(f"Written to {options.out}/{NAME}.json")


if __name__ == "__main__":
    main()
