"""Figures of images as they come in, each image once; and what an interruption leaves of them."""

from __future__ import annotations

import glob
import json
import os
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wngen.image import Batch

Tables = dict[str, NDArray[Any]]
"""Figures by name, float64 with one row for each image, and `index`, the images' places in their split."""


class Rows:
    """Figures of images, which may come in any order; each image may come once.

    Args:
        images: how many there must be in the end, over all processes.
        done: figures that are there already, of some of the images: these need not be computed.
        figures: names of those that every image must have; by default those that have been put.
    """

    def __init__(self, images: int, done: Tables | None = None, figures: Iterable[str] = ()) -> None:
        self.images, self._figures = images, frozenset(figures)
        self._seen: set[int] = set()
        self._done: set[int] = set() if done is None else set(done["index"].tolist())
        self._parts: dict[str, list[tuple[NDArray[np.int64], NDArray[np.float64]]]] = {}

    def claim(self, batch: Batch) -> Batch:
        """Note that the images of a batch have come, none of them for the second time.

        Returns:
            Those whose figures are not there yet.
        """
        for i in batch.index.tolist():
            if i in self._seen:
                raise ValueError(f"the image with index {i} came twice; each image must be counted exactly once")
            if len(self._seen) == self.images:
                raise ValueError(f"the image with index {i} is one more than the {self.images} images announced")
            self._seen.add(i)
        if not self._done:
            return batch
        new = torch.tensor([i not in self._done for i in batch.index.tolist()], dtype=torch.bool)
        label = None if batch.label is None else batch.label[new.to(batch.label.device)]
        return Batch(batch.image[new.to(batch.image.device)], label, batch.index[new.to(batch.index.device)])

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
        self._parts.setdefault(name, []).append((rows, table))

    def tables(self) -> Tables:
        """What has been put so far, of the images that have every figure."""
        columns = {}
        for name, parts in self._parts.items():
            index, table = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.argsort(index)
            columns[name] = index[order], table[order]
        if not columns or not self._figures <= columns.keys():
            return {}
        common = set.intersection(*(set(rows.tolist()) for rows, _ in columns.values()))
        complete = np.array(sorted(common), dtype=np.int64)
        return {"index": complete, **{name: table[np.isin(rows, complete)] for name, (rows, table) in columns.items()}}


def merged(parts: Iterable[Tables], images: int | None = None) -> Tables:
    """Figures of several lots of images as one table, whose indices rise.

    Args:
        parts: of the same figures.
        images: how many there must be; any number by default.

    Raises:
        ValueError: an index that stands in two of them, or another number of images.
    """
    parts = [part for part in parts if part]
    if not parts:
        parts = [{"index": np.empty(0, np.int64)}]
    assert all(part.keys() == parts[0].keys() for part in parts)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    index, counts = np.unique(joined["index"], return_counts=True)
    if (counts > 1).any():
        twice = int(index[counts > 1][0])
        raise ValueError(f"the image with index {twice} came twice; each image must be counted exactly once")
    if images is not None and len(index) != images:
        missing = sorted(set(range(images)) - set(index.tolist()))
        is_subset = max(index.tolist(), default=0) >= images  # which of its indices are missing, nobody can tell
        which = "" if is_subset else f"; missing are the indices {', '.join(map(str, missing[:5]))}"
        raise ValueError(f"{len(index)} images came, wanted {images}{which}{', ...' * (len(missing) > 5)}")
    order = np.argsort(joined["index"])
    return {name: table[order] for name, table in joined.items()}


def write_tables(path: Path, tables: Tables, about: str) -> None:
    """Write them as `.npz` with a text `about`, beside the target first, so that no half of it is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, about=np.array(about), **tables)
    partial.replace(path)


def read_tables(path: Path) -> tuple[str, Tables]:
    """The text `about`, and the tables, that `write_tables` wrote.

    Raises:
        ValueError: no such file, or it is another one, or damaged.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        about = str(content.pop("about"))
        rows = len(content["index"])
        if any(len(table) != rows for table in content.values()):
            raise ValueError("tables of different lengths")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} does not hold figures of images, as `wngen evaluate` writes: {error!r}") from error
    return about, content


class Unfinished:
    """Files that keep the figures of an evaluation until it is finished, so that an interrupted one goes on.

    Each of several processes has a file of its own. They are kept beside the file that is being made.

    Args:
        path: of the file that is being made.
        key: what a figure depends on. What was kept under another key is not taken up.
        rank: of this process.
        seconds: between two times of writing.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], rank: int = 0, seconds: float = 30.0) -> None:
        self._folder, self._prefix = path.parent, f".{path.name}.unfinished"
        self._own = self._folder / f"{self._prefix}-{rank}"
        self._key = json.dumps(key, sort_keys=True)
        self._seconds, self._written = seconds, time.monotonic()

    def read(self) -> Tables:
        """What earlier processes have kept. A file that is damaged or has another key is as good as none."""
        kept: Tables = {}
        for path in self._files():
            try:
                key, tables = read_tables(path)
            except ValueError:
                continue
            if key == self._key:
                new = ~np.isin(tables["index"], kept.get("index", []))
                kept = merged([kept, {name: table[new] for name, table in tables.items()}])
        return kept

    def write(self, tables: Tables) -> None:
        """Keep these, in place of what this process has kept before."""
        if len(tables.get("index", ())):
            write_tables(self._own, tables, self._key)
        self._written = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written > self._seconds

    def remove(self) -> None:
        """Once the evaluation is finished."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def take_over(self, tables: Tables) -> None:
        """Keep these, which `read` has given, in this process's file alone.

        Raises:
            OSError: nothing can be written there.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self._folder, os.W_OK):
            raise PermissionError(f"nothing can be written into {self._folder}; say by --out where figures may go")
        self.write(tables)
        for path in self._files():
            if path != self._own:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{glob.escape(self._prefix)}-*"))
