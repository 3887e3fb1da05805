"""What one process of a training owes the others."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy


def check_strategy(strategy: object) -> None:
    """Every process holds the whole model: its average, its norms and its checkpoints are made of whole tensors.

    Raises:
        ValueError: a strategy that divides the model, or starts its processes in another way than by this command.
    """
    if strategy not in ("auto", "ddp") and type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(
            f"--trainer.strategy {name}: wanted auto or ddp, where every process holds the whole model; to have a "
            "large one fit, lower data.batch_size, or choose precision bf16-mixed"
        )


def end_all(rank: int, count: int, children: Sequence[subprocess.Popen[bytes]], patience_s: float = 2.0) -> None:
    """Let an exception, that is being handled in one of several processes, end them all.

    It is told here, with its traceback: in the others it will look like a connection that was closed.

    Args:
        rank: which process this is.
        count: how many there are.
        children: those that this one has started; what torchrun or srun have started, they end.
        patience_s: for how long they may end by themselves, and tell why, before they are killed.
    """
    print(f"wngen fit: process {rank} of {count} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    until = time.monotonic() + patience_s
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
        child.kill()


def end_with(parent: int, every_s: float = 1.0) -> None:
    """From now on, let this process end soon after the one that started it.

    If that one is killed while they form their group, this one would wait for it for half an hour.

    Args:
        parent: that process.
        every_s: how often to look.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def alone(folder: Path, writes: bool) -> Iterator[None]:
    """While this goes on, no other training can begin in a folder; however this process ends, it is free again.

    Args:
        folder: of the run; made if need be.
        writes: whether this process is the one that writes there.

    Raises:
        ValueError: another training goes on there.
    """
    if not writes:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process trains there; wait for its end, or name another folder by --run"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
