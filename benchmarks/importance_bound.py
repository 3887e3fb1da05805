"""Time and memory of the importance-weighted bound with many samples.

Evaluates the same images with `wngen.evaluation.evaluate`, which runs the encoder once for each image and decodes
`chunk` samples at a time, for several chunks; with the naive loop over images that repeats each K times and runs the
whole model on that; and with the simplest loop, over images and samples, one at a time, of which only the first
`loop_samples` are drawn and their time is scaled up. Every measurement is a process of its own, so that its peak memory
is known; they take turns. All see the same noise, and the bounds of all but the simplest loop are asserted to agree.

The time does not depend on the weights: by default the model is the quickstart's, initialized from data.

Writes importance_bound.json to `out`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from measuring import machine, peak_mib, write_json
from rich.console import Console
from rich.table import Table

NAME = "importance_bound"
NAIVE, LOOP = "naive", "loop"
TOLERANCE_NATS = 1e-3  # rounding differs with the shape of what goes through the network

console = Console()


@dataclass(frozen=True)
class Options:
    """Time and peak memory of the importance-weighted bound, for several chunks and a naive loop.

    Args:
        out: the folder that the results go to.
        model: a run folder, a checkpoint or a release; by default the quickstart's model, not trained.
        images: how many test images, drawn by the data's evaluation seed.
        importance_samples: K of the bound.
        chunks: how many samples go through the decoder at once.
        loop_samples: of each image, in the simplest loop.
        rounds: how often each is measured.
        threads: of torch.
        seed: of the noise, and of the weights of a model that is not trained.
    """

    out: Path = Path("runs/benchmarks")
    model: str | None = None
    images: int = 8
    importance_samples: int = 5000
    chunks: list[int] = field(default_factory=lambda: [64, 256, 1024, 4096])
    loop_samples: int = 50
    rounds: int = 3
    threads: int = 1
    seed: int = 0


def measure(way: str, options: Options) -> dict[str, Any]:
    """One measurement, in this process.

    Args:
        way: a chunk, `naive` or `loop`.
        options: of the benchmark.

    Returns:
        `seconds`, `peak_mib`, `peak_mib_before` the evaluation, the `bounds_nats` of the images, and the `machine`.
    """
    # Not at the top: a process on Linux inherits the peak of the one that starts it, which so stays small.
    import torch

    import wngen
    from wngen.data import BinarizedMNIST
    from wngen.evaluation import evaluate
    from wngen.models import ConvVAE
    from wngen.nn import data_dependent_init
    from wngen.noise import Noise

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data, k = BinarizedMNIST(), options.importance_samples
    model: Any
    if options.model is None:
        model = ConvVAE(patch=2, widths=[16, 32], blocks=0)
        init = next(iter(data.evaluation_batches("train", 256, 256)))
        data_dependent_init(model, init.image, noise=Noise(options.seed, init.index))
    else:
        model = wngen.load(options.model)
    model.eval()
    batch = next(iter(data.evaluation_batches("test", options.images, options.images)))
    before, started = peak_mib(), time.perf_counter()
    if way == NAIVE:
        bounds = []
        with torch.no_grad():
            for x, index in zip(batch.image, batch.index, strict=True):
                x, noise = x.expand(k, *x.shape), Noise(options.seed, index.expand(k), torch.arange(k))
                log_weight = model.bound(x, model.encode(x), None, noise).elbo_nats.double()
                bounds.append(float(log_weight.logsumexp(dim=0) - torch.tensor(k).log()))
    elif way == LOOP:
        bounds, k = [], min(k, options.loop_samples)
        with torch.no_grad():
            for x, index in zip(batch.image, batch.index, strict=True):
                draws = [Noise(options.seed, index[None], draw) for draw in range(k)]
                weights = [model.bound(x[None], model.encode(x[None]), None, noise).elbo_nats for noise in draws]
                bounds.append(float(torch.cat(weights).double().logsumexp(dim=0) - torch.tensor(k).log()))
    else:
        evaluation = evaluate(model, [batch], options.images, k, options.seed, chunk=int(way))
        assert evaluation.log_likelihood_nats is not None
        bounds = evaluation.log_likelihood_nats.tolist()
    seconds = (time.perf_counter() - started) * options.importance_samples / k
    return {
        "seconds": seconds,
        "peak_mib": peak_mib(),
        "peak_mib_before": before,
        "bounds_nats": bounds,
        "machine": machine(),
    }


def in_a_process(way: str, arguments: list[str]) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--measure", way]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def show(record: dict[str, Any]) -> None:
    """The table."""
    table = Table("chunk", "s/image", "images/s", "hours for 10,000", "peak MiB", "of that before")
    for row in record["ways"]:
        rate = row["images_per_second"]
        memory = f"{row['peak_mib']:,.0f}", f"{row['peak_mib_before']:,.0f}"
        table.add_row(row["way"], f"{1 / rate:.2f}", f"{rate:.3f}", f"{10_000 / rate / 3600:.2f}", *memory)
    console.print(table)
    options = record["options"]
    console.print(
        f"K = {options['importance_samples']}, {options['images']} images, medians of {options['rounds']} rounds; "
        f"bounds agree within {record['largest_difference_nats']:.1g} nats"
    )


def main() -> None:
    """Measure and report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_class_arguments(Options)
    parser.add_argument(
        "--measure", type=str | None, help="Do one measurement, a chunk, 'naive' or 'loop', and print it."
    )
    arguments = parser.parse_args().as_dict()
    way = arguments.pop("measure")
    options = Options(**arguments)
    if way is not None:
        sys.stdout.write(json.dumps(measure(way, options)))
        return
    ways = [*map(str, options.chunks), NAIVE, LOOP]
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(options.rounds):
        first = turn % len(ways)
        for way in ways[first:] + ways[:first]:
            results[way].append(in_a_process(way, sys.argv[1:]))
            console.print(f"round {turn + 1}, {way}: {results[way][-1]['seconds']:.1f} s")
    bounds = [result["bounds_nats"] for way, measured in results.items() if way != LOOP for result in measured]
    difference = max(max(image) - min(image) for image in zip(*bounds, strict=True))
    assert difference < TOLERANCE_NATS, f"the bounds differ by up to {difference} nats"
    rows = []
    for way, measured in results.items():
        seconds = statistics.median(result["seconds"] for result in measured)
        memory = {name: statistics.median(r[name] for r in measured) for name in ("peak_mib", "peak_mib_before")}
        rows.append({"way": way, "seconds": seconds, "images_per_second": options.images / seconds, **memory})
    record = {
        "benchmark": NAME,
        "machine": results[NAIVE][0]["machine"],
        "options": {**asdict(options), "out": str(options.out)},
        "largest_difference_nats": difference,
        "ways": rows,
    }
    write_json(options.out / f"{NAME}.json", record)
    show(record)
    console.print(f"Written to {options.out}/{NAME}.json")


if __name__ == "__main__":
    main()
