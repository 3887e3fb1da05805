"""Whole runs of `wngen fit`, each done once."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from wngen import cli


def fitted(folder: Path, arguments: Sequence[str]) -> Path:
    """The folder of a run, which is trained unless it is there and complete; what an interruption left is removed.

    Raises:
        RuntimeError: the training failed; what is wrong it has printed.
    """
    if not (folder / "report.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = cli.main(["fit", f"--run={folder}", *arguments])
        if status:
            raise RuntimeError(f"{folder} failed: {said.getvalue()}")
    return folder
