"""One training run of the VAE, in one of the forms that are compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from plain_layers import add_batch_norm, plain_copy
from torch import Tensor, nn

from wngen.data import BinarizedMNIST, Split
from wngen.image import Batch
from wngen.models import ConvVAE
from wngen.nn import data_dependent_init
from wngen.noise import Noise

Form = Literal["weight_norm", "plain", "plain_default_init", "batch_norm"]

INIT_IMAGES = 256
MOMENT_IMAGES = 2048  # from which the moments of batch norm are computed for evaluation
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Settings:
    """What a run depends on, beside its form, learning rate, seed and length.

    Args:
        optimizer: adamax as in the paper, or adam.
        batch_size: images in a step.
        ema_decay: of the averaged weights; less at the beginning.
        evaluations_per_epoch: points of the curve in each epoch.
        train_images: a random subset of so many training images, the same in all runs; 50,000 by default.
        val_images: a random subset of so many validation images.
        widths: feature maps of each stage of the model.
        blocks: residual blocks of each stage.
        patch: the first stage works on patches of so many pixels squared.
        hidden: units of the fully connected layers.
        iaf_width: units of the hidden layer of each of the two steps of the flow.
        precision: bf16 is autocast.
        threads: of torch.
    """

    optimizer: Literal["adamax", "adam"] = "adamax"
    batch_size: int = 64
    ema_decay: float = 0.999
    evaluations_per_epoch: int = 4
    train_images: int | None = None
    val_images: int = 2000
    widths: list[int] = field(default_factory=lambda: [16, 32])
    blocks: int = 1
    patch: int = 2
    hidden: int = 256
    iaf_width: int = 320
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1

    def as_dict(self) -> dict[str, Any]:
        """The settings alone, also of a subclass that has more."""
        return {name: value for name, value in asdict(self).items() if name in Settings.__annotations__}


class Data:
    """The images that all runs share, in memory.

    Args:
        settings: which subsets to draw.

    Attributes:
        train: to train on.
        init: those of them that initialize.
        moments: those of them that batch norm takes its moments from.
        val: for the curves and the choice of the learning rate.
        test: for the figure at the end.
        protocol: what the figures are measured on.
    """

    def __init__(self, settings: Settings) -> None:
        data = BinarizedMNIST()
        # A smaller subset is part of a larger one.
        self.train = self._images(data, "train", settings.train_images)
        self.init = self._images(data, "train", min(INIT_IMAGES, len(self.train.index)))
        self.moments = self._images(data, "train", min(MOMENT_IMAGES, len(self.train.index)))
        self.val = self._images(data, "val", settings.val_images)
        self.test = self._images(data, "test", None)
        self.protocol = {
            "train": data.protocol("train", settings.train_images),
            "val": data.protocol("val", settings.val_images),
            "test": data.protocol("test"),
        }
        self.steps_per_epoch = len(self.train.index) // settings.batch_size

    @staticmethod
    def _images(data: BinarizedMNIST, split: Split, limit: int | None) -> Batch:
        return next(iter(data.evaluation_batches(split, data.size(split), limit)))


def part(images: Batch, rows: slice | Tensor) -> Batch:
    """Some of the images; the binarized set has no labels."""
    return Batch(images.image[rows], None, images.index[rows])


def parts(images: Batch) -> Iterator[Batch]:
    """All images in order, as many at a time as are evaluated at once."""
    for start in range(0, len(images.index), EVALUATION_BATCH):
        yield part(images, slice(start, start + EVALUATION_BATCH))


def shuffled(images: Batch, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of one size without end, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images.index), generator=generator).split(batch_size):
            if len(rows) == batch_size:
                yield part(images, rows)


def build(form: Form, seed: int, data: Data, settings: Settings) -> nn.Module:
    """The model in one of its forms; all of a seed, but that with torch's init, start from the same function."""
    torch.manual_seed(seed)
    sizes = {name: getattr(settings, name) for name in ("widths", "blocks", "patch", "hidden", "iaf_width")}
    model: nn.Module = ConvVAE(**sizes)
    data_dependent_init(model, data.init.image, noise=Noise(seed, data.init.index))
    if form != "weight_norm":
        model = plain_copy(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    if form == "plain_default_init":
        for layer in layers.values():
            layer.reset_parameters()
    if form == "batch_norm":
        inner = [name for name in layers if name.startswith(("encoder.", "decoder.")) and name != "decoder.output"]
        add_batch_norm(model, inner)
    return model.to(memory_format=torch.channels_last)


Key = tuple[Form, float, int, int]  # form, learning rate, seed, epochs


@dataclass(frozen=True)
class Run:
    """What a run is, and what came of it.

    Attributes:
        form: of the model.
        rate: learning rate.
        seed: of init, order and noise.
        epochs: how long.
        curve_epochs: where the bound was taken.
        curve_elbo_nats: the validation bound there, of averaged weights; shorter for a run that diverged.
        seconds_per_epoch: median over its turns, of training steps alone.
        test_elbo_nats: at the end; None where it was not wanted, or the run diverged.
        diverged: whether the bound ceased to be finite.
    """

    form: Form
    rate: float
    seed: int
    epochs: int
    curve_epochs: list[float]
    curve_elbo_nats: list[float]
    seconds_per_epoch: float
    test_elbo_nats: float | None
    diverged: bool

    @property
    def key(self) -> Key:
        """What tells it from other runs of the same settings."""
        return self.form, self.rate, self.seed, self.epochs


class Trainer:
    """Trains one model, a turn at a time.

    Args:
        form: of the model.
        rate: learning rate.
        seed: of init, order and noise.
        data: what all runs share.
        settings: of the benchmark.
    """

    def __init__(self, form: Form, rate: float, seed: int, data: Data, settings: Settings) -> None:
        self.form, self.rate, self.seed, self.data, self.settings = form, rate, seed, data, settings
        self.model = build(form, seed, data, settings)
        self.parameters: list[Tensor] = list(self.model.parameters())
        if settings.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters, rate, fused=True)
        else:
            self.optimizer = torch.optim.Adamax(self.parameters, rate, foreach=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.batches = shuffled(data.train, settings.batch_size, seed)
        self.steps = 0
        self.diverged = False
        self.step_seconds: list[float] = []
        self.epochs: list[float] = []
        self.elbo_nats: list[float] = []

    def step(self) -> None:
        """One step of the optimizer and of the average."""
        batch = next(self.batches)
        with self.autocast():
            bound = self.model(batch.image, noise=Noise(self.seed, batch.index, self.steps + 1))
        loss = -bound.elbo_nats.mean()
        self.diverged = not math.isfinite(loss.item())
        if self.diverged:
            return
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        decay = min(self.settings.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def turn(self, steps: int) -> None:
        """Train for some steps, then take the validation bound; nothing once the run has diverged."""
        started = time.perf_counter()
        for _ in range(steps):
            if self.diverged:
                return
            self.step()
        self.step_seconds.append((time.perf_counter() - started) / steps)
        elbo_nats = self.evaluate(self.data.val)
        self.diverged = not math.isfinite(elbo_nats)
        if not self.diverged:
            self.epochs.append(self.steps / self.data.steps_per_epoch)
            self.elbo_nats.append(elbo_nats)

    @torch.no_grad()
    def evaluate(self, images: Batch) -> float:
        """The mean bound on some images, of the averaged weights."""
        raw = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        self._renew_moments()
        self.model.eval()
        total = 0.0
        for batch in parts(images):
            with self.autocast():
                bound = self.model(batch.image, noise=Noise(0, batch.index))
            total += bound.elbo_nats.double().sum().item()
        self.model.train()
        torch._foreach_copy_(self.parameters, raw)
        return total / len(images.index)

    def _renew_moments(self) -> None:
        """The moments of batch norm under the weights as they are now."""
        norms = [layer for layer in self.model.modules() if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for norm in norms:
            norm.reset_running_stats()
        for batch in parts(self.data.moments) if norms else ():
            with self.autocast():
                self.model(batch.image, noise=Noise(0, batch.index))

    def autocast(self) -> torch.autocast:
        """As the precision says."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16")

    def result(self, epochs: int, test: bool) -> Run:
        """The run as it is recorded."""
        return Run(
            self.form,
            self.rate,
            self.seed,
            epochs,
            self.epochs,
            self.elbo_nats,
            statistics.median(self.step_seconds or [math.nan]) * self.data.steps_per_epoch,
            self.evaluate(self.data.test) if test and not self.diverged else None,
            self.diverged,
        )
