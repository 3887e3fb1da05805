"""The last good checkpoint outlives whatever happens to the next one."""

from __future__ import annotations

import os
import resource
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wngen import load
from wngen.checkpoint import newest_state
from wngen.models import ConvVAE
from wngen.training import AtomicCheckpointIO, write_safely


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    model = ConvVAE(1, 6, 6, 2, latent_dim=2, widths=(4,), blocks=1, hidden=8, iaf_width=8)
    weights = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    return {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "ema": weights,
        "global_step": step,
        "wngen": {"version": "0", "model": model.config, "training": {}, "data": None, "skipped": [0, 0]},
    }


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, one after the other."""
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint(state(step), tmp_path / "last.ckpt")
    return tmp_path


def assert_untouched(run: Path) -> None:
    assert [step_of(run / name) for name in ("last.ckpt", "last-previous.ckpt")] == [2, 1]
    assert newest_state(run)[0] == run / "last.ckpt"


def test_the_one_before_is_kept_of_the_newest_and_of_no_other(run):
    AtomicCheckpointIO().save_checkpoint(state(7), run / "best.ckpt")
    AtomicCheckpointIO().save_checkpoint(state(8), run / "best.ckpt")
    AtomicCheckpointIO().save_checkpoint(state(3), run / "last.ckpt")
    assert {path.name: step_of(path) for path in run.iterdir()} == {
        "last.ckpt": 3,
        "last-previous.ckpt": 2,
        "best.ckpt": 8,
    }


def test_a_file_system_without_links_keeps_the_one_before_too(run, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    AtomicCheckpointIO().save_checkpoint(state(3), run / "last.ckpt")
    assert [step_of(run / name) for name in ("last.ckpt", "last-previous.ckpt")] == [3, 2]
    assert len(list(run.iterdir())) == 2


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files of more than 10 kB cannot be written, as where the disk is full: the system itself says so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_good_one_and_no_rubbish(run, full_disk):
    """Also where the folder for temporary files has room: nothing is written there."""
    with pytest.raises(OSError, match=r"last\.ckpt \(File too large\); the previous one is untouched: .*last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint(state(3), run / "last.ckpt")
    assert_untouched(run)
    assert len(list(run.iterdir())) == 2
    with pytest.raises(OSError, match=r"best\.ckpt \(File too large\); there is no previous one"):
        AtomicCheckpointIO().save_checkpoint(state(3), run / "best.ckpt")


def test_where_nothing_may_be_written_the_last_good_one_is_untouched(run):
    """A folder in place of the file to write, since root may write anywhere."""
    (run / ".last.ckpt.partial").mkdir()
    with pytest.raises(OSError, match=r"\(Is a directory\); the previous one is untouched"):
        AtomicCheckpointIO().save_checkpoint(state(3), run / "last.ckpt")
    assert_untouched(run)


@pytest.mark.parametrize("moment", ["write", "fsync", "hardlink_to", "replace"])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_kill_at_any_moment_of_a_save_leaves_the_newest_or_the_one_before(run, moment, nth):
    """In a process of its own, that ends in the middle of the n-th call of what the save consists of."""
    process = os.fork()
    if not process:
        calls = iter(range(9))
        place = os if moment == "fsync" else torch if moment == "write" else Path
        name = "save" if moment == "write" else moment
        original = getattr(place, name)

        def die(*args: Any) -> Any:
            if next(calls) == nth:
                if moment == "write":
                    args[1].write(b"half of it")
                os._exit(9)
            return original(*args)

        setattr(place, name, die)
        AtomicCheckpointIO().save_checkpoint(state(3), run / "last.ckpt")
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if (moment, nth) not in {("write", 1), ("hardlink_to", 1)}:
        assert os.WEXITSTATUS(status) == 9
    path, _, complaint = newest_state(run)
    assert (path.name, complaint) == ("last.ckpt", None)
    assert step_of(path) in (2, 3)
    AtomicCheckpointIO().save_checkpoint(state(4), run / "last.ckpt")  # whatever is left of the killed one
    assert step_of(run / "last.ckpt") == 4
    assert step_of(run / "last-previous.ckpt") in (2, 3)


def test_what_does_not_come_back_from_the_disk_as_written_never_becomes_the_newest(run, monkeypatch):
    sync = os.fsync

    def bad_disk(descriptor: int) -> None:
        sync(descriptor)
        partial = run / ".last.ckpt.partial"
        if partial.exists():
            content = bytearray(partial.read_bytes())
            content[len(content) // 2] ^= 16
            partial.write_bytes(content)

    monkeypatch.setattr(os, "fsync", bad_disk)
    with pytest.raises(OSError, match=r"read back, .*the previous one is untouched"):
        AtomicCheckpointIO().save_checkpoint(state(3), run / "last.ckpt")
    assert_untouched(run)


def test_of_other_files_only_the_new_or_the_old_content_is_ever_there(tmp_path):
    target = tmp_path / "deep" / "config.yaml"
    write_safely(target, lambda file: file.write(b"old"))

    def stop_halfway(file: Any) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safely(target, stop_halfway)
    assert target.read_bytes() == b"old"
    assert len(list(target.parent.iterdir())) == 1


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_file_is_noticed_and_the_one_before_taken(run, damage):
    damage(run / "last.ckpt")
    path, metadata, complaint = newest_state(run)
    assert path == run / "last-previous.ckpt"
    assert metadata.model["model"] == "ConvVAE"
    assert complaint.startswith(f"{run / 'last.ckpt'} ")
    damage(run / "last-previous.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt .*; .*last-previous\.ckpt "):
        newest_state(run)


def test_without_the_newest_file_the_one_before_is_taken(run):
    (run / "last.ckpt").unlink()
    path, _, complaint = newest_state(run)
    assert (path.name, complaint) == ("last-previous.ckpt", f"{run / 'last.ckpt'} is missing")


def test_to_evaluate_a_run_with_a_damaged_file_one_must_choose_another(run):
    AtomicCheckpointIO().save_checkpoint(state(1), run / "best.ckpt")
    flip_a_bit(run / "best.ckpt")
    cut_short(run / "last.ckpt")
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged.* Beside it are whole: .*/last-previous\.ckpt; name"):
        load(run)
    assert load(run / "last-previous.ckpt").config == state(1)["wngen"]["model"]
    cut_short(run / "last-previous.ckpt")
    with pytest.raises(ValueError, match=r"^(?!.*Beside).*best\.ckpt is damaged"):
        load(run)


def test_whichever_byte_is_damaged_it_is_noticed_or_does_not_matter(tmp_path):
    """Padding may change; no error but the one that explains, and never another content."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({**state(1), "ema": {"w": torch.arange(5.0)}, "state_dict": {}}, path)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    noticed = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            newest, _, _ = newest_state(tmp_path)
            now = torch.load(newest, weights_only=True)
        except ValueError:
            noticed += 1
        else:
            assert torch.equal(now["ema"]["w"], content["ema"]["w"]), place
            assert now["wngen"] == content["wngen"], place
    assert noticed > len(whole) / 20
