"""What the benchmarks share: timing in turns, and a record of what was measured, and on what."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

Clock = Literal["wall", "cpu"]
Name = TypeVar("Name", bound=Hashable)


def interleaved(
    calls: Mapping[Name, Callable[[], object]], rounds: int, warmup: int = 3, clock: Clock = "wall"
) -> dict[Name, list[float]]:
    """Seconds of each call in each round.

    The calls take turns, and each round begins with another one, so that whatever else the machine does hits all
    of them alike.

    Args:
        calls: by name.
        rounds: how often each is timed.
        warmup: rounds before that, which do not count.
        clock: `cpu` is the processor's time, of all threads together: on a machine where others run too, with one
            thread, what a call would take by itself, but for caches and memory that are shared.
    """
    names = list(calls)
    now = time.perf_counter if clock == "wall" else time.process_time
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = now()
            calls[name]()
            if turn >= warmup:
                seconds[name].append(now() - started)
    return seconds


def apart(ways: Sequence[str], rounds: int, console: Console) -> dict[str, list[dict[str, Any]]]:
    """The results of measurements in processes of their own, which take turns, by their ways.

    Each process is the script that is running, with its own options and `--measure WAY` before them; it prints its
    result as JSON in its last line.

    Args:
        ways: what to measure.
        rounds: how often each.
        console: where the seconds are shown as they come in.
    """
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(rounds):
        first = turn % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            command = [sys.executable, sys.argv[0], "--measure", way, *sys.argv[1:]]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
            console.print(f"{way}: {results[way][-1]['seconds']:.3g} s per step")
    return results


def command(
    options: type[Any],
    main: Callable[[Any], None],
    measure: Callable[[str, Any], dict[str, Any]],
    check: Callable[[Any], None] = lambda options: None,
) -> None:
    """The command line of a script that measures in processes of its own, as `apart` starts them.

    Args:
        options: what it takes, a dataclass.
        main: measures all, given the options.
        measure: measures one thing, given its name and the options, to be printed as JSON.
        check: raises a ValueError for options that do not go together.
    """
    parser = ArgumentParser(description=options.__doc__)
    parser.add_argument("--measure", type=str | None, help="Only this measurement, printed as JSON.")
    parser.add_class_arguments(options)
    arguments = parser.parse_args().as_dict()
    chosen = arguments.pop("measure")
    given = options(**arguments)
    try:
        check(given)
    except ValueError as error:
        parser.error(str(error))
    if chosen is None:
        main(given)
    else:
        print(json.dumps(measure(chosen, given)))


def overhead_percent(seconds: list[float], reference: list[float]) -> dict[str, float]:
    """How much longer a call takes than a reference: median and quartiles over the rounds, each compared in itself."""
    ratios = [100 * (a / b - 1) for a, b in zip(seconds, reference, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"median": median, "low_quartile": low, "high_quartile": high}


def count_parameters(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters())


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` counts what the process that started this one held
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, Any]:
    """The hardware and software of this process, as JSON."""
    import torch  # here, so that a process that only starts others stays small

    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # of the last minute: what else was running
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wngen": version("wngen"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file by way of another beside it, so that the old one stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
