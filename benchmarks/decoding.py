"""How much faster the decoder draws images than a full forward pass for each pixel, and how far it is from the floor.

Draws `batch` images with an untrained PixelCNN++ (the time does not depend on the weights), and between times runs the
forward pass that a naive loop would repeat for every pixel, folded and without gradients. The naive time is the median
of these passes times the number of pixels: the loop itself would take hours. With `--check` it is run in full too,
which is worth it for small models only.

The floor has two parts, both from rates measured in the same run: arithmetic, which is that of one forward pass for
each image at the rate of a large matrix product; and memory, which is the weights of each layer read once for each
pixel (or row) at which the layer runs, at the rate of reading. Weights that stay in a cache undercut the second. The
strided and transposed layers, eight of them, are left out of it.

Writes decoding.json to `out`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from measuring import count_parameters, interleaved, machine, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wngen.decoder import Decoder, Drawn
from wngen.models import PixelCNNPP
from wngen.nn import CausalConv2d, Pointwise, fold
from wngen.noise import Noise

NAME = "decoding"

console = Console()


@dataclass(frozen=True)
class Options:
    """The decoder against a full forward pass for each pixel.

    Args:
        out: the folder that the results go to.
        channels: of the images.
        size: height and width.
        levels: of a sub-pixel.
        filters: feature maps of the PixelCNN++.
        blocks: of each stream at each resolution.
        batch: images drawn at once.
        rounds: how often each is measured.
        check: also run the naive loop over all pixels.
        threads: of torch.
        seed: of the weights and the noise.
    """

    out: Path = Path("runs/benchmarks")
    channels: int = 3
    size: int = 32
    levels: int = 256
    filters: int = 160
    blocks: int = 5
    batch: int = 16
    rounds: int = 3
    check: bool = False
    threads: int = 1
    seed: int = 0


@torch.no_grad()
def naive(model: PixelCNNPP, noise: Noise) -> Tensor:
    """Images drawn by a forward pass for each pixel."""
    spec = model.spec
    images = torch.zeros(len(noise.index), *spec.shape, dtype=torch.uint8)
    source = Drawn(noise, spec.width)
    for row in range(spec.height):
        for column in range(spec.width):
            predicted = model.predict(spec.scale(images))[:, :, row : row + 1, column : column + 1]
            images[:, :, row, column] = source(model.distribution(predicted), row, column)[..., 0, 0]
    return images


def rate(run: Callable[[], object], amount: float, rounds: int = 5) -> float:
    """`amount` over the median seconds of a call."""
    return amount / statistics.median(interleaved({"": run}, rounds)[""])


@torch.no_grad()
def weight_bytes(model: PixelCNNPP, decoder: Decoder) -> int:
    """Bytes of weights that the steps over one batch of images read, counted by running them."""
    read = 0

    def count(layer: nn.Module, *_: object) -> None:
        nonlocal read
        read += sum(p.numel() * p.element_size() for p in layer.parameters())

    network = decoder.model
    assert isinstance(network, PixelCNNPP)
    layers = [layer for layer in network.modules() if isinstance(layer, CausalConv2d | Pointwise)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    decoder.run(1, Drawn(Noise(0, torch.arange(1)), model.spec.width))
    for hook in hooks:
        hook.remove()
    return read


def main(options: Options) -> None:
    """Measure, print a table, and write the record."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = PixelCNNPP(
        options.channels, options.size, options.size, options.levels, options.filters, options.blocks
    ).eval()
    folded, decoder = fold(model), Decoder(model)
    assert isinstance(folded, PixelCNNPP)
    noise = Noise(options.seed, torch.arange(options.batch))
    folded.to(memory_format=torch.channels_last)
    x = torch.randint(0, options.levels, (options.batch, *model.spec.shape), dtype=torch.uint8)
    pixels = options.size**2

    def forward() -> None:
        with torch.no_grad():
            folded.distribution(folded.predict(folded.spec.scale(x)))

    calls = {"forward": forward, "decoder": lambda: Decoder(model).run(options.batch, Drawn(noise, options.size))}
    seconds = {name: statistics.median(s) for name, s in interleaved(calls, options.rounds, warmup=1).items()}
    counter = FlopCounterMode(display=False)
    with counter:
        forward()
    flop = counter.get_total_flops()
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    block = torch.randn(2**26)  # 256 MiB, more than any cache
    flop_rate, byte_rate = rate(lambda: a @ b, 2 * 2048**3), rate(lambda: block.sum(), 4 * 2**26)
    record = {
        "options": {**asdict(options), "out": str(options.out)},
        "machine": machine(),
        "parameters": count_parameters(model),
        "seconds_decoder": seconds["decoder"],
        "seconds_forward": seconds["forward"],
        "seconds_naive_extrapolated": seconds["forward"] * pixels,
        "speed_up": seconds["forward"] * pixels / seconds["decoder"],
        "seconds_floor_arithmetic": flop / flop_rate,
        "seconds_floor_memory": weight_bytes(model, decoder) / byte_rate,
        "matmul_gflop_per_second": flop_rate / 1e9,
        "memory_gbyte_per_second": byte_rate / 1e9,
    }
    if options.check:
        started = time.perf_counter()
        drawn = naive(folded, noise)
        record["seconds_naive_in_full"] = time.perf_counter() - started
        same = drawn == decoder.run(options.batch, Drawn(noise, options.size))[0]
        record["pixels_equal"] = float(same.float().mean())
    write_json(options.out / f"{NAME}.json", record)
    table = Table("figure", "value", title=f"{options.batch} images of {options.size} x {options.size}")
    for name, value in record.items():
        if isinstance(value, float):
            table.add_row(name.replace("_", " "), f"{value:,.3g}")
    console.print(table)


if __name__ == "__main__":
    parser = ArgumentParser(description=Options.__doc__)
    parser.add_class_arguments(Options)
    main(Options(**parser.parse_args().as_dict()))
