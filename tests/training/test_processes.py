"""Training with several processes: the same path as with one, and an end of all where one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from group import BATCH, PATIENCE_S, STEPS, Deaf, Faulty, distance, same, saved_images, together

from wngen import load
from wngen.cli import main
from wngen.cli.processes import alone, end_all

WNGEN = Path(sys.executable).with_name("wngen")
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_images(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture(scope="module")
def paths(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What has come of every process, by their number."""
    folder = tmp_path_factory.mktemp("paths")
    return {count: together(folder / str(count), count, images) for count in (1, 2, 3)}


def test_data_dependent_init_is_the_same_to_the_last_bit_in_every_process_of_any_number(paths):
    for results in paths.values():
        for result in results:
            same(result["begun"], paths[1][0]["begun"])


def test_every_process_holds_the_same_weights_and_the_same_average(paths):
    for results in paths.values():
        for result in results:
            for kind in ("weights", "average"):
                same(result[kind], results[0][kind])
            assert distance(result["weights"], result["begun"]) > 1e-2
            assert not result["broadcasts"]  # masks are not sent at every step
            assert distance(result["average"], {name: result["weights"][name] for name in result["average"]}) > 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_follow_one(paths, count):
    """Order, flips and noise are those of the global batch, however it is divided."""
    one, several = paths[1][0], paths[count][0]
    assert one["steps"] == several["steps"] == STEPS
    assert distance(several["effective"], one["effective"]) < 1e-5
    agree(several["logged"], one["logged"], rel=1e-5)


def agree(logged: list[dict[str, float]], expected: list[dict[str, float]], rel: float) -> None:
    assert len(logged) == len(expected) > STEPS
    for figures, wanted in zip(logged, expected, strict=True):
        assert figures == pytest.approx(wanted, rel=rel, abs=rel)


@pytest.mark.parametrize("count", [2, 3])
def test_they_differ_by_rounding_alone(images, tmp_path, count):
    """In double precision eight more digits agree; among others of the figures of each validation."""
    (one,) = together(tmp_path / "1", 1, images, precision="64-true")
    several = together(tmp_path / "several", count, images, precision="64-true")[0]
    assert distance(several["effective"], one["effective"]) < 1e-12
    agree(several["logged"], one["logged"], rel=1e-9)


@pytest.mark.parametrize("model", ["ResNetVAE", "PixelCNNPP"])
def test_models_of_other_kinds(model, tmp_path):
    """DDP also wants each of their parameters to have a gradient at each step."""
    images = saved_images(tmp_path, 8)
    (one,) = together(tmp_path / "1", 1, images, model=model, max_steps=6)
    several = together(tmp_path / "2", 2, images, model=model, max_steps=6)
    same(several[0]["weights"], several[1]["weights"])
    assert distance(several[0]["effective"], one["effective"]) < 1e-5


def test_free_bits_are_decided_on_the_mean_over_all_processes(images, tmp_path):
    """With a floor that the processes, each by its own images, would decide upon differently."""
    options = {"free_bits": 0.35, "max_steps": 6}
    (one,) = together(tmp_path / "1", 1, images, **options)
    several = together(tmp_path / "3", 3, images, **options)[0]
    deaf = together(tmp_path / "deaf", 3, images, Deaf, **options)[0]
    assert distance(several["effective"], one["effective"]) < 1e-5
    assert distance(deaf["effective"], one["effective"]) > 1e-3


def test_what_is_infinite_in_one_process_is_a_step_left_out_by_all(images, tmp_path):
    options = {"faulty_steps": (3, 4, 7), "max_steps": 10}
    (one,) = together(tmp_path / "1", 1, images, Faulty, **options)
    several = together(tmp_path / "3", 3, images, Faulty, **options)
    for result in several:
        assert result["skipped"] == one["skipped"] == 3
        same(result["weights"], several[0]["weights"])
    assert all(bool(value.isfinite().all()) for value in several[0]["weights"].values())
    assert distance(several[0]["effective"], one["effective"]) < 1e-5


@pytest.mark.parametrize("count", [1, 3])
def test_what_two_have_begun_others_go_on_with_on_the_same_path(paths, images, tmp_path, count):
    """From the middle of an epoch."""
    together(tmp_path, 2, images, max_steps=STEPS // 2 - 1)
    results = together(tmp_path, count, images)
    for result in results:
        same(result["weights"], results[0]["weights"])
        assert distance(result["effective"], paths[1][0]["effective"]) < 1e-5


def test_a_batch_that_three_cannot_share_is_refused(images, tmp_path):
    with pytest.raises(AssertionError, match=r"batch_size=10 .* cannot be shared equally by 3; use 9"):
        together(tmp_path, 3, images, batch_size=10)


def command(images: Path, *options: str) -> list[str]:
    """Of a training of one epoch, on images of 6 x 6."""
    return [
        "fit",
        "--data=ArrayFile", f"--data.path={images}", "--data.binarization=none", f"--data.batch_size={BATCH}",
        "--model=ConvVAE", "--model.widths=[4]", "--model.blocks=1", "--model.hidden=8", "--model.latent_dim=3",
        "--model.iaf_width=8", "--training.init_images=40", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--trainer.check_val_every_n_epoch=1", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
        *options,
    ]  # fmt: skip


def run(program: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """To its end, which must come in time."""
    path, *arguments = program
    program = [Path(sys.executable).with_name(str(path)), *arguments]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(program, env=everything, capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_command_with_two_processes_writes_what_it_does_with_one(images, tmp_path):
    """Started by Lightning; the first process evaluates and draws while the other is done."""
    folders = [tmp_path / "one", tmp_path / "two"]
    assert main(command(images, f"--run={folders[0]}")) == 0
    done = run(["wngen", *command(images, f"--run={folders[1]}", *TWO)])
    assert done.returncode == 0, done.stderr
    said = "".join(done.stdout.split())  # a long path may stand on two lines
    assert said.count(f"In{folders[1]}/:") == 1, done.stdout
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} for folder in folders]
    assert {name for name in names[0] ^ names[1] if "tfevents" not in name} == set()
    one, two = (json.loads((folder / "report.json").read_text())["nats"] for folder in folders)
    assert two["elbo"]["mean"] == pytest.approx(one["elbo"]["mean"], rel=1e-6)
    one, two = (load(folder / "last.ckpt", weights="raw").state_dict() for folder in folders)
    assert distance(two, one) < 1e-5


FAILING = """
import os
import pytorch_lightning as pl

class Failing(pl.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 3 and trainer.global_rank == int(os.environ["FAILING"]):
            raise KeyError("broken on purpose")
"""


@pytest.mark.parametrize(("launcher", "failing"), [("torchrun", 1), ("wngen", 0)])
def test_an_exception_in_one_process_ends_all_with_its_traceback(images, tmp_path, launcher, failing):
    (tmp_path / "failing.py").write_text(FAILING)
    arguments = command(images, f"--run={tmp_path / 'run'}", "--trainer.callbacks=failing.Failing", *TWO)
    if launcher == "torchrun":
        arguments = ["--standalone", "--nproc-per-node=2", "--no-python", "--", str(WNGEN), *arguments]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run([launcher, *arguments], PYTHONPATH=path, FAILING=str(failing))
    assert done.returncode != 0, done.stderr
    assert f"process {failing} of 2 failed:\nTraceback" in done.stderr
    assert "KeyError: 'broken on purpose'" in done.stderr
    assert not (tmp_path / "run" / "report.json").exists()


def test_what_does_not_end_by_itself_is_ended():
    """Such as a process that waits for a GPU, which waits for the process that failed."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        end_all(0, 2, [child], patience_s=0.1)
        assert child.wait(timeout=PATIENCE_S) == -signal.SIGKILL


ORPHAN = """
import os, sys, time
from wngen.cli.processes import end_with
end_with(int(sys.argv[1]), every_s=0.05)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_one_whose_parent_is_killed_before_they_have_met_ends_too():
    """It would wait for it."""
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {ORPHAN!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        orphan = int(started.stdout.readline())
        assert Path(f"/proc/{orphan}").exists()
        started.kill()
    until = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{orphan}/cmdline").exists() and Path(f"/proc/{orphan}/cmdline").read_bytes():
        assert time.monotonic() < until, "it goes on by itself"
        time.sleep(0.05)


def test_only_one_training_at_a_time_in_a_folder(images, tmp_path, capsys):
    arguments = command(images, f"--run={tmp_path / 'run'}")
    with alone(tmp_path / "run", writes=True):
        assert main(arguments) == 1
        assert f"{tmp_path / 'run'}: another process trains there" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        with alone(tmp_path / "run", writes=False):  # those that do not write take part in it
            assert not is_free(tmp_path / "run")
        assert not is_free(tmp_path / "run")
    assert is_free(tmp_path / "run")


def test_a_training_that_was_killed_leaves_its_folder_free(tmp_path):
    holding = "import sys, time; from pathlib import Path; from wngen.cli.processes import alone\n"
    holding += "with alone(Path(sys.argv[1]), True): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", holding, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not is_free(tmp_path)
        holder.kill()
    assert is_free(tmp_path)


def is_free(folder: Path) -> bool:
    """Whether a training could begin there."""
    try:
        with alone(folder, writes=True):
            return True
    except ValueError:
        return False


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn", "FSDPStrategy"])
def test_strategies_that_divide_the_model_are_refused(images, tmp_path, capsys, strategy):
    assert main(command(images, f"--run={tmp_path / 'run'}", f"--trainer.strategy={strategy}")) == 1
    assert f"--trainer.strategy {strategy}: wanted auto or ddp" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_that_others_start_want_a_folder_in_common(images, monkeypatch, capsys):
    monkeypatch.delenv("WNGEN_RUN", raising=False)
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            with pytest.raises(SystemExit):
                main(command(images))
        assert "need a folder in common: name it by --run" in capsys.readouterr().err
