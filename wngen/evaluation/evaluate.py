"""A model's bounds on the images of a data set: one number for each image, each image exactly once."""

from __future__ import annotations

import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from wngen.image import Batch
from wngen.model import LikelihoodModel
from wngen.noise import Noise
from wngen.precision import full_precision

FractionDone = Callable[[float], None]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of each image of a data set: float64 tables with one row for each image.

    Attributes:
        index: `(N,)`, the images' places in their split, rising.
        distortion_nats: `(N,)`, -log p(x | z) at one sample of the posterior; for an exact model -log p(x).
        layer_kl_nats: `(N, L)`, divergence of posterior from prior of each stochastic layer.
        log_likelihood_nats: `(N,)`, exact or the importance-weighted bound; None if it was not asked for.
        is_exact: whether `log_likelihood_nats` is exact, not a bound.
        importance_samples: K of the importance-weighted bound, or None.
        seed: of the noise.
        dtype: of the weights, such as `float32`.
        device: where it ran.
        wall_seconds: how long it took.
    """

    index: NDArray[np.int64]
    distortion_nats: NDArray[np.float64]
    layer_kl_nats: NDArray[np.float64]
    log_likelihood_nats: NDArray[np.float64] | None
    is_exact: bool
    importance_samples: int | None
    seed: int
    dtype: str
    device: str
    wall_seconds: float

    @property
    def rate_nats(self) -> NDArray[np.float64]:
        """`(N,)`, divergence of posterior from prior over all layers."""
        return self.layer_kl_nats.sum(axis=1)

    @property
    def elbo_nats(self) -> NDArray[np.float64]:
        """`(N,)`, the evidence lower bound: -(distortion + rate); for an exact model the log-likelihood."""
        return -(self.distortion_nats + self.rate_nats)

    @property
    def best_nats(self) -> NDArray[np.float64]:
        """`(N,)`, the exact log-likelihood, or else the tightest bound that was computed."""
        return self.elbo_nats if self.log_likelihood_nats is None else self.log_likelihood_nats

    def write(self, path: Path | str) -> None:
        """Keep it as an `.npz`: the tables under their names, and the rest as JSON under `about`.

        Written beside its target first, so that no half of it is ever there.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: value for name, value in vars(self).items() if value is not None}
        tables = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        about = {name: value for name, value in values.items() if name not in tables}
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, about=np.array(json.dumps(about)), **tables)
        partial.replace(path)

    @classmethod
    def read(cls, path: Path | str) -> Evaluation:
        """Read what `write` wrote.

        Raises:
            ValueError: no such file, or it is another one, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
            about = json.loads(str(content.pop("about")))
            optional = {"log_likelihood_nats": None, "importance_samples": None}
            return cls(**{**optional, **about, **content})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{path} does not hold figures of images, as `wngen evaluate` writes: {error!r}"
            ) from error


@torch.no_grad()
def evaluate(
    model: LikelihoodModel,
    batches: Iterable[Batch],
    images: int,
    importance_samples: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | FractionDone = False,
) -> Evaluation:
    """Compute a model's bound on each image of a data set.

    The noise of an image follows from the seed and its index, so that the result depends on neither the batch
    size, the order of the batches nor the chunking, up to the rounding of the weights' dtype. It runs in eval
    mode, without autocast or TF32; the model's modes and device and torch's random numbers stay as they were.

    Args:
        model: any model.
        batches: the images with their indices, in any order; labels are used if the model is conditioned on them.
        images: how many there must be.
        importance_samples: K of the importance-weighted bound, whose time grows with K; None leaves it out. An
            exact model has no use for it.
        seed: of the noise.
        chunk: images, or samples of them, that go through the model at once; it bounds the memory. By default what
            the model says.
        device: where to run; where the model is by default.
        progress: whether to show a bar with the remaining time; or what to call with the fraction done.

    Raises:
        ValueError: an index missing or repeated, or a value that is not finite; the message names the index.
    """
    chunk = model.chunk if chunk is None else chunk
    if images < 1 or chunk < 1 or (importance_samples is not None and importance_samples < 1):
        raise ValueError(f"{images=}, {chunk=}, {importance_samples=}: each must be at least 1")
    started = time.perf_counter()
    k = None if model.is_exact else importance_samples
    rows = _Rows()
    with _prepared(model, device) as home, _reported(progress, images) as advance:
        forward_share = 1 / (1 + (k or 0))
        for batch in batches:
            rows.claim(batch.index, images)
            for x, y, index in _parts(batch, chunk, model, home):
                bound = model(x, y, noise=Noise(seed, index))
                rows.put(index, "distortion_nats", bound.distortion_nats)
                rows.put(index, "layer_kl_nats", bound.layer_kl_nats)
                advance(len(index) * forward_share)
            if k is None:
                continue
            # Few images at a time where K is large, so that progress shows within a batch too.
            for x, y, index in _parts(batch, max(1, chunk // k), model, home):
                value = model.log_likelihood(x, y, k, noise=Noise(seed, index), chunk=chunk)
                rows.put(index, "log_likelihood_nats", value)
                advance(len(index) * (1 - forward_share))
    tables = rows.tables(images)
    distortion = tables["distortion_nats"]
    return Evaluation(
        index=rows.index(),
        distortion_nats=distortion,
        layer_kl_nats=tables["layer_kl_nats"],
        log_likelihood_nats=-distortion if model.is_exact else tables.get("log_likelihood_nats"),
        is_exact=model.is_exact,
        importance_samples=k,
        seed=seed,
        dtype=str(_first_weight(model).dtype).removeprefix("torch."),
        device=_name(home),
        wall_seconds=time.perf_counter() - started,
    )


class _Rows:
    """Figures of images as they come in, in any order; each image may come once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._figures: dict[str, list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = {}

    def claim(self, index: Tensor, images: int) -> None:
        """Note that the images of `(B,)` indices are coming, none of them for the second time."""
        for i in index.tolist():
            if i in self._seen:
                raise ValueError(f"the image with index {i} came twice; each image must be counted exactly once")
            if len(self._seen) == images:
                raise ValueError(f"the image with index {i} is one more than the {images} images announced")
            self._seen.add(i)

    def put(self, index: Tensor, name: str, values: Tensor) -> None:
        """Keep the figure called `name` `(B, ...)` of the images `(B,)`."""
        rows, table = index.cpu().numpy(), values.double().cpu().numpy()
        assert len(rows) == len(table)
        finite = np.isfinite(table).reshape(len(table), -1).all(axis=1)
        if not finite.all():
            first = int(np.argmin(finite))
            others = f"{np.count_nonzero(~finite) - 1} of the {len(rows) - 1} images beside it"
            raise ValueError(
                f"{name} of the image with index {rows[first]} is {table[first]}, and not finite either for {others}. "
                "None is left out of an average: look at the image and at the model's weights"
            )
        self._figures.setdefault(name, []).append((rows, table))

    def index(self) -> NDArray[np.int64]:
        """The indices of all images, rising."""
        return np.array(sorted(self._seen), dtype=np.int64)

    def tables(self, images: int) -> dict[str, NDArray[np.float64]]:
        """Every figure in the order of `index`, once all images have come."""
        if len(self._seen) != images:
            missing = sorted(set(range(images)) - self._seen)
            is_subset = max(self._seen, default=0) >= images  # which of its indices are missing, nobody can tell
            which = "" if is_subset else f"; missing are the indices {', '.join(map(str, missing[:5]))}"
            raise ValueError(f"{len(self._seen)} images came, wanted {images}{which}{', ...' * (len(missing) > 5)}")
        tables = {}
        for name, parts in self._figures.items():
            order = np.argsort(np.concatenate([rows for rows, _ in parts]))
            tables[name] = np.concatenate([table for _, table in parts])[order]
            assert len(order) == images
        return tables


def _parts(
    batch: Batch, size: int, model: LikelihoodModel, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """At most `size` images at a time on the device, with the labels that the model asks for."""
    for part in torch.arange(len(batch.index), device=batch.index.device).split(size):
        label = None if model.num_classes is None or batch.label is None else batch.label[part].to(device)
        yield batch.image[part].to(device), label, batch.index[part].to(device)


@contextmanager
def _prepared(model: LikelihoodModel, device: torch.device | str | None) -> Iterator[torch.device]:
    """The model in eval mode on the device, everything in the precision of its weights; afterwards all as before."""
    before = _first_weight(model).device
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
def _reported(progress: bool | FractionDone, images: int) -> Iterator[Callable[[float], None]]:
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
            TextColumn("evaluating"),
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


def _first_weight(model: LikelihoodModel) -> Tensor:
    return next(weight for weight in model.state_dict().values() if weight.is_floating_point())


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
