"""How a model is run over a data set: made ready, a part at a time, and with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from wngen.image import Batch
from wngen.model import LikelihoodModel
from wngen.precision import full_precision

FractionDone = Callable[[float], None]


def parts(
    batch: Batch, size: int, model: LikelihoodModel, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """At most `size` images at a time on the device, with the labels that the model asks for."""
    if not len(batch.index):  # which would be split into one part of none
        return
    for part in torch.arange(len(batch.index), device=batch.index.device).split(size):
        label = None if model.num_classes is None or batch.label is None else batch.label[part].to(device)
        yield batch.image[part].to(device), label, batch.index[part].to(device)


@contextmanager
def prepared(model: LikelihoodModel, device: torch.device | str | None) -> Iterator[torch.device]:
    """The model in eval mode on the device, everything in the precision of its weights; afterwards all as before."""
    before = first_weight(model).device
    target = torch.device(device or before)
    training = {module: module.training for module in model.modules()}
    try:
        if target != before:
            model.to(target)
        model.eval()
        with full_precision(target):
            yield target
    finally:
        if target != before:
            model.to(before)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def reported(
    progress: bool | FractionDone, images: float, doing: str = "evaluating"
) -> Iterator[Callable[[float], None]]:
    """What to call with the number of images done since the last call."""
    if not isinstance(progress, bool):
        done = 0.0

        def report(more: float) -> None:
            nonlocal done
            done += more
            progress(done / images)

        yield report
    elif progress:
        columns = (
            TextColumn(doing),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} images"),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            TimeRemainingColumn(),
        )
        # The speed is averaged over minutes: one image may take seconds.
        with Progress(*columns, console=Console(stderr=True), speed_estimate_period=300) as bar:
            task = bar.add_task("", total=images)
            yield lambda more: bar.advance(task, more)
    else:
        yield lambda more: None


def first_weight(model: LikelihoodModel) -> Tensor:
    """One that stands for the dtype and the device of all."""
    return next(weight for weight in model.state_dict().values() if weight.is_floating_point())


def device_name(device: torch.device) -> str:
    """For readers."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
