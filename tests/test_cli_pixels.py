"""The commands on a model that draws pixel by pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wngen import load
from wngen.autoregressive import AutoregressiveModel
from wngen.cli import main
from wngen.sampling import draw_samples

CONFIG = """
model:
  class_path: PixelCNNPP
  init_args: {filters: 4, blocks: 1, scales: 2, components: 2, num_classes: 3}
data:
  class_path: ArrayFile
  init_args: {path: PATH, levels: 4, batch_size: 15, validation: 0.2, test: 0.2}
training: {init_images: 9}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, precision: 32-true}
images: {count: 3}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small conditional PixelCNN++, trained for some steps on coloured images of 8 x 6 pixels with four levels."""
    folder = tmp_path_factory.mktemp("pixels")
    images = np.random.default_rng(0).integers(0, 4, (60, 8, 6, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(60) % 3)
    (folder / "tiny.yaml").write_text(CONFIG.replace("PATH", str(folder / "images.npz")))
    assert main(["fit", "--config", str(folder / "tiny.yaml"), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_a_resumed_run_drops_out_the_same_activations(run, tmp_path):
    config, folders = str(run.parent / "tiny.yaml"), (tmp_path / "halves", tmp_path / "whole")
    assert main(["fit", "--config", config, "--run", str(folders[0])]) == 0
    assert main(["fit", "--resume", str(folders[0]), "--trainer.max_epochs=2"]) == 0
    assert main(["fit", "--config", config, "--run", str(folders[1]), "--trainer.max_epochs=2"]) == 0
    resumed, uninterrupted = (load(folder / "last.ckpt").state_dict() for folder in folders)
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())


def test_the_figure_is_the_exact_likelihood(run, tmp_path):
    report = json.loads((run / "report.json").read_text())
    assert report["nats"].keys() == {"log_likelihood"}
    assert report["protocol"]["estimator"] == "exact"
    out = tmp_path / "again.json"
    assert main(["evaluate", str(run), "--chunk=1", f"--out={out}", "--device=cpu"]) == 0
    again = json.loads(out.read_text())
    assert again["nats"]["log_likelihood"]["mean"] == pytest.approx(report["nats"]["log_likelihood"]["mean"], abs=1e-4)


def test_a_run_ends_with_samples_and_completions(run):
    for name in ("samples.png", "completions.png", "curves.png"):
        with Image.open(run / name) as picture:
            assert len(picture.convert("L").getcolors()) > 1, f"{name} is blank"


def test_samples_and_the_film_of_their_drawing(run, tmp_path):
    out, film = tmp_path / "s.png", tmp_path / "s.gif"
    sample = ["sample", str(run), "-n=5", "--seed=3", f"--out={out}", "--device=cpu"]
    assert main([*sample, f"--animate={film}"]) == 0
    with Image.open(film) as frames, Image.open(out) as picture:
        frames.seek(frames.n_frames - 1)
        assert frames.n_frames > 20
        assert frames.size == picture.size
        last, drawn = (np.asarray(image.convert("RGB"), dtype=int) for image in (frames, picture))
    assert abs(last - drawn).max() <= 8  # a GIF has 256 colours
    assert main(["sample", str(run), "-n=257", f"--animate={film}", f"--out={out}", "--device=cpu"]) == 1


def test_completions_leave_what_is_given(run, tmp_path):
    out = tmp_path / "c.png"
    complete = ["complete", str(run), "--device=cpu", "-n=2", "--alternatives=3", f"--out={out}"]
    assert main([*complete, "--rows=5"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (5 * (6 * 8 + 2) + 2, 2 * (8 * 8 + 2) + 2)
        tiles = np.asarray(picture)[2:, 2:]
    for row in range(2):
        original, given, *ways = (tiles[66 * row : 66 * row + 64, 50 * i : 50 * i + 48] for i in range(5))
        assert (given[40:] == given[40, 0]).all()
        for tile in (given, *ways):
            assert (tile[:40] == original[:40]).all()
    Image.fromarray(np.eye(8, 6, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    assert main([*complete, f"--mask={tmp_path / 'mask.png'}", f"--animate={tmp_path / 'c.gif'}"]) == 0
    assert (tmp_path / "c.gif").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows=8"], "images have 8 rows, give 0 to 7 of them"),
        (["--mask=absent.png"], "absent.png cannot be read as a picture"),
        (["--alternatives=0"], "--alternatives 0: wanted at least 1"),
        (["--rows=2", "--mask=m.png"], "--rows and --mask both say what is given: leave one out"),
    ],
)
def test_what_cannot_be_completed_is_explained(run, tmp_path, capsys, arguments, message):
    complete = ["complete", str(run), "--device=cpu", f"--out={tmp_path / 'c.png'}", "-n=1"]
    try:
        status = main([*complete, *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_a_vae_neither_completes_nor_animates(tmp_path, capsys):
    vae = str(Path(__file__).parents[1] / "checkpoints" / "conv-vae-iaf-mnist")
    data = ["--data=BinarizedMNIST", "--data.binarization=static"]
    for command in (["complete", vae, *data], ["sample", vae, f"--animate={tmp_path / 'a.gif'}"]):
        assert main([*command, "-n=1", "--device=cpu", f"--out={tmp_path / 'c.png'}"]) == 1
        assert "ConvVAE does not draw pixel by pixel" in capsys.readouterr().err


def test_sampling_leaves_the_model_and_the_random_numbers_alone(run):
    model = load(run, device="cpu")
    assert isinstance(model, AutoregressiveModel)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first = draw_samples(model, 4, label=1, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(draw_samples(model, 6, label=1, seed=5)[:4], first)  # an image's numbers are its own
