"""Where the time of a training step goes, what bookkeeping adds to it, and what each option of training gains.

For each configuration, with the model, data and batch size that it names, and random images in the place of data that
is not in the package:

- the parts of a step, in a bare loop with the library's own objects: data (cutting a batch out of memory, binarization,
  flips), forward pass and objective, backward pass, clipping, optimizer, moving average, and the logging of one step in
  `log_every`; beside their sum the time of a step that is not taken apart;
- arithmetic: FLOP of forward and backward pass, and FLOP per second against that of the best matrix product;
- bookkeeping: a step of the trainer that `wngen fit` sets up, against one of a bare loop that has forward and backward
  pass, clipping and optimizer alone, in turns;
- options: precision, memory layout, plain layers in the place of weight-normalized ones, recomputation (ResNetVAE), a
  compiled model (`--compiled`) and, on a GPU, where the data lies, in turns, against the library's defaults; with the
  memory of a step where an option may change it, each measured in a process of its own.

And for some configurations the step of each optimizer, with gradients that are there.

Writes training.json to `out`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import statistics
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from bare_step import BareStep, Way, finished, read_config, seconds_of_parts
from bookkeeping import bookkeeping
from jsonargparse import Namespace
from measuring import (
    Clock,
    apart,
    command,
    count_parameters,
    interleaved,
    machine,
    overhead_percent,
    peak_mib,
    write_json,
)
from optimizers import OPTIMIZERS, time_optimizers
from rich.console import Console
from rich.table import Table

from wngen.arguments import config_path

NAME = "training"
DEFAULT = "default"
PARTS = ("data", "forward", "backward", "clip", "optimizer", "ema", "logging")

console = Console()


@dataclass(frozen=True)
class Options:
    """Parts of a training step, bookkeeping, and the options of training.

    Args:
        out: the folder that the results go to.
        configs: names or paths of configurations.
        optimizers_of: configurations whose parameters the optimizers are compared on.
        batch: images in a step, in place of the configuration's.
        device: `cpu` or `cuda`.
        rounds: how often each thing is timed.
        seconds: that a round of each measurement is to last, where a step does not last longer.
        log_every: steps from one that is logged to the next; in the trainer fewer, where they last over 2 `seconds`.
        matmul_sizes: of the square matrices whose products are the ceiling; the best one counts.
        memory: whether to measure memory too, in processes of their own.
        compiled: whether to try a compiled model and a compiled Adamax too, which takes minutes.
        profile: whether to write a profile of the trainer's steps too, training-<config>.prof; figures of bookkeeping
            are not good then.
        clock: wall, or cpu for processor time, which other processes disturb less; with one thread only.
        threads: of torch.
    """

    out: Path = Path("runs/benchmarks")
    configs: list[str] = field(
        default_factory=lambda: [
            "quickstart",
            "resnet_vae_mnist_static",
            "pixelcnn_mnist_static",
            "pixelcnn_pp_mnist_static",
            "pixelsnail_mnist_static",
        ]
    )
    optimizers_of: list[str] = field(
        default_factory=lambda: ["quickstart", "conv_vae_mnist_paper", "resnet_vae_cifar10"]
    )
    batch: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 5
    seconds: float = 1.0
    log_every: int = 50
    matmul_sizes: list[int] = field(default_factory=lambda: [1024, 2048])
    memory: bool = True
    compiled: bool = False
    profile: bool = False
    clock: Clock = "wall"
    threads: int = 1


def check(options: Options) -> None:
    """Refuse what would fail later on.

    Raises:
        ValueError: an unknown configuration, or options that do not go together.
    """
    if options.clock == "cpu" and (options.threads > 1 or options.device == "cuda"):
        seen = f"--clock cpu --threads {options.threads} --device {options.device}"
        raise ValueError(f"{seen}: processor time is that of one thread of the CPU; take --clock wall")
    if options.rounds < 2:
        raise ValueError(f"--rounds {options.rounds}: quartiles want at least 2")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    for name in options.configs + options.optimizers_of:
        config_path(name)


def ways_of(config: Namespace, options: Options) -> dict[str, Way]:
    """The library's way to take a step, and others that differ in an option or two."""
    default = Way().on(options.device)
    is_mixed = default.precision == "bf16-mixed"
    other, other_name = (
        replace(default, precision="32-true" if is_mixed else "bf16-mixed"),
        "fp32" if is_mixed else "bf16",
    )
    ways = {
        DEFAULT: default,
        other_name: other,
        "contiguous": replace(default, channels_last=False),
        f"{other_name}, contiguous": replace(other, channels_last=False),
        "plain layers": replace(default, plain=True),
    }
    if config.model.class_path.endswith("ResNetVAE"):
        computed = bool(config.model.init_args.get("recompute", False))
        ways["kept" if computed else "recomputed"] = replace(default, recompute=not computed)
    if options.compiled:
        ways["compiled"] = replace(default, compiled=True)
        ways["compiled, plain layers"] = replace(default, compiled=True, plain=True)
    if options.device == "cuda":
        ways["data in host memory"] = replace(default, resident=False)
    return ways


def ceiling(options: Options) -> dict[str, float]:
    """The most FLOP per second that a product of two square matrices reaches, by precision."""
    calls = {}
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        for size in options.matmul_sizes:
            a, b = torch.randn(2, size, size, device=options.device).to(dtype)

            def product(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
                torch.mm(a, b)
                if a.is_cuda:
                    torch.cuda.synchronize()

            calls[precision, size] = product
    seconds = interleaved(calls, options.rounds, warmup=1, clock=options.clock)
    rates = {key: 2 * key[1] ** 3 / min(times) for key, times in seconds.items()}
    return {p: max(rate for (q, _), rate in rates.items() if q == p) for p in ("32-true", "bf16-mixed")}


def time_steps(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """All that is measured of a configuration, but for memory."""
    config = read_config(name, options.batch)
    ways = ways_of(config, options)
    steps = {way: BareStep(config, ways[way], options.device, folder / f"way{i}") for i, way in enumerate(ways)}
    default = steps[DEFAULT]
    flop = default.flop()
    calls = {way: finished(step, step.whole) for way, step in steps.items()}
    warm = interleaved(calls, 1, warmup=2, clock=options.clock)
    repeats = max(1, math.ceil(options.rounds * options.seconds / sum(times[0] for times in warm.values())))
    seconds = interleaved(calls, min(51, max(options.rounds, repeats)), warmup=0, clock=options.clock)
    step_seconds = statistics.median(seconds[DEFAULT])
    count = min(51, max(options.rounds, math.ceil(options.rounds * options.seconds / 2 / step_seconds)))
    parts = [seconds_of_parts(default, options.clock) for _ in range(count)]
    log_every = max(1, min(options.log_every, round(2 * options.seconds / step_seconds)))
    medians = {part: statistics.median(p[part] for p in parts) for part in PARTS}
    for step in steps.values():
        step.close()
    del steps, step, calls
    profile = options.out / f"{NAME}-{Path(name).stem}.prof" if options.profile else None
    turns = bookkeeping(
        config, ways[DEFAULT], options.device, folder, log_every, options.rounds, options.clock, profile
    )
    return {
        "config": name,
        "model": type(default.training.model).__name__,
        "parameters": count_parameters(default.training.model),
        "batch_size": default.data.batch_size,
        "precision": ways[DEFAULT].precision,
        "flop": flop,
        "part_seconds": {**medians, "logging": medians["logging"] / options.log_every},
        "step_seconds": seconds,
        "relative_seconds": {way: relative(times, seconds[DEFAULT]) for way, times in seconds.items()},
        "bookkeeping": {
            **turns,
            "log_every": log_every,
            "overhead_percent": overhead_percent(turns["training_seconds"], turns["bare_seconds"]),
        },
    }


def relative(seconds: list[float], reference: list[float]) -> dict[str, float]:
    """How many times as long as a reference a way takes: median and quartiles over the rounds."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(seconds, reference, strict=True)], n=4)
    return {"median": median, "low_quartile": low, "high_quartile": high}


def measure_memory(name: str, way: str, options: Options) -> dict[str, Any]:
    """MiB that steps take beyond what was held when model and optimizer were there, in this process alone."""
    config = read_config(name, options.batch)
    with tempfile.TemporaryDirectory() as folder:
        step = BareStep(config, ways_of(config, options)[way], options.device, Path(folder), random=True)
        step.allocate()
        is_gpu = options.device == "cuda"
        before = torch.cuda.memory_allocated() / 2**20 if is_gpu else peak_mib()
        (times,) = interleaved({way: finished(step, step.whole)}, 2, warmup=1, clock=options.clock).values()
        peak = torch.cuda.max_memory_allocated() / 2**20 if is_gpu else peak_mib()
    return {"seconds": times[-1], "step_mib": peak - before, "peak_mib": peak}


def show(record: dict[str, Any]) -> None:
    """Every table."""
    peak = record["ceiling_flop_per_second"]
    fp32, bf16 = (f"{peak[precision] / 1e9:.0f}" for precision in ("32-true", "bf16-mixed"))
    parts = Table("config", *PARTS, "sum", "whole", title="Parts of a bare step, ms")
    rates = Table("config", "batch", "images/s", "GFLOP", "GFLOP/s", "of ceiling", title="Arithmetic")
    rates.caption = f"The ceiling, the best matrix product: {fp32} GFLOP/s in fp32, {bf16} in bf16"
    turns = Table("config", "trainer, ms", "bare, ms", "overhead", "steps a block", title="Bookkeeping")
    ways = Table("config", "way", "ms/step", "time, of default's", "memory, MiB", title="Options")
    for row in record["steps"]:
        seconds, times = statistics.median(row["step_seconds"][DEFAULT]), row["part_seconds"]
        flop = sum(row["flop"].values())
        cells = [*times.values(), sum(times.values()), seconds]
        parts.add_row(row["config"], *(f"{1e3 * cell:.2f}" for cell in cells))
        rates.add_row(
            row["config"],
            str(row["batch_size"]),
            f"{row['batch_size'] / seconds:,.0f}",
            f"{flop / 1e9:.2f}",
            f"{flop / seconds / 1e9:.0f}",
            f"{100 * flop / seconds / peak[row['precision']]:.0f} %",
        )
        kept = row["bookkeeping"]
        overhead = kept["overhead_percent"]
        turns.add_row(
            row["config"],
            f"{1e3 * statistics.median(kept['training_seconds']):.1f}",
            f"{1e3 * statistics.median(kept['bare_seconds']):.1f}",
            f"{overhead['median']:+.1f} % ({overhead['low_quartile']:+.1f} to {overhead['high_quartile']:+.1f})",
            str(kept["log_every"]),
        )
        for way, measured in row["step_seconds"].items():
            ratio, memory = row["relative_seconds"][way], row.get("memory", {}).get(way)
            ways.add_row(
                row["config"],
                f"{way} ({row['precision']})" if way == DEFAULT else way,
                f"{1e3 * statistics.median(measured):.1f}",
                f"{ratio['median']:.2f} ({ratio['low_quartile']:.2f} to {ratio['high_quartile']:.2f})",
                f"{memory['step_mib']:,.0f}" if memory else "",
            )
    optimizers = Table("config", "parameters", "tensors", *OPTIMIZERS, title="Step of an optimizer, ms")
    for row in record["optimizers"]:
        step_ms = (f"{row['step_ms'][way]:.2f}" if way in row["step_ms"] else "" for way in OPTIMIZERS)
        optimizers.add_row(row["config"], f"{row['parameters']:,}", str(row["tensors"]), *step_ms)
    for table in (parts, rates, turns, ways, optimizers):
        console.print(table)


def measured(what: str, options: Options) -> dict[str, Any]:
    """One measurement, in this process: `steps CONFIG`, or `memory CONFIG WAY`."""
    os.environ["FORCE_COLOR"] = "1"  # the progress bar draws as it does in a terminal, where it is not seen
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    kind, _, rest = what.partition(" ")
    name, _, way = rest.partition(" ")
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        if kind == "memory":
            return measure_memory(name, way, options)
        row = time_steps(name, options, Path(folder))
    return {"seconds": statistics.median(row["step_seconds"][DEFAULT]), **row}


def main(options: Options) -> None:
    """Measure each configuration in a process of its own, and report."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "benchmark": NAME,
        "machine": machine(),
        "options": {**asdict(options), "out": str(options.out)},
        "ceiling_flop_per_second": ceiling(options),
        "optimizers": [
            time_optimizers(name, options.device, 3 * options.rounds, options.clock, options.compiled)
            for name in options.optimizers_of
        ],
        "steps": [],
    }
    for name in options.configs:
        what = f"steps {name}"
        row = apart([what], 1, console)[what][0]
        if options.memory:
            ways = ways_of(read_config(name, options.batch), options)
            kinds = [f"memory {name} {title}" for title, way in ways.items() if way.channels_last]
            row["memory"] = {kind.split(" ", 2)[2]: results[0] for kind, results in apart(kinds, 1, console).items()}
        record["steps"].append(row)
        write_json(options.out / f"{NAME}.json", record)
    show(record)
    console.print(f"Written to {options.out}/{NAME}.json")


if __name__ == "__main__":
    command(Options, main, measured, check)
