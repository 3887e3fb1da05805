"""Models come back from files bit by bit, and what is damaged or foreign is refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from wngen import checkpoint
from wngen.checkpoint import Metadata, load, read_metadata, save_release
from wngen.evaluation import Evaluation, Report, evaluate, weights_sha256
from wngen.image import Batch
from wngen.models import ConvVAE
from wngen.nn import data_dependent_init
from wngen.noise import Noise

DATA = {"data": "BinarizedMNIST", "binarization": "static"}
TRAINING = {"learning_rate": 0.002, "betas": [0.9, 0.999]}


def build(**arguments: Any) -> ConvVAE:
    small = {"latent_dim": 3, "widths": [4, 6], "blocks": 1, "hidden": 8, "iaf_width": 8}
    return ConvVAE(1, 8, 8, 2, **{**small, **arguments})


def images(n: int) -> torch.Tensor:
    return torch.randint(2, (n, 1, 8, 8), dtype=torch.uint8)


@pytest.fixture
def model() -> ConvVAE:
    """Initialized from data, so that its buffers are not those of a new model."""
    model = build()
    data_dependent_init(model, images(32), noise=Noise(0, torch.arange(32)))
    return model.eval()


def content(model: ConvVAE) -> dict[str, Any]:
    """A checkpoint of training as Lightning writes it; the averaged weights are the raw ones plus 1."""
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(40.0)}}, "param_groups": [{"lr": 0.002}]}],
        "wngen": {"version": "0.0.7", "model": model.config, "data": DATA, "training": TRAINING},
        "ema": {name: value.detach() + 1 for name, value in model.named_parameters()},
    }


def write(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def assert_same(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    for (name, value), (_, wanted) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(value, wanted), name  # masks too, which no file holds
    assert not loaded.training


def test_a_checkpoint_gives_averaged_or_raw_weights(model: ConvVAE, tmp_path: Path):
    path = write(content(model), tmp_path / "last.ckpt")
    raw = load(path, weights="raw")
    assert_same(raw, model)
    assert all(bool(value) for name, value in raw.state_dict().items() if name.endswith("initialized"))
    averaged = load(path)
    for name, value in averaged.named_parameters():
        assert torch.equal(value, model.get_parameter(name) + 1)
    for name, value in averaged.named_buffers():
        assert torch.equal(value, model.get_buffer(name))
    x, noise = images(4), Noise(1, torch.arange(4))
    assert torch.equal(raw(x, noise=Noise(1, torch.arange(4))).elbo_nats, model(x, noise=noise).elbo_nats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_release_comes_back_bit_by_bit(model: ConvVAE, tmp_path: Path, dtype: torch.dtype):
    model.to(dtype)
    save_release(model, tmp_path / "release")
    loaded = load(tmp_path / "release")
    assert_same(loaded, model)
    assert loaded.config == {**model.config, "widths": [4, 6]}
    assert weights_sha256(loaded) == weights_sha256(model)
    save_release(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "release" / name).read_bytes()


def test_a_release_is_plain_for_others_too(model: ConvVAE, tmp_path: Path):
    """The hub's own `from_pretrained` reads it, and so does whoever may read the folder."""
    save_release(model, tmp_path / "release", metadata=Metadata(model.config, DATA, TRAINING))
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert_same(ConvVAE.from_pretrained(tmp_path / "release"), model)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "release").iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_a_run_is_loaded_from_its_best_file(model: ConvVAE, tmp_path: Path):
    names = ("best.ckpt", "last.ckpt", "release")
    for i, name in enumerate(names):
        with torch.no_grad():
            model.posterior.bias.fill_(i)
        if name == "release":
            save_release(model, tmp_path / name)
        else:
            write(content(model), tmp_path / name)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert load(tmp_path, weights="raw").posterior.bias.tolist() == [0.0] * 6
    (tmp_path / "best.ckpt").unlink()
    assert load(str(tmp_path), weights="raw").posterior.bias.tolist() == [1.0] * 6
    (tmp_path / "last.ckpt").unlink()
    assert load(tmp_path).posterior.bias.tolist() == [2.0] * 6


def test_metadata_is_known_without_the_weights(model: ConvVAE, tmp_path: Path):
    path = write(content(model), tmp_path / "last.ckpt")
    metadata = read_metadata(path)
    assert metadata == Metadata(model.config, DATA, TRAINING, "0.0.7")
    save_release(model, tmp_path / "release", metadata=metadata)
    (tmp_path / "release" / "model.safetensors").write_bytes(b"")
    released = read_metadata(tmp_path / "release")
    assert (released.model, released.data, released.training) == (model.config, DATA, TRAINING)
    save_release(model, tmp_path / "release")
    assert read_metadata(tmp_path / "release").data is None


def report_of(model: ConvVAE) -> Report:
    evaluation: Evaluation = evaluate(model, [Batch(images(20), None, torch.arange(20))], 20, importance_samples=3)
    return Report.of(evaluation, model, {"name": "Noise", "split": "test", "images": 20}, "ema")


def test_a_release_carries_its_report(model: ConvVAE, tmp_path: Path):
    report = report_of(model)
    save_release(model, tmp_path / "noise-vae", report)
    assert Report.read(tmp_path / "noise-vae" / "report.json") == report
    card = ModelCard.load(tmp_path / "noise-vae" / "README.md")
    assert card.data.model_name == "noise-vae"
    assert card.data.library_name == "wngen"
    assert {result.metric_type for result in card.data.eval_results} >= {"elbo_nats", "log_likelihood_nats"}
    assert report.protocol["weights_sha256"] == weights_sha256(load(tmp_path / "noise-vae"))


def test_a_release_replaces_its_own_files_only(model: ConvVAE, tmp_path: Path):
    folder = tmp_path / "release"
    save_release(model, folder, report_of(model))
    (folder / "samples.png").write_bytes(b"picture")
    other = build(latent_dim=2)
    save_release(other, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]  # the report was the other model's
    assert (folder / "samples.png").read_bytes() == b"picture"
    assert_same(load(folder), other.eval())
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_a_failed_release_leaves_the_old_one(model: ConvVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "release"
    save_release(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ConvVAE, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_release(build(), folder)
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: full_disk() if self.name == "new" else rename(self, to))
        with pytest.raises(OSError, match="No space left"):
            save_release(build(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_weights_under_two_names_come_back_under_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Tied(ConvVAE):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.decoder.stages[1] = self.decoder.stages[0]

    from wngen import models

    monkeypatch.setattr(models, "Tied", Tied, raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "Tied"])
    small = {"latent_dim": 3, "widths": [4, 4], "blocks": 1, "hidden": 8, "iaf_width": 8}
    model = Tied(channels=1, height=8, width=8, levels=2, **small).eval()
    save_release(model, tmp_path / "release")
    assert len(load_file(tmp_path / "release" / "model.safetensors")) < len(model.state_dict())
    loaded = load(tmp_path / "release")
    assert_same(loaded, model)
    assert loaded.decoder.stages[0] is loaded.decoder.stages[1]


def test_loading_leaves_random_numbers_alone(model: ConvVAE, tmp_path: Path):
    save_release(model, tmp_path / "release")
    state = torch.get_rng_state()
    load(tmp_path / "release")
    assert torch.equal(torch.get_rng_state(), state)


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_carries_code_is_refused(model: ConvVAE, tmp_path: Path):
    harm = tmp_path / "harm"
    path = write({**content(model), "extra": Malicious(harm)}, tmp_path / "evil.ckpt")
    for read in (load, read_metadata):
        with pytest.raises(ValueError, match=r"evil.ckpt carries code and was not loaded: it names posix.mkdir"):
            read(path)
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps(Malicious(harm)))
    with pytest.raises(ValueError, match=r"bare.ckpt .*Bare pickles are not opened, since they may carry code"):
        load(bare)
    assert not harm.exists()


def test_a_damaged_checkpoint_is_refused(model: ConvVAE, tmp_path: Path):
    whole = write(content(model), tmp_path / "whole.ckpt").read_bytes()
    path = tmp_path / "cut.ckpt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"cut.ckpt \({length:,} bytes\) is cut short"):
            load(path)
    middle = whole.index(bytes(model.encoder.stem.v.detach().numpy().tobytes()))
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"cut.ckpt is damaged: .* does not have the checksum"):
        load(path)
    path.write_text("<html>404 not found</html>")
    with pytest.raises(ValueError, match="no checkpoint at all"):
        load(path)


def test_a_checkpoint_of_another_program_is_refused(model: ConvVAE, tmp_path: Path):
    for foreign, complaint in (
        ({"state_dict": {}, "epoch": 3}, "not written by wngen: wanted a dict with .*, got state_dict, epoch"),
        ([torch.zeros(3)], "not written by wngen: .*, got list"),
        ({**content(model), "state_dict": [1, 2]}, "not written by wngen"),
        ({**content(model), "wngen": {"version": "1"}}, "does not say which model it holds"),
    ):
        path = write(foreign, tmp_path / "foreign.ckpt")
        with pytest.raises(ValueError, match=complaint) as error:
            load(path)
        assert str(path) in str(error.value)


def test_another_architecture_is_refused(model: ConvVAE, tmp_path: Path):
    def altered(**about: Any) -> dict[str, Any]:
        good = content(model)
        return {**good, "wngen": {**good["wngen"], "model": {**model.config, **about}}}

    for change, complaint in (
        ({"model": "ResNet"}, "holds a model 'ResNet', wanted one of those in wngen.models: .*ConvVAE"),
        ({"model": "annotations"}, "holds a model 'annotations'"),
        ({"depth": 3}, "describes a ConvVAE that cannot be built: .*depth"),
        ({"levels": 1}, "describes a ConvVAE that cannot be built: levels=1"),
        ({"latent_dim": 5}, r"of another shape: .*posterior.v \(6, 8\), wanted \(10, 8\)"),
        ({"posterior": "diagonal"}, r"nothing was loaded. not expected: flow.steps.0.conditioner.* and \d+ more"),
        ({"blocks": 2}, r"missing: decoder.stages.0.1.* and \d+ more"),
    ):
        path = write(altered(**change), tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=complaint) as error:
            load(path, weights="raw")
        assert str(path) in str(error.value)


def test_entries_that_are_missing_or_too_many_are_named(model: ConvVAE, tmp_path: Path):
    for part, key, weights in (
        ("state_dict", "model.encoder.stem.g", "raw"),
        ("state_dict", "model.posterior.initialized", "raw"),
        ("ema", "encoder.stem.g", "ema"),
    ):
        name = key.removeprefix("model.")
        broken = content(model)
        del broken[part][key]
        with pytest.raises(ValueError, match=f"nothing was loaded. missing: {name}$"):
            load(write(broken, tmp_path / "broken.ckpt"), weights=weights)  # type: ignore[arg-type]
        broken = content(model)
        broken[part][f"{key}.twin"] = torch.zeros(1)
        with pytest.raises(ValueError, match=f"not expected: {name}.twin$"):
            load(write(broken, tmp_path / "broken.ckpt"), weights=weights)  # type: ignore[arg-type]
        broken = content(model)
        broken[part][key] = 3
        with pytest.raises(ValueError, match=f"of another shape: {name} "):
            load(write(broken, tmp_path / "broken.ckpt"), weights=weights)  # type: ignore[arg-type]


def test_weights_that_are_not_there_are_not_replaced_by_others(model: ConvVAE, tmp_path: Path):
    for average in ({}, None):
        path = write({**content(model), "ema": average}, tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match=r"holds no averaged weights \(ema\); load it with weights='raw'"):
            load(path)
        assert_same(load(path, weights="raw"), model)
    with pytest.raises(ValueError, match="weights='best': wanted 'ema' or 'raw'"):
        load(path, weights="best")  # type: ignore[arg-type]


def test_a_damaged_release_is_refused(model: ConvVAE, tmp_path: Path):
    folder = tmp_path / "release"
    save_release(model, folder)
    weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()

    def refused(complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint) as error:
            load(folder)
        assert str(folder) in str(error.value)

    for length in (0, 5, 200, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:length])
        refused("missing, cut short or damaged")
    state = load_file(write_bytes(folder / "model.safetensors", weights))
    renamed = {name.replace("stem.v", "stem.w"): value for name, value in state.items()}
    save_file(renamed, folder / "model.safetensors")
    refused("missing: encoder.stem.v; not expected: encoder.stem.w")
    (folder / "model.safetensors").write_bytes(weights)
    for text in ("{", "[1]", ""):
        (folder / "config.json").write_text(text)
        refused(r"config.json cannot be read|does not say which model")
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "model": "GAN"}))
    refused("holds a model 'GAN'")
    (folder / "config.json").unlink()
    refused("config.json cannot be read")


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_place_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no model: wanted best.ckpt.*it holds nothing"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"it holds notes\.txt"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*last.ckpt: wanted the folder of a run"):
        load(tmp_path / "last.ckpt")


def test_a_hub_id_without_a_network_is_explained():
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        ValueError, match=r"no file or folder nobody/nothing, and no model .* Hugging Face hub: "
    ) as error:
        load("nobody/nothing")
    assert "offline" in str(error.value).lower() or "cached" in str(error.value)
    with pytest.raises(ValueError, match="or a hub id user/name"):
        load("nobody")


def test_a_model_is_loaded_from_the_hub(model: ConvVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_release(model, tmp_path / "snapshot")
    asked: list[str] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        assert set(allow_patterns) == {"config.json", "model.safetensors"}
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert_same(load("somebody/conv-vae"), model)
    assert asked == ["somebody/conv-vae"]
    monkeypatch.chdir(tmp_path)
    save_release(model, tmp_path / "somebody" / "conv-vae")
    assert_same(load("somebody/conv-vae"), model)  # a folder of that name comes first
    assert len(asked) == 1
