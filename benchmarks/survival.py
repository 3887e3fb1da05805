"""Kills one training again and again, each time at another moment, and compares what is left with one never killed.

    python benchmarks/survival.py --kills 200

Each life of the training is a process of its own, forked from this one so that it need not import torch again: it goes
on by `wngen fit --resume` from what the last one left, and gets SIGKILL after a random time. When all kills are done
the last life may reach the end. Then everything in the last checkpoint that decides how training goes on (weights,
their average, the optimizer's state, counters) must be, bit for bit, that of the training that nobody killed. After
each kill there must be a whole checkpoint that is not older than the one before.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import numpy as np
import torch

import wngen.cli.fitting
from wngen.checkpoint import newest_state
from wngen.cli import main

TRAINING = [
    "--model.widths=[4]", "--model.patch=1", "--model.hidden=16", "--model.iaf_width=16", "--model.latent_dim=4",
    "--data=ArrayFile", "--data.levels=256", "--data.binarization=dynamic", "--data.batch_size=20",
    "--training.init_images=20", "--images.every_n_epochs=0", "--checkpoints.every_n_steps=2",
    "--trainer.val_check_interval=7", "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1",
]  # fmt: skip


def live(*arguments: str) -> int:
    """Start a life of the training; its process."""
    process = os.fork()
    if process:
        return process
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os._exit(main(["fit", *arguments]))


def ends(process: int) -> bool:
    """Whether a life ended by itself; an error in it is one here too."""
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a life of the training failed with status {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def digest(folder: Path) -> str:
    """SHA-256 of all that decides how the training goes on, in its newest checkpoint."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in value:
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    content = torch.load(newest_state(folder)[0], weights_only=True)
    add({name: content[name] for name in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "loops")})
    add(content["wngen"]["skipped"])
    add([state["best_model_score"] for state in content["callbacks"].values() if "best_model_score" in state])
    return sha.hexdigest()


def survive() -> None:
    """Run the lives and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many processes are killed")
    parser.add_argument("--epochs", type=int, default=4, help="length of the training; of 10 steps each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    moments = random.Random(options.seed)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        images = np.random.default_rng(0).integers(0, 256, (240, 6, 6), dtype=np.uint8)
        np.savez(folder / "images.npz", train=images[:200], val=images[200:])
        training = [*TRAINING, f"--data.path={folder / 'images.npz'}", f"--trainer.max_epochs={options.epochs}"]
        wngen.cli.fitting.Run.finish = lambda *_: None  # type: ignore[method-assign]  # the training is what counts
        with contextlib.redirect_stdout(io.StringIO()):  # so that all is imported that a life needs
            main(["fit", f"--run={folder / 'warm'}", *training, "--trainer.max_epochs=1"])
        assert threading.active_count() == 1, "threads do not survive a fork"
        begin = time.monotonic()
        assert ends(live(f"--run={folder / 'whole'}", *training))
        whole, seconds = digest(folder / "whole"), time.monotonic() - begin

        begin, lost, finished, kills, kills_in_a_save, step = time.monotonic(), 0, 0, 0, 0, 0
        run = folder / "0"
        while kills < options.kills:
            resumes = (run / "config.yaml").is_file()
            process = live(*([f"--resume={run}"] if resumes else [f"--run={run}", *training]))
            time.sleep(moments.uniform(0, seconds / 2))
            os.kill(process, signal.SIGKILL)
            if ends(process):  # it was faster, and the next one begins anew
                lost += digest(run) != whole
                finished, step, run = finished + 1, 0, folder / str(finished + 1)
                continue
            kills += 1
            kills_in_a_save += any(run.glob(".*.partial"))
            if step or any(run.glob("last*.ckpt")):
                path, _, complaint = newest_state(run)
                now = torch.load(path, weights_only=True)["global_step"]
                lost += complaint is not None or now < step
                step = now
        resumes = (run / "config.yaml").is_file()
        assert ends(live(*([f"--resume={run}"] if resumes else [f"--run={run}", *training])))
        lost += digest(run) != whole
        print(
            f"{kills} kills, {kills_in_a_save} of them while a file was being written; {finished} trainings came to "
            f"their end in spite of it, and one more when the killing was over.\n"
            f"{time.monotonic() - begin:.0f} seconds; never killed, a training takes {seconds:.1f} seconds.\n"
            f"SHA-256 of the end {digest(run)[:16]}, never killed {whole[:16]}; lost: {lost}"
        )
    if lost:
        raise SystemExit(1)


if __name__ == "__main__":
    survive()
