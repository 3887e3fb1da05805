"""A model's bounds on the images of a data set: one number for each image, each image exactly once."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wngen.evaluation.processes import ALONE, Processes
from wngen.evaluation.rows import Rows, Tables, Unfinished, merged, read_tables, write_tables
from wngen.evaluation.running import FractionDone, device_name, first_weight, parts, prepared, reported
from wngen.image import Batch
from wngen.model import LikelihoodModel
from wngen.noise import Noise


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

    @property
    def estimator(self) -> str:
        """What `best_nats` is: `exact`, `elbo`, or `importance-weighted`."""
        if self.is_exact:
            return "exact"
        return "elbo" if self.importance_samples is None else "importance-weighted"

    def write(self, path: Path | str) -> None:
        """Keep it as an `.npz`: the tables under their names, and the rest as JSON under `about`."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        tables = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        about = {name: value for name, value in values.items() if name not in tables}
        write_tables(Path(path), tables, json.dumps(about))

    @classmethod
    def read(cls, path: Path | str) -> Evaluation:
        """Read what `write` wrote.

        Raises:
            ValueError: no such file, or it is another one, or damaged.
        """
        about, tables = read_tables(Path(path))
        try:
            return cls(**{"log_likelihood_nats": None, "importance_samples": None, **json.loads(about), **tables})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold the figures of an evaluation: {error!r}") from error


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
    dtype: torch.dtype | None = None,
    unfinished: Unfinished | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Compute a model's bound on each image of a data set.

    The noise of an image follows from the seed and its index, so that the result depends on neither the batch
    size, the order of the batches, the chunking nor the number of processes, up to the rounding of the weights' dtype.
    It runs in eval mode, without autocast or TF32; the model's modes and device and torch's random numbers stay as they
    were.

    Args:
        model: any model.
        batches: the images with their indices, in any order; labels are used if the model is conditioned on them. Of
            several processes each has its own.
        images: how many there must be, over all processes.
        importance_samples: K of the importance-weighted bound, whose time grows with K; None leaves it out. An
            exact model has no use for it.
        seed: of the noise.
        chunk: images, or samples of them, that go through the model at once; it bounds the memory. By default what
            the model says.
        device: where to run; where the model is by default.
        progress: whether to show a bar with the remaining time; or what to call with the fraction done.
        dtype: of a copy of the model that is evaluated in place of it, such as `torch.float64`.
        unfinished: where figures are kept until all are there; those that an interrupted evaluation has kept there
            are not computed again.
        processes: that share the images. Each gets the figures of all.

    Raises:
        ValueError: an index missing or repeated, or a value that is not finite; the message names the index.
        TypeError: images that are not of integer levels.
    """
    chunk = model.chunk if chunk is None else chunk
    if images < 1 or chunk < 1 or (importance_samples is not None and importance_samples < 1):
        raise ValueError(f"{images=}, {chunk=}, {importance_samples=}: each must be at least 1")
    started = time.perf_counter()
    k = None if model.is_exact else importance_samples
    if dtype not in (None, first_weight(model).dtype):
        model = copy.deepcopy(model).to(dtype)
    done = _taken_over(unfinished, processes)
    figures = ("distortion_nats", "layer_kl_nats", *(("log_likelihood_nats",) if k else ()))
    rows = Rows(images, done, figures)
    try:
        with prepared(model, device) as home, reported(progress, images / processes.count) as advance:
            for batch in batches:
                if batch.image.dtype != torch.uint8:
                    raise TypeError(f"images of {batch.image.dtype}: wanted integer levels as uint8, see ImageSpec")
                new = rows.claim(batch)
                advance(len(batch.index) - len(new.index))
                if not len(new.index):
                    continue
                for part in _figures(model, new, k, seed, chunk, home, rows):
                    advance(part)
                    if unfinished is not None and unfinished.is_due():
                        unfinished.write(_with(done, rows, processes))
    finally:  # after an interruption too
        if unfinished is not None:
            unfinished.write(_with(done, rows, processes))
    tables = merged(processes.gather(_with(done, rows, processes)), images)
    distortion = tables["distortion_nats"]
    return Evaluation(
        index=tables["index"].astype(np.int64),
        distortion_nats=distortion,
        layer_kl_nats=tables["layer_kl_nats"],
        log_likelihood_nats=-distortion if model.is_exact else tables.get("log_likelihood_nats"),
        is_exact=model.is_exact,
        importance_samples=k,
        seed=seed,
        dtype=str(first_weight(model).dtype).removeprefix("torch."),
        device=device_name(home),
        wall_seconds=time.perf_counter() - started,
    )


def _figures(
    model: LikelihoodModel, batch: Batch, k: int | None, seed: int, chunk: int, home: torch.device, rows: Rows
) -> Iterator[float]:
    """Put the figures of a batch into rows, a part at a time; the number of images that each part amounts to."""
    forward_share = 1 / (1 + (k or 0))
    for x, y, index in parts(batch, chunk, model, home):
        bound = model(x, y, noise=Noise(seed, index))
        rows.put(index, "distortion_nats", bound.distortion_nats)
        rows.put(index, "layer_kl_nats", bound.layer_kl_nats)
        yield len(index) * forward_share
    if k is None:
        return
    # Few images at a time where K is large, so that progress shows within a batch too.
    for x, y, index in parts(batch, max(1, chunk // k), model, home):
        value = model.log_likelihood(x, y, k, noise=Noise(seed, index), chunk=chunk)
        rows.put(index, "log_likelihood_nats", value)
        yield len(index) * (1 - forward_share)


def _taken_over(unfinished: Unfinished | None, processes: Processes) -> Tables | None:
    """What is there already; the first process keeps it for all, before any other keeps something new."""
    if unfinished is None:
        return None
    done = processes.gather(unfinished.read())[0]
    if processes.rank == 0:
        unfinished.take_over(done)
    processes.gather(None)
    return done if len(done.get("index", ())) else None


def _with(done: Tables | None, rows: Rows, processes: Processes) -> Tables:
    """The figures that this process answers for: its own, and of the first those that were there already."""
    return merged([done or {}, rows.tables()]) if processes.rank == 0 else rows.tables()
