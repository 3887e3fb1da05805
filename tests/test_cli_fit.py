"""`wngen fit` interrupted and resumed: by signals, after damage, on a full disk, with other options."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from wngen.checkpoint import newest_state
from wngen.cli import main
from wngen.training import Checkpoints

TINY = [
    "--model.widths=[4]", "--model.patch=1", "--model.hidden=8", "--model.iaf_width=8", "--model.latent_dim=2",
    "--data=ArrayFile", "--data.levels=2", "--data.batch_size=10", "--training.init_images=10",
    "--images.every_n_epochs=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.precision=32-true", "--trainer.check_val_every_n_epoch=1", "--trainer.max_epochs=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wngen.cli.run.Run.finish", lambda self, *args: None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    levels = np.random.default_rng(0).integers(0, 2, (70, 6, 6), dtype=np.uint8)
    np.savez(path, train=levels[:50], val=levels[50:])
    return path


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing befell: eight steps in two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wngen.cli.run.Run.finish", lambda self, *args: None)
        assert main(["fit", f"--run={folder}", f"--data.path={images}", *TINY]) == 0
    return folder


def assert_same_end(run: Path, whole: Path) -> None:
    """Weights, average, optimizer, schedule and the best so far."""
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (run, whole))
        assert one["global_step"] == other["global_step"]
        for part in ("state_dict", "ema"):
            assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())
        states = [each["optimizer_states"][0]["state"].values() for each in (one, other)]
        for mine, theirs in zip(*states, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert one["lr_schedulers"] == other["lr_schedulers"]
        best = [
            state["best_model_score"]
            for each in (one, other)
            for key, state in each["callbacks"].items()
            if "best_k_models" in state
        ]
        assert best[0] == best[1]


class At(Checkpoints):
    """Does something after a step, and in a validation."""

    step, validation_of_step = 0, 0
    act: Callable[[], Any]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            type(self).act()

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.validation_of_step and not trainer.sanity_checking:
            type(self).act()


def at(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any], step: int = 0, validation_of_step: int = 0) -> None:
    place = {"step": step, "validation_of_step": validation_of_step, "act": staticmethod(act)}
    monkeypatch.setattr("wngen.cli.fitting.Checkpoints", type("At", (At,), place))


@pytest.mark.parametrize(
    ("number", "status", "place"),
    [
        (signal.SIGTERM, 143, {"step": 3}),
        (signal.SIGINT, 130, {"step": 4}),
        (signal.SIGTERM, 143, {"validation_of_step": 4}),
        (signal.SIGINT, 130, {"step": 8}),
    ],
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number, status, place, images, whole, tmp_path, monkeypatch, capsys
):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    run = tmp_path / "run"
    at(monkeypatch, lambda: signal.raise_signal(number), **place)
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--run={run}", f"--data.path={images}", *TINY])
    assert stop.value.code == status
    (step,) = place.values()
    said = capsys.readouterr().err
    assert said == f"wngen fit: interrupted; `wngen fit --resume {run}` goes on from step {step}\n"
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == step
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    monkeypatch.setattr("wngen.cli.fitting.Checkpoints", Checkpoints)
    assert main(["fit", f"--resume={run}"]) == 0
    assert_same_end(run, whole)


def test_ctrl_c_twice_does_not_wait_for_the_end_of_the_step(images, whole, tmp_path, monkeypatch, capsys):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run = tmp_path / "run"
    at(monkeypatch, twice, step=7)
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--run={run}", f"--data.path={images}", *TINY])
    assert stop.value.code == 130
    assert "goes on from step 4" in capsys.readouterr().err  # the end of the first epoch
    monkeypatch.setattr("wngen.cli.fitting.Checkpoints", Checkpoints)
    assert main(["fit", f"--resume={run}"]) == 0
    assert_same_end(run, whole)


def test_killed_before_the_first_checkpoint_it_begins_anew(images, whole, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "config.yaml", run)
    (run / ".last.ckpt.partial").write_bytes(b"half of it")
    assert main(["fit", f"--resume={run}"]) == 0
    assert "no checkpoint yet to go on from: it begins anew" in capsys.readouterr().out
    assert_same_end(run, whole)


@pytest.fixture
def halfway(whole: Path, tmp_path: Path, images: Path) -> Path:
    """Moved from where it was trained for an epoch, with checkpoints of steps 2 and 4."""
    run = tmp_path / "begun"
    options = ["--checkpoints.every_n_steps=2", "--training.decay=constant"]
    assert main(["fit", f"--run={run}", f"--data.path={images}", *TINY, "--trainer.max_epochs=1", *options]) == 0
    return run.rename(tmp_path / "moved")


def test_with_a_damaged_newest_file_it_goes_on_from_the_one_before_and_says_so(halfway, images, tmp_path, capsys):
    whole = tmp_path / "whole"
    constant = ["--training.decay=constant"]
    assert main(["fit", f"--run={whole}", f"--data.path={images}", *TINY, *constant]) == 0
    content = (halfway / "last.ckpt").read_bytes()
    (halfway / "last.ckpt").write_bytes(content[:2000])
    capsys.readouterr()
    assert main(["fit", f"--resume={halfway}", "--trainer.max_epochs=2"]) == 0
    said = capsys.readouterr().out
    assert f"{halfway}/last.ckpt (2,000 bytes) is cut short" in said
    assert f"It goes on from the one before, {halfway}/last-previous.ckpt." in said
    assert_same_end(halfway, whole)
    assert (halfway / "last.ckpt.damaged").stat().st_size == 2000


def test_with_all_of_them_damaged_it_says_so(halfway, capsys):
    for name in ("last.ckpt", "last-previous.ckpt"):
        (halfway / name).write_bytes(b"")
    assert main(["fit", f"--resume={halfway}"]) == 1
    said = capsys.readouterr().err
    assert "nothing to go on from" in said
    assert f"{halfway}/best.ckpt can still be evaluated" in said


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.batch_size=25", "data.batch_size=10 (not 25)"),
        ("--data.seed=3", "data.seed=0 (not 3)"),
        ("--data.test=0.2", "data.test=0.1 (not 0.2)"),
        ("--data.horizontal_flips=true", "data.horizontal_flips=False (not True)"),
        ("--training.seed=1", "training.seed=0 (not 1)"),
        ("--trainer.precision=64-true", "training.precision=32-true (not 64-true)"),
        ("--trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=1 (not 2)"),
        ("--trainer.limit_train_batches=3", "trainer.limit_train_batches=None (not 3"),
    ],
)
def test_what_was_trained_so_far_must_be_what_is_trained_on(option, message, whole, capsys):
    before = (whole / "config.yaml").read_text()
    main(["fit", f"--resume={whole}", option])
    assert message in capsys.readouterr().err
    assert (whole / "config.yaml").read_text() == before


def test_an_attempt_that_trains_nothing_leaves_the_run_as_it_was(whole, capsys):
    before = (whole / "config.yaml").read_text()
    assert main(["fit", f"--resume={whole}", "--trainer.callbacks+=ForcedWeightNorm", "--trainer.max_epochs=9"]) == 1
    assert "ForcedWeightNorm" in capsys.readouterr().err
    assert (whole / "config.yaml").read_text() == before
    twice = ["--trainer.callbacks+=NoiseScale", "--trainer.callbacks+=NoiseScale"]
    assert main(["fit", f"--resume={whole}", *twice]) == 1
    assert "trainer.callbacks: NoiseScale is there twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", f"--resume={whole / 'last.ckpt'}"])
    assert "it is a file; wanted the folder of an interrupted run" in capsys.readouterr().err


def test_what_may_change_is_said(halfway, images, capsys):
    elsewhere = images.with_name("elsewhere.npz")
    shutil.copy(images, elsewhere)
    path = halfway / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["wngen"]["processes"] = 4
    torch.save(content, path)
    options = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=7", f"--data.path={elsewhere}"]
    options += ["--checkpoints.every_n_minutes=7", "--trainer.callbacks+=WeightNormHealth"]
    capsys.readouterr()
    assert main(["fit", f"--resume={halfway}", *options]) == 0
    said = capsys.readouterr().out
    assert "Begun with trainer.max_epochs=1, goes on with 2." in said
    assert "Begun with trainer.log_every_n_steps=None, goes on with 7." in said
    assert f"Begun with data.path={images}, goes on with {elsewhere}." in said
    assert "Begun with processes=4, goes on with 1." in said
    assert "Begun with trainer.callbacks=None, goes on with [WeightNormHealth]." in said
    assert "Begun with checkpoints.every_n_minutes=5.0, goes on with 7.0." in said
    assert main(["fit", f"--resume={halfway}"]) == 0
    assert "max_epochs" not in capsys.readouterr().out  # which it now has in its configuration


def test_a_disk_full_in_the_middle_says_how_to_go_on_and_it_does(images, whole, tmp_path, monkeypatch, capsys):
    """A limit on the size of files, that falls below that of a checkpoint after three steps."""
    run, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    at(monkeypatch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1])), step=3)
    try:
        status = main(["fit", f"--run={run}", f"--data.path={images}", *TINY, "--checkpoints.every_n_steps=1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 1
    said = capsys.readouterr().err
    assert f"could not write the checkpoint last.ckpt (File too large); the previous one is untouched: {run}" in said
    assert f"With that put right, `wngen fit --resume {run}` goes on" in said
    assert torch.load(newest_state(run)[0], weights_only=True)["global_step"] == 2
    monkeypatch.setattr("wngen.cli.fitting.Checkpoints", Checkpoints)
    assert main(["fit", f"--resume={run}"]) == 0
    assert_same_end(run, whole)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_again_and_again_it_ends_as_if_it_never_had_been(images, whole, tmp_path):
    """By SIGKILL, in processes forked from this one; `benchmarks/survival.py` does it 200 times."""
    run = tmp_path / "run"
    moments = random.Random(0)
    for life in range(5):
        arguments = [f"--resume={run}"] if life else [f"--run={run}", f"--data.path={images}", *TINY]
        process = os.fork()
        if not process:
            os._exit(main(["fit", *arguments, "--checkpoints.every_n_steps=1"]))
        deadline = time.monotonic() + 60
        while not (run / "config.yaml").is_file() or len(list((run / "metrics").glob("*"))) <= life:
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status) or life > 0
    assert main(["fit", f"--resume={run}"]) == 0
    assert_same_end(run, whole)


def test_a_shell_sees_by_its_status_that_a_run_was_terminated(images, tmp_path):
    run, wngen = tmp_path / "run", Path(sys.executable).with_name("wngen")
    common = [f"--data.path={images}", *TINY, "--training.decay=constant", "--trainer.max_epochs=-1"]
    process = subprocess.Popen(
        [wngen, "fit", f"--run={run}", *common], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not (run / "last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    step = torch.load(run / "last.ckpt", weights_only=True)["global_step"]
    assert f"interrupted; `wngen fit --resume {run}` goes on from step {step}\n" in said
    uninterrupted = tmp_path / "uninterrupted"
    assert main(["fit", f"--run={uninterrupted}", *common, f"--trainer.max_steps={step}"]) == 0
    one, other = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (run, uninterrupted))
    for part in ("state_dict", "ema"):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())


def test_what_is_wrong_with_a_callback_is_said_in_its_own_words(tmp_path, capsys):
    command = ["fit", f"--run={tmp_path / 'run'}", "--trainer.callbacks+=ForcedWeightNorm", "--trainer.callbacks.rms=0"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("wngen fit: error: rms=0.0: wanted a positive number, such as 0.05, or none for unit norm\n")
    assert not (tmp_path / "run").exists()
