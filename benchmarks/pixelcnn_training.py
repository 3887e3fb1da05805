"""Images per second and peak memory of training PixelCNN++, beside another implementation.

A step is forward, loss, backward and Adam, on random images, at the original's size by default. Ours runs in single
precision and with bf16 autocast, both channels_last. The other one is the PyTorch port pclucas14/pixel-cnn-pp, of which
`--peer` names a clone, in single precision as it is trained there; its network is given our loss, since its own wants
a GPU. Every measurement is a process of its own, so that its peak memory is known; they take turns.

Writes pixelcnn_training.json to `out`.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measuring import apart, command, machine, peak_mib, write_json
from rich.console import Console
from rich.table import Table

NAME = "pixelcnn_training"

console = Console()


@dataclass(frozen=True)
class Options:
    """Training steps of PixelCNN++, ours and another one.

    Args:
        out: the folder that the results go to.
        peer: a clone of pclucas14/pixel-cnn-pp; without it ours is measured alone.
        filters: feature maps.
        blocks: of each stream at each resolution.
        size: height and width.
        batch: images in a step.
        steps: that are timed in each measurement, after one that is not.
        rounds: how often each is measured.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks")
    peer: Path | None = None
    filters: int = 160
    blocks: int = 5
    size: int = 32
    batch: int = 4
    steps: int = 2
    rounds: int = 3
    threads: int = 1


def measure(way: str, options: Options) -> dict[str, Any]:
    """Median seconds of a step of `ours fp32`, `ours bf16` or `peer fp32`, and this process's peak memory."""
    import torch

    from wngen.distributions import DiscretizedLogisticMixture
    from wngen.image import ImageSpec
    from wngen.models import PixelCNNPP
    from wngen.nn import data_dependent_init

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    spec = ImageSpec(3, options.size, options.size, 256)
    x = torch.randint(0, 256, (options.batch, *spec.shape), dtype=torch.uint8)
    network: Any
    if way == "peer fp32":
        assert options.peer is not None
        sys.path.insert(0, str(options.peer))
        from model import PixelCNN

        network = PixelCNN(nr_resnet=options.blocks, nr_filters=options.filters)
        predict = network
    else:
        network = PixelCNNPP(**spec.as_dict(), filters=options.filters, blocks=options.blocks)
        data_dependent_init(network, x)
        network.to(memory_format=torch.channels_last)
        predict = network.predict
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=way != "peer fp32")
    seconds = []
    for _ in range(1 + options.steps):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "ours bf16"):
            predicted = predict(spec.scale(x))
        loss = -DiscretizedLogisticMixture.from_parameters(predicted, 3, 256).log_prob(x).sum() / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peak_mib(), "machine": machine()}


def main(options: Options) -> None:
    """Measure in turns, print a table, and write the record."""
    ways = ["ours fp32", "ours bf16", *(["peer fp32"] if options.peer else [])]
    results = apart(ways, options.rounds, console)
    seconds = {way: statistics.median(r["seconds"] for r in results[way]) for way in ways}
    reference = ways[-1]
    table = Table("way", "images/s", f"times {reference}", "peak memory, MiB")
    record: dict[str, Any] = {
        "options": {**asdict(options), "out": str(options.out), "peer": str(options.peer)},
        "machine": results[ways[0]][0]["machine"],
        "ways": {},
    }
    for way in ways:
        figures = {
            "images_per_second": options.batch / seconds[way],
            "speed_up": seconds[reference] / seconds[way],
            "peak_mib": statistics.median(r["peak_mib"] for r in results[way]),
            "seconds_per_step": [r["seconds"] for r in results[way]],
        }
        record["ways"][way] = figures
        table.add_row(
            way, f"{figures['images_per_second']:.2f}", f"{figures['speed_up']:.2f}", f"{figures['peak_mib']:,.0f}"
        )
    write_json(options.out / f"{NAME}.json", record)
    console.print(table)


if __name__ == "__main__":
    command(Options, main, measure)
