"""What an evaluation costs over the model's own forward passes.

For each of several released models, `wngen.evaluation.evaluate` (claiming of indices, checks, tables in float64, and
what an interruption would leave written every ten seconds) takes turns with a bare loop over the same batches that
calls the model and adds its bounds up; for models with latent variables also with K importance samples. Times are those
of the processor.

Writes evaluation_overhead.json to `out`.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from measuring import interleaved, machine, overhead_percent, write_json
from rich.console import Console
from rich.table import Table

import wngen
from wngen.data import BinarizedMNIST
from wngen.evaluation import evaluate
from wngen.evaluation.rows import Unfinished
from wngen.image import Batch
from wngen.model import LikelihoodModel
from wngen.noise import Noise
from wngen.precision import full_precision

console = Console()


@dataclass(frozen=True)
class Options:
    """What an evaluation costs over the model's own forward passes.

    Args:
        out: the folder that the results go to.
        models: of binarized MNIST: run folders, checkpoints or releases.
        images: how many test images, drawn by the data's evaluation seed.
        importance_samples: K, for those with latent variables.
        rounds: how often each is measured.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks")
    models: list[str] = field(
        default_factory=lambda: [
            f"checkpoints/{name}"
            for name in ("conv-vae-iaf-mnist", "resnet-vae-mnist-static", "pixelcnn-pp-mnist-static")
        ]
    )
    images: int = 512
    importance_samples: int = 8
    rounds: int = 7
    threads: int = 1


@torch.no_grad()
def bare(model: LikelihoodModel, batches: list[Batch], k: int | None) -> float:
    """The least that gives a mean bound."""
    total = 0.0
    with full_precision(torch.device("cpu")):
        for batch in batches:
            total += float(model(batch.image, noise=Noise(0, batch.index)).elbo_nats.double().sum())
            if k is not None:
                noise = Noise(0, batch.index)
                total += float(model.log_likelihood(batch.image, None, k, noise, model.chunk).sum())
    return total


def measure(where: str, k: int | None, options: Options) -> dict[str, Any]:
    """The overhead for one model."""
    model, data = wngen.load(where), BinarizedMNIST()
    size = min(model.chunk, 256)
    batches = list(data.evaluation_batches("test", size, options.images))
    with tempfile.TemporaryDirectory() as folder:

        def ours() -> None:
            unfinished = Unfinished(Path(folder) / "per_image.npz", {}, seconds=10)
            evaluate(model, batches, options.images, k, chunk=model.chunk, unfinished=unfinished)
            unfinished.remove()

        calls = {"evaluate": ours, "bare": lambda: bare(model, batches, k)}
        seconds = interleaved(calls, options.rounds, warmup=1, clock="cpu")
    percent = overhead_percent(seconds["evaluate"], seconds["bare"])
    return {"model": where, "importance_samples": k, "overhead_percent": percent, "seconds": seconds}


def main() -> None:
    """Measure and report."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_class_arguments(Options)
    options = Options(**parser.parse_args().as_dict())
    torch.set_num_threads(options.threads)
    rows = []
    table = Table("model", "K", "bare, images/s", "overhead, %", "quartiles")
    for where in options.models:
        for k in [None] if wngen.load(where).is_exact else [None, options.importance_samples]:
            row = measure(where, k, options)
            rows.append(row)
            percent, seconds = row["overhead_percent"], sorted(row["seconds"]["bare"])
            rate = options.images / seconds[len(seconds) // 2]
            quartiles = f"{percent['low_quartile']:+.1f} to {percent['high_quartile']:+.1f}"
            table.add_row(Path(where).name, str(k or ""), f"{rate:,.0f}", f"{percent['median']:+.1f}", quartiles)
    write_json(
        options.out / "evaluation_overhead.json",
        {
            "benchmark": "evaluation_overhead",
            "machine": machine(),
            "options": {**asdict(options), "out": ""},
            "rows": rows,
        },
    )
    console.print(table)
    console.print(f"Written to {options.out}/evaluation_overhead.json")


if __name__ == "__main__":
    main()
