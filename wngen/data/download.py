"""Where data sets lie, and how torchvision's come to lie there undamaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich import get_console

PATIENCE_S = 5.0  # before it is said what is waited for


def data_root(root: str | None) -> Path:
    """The folder of all data sets: the given one, else `$WNGEN_DATA`, else `~/.cache/wngen`."""
    return Path(root or os.environ.get("WNGEN_DATA") or "~/.cache/wngen").expanduser()


def download(dataset: type[Any], root: Path, files: Mapping[Path, str], by_hand: str) -> None:
    """Download one of torchvision's data sets, unless all its files are there.

    Of several processes that want it, one downloads, and the others wait for it.

    Args:
        dataset: its class.
        root: the folder of all data sets.
        files: the files that it is read from, with their MD5.
        by_hand: which files to put where without a network.

    Raises:
        FileNotFoundError: it is not there and cannot be had.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(FileLock(root / f".{dataset.__name__}.lock")):
            if not all(file.exists() for file in files):
                dataset(root, download=True)
    except (OSError, RuntimeError, EOFError, HTTPException) as error:
        if all(file.exists() for file in files):  # in a folder that cannot be written to
            return
        raise FileNotFoundError(
            f"{dataset.__name__} is not in {root} and could not be downloaded: without a network, put {by_hand}, "
            f"or set WNGEN_DATA to a folder that has it. The download failed with: {error}"
        ) from error


def _alone(lock: FileLock) -> AbstractContextManager[Any]:
    """Hold a lock, after a word where another process holds it for long."""
    try:
        return lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        said = f"Waiting for another process that downloads, and holds {lock.lock_file}"
        get_console().print(said, soft_wrap=True, markup=False)
        return lock.acquire()


def check_files(files: Mapping[Path, str]) -> None:
    """Check that files are there and what they should be.

    Args:
        files: each with its MD5.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is damaged.
    """
    for file, wanted in files.items():
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: call prepare_data(), or set WNGEN_DATA to a folder that has it"
            )
        with file.open("rb") as stream:
            seen = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if seen != wanted:
            size = file.stat().st_size
            raise ValueError(
                f"{file} is damaged: its {size} bytes have MD5 {seen}, wanted {wanted}; delete it to have it restored"
            )
