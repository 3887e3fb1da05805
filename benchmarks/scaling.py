"""How many GPUs pay: what a training step costs, and how it would scale out under DDP.

For each configuration it finds what a step consists of, in FLOP, bytes and gradients that are communicated
(`ddp_steps.py`); how long it takes on this processor for several numbers of images, and from the straight line through
them what it takes however few they are; and, by the model of time in `ddp_model.py`, the number of GPUs up to which DDP
stays 90 % efficient, for several interconnects. One thing the model says can be tried here: two processes that train
the quickstart's model over gloo. GPUs and interconnects are assumptions, to be changed by options.

Writes scaling.json and scaling.png to `out`. What a file named by `--record` holds is not measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from ddp_model import Cost, Device, Interconnect, Link
from ddp_steps import as_record, compared, cost_of, from_record, line, seconds_by_images
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from measuring import machine, write_json
from rich.console import Console
from rich.table import Table

NAME = "scaling"
NVLINK = Link(360e9, 3e-6)  # of an H100's 450 GB/s what all-reduces reach
INTERCONNECTS = (
    Interconnect("NVLink, one machine", NVLINK),
    Interconnect("PCIe 4.0, one machine", Link(25e9, 5e-6)),
    Interconnect("8 x 400 Gb/s", NVLINK, Link(400e9, 10e-6)),
    Interconnect("400 Gb/s", NVLINK, Link(50e9, 10e-6)),
    Interconnect("100 Gb/s", NVLINK, Link(12.5e9, 20e-6)),
    Interconnect("10 Gb/s", NVLINK, Link(1.25e9, 30e-6)),
)
IDEAL = Interconnect("infinitely fast", Link(math.inf, 0.0), Link(math.inf, 0.0))
LIMIT = 1024  # GPUs that are looked at
CHECKED = "quickstart"
SHORT_FLOP = 3e10  # steps of less are timed five times as often

console = Console()


@dataclass(frozen=True)
class Options:
    """What training steps cost, and up to how many GPUs they stay efficient.

    Args:
        out: the folder that the results go to.
        configs: whose steps.
        record: a scaling.json, whose measurements are taken, and of which only what is missing is measured.
        markdown: print tables as Markdown.
        rounds: how often a step is timed with each number of images.
        flops: of a GPU's bf16 matrix products, per second.
        utilization: what part of them the networks reach.
        utilizations: for the table of how much depends on that.
        launch_us: the least time of an operation, in microseconds.
        memory_bytes_per_s: of a GPU.
    """

    out: Path = Path("runs/benchmarks")
    configs: list[str] = field(
        default_factory=lambda: [
            CHECKED,
            "conv_vae_mnist_dynamic",
            "resnet_vae_mnist_static",
            "pixelcnn_pp_mnist_static",
            "pixelcnn_pp_fashion_mnist",
            "resnet_vae_cifar10",
            "resnet_vae_cifar10_modern",
            "pixelcnn_pp_cifar10",
        ]
    )
    record: Path | None = None
    markdown: bool = False
    rounds: int = 5
    flops: float = 200e12
    utilization: float = 0.25
    utilizations: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5])
    launch_us: float = 6.0
    memory_bytes_per_s: float = 2e12

    def device(self, utilization: float | None = None) -> Device:
        """The GPU."""
        used = self.utilization if utilization is None else utilization
        return Device(self.flops, used, self.launch_us / 1e6, self.memory_bytes_per_s)


def measured(options: Options) -> dict[str, Any]:
    """What was measured before, and here what is missing of it."""
    found: dict[str, Any] = {"machine": machine(), "costs": {}, "seconds": {}}
    if options.record is not None:
        found |= json.loads(options.record.read_text())
    for config in options.configs:
        if config not in found["seconds"]:
            console.print(f"{config} ...")
            cost = from_record(found["costs"][config]) if config in found["costs"] else cost_of(config)
            is_short = cost.flop(cost.batch) < SHORT_FLOP
            rounds = options.rounds * (5 if is_short else 1)
            found["costs"][config] = as_record(cost)
            found["seconds"][config] = seconds_by_images(config, cost.flop_per_image, rounds)
            write_json(options.out / f"{NAME}.json", found)
    if "check" not in found:
        found["check"] = compared(CHECKED, cost_of(CHECKED), 8 * options.rounds)
        write_json(options.out / f"{NAME}.json", found)
    return found


def check_model(costs: Sequence[Cost], options: Options) -> None:
    """What must hold of any model of time: one GPU is one GPU, and what is faster loses less."""
    device = options.device()
    for cost in costs:
        for strong in (False, True):
            assert cost.efficiency(device, IDEAL, 1, strong) == 1
            best = cost.most_gpus(device, IDEAL, strong, limit=LIMIT)
            for interconnect in INTERCONNECTS:
                assert cost.most_gpus(device, interconnect, strong, limit=LIMIT) <= best
                assert cost.efficiency(device, interconnect, 8, strong) <= 1
        slow, *_, fast = (cost.efficiency(options.device(u), INTERCONNECTS[0], 8, False) for u in (0.1, 0.25, 0.5))
        assert slow >= fast, "the faster the GPU, the more there is to hide communication behind"


def costs_table(costs: Sequence[Cost]) -> list[list[str]]:
    """What a step consists of."""
    head = ["configuration", "parameters", "batch", "GFLOP per image", "GFLOP per step", "saved, MB per image"]
    head += ["state, MB", "gradients, MB", "operations", "kFLOP per gradient byte"]
    rows = [
        [
            cost.config,
            f"{cost.parameters:,}",
            f"{cost.batch}",
            _short(cost.flop_per_image / 1e9),
            _short(cost.flop(cost.batch) / 1e9),
            _short(cost.saved_bytes_per_image / 1e6),
            f"{cost.state_bytes / 1e6:,.0f}",
            f"{cost.gradient_bytes / 1e6:.1f}",
            f"{cost.operations:,}",
            _short(cost.flop(cost.batch) / cost.gradient_bytes / 1e3),
        ]
        for cost in costs
    ]
    return [head, *rows]


def processor_table(costs: Sequence[Cost], seconds: dict[str, dict[int, float]]) -> list[list[str]]:
    """What a step takes here, and up to how many processes that alone would let a batch be divided."""
    rows = [
        [
            "configuration",
            "images",
            "fixed, ms",
            "ms per image",
            "GFLOP/s",
            "largest residual",
            "fixed, of a step",
            "processes",
        ]
    ]
    for cost in costs:
        fixed, each = line(seconds[cost.config])
        off = max(abs((fixed + each * n) / s - 1) for n, s in seconds[cost.config].items())
        whole = fixed + each * cost.batch
        rows.append(
            [
                cost.config,
                ", ".join(str(n) for n in sorted(seconds[cost.config])),
                _short(1e3 * fixed),
                _short(1e3 * each),
                f"{cost.flop_per_image / each / 1e9:.0f}",
                f"{100 * off:.1f} %",
                f"{100 * fixed / whole:.1f} %",
                f"{(whole / 0.9 - each * cost.batch) / fixed:.1f}",
            ]
        )
    return rows


def gpu_table(costs: Sequence[Cost], options: Options) -> list[list[str]]:
    """What a step takes on the assumed GPU, by parts, and how long its gradients take if nothing hides that."""
    device, shown = options.device(), [(INTERCONNECTS[i], n) for i, n in ((0, 8), (1, 8), (3, 16), (4, 16), (5, 16))]
    head = ["configuration", "computing, ms", "launching, ms", "weights, ms", "images to fill it"]
    rows = [[*head, *(f"{way.name.partition(',')[0]}, {n} GPUs, ms" for way, n in shown)]]
    for cost in costs:
        computing, launching = cost.flop(cost.batch) / device.rate, cost.operations * device.launch_s
        sends = [sum(way.all_reduce_s(size, n) for size in cost.buckets) for way, n in shown]
        parts, gradients = (
            [_short(1e3 * t) for t in times] for times in ((computing, launching, cost.fixed_s(device)), sends)
        )
        rows.append([cost.config, *parts, f"{cost.batch * launching / computing:,.0f}", *gradients])
    return rows


def gpus_table(costs: Sequence[Cost], options: Options, strong: bool) -> list[list[str]]:
    """Up to how many GPUs DDP is 90 % efficient."""
    device = options.device()
    ways = [*INTERCONNECTS, IDEAL] if strong else INTERCONNECTS
    rows = [["configuration", "batch", *(way.name for way in ways)]]
    for cost in costs:
        most = [cost.most_gpus(device, way, strong, limit=LIMIT) for way in ways]
        rows.append([cost.config, f"{cost.batch}" if strong else f"{cost.batch} each", *map(_number, most)])
    return rows


def sensitivity_table(costs: Sequence[Cost], options: Options) -> list[list[str]]:
    """The same for GPUs of other speeds, and for one where launching takes no time, over two of the interconnects."""
    kinds = {f"{options.flops * u / 1e12:.0f} TFLOP/s": options.device(u) for u in options.utilizations}
    kinds["launching free"] = replace(options.device(), launch_s=0.0)
    ways = [(way, kind, device) for way in INTERCONNECTS[3:5] for kind, device in kinds.items()]
    rows = [["configuration", *(f"{way.name}, {kind}" for way, kind, _ in ways)]]
    for cost in costs:
        cells = []
        for way, _, device in ways:
            most = [cost.most_gpus(device, way, strong, limit=LIMIT) for strong in (False, True)]
            cells.append(" / ".join(map(_number, most)))
        rows.append([cost.config, *cells])
    return rows


def check_table(check: dict[str, float]) -> list[list[str]]:
    """DDP of two processes here, measured and predicted."""
    names = [name for name in check if name not in ("gigabytes per second", "latency") and "efficiency" not in name]
    rows = [["", "ms per step", "efficiency"]]
    for name in names:
        efficiency = "" if name == "one process" else f"{check['one process'] / check[name] / 2:.2f}"
        rows.append([name, f"{check[name]:.1f}", efficiency])
    return rows


def _short(value: float) -> str:
    """Three figures."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _number(most: int) -> str:
    return f"≥ {most:,}" if most == LIMIT else f"{most}"


def draw(costs: Sequence[Cost], options: Options, path: Path) -> None:
    """Efficiency against GPUs: solid where they share a batch, dashed where each has one."""
    device = options.device()
    figure = Figure(figsize=(5 * len(costs), 3.8), layout="constrained")
    for cost, axes in zip(costs, figure.subplots(1, len(costs), squeeze=False, sharey=True)[0], strict=True):
        for i, way in enumerate(INTERCONNECTS):
            for strong, dash in ((True, "-"), (False, "--")):
                most = min(LIMIT, way.most, cost.batch if strong else LIMIT)
                gpus = [2**k for k in range(int(math.log2(most)) + 1)]
                values = [cost.efficiency(device, way, n, strong) for n in gpus]
                axes.plot(gpus, values, dash, color=f"C{i}", marker=".", label=way.name if strong else None)
        axes.axhline(0.9, color="0.6", linewidth=0.8)
        axes.set(xscale="log", xlabel="GPUs", title=cost.config, ylim=(0, 1.05))
        axes.set_xticks([4**k for k in range(6)], [f"{4**k:,}" for k in range(6)])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("efficiency")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def show(title: str, rows: list[list[str]], markdown: bool) -> None:
    """Print a table, whose first row is its head."""
    if markdown:
        rules = ["---", *["---:"] * (len(rows[0]) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rules, *rows[1:])]
        print(f"\n{title}\n", *lines, sep="\n")
    else:
        table = Table(*rows[0], title=title)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)


def main(options: Options) -> None:
    """Measure, or read what was measured, and say what follows from it."""
    torch.set_num_threads(1)
    found = measured(options)
    costs = [from_record(found["costs"][config]) for config in options.configs]
    seconds = {config: {int(n): s for n, s in by_images.items()} for config, by_images in found["seconds"].items()}
    check_model(costs, options)
    tables = {
        "What a step consists of": costs_table(costs),
        "Processor time of a step here": processor_table(costs, seconds),
        "A step on one GPU": gpu_table(costs, options),
        "GPUs at 90 %, each with a batch": gpus_table(costs, options, strong=False),
        "GPUs at 90 %, sharing a batch": gpus_table(costs, options, strong=True),
        "The same on GPUs of other speeds, each with a batch / sharing one": sensitivity_table(costs, options),
        f"Two processes here, {CHECKED}": check_table(found["check"]),
    }
    for title, rows in tables.items():
        show(title, rows, options.markdown)
    error = found["check"]["DDP, predicted"] / found["check"]["DDP, measured"] - 1
    rate, latency = found["check"]["gigabytes per second"], found["check"]["latency"]
    print(f"\nPrediction against measurement: {100 * error:+.0f} %; gloo: {rate:.2f} GB/s, {latency:.2f} ms a hop")
    chosen = {**asdict(options), "out": str(options.out), "record": str(options.record)}
    write_json(options.out / f"{NAME}.json", {**found, "options": chosen, "tables": tables})
    matplotlib.use("agg")
    draw([cost for cost in costs if cost.config.endswith("cifar10")] or costs[:2], options, options.out / f"{NAME}.png")


if __name__ == "__main__":
    parser = ArgumentParser(description=Options.__doc__)
    parser.add_class_arguments(Options)
    main(Options(**parser.parse_args().as_dict()))
