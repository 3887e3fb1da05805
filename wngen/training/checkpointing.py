"""Checkpoint files that a full disk or a kill cannot destroy."""

from __future__ import annotations

import contextlib
import errno
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from wngen.checkpoint import LAST, PREVIOUS


def write_safely(target: Path, write: Callable[[BinaryIO], object], check: Callable[[Path], object] = bool) -> None:
    """Write a file beside its target, flush it to the disk, check it there, and rename it over the target.

    Until the rename the target stays as it is, whatever happens.

    Args:
        target: what to replace, or to make.
        write: writes the content.
        check: reads the file back, and raises an error if that is not what was written.

    Raises:
        OSError: the disk is full, or the folder not writable; what was there is untouched.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        check(partial)
        if target.name == LAST:
            _keep(target)
        partial.replace(target)
        _flush_names(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _keep(last: Path) -> None:
    """Let the newest checkpoint be the one before the newest, without a moment in which there is none."""
    if not last.exists():
        return
    beside = last.with_name(f".{PREVIOUS}.partial")
    try:
        beside.unlink(missing_ok=True)
        beside.hardlink_to(last)
        beside.replace(last.with_name(PREVIOUS))
    except OSError:  # a file system without links
        last.replace(last.with_name(PREVIOUS))


def _flush_names(folder: Path) -> None:
    """Bring the renaming of files in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to the disk, reads it back, and renames it over the target.

    Of `last.ckpt` the one before is kept, as `last-previous.ckpt`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: the disk is full, the folder not writable, or what is read back is not what was written; the
                file at `path` is untouched.
        """
        target = Path(path)

        def write(file: BinaryIO) -> None:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's words for what went wrong beneath it
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

        def check(partial: Path) -> None:
            if seen := _difference(partial, checkpoint):
                raise OSError(errno.EIO, f"read back, {seen}")

        try:
            write_safely(target, write, check)
        except OSError as error:
            kept = f"the previous one is untouched: {target}" if target.exists() else "there is no previous one"
            raise OSError(
                error.errno, f"could not write the checkpoint {target.name} ({error.strerror}); {kept}"
            ) from error


def _difference(path: Path, checkpoint: dict[str, Any]) -> str | None:
    """What is wrong with a file that should hold `checkpoint`, as far as checksums and names tell."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:  # forget what memory holds of it, so that the disk is read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                return f"{damaged} has another checksum"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        return f"it cannot be opened: {error}"
    return None if content.keys() == checkpoint.keys() else f"it holds {', '.join(content)}"
