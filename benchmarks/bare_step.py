"""A training step of a configuration's model in a bare loop, with no Lightning around it."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser, Namespace
from measuring import Clock
from plain_layers import plain_copy
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import wngen.models  # noqa: F401  # its classes are known by name once they are imported
from wngen.arguments import build, config_path
from wngen.cli.run import Run, fastest_precision
from wngen.cli.subject import SPEC
from wngen.data import BinarizedMNIST, ImageDataModule, Split
from wngen.data.images import Images
from wngen.data.loader import TrainingLoader
from wngen.image import Batch
from wngen.model import Bound, LikelihoodModel
from wngen.noise import derived_seed
from wngen.training import Checkpoints, ImageGrids, Training

INIT_IMAGES = 16  # of the data-dependent init: fewer than in training, so that memory is that of a step
RANDOM_IMAGES = 4096  # in place of a data set that is not in the package


@dataclass(frozen=True)
class Way:
    """How a step is taken.

    Attributes:
        precision: of Lightning; None for the faster one, as `wngen fit` chooses it.
        channels_last: see `Training`.
        recompute: see `ResNetVAE`; None for what the configuration says.
        compiled: see `Training`.
        plain: whether plain layers stand in the place of weight-normalized ones.
        resident: whether a GPU holds all images; on the CPU they are where they are.
    """

    precision: Literal["32-true", "bf16-mixed"] | None = None
    channels_last: bool = True
    recompute: bool | None = None
    compiled: bool = False
    plain: bool = False
    resident: bool = True

    def on(self, device: str) -> Way:
        """The same with the precision that is meant."""
        return replace(self, precision=self.precision or fastest_precision(device))


class RandomImages(ImageDataModule):
    """Random images in the place of others, of the same kind and treated alike.

    Args:
        others: what they stand in for.
    """

    def __init__(self, others: ImageDataModule) -> None:
        static = others.binarization == "static"
        super().__init__(
            others.batch_size,
            others.seed,
            others.evaluation_seed,
            "none" if static else others.binarization,
            2 if static else others.levels,
            others.horizontal_flips,
        )
        self._shape, self._num_classes = others.shape, others.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    def load(self) -> dict[Split, Images]:
        generator = torch.Generator().manual_seed(0)
        count = max(RANDOM_IMAGES, self.batch_size)
        image = torch.randint(0, self.levels, (count, *self.shape), dtype=torch.uint8, generator=generator)
        classes = self.num_classes
        label = None if classes is None else torch.randint(0, classes, (count,), generator=generator)
        images = Images.all_of(image, label)
        return {"train": images, "val": images.hold_out(0)[1], "test": images.hold_out(0)[1]}


def read_config(name: str, batch: int | None) -> Namespace:
    """A configuration's model, data and training, with another batch size where one is given."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(LikelihoodModel, "model", skip=SPEC)
    parser.add_subclass_arguments(ImageDataModule, "data")
    parser.add_class_arguments(Training, "training", skip={"model"})
    for unused in ("trainer", "images", "checkpoints"):
        parser.add_argument(f"--{unused}", type=dict)
    config = parser.parse_path(config_path(name))
    config.data.init_args.batch_size = batch or config.data.init_args.batch_size
    return config


def built(config: Namespace, way: Way, random: bool = False) -> tuple[Training, ImageDataModule]:
    """A model to be trained, and its data: random images where they are asked for, or the package does not hold it."""
    pl.seed_everything(config.training.seed, verbose=False)
    data: ImageDataModule = build(config.data)
    if random or not isinstance(data, BinarizedMNIST) or data.binarization != "static":
        data = RandomImages(data)
    chosen = config.model.clone()
    if way.recompute is not None:
        chosen.init_args.recompute = way.recompute
    model: LikelihoodModel = build(chosen, **data.spec.as_dict())
    options = {
        **config.training.as_dict(),
        "channels_last": way.channels_last,
        "compiled": way.compiled,
        "init_images": min(INIT_IMAGES, config.training.init_images, data.batch_size),
    }
    return Training(model, **options), data


def lightning(folder: Path, way: Way, device: str, **options: Any) -> pl.Trainer:
    """Lightning's trainer as `wngen fit` sets it up but for validation, with other options where they are given."""
    defaults = {name: p.default for name, p in inspect.signature(pl.Trainer).parameters.items()}
    own = {"accelerator": device, "devices": 1, "precision": way.precision, "max_epochs": -1, "max_steps": 10**6}
    given = {**defaults, **own, **options}
    return Run(folder).trainer(given, ImageGrids(), Checkpoints(), has_validation=False)


class BareStep:
    """The steps of one training, each of them whole, in its parts, or only what no loop can do without.

    Args:
        config: see `read_config`.
        way: how they are taken.
        device: `cpu` or `cuda`.
        folder: for what is logged.
        random: whether images are random ones, of which there are few, whatever the package holds.
    """

    def __init__(self, config: Namespace, way: Way, device: str, folder: Path, random: bool = False) -> None:
        self.training, self.data = built(config, way, random)
        self.trainer = self.training.trainer = lightning(folder, way, device)
        self.device = torch.device(device)
        self.training.to(self.device)
        options = self.training.options
        if options["init_images"]:
            first = next(
                iter(self.data.evaluation_batches("train", options["init_images"], limit=options["init_images"]))
            )
            self.training.initialize(self._moved(first))
        if way.plain:
            self.training.model = plain_copy(self.training.model)
        if options["channels_last"]:
            self.training.model.to(memory_format=torch.channels_last)
        if options["compiled"]:
            self.training.model.compile()
        chosen: Any = self.training.configure_optimizers()
        self.optimizer, self.schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
        images = self.data.images("train")
        self._loader = TrainingLoader(images.to(self.device) if way.resident else images, self.data.batch_size, 0)
        self._batches = itertools.chain.from_iterable(itertools.repeat(self._loader))
        self.batch = self._next_batch()  # of all bare steps
        self.step = 0
        self.training.ema.on_train_start(self.trainer, self.training)

    def _moved(self, batch: Batch) -> Batch:
        return Batch(*(None if t is None else t.to(self.device, non_blocking=True) for t in batch))  # type: ignore[arg-type]

    def _next_batch(self) -> Batch:
        return self.data.augment(self._moved(next(self._batches)), self._loader.epoch)

    def _loss(self, batch: Batch, draw: int) -> tuple[Tensor, Bound]:
        with self.trainer.precision_plugin.train_step_context():
            bound = self.training(batch, draw)
            return self.training.objective_nats(bound, lambda mean: mean), bound

    def parts(self) -> Iterator[str]:
        """Take a step, as training takes one that is logged, and give the name of each part when it is done."""
        self.step += 1
        batch = self._next_batch()
        yield "data"
        torch.manual_seed(derived_seed(0, "step", self.step, 0))
        loss, bound = self._loss(batch, self.step)
        yield "forward"
        loss.backward()
        yield "backward"
        self.training.configure_gradient_clipping(self.optimizer)
        yield "clip"
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        yield "optimizer"
        ended: Any = SimpleNamespace(global_step=self.step)
        self.training.ema.on_train_batch_end(ended, self.training)
        yield "ema"
        terms = torch.stack([bound.elbo_nats, bound.distortion_nats, bound.rate_nats, *bound.layer_kl_nats.unbind(1)])
        figures = torch.cat([terms.detach().mean(dim=1), loss.detach()[None]]).tolist()
        for logger in self.trainer.loggers:
            logger.log_metrics({f"train/{i}": figure for i, figure in enumerate(figures)}, self.step)
        yield "logging"

    def whole(self) -> None:
        """A step that is not logged."""
        for part in self.parts():
            if part == "ema":
                break

    def bare(self) -> None:
        """Forward and backward pass of the objective, clipping and optimizer, on the same batch each time."""
        self.step += 1
        loss, _ = self._loss(self.batch, self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.training.model.parameters(), self.training.options["clip_norm"])
        self.optimizer.step()

    def flop(self) -> dict[str, int]:
        """Of matrix products and convolutions: a multiplication and an addition are two, attention is a full square."""
        counted = {}
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                loss, _ = self._loss(self.batch, 0)
            counted["forward"] = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            counted["backward"] = counter.get_total_flops()
        self.optimizer.zero_grad()
        return counted

    def allocate(self) -> None:
        """Give all that does not grow with the batch its place in memory, by a bare step on two images."""
        whole = self.batch
        self.batch = Batch(*(None if t is None else t[:2] for t in whole))  # type: ignore[arg-type]
        self.bare()
        self.batch = whole

    def close(self) -> None:
        """Have what is logged written."""
        for logger in self.trainer.loggers:
            logger.finalize("success")

    def wait(self) -> None:
        """For the device, so that what has been asked of it counts."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def finished(step: BareStep, call: Callable[[], object]) -> Callable[[], None]:
    """A call that returns when the device has done what it asks for."""

    def waited() -> None:
        call()
        step.wait()

    return waited


def seconds_of_parts(step: BareStep, clock: Clock) -> dict[str, float]:
    """Of one step: by the clock on the CPU, by events in its queue on a GPU."""
    names = []
    if step.device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True)]
        events[0].record()
        for name in step.parts():
            names.append(name)
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        step.wait()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    else:
        now = time.perf_counter if clock == "wall" else time.process_time
        times = [now()]
        for name in step.parts():
            names.append(name)
            times.append(now())
        seconds = [b - a for a, b in itertools.pairwise(times)]
    return dict(zip(names, seconds, strict=True))
