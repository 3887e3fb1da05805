"""The command line as a user sees it: the main job in miniature, and mistakes that are explained."""

import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from rich.console import Console

from wngen import load
from wngen.arguments import general_first, packaged_configs
from wngen.checkpoint import save_release
from wngen.cli import main
from wngen.models import ConvVAE

RELEASED = Path(__file__).parents[1] / "checkpoints" / "conv-vae-iaf-mnist"
MINIATURE = [
    "--model.widths=[4]", "--model.patch=4", "--model.hidden=16", "--model.iaf_width=16", "--model.latent_dim=4",
    "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.check_val_every_n_epoch=1",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the quickstart in miniature."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["fit", "--run", str(folder), "--trainer.max_epochs=2", *MINIATURE]) == 0
    return folder


def test_fit_writes_everything_it_promises(run):
    report = json.loads((run / "report.json").read_text())
    assert report["protocol"]["images"] == 10_000
    assert report["protocol"]["data"]["binarization"] == "static"
    assert report["nats"]["elbo"]["low"] < report["nats"]["elbo"]["mean"] < report["nats"]["elbo"]["high"] < 0
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        with Image.open(run / name) as picture:
            assert len(picture.convert("L").getcolors()) > 1, f"{name} is blank"
    for name in (
        "best.ckpt",
        "last.ckpt",
        "config.yaml",
        "release/config.json",
        "release/model.safetensors",
        "release/README.md",
    ):
        assert (run / name).is_file(), name


def test_run_folder_checkpoint_and_release_hold_the_same_averaged_model(run):
    models = [load(run), load(run / "best.ckpt"), load(run / "release")]
    for name, value in models[0].state_dict().items():
        assert all(torch.equal(value, other.state_dict()[name]) for other in models), name


def test_evaluate_repeats_the_figure_of_the_run(run, tmp_path):
    out = tmp_path / "again.json"
    assert main(["evaluate", str(run), "--chunk=700", f"--out={out}", "--device=cpu"]) == 0
    first, again = (json.loads(path.read_text()) for path in (run / "report.json", out))
    assert again["nats"]["elbo"]["mean"] == pytest.approx(first["nats"]["elbo"]["mean"], abs=1e-4)
    assert again["protocol"]["weights_sha256"] == first["protocol"]["weights_sha256"]


def test_evaluate_with_importance_samples_on_a_subset_gives_a_tighter_bound(run, tmp_path):
    out = tmp_path / "k.json"
    arguments = ["--limit=50", "--importance-samples=30", f"--out={out}", "--weights=raw", "--device=cpu"]
    assert main(["evaluate", str(run / "last.ckpt"), *arguments]) == 0
    report = json.loads(out.read_text())
    assert report["protocol"]["importance_samples"] == 30
    assert report["protocol"]["weights"] == "raw"
    assert report["nats"]["log_likelihood"]["mean"] > report["nats"]["elbo"]["mean"]


def test_pictures_from_a_model(run, tmp_path):
    common = [str(run), "--device=cpu"]
    assert main(["sample", *common, "-n", "6", "--columns=3", "--seed=1", f"--out={tmp_path / 'a.png'}"]) == 0
    assert main(["sample", *common, "-n", "6", "--columns=3", "--seed=1", f"--out={tmp_path / 'b.png'}"]) == 0
    assert main(["sample", *common, "-n", "6", "--columns=3", "--seed=2", f"--out={tmp_path / 'c.png'}"]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert main(["reconstruct", *common, "-n", "4", f"--out={tmp_path / 'r.png'}"]) == 0
    assert main(["interpolate", *common, "-n", "2", "--steps=5", f"--out={tmp_path / 'i.png'}"]) == 0
    assert main(["interpolate", *common, "-n", "2", "--steps=5", f"--out={tmp_path / 'i.gif'}"]) == 0
    with Image.open(tmp_path / "i.gif") as film, Image.open(tmp_path / "i.png") as strip:
        assert film.n_frames == 8  # there and back again, the ends shown once
        assert strip.width > strip.height


def test_resume_goes_on_to_the_same_weights_as_an_uninterrupted_run(run, tmp_path):
    """Two epochs in one go, and one epoch resumed for a second: the same path, so the same weights."""
    folder = tmp_path / "halves"
    constant = ["--training.decay=constant", *MINIATURE]
    assert main(["fit", "--run", str(folder), "--trainer.max_epochs=1", *constant]) == 0
    assert main(["fit", "--resume", str(folder), "--trainer.max_epochs=2"]) == 0
    whole = tmp_path / "whole"
    assert main(["fit", "--run", str(whole), "--trainer.max_epochs=2", *constant]) == 0
    resumed, uninterrupted = load(folder / "last.ckpt"), load(whole / "last.ckpt")
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("name", packaged_configs())
def test_every_config_takes_one_step(name, tmp_path, request):
    """Those that train on what is not embedded are skipped without the data."""
    data = ["--data.batch_size=4"]
    chosen = yaml.safe_load(packaged_configs()[name].read_text())["data"]
    if chosen["class_path"] != "BinarizedMNIST" or chosen.get("init_args", {}).get("binarization") == "dynamic":
        data_root = request.getfixturevalue("data_root")
    if chosen["class_path"] == "CIFAR10":  # the real images, in another file format
        data = ["--data=ArrayFile", "--data.levels=256", f"--data.path={data_root / 'cifar10' / 'train.npy'}", *data]
    quick = [
        "--trainer.fast_dev_run=1",
        "--training.init_images=8",
        "--images.every_n_epochs=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    assert main(["fit", "--config", name, "--run", str(tmp_path / "run"), *data, *quick]) == 0


def test_configs_and_models_are_listed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("rich._console", Console(width=100))
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in packaged_configs())
    assert "970,786" in listed  # of pixelcnn_pp_mnist_static: the data's images have one channel of two levels
    released = load(RELEASED)
    assert f"{sum(p.numel() for p in released.parameters()):,}" in listed  # of conv_vae_mnist_dynamic
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "ConvVAE" in listed
    assert "conv-vae-iaf-mnist" in listed
    monkeypatch.setattr("wngen.__file__", str(tmp_path / "site-packages" / "wngen" / "__init__.py"))
    assert main(["models"]) == 0
    assert "they lie in the folder checkpoints/" in capsys.readouterr().out


@pytest.mark.parametrize("name", packaged_configs())
def test_every_config_says_what_it_trains(name):
    text = packaged_configs()[name].read_text()
    assert text.startswith("# ")
    assert {"model", "data", "training", "trainer", "images"} >= yaml.safe_load(text).keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fitt"], "no command 'fitt'; did you mean 'fit'?"),
        (["fit", "--confg", "quickstart"], "unknown argument '--confg'; did you mean '--config'?"),
        (["fit", "--config", "quikstart"], "did you mean 'quickstart'?"),
        (["fit", "--model.latnt_dim", "3"], "'latnt_dim'; did you mean 'latent_dim'?"),
        (["fit", "--model", "ConvVEA"], "no model called 'ConvVEA'; did you mean 'ConvVAE'?"),
        (["fit", "--training.learning_rat", "3"], "did you mean '--training.learning_rate'?"),
        (["fit", "--trainer.max_epoch", "3"], "did you mean '--trainer.max_epochs'?"),
        (["fit", "--images.count", "0"], "count=0"),
        (["evaluate", str(RELEASED), "--data.path", "x"], "BinarizedMNIST has no option 'path'"),
        (["fit", "--model.latent_dim", "many"], "ConvVAE takes no latent_dim=many: wanted int"),
        (["fit", "--model.posterior", "full"], "ConvVAE takes no posterior=full: wanted one of 'diagonal', 'iaf'"),
        (["fit", "--training.learning_rate", "fast"], "Expected a float. Got value: fast"),
        (["fit", "--trainer.callbacks+=NoiseScale", "--trainer.callbacks.window=all"], "no window=all: wanted int"),
        (["fit", "--trainer.callbacks+=NoiseScale", "--trainer.callbacks.windw=9"], "NoiseScale has no option 'windw'"),
        (["fit", "--resume", "nowhere"], "no last.ckpt in it"),
        (["evaluate", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_explained(argv, message, capsys):
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  class_path: ConvVAE\n  init_args:\n    latnt_dim: 3\n", "'latnt_dim'; did you mean 'latent_dim'?"),
        ("trainng:\n  learning_rate: 3\n", "did you mean 'training"),
        ("training:\n  learning_rat: 3\n", "did you mean 'training.learning_rate'?"),
    ],
)
def test_mistakes_in_yaml_are_explained(text, message, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "mine.yaml")])
    assert message in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(run, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--run", str(run)])
    assert "--resume" in capsys.readouterr().err


def test_data_of_another_shape_is_refused(run, tmp_path, capsys):
    np.save(tmp_path / "other.npy", np.zeros((40, 8, 8), dtype=np.uint8))
    arguments = ["--data", "ArrayFile", "--data.path", str(tmp_path / "other.npy"), "--data.levels=2"]
    assert main(["evaluate", str(run), "--device=cpu", *arguments]) == 1
    assert "height=28" in capsys.readouterr().err


def test_a_conditional_model_needs_labelled_data(tmp_path, capsys):
    """The embedded static split comes without labels."""
    assert main(["fit", "--run", str(tmp_path / "run"), "--model.num_classes=10", *MINIATURE]) == 1
    assert "the model knows 10 classes, BinarizedMNIST has no labels" in capsys.readouterr().err


def test_few_images_or_none_to_test_on_cost_nothing(tmp_path):
    arrays = {name: np.zeros((n, 28, 28), np.uint8) for name, n in (("train", 200), ("val", 3), ("test", 3))}
    options = ["--data=ArrayFile", "--data.levels=2", "--data.batch_size=50", "--trainer.max_epochs=1", *MINIATURE]
    for name, splits in (("few", ["train", "val", "test"]), ("none", ["train"])):
        np.savez(tmp_path / f"{name}.npz", **{split: arrays[split] for split in splits})
        run = tmp_path / name
        shares = [] if "test" in splits else ["--data.validation=0", "--data.test=0"]
        assert main(["fit", f"--run={run}", *options, f"--data.path={tmp_path / name}.npz", *shares]) == 0
        assert (run / "release" / "model.safetensors").is_file()
        assert (run / "report.json").is_file() == ("test" in splits)


def test_the_precision_of_training_goes_into_report_and_release_and_is_found_again(run, tmp_path):
    for where in (run, run / "last.ckpt", run / "release"):
        out = tmp_path / "report.json"
        assert main(["evaluate", str(where), "--limit=20", f"--out={out}", "--device=cpu"]) == 0
        assert json.loads(out.read_text())["protocol"]["training_precision"] == "32-true"
    assert json.loads((run / "report.json").read_text())["protocol"]["training_precision"] == "32-true"
    assert "float32 (trained in 32-true)" in (run / "release" / "README.md").read_text()


def test_without_an_average_weights_are_called_raw(tmp_path, capsys):
    arrays = {split: np.zeros((n, 28, 28), np.uint8) for split, n in (("train", 100), ("val", 3), ("test", 5))}
    np.savez(tmp_path / "few.npz", **arrays)
    run = tmp_path / "run"
    # In any order: what configures the data comes before the data is named, and the configuration last.
    data = [f"--data.path={tmp_path / 'few.npz'}", "--data.levels", "2", "--data.batch_size=50", "--data", "ArrayFile"]
    options = ["--training.ema_decay=0", "--images.count=3", "--images.seed=5", "--trainer.max_epochs=1", *MINIATURE]
    assert main(["fit", f"--run={run}", *data, *options, "--config", "quickstart"]) == 0
    assert json.loads((run / "report.json").read_text())["protocol"]["weights"] == "raw"
    assert "raw weights" in (run / "release" / "README.md").read_text()
    for where in (run, run / "release"):
        assert main(["evaluate", str(where), "--device=cpu"]) == 0
        assert "EMA" not in capsys.readouterr().out
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["images"] == {"count": 3, "every_n_epochs": 1, "seed": 5}
    with Image.open(next((run / "images").glob("samples-*.png"))) as picture:
        assert picture.size == (2 * 86 + 2, 2 * 86 + 2)  # 28 pixels at scale 3 and a gap, in two columns and rows


def test_the_order_of_words_does_not_matter():
    words = ["RUN", "--data.path", "x", "--limit=3", "--data", "MNIST", "--config=a", "--split", "val", "--config", "b"]
    assert general_first(words) == [
        "--config=a", "--config", "b", "--data", "MNIST", "RUN", "--data.path", "x", "--limit=3", "--split", "val",
    ]  # fmt: skip
    assert general_first(["--run", "x", "--data"]) == ["--run", "x", "--data"]
    assert general_first(["--data.path=x", "--data"]) == ["--data", "--data.path=x"]


def test_pictures_of_a_conditional_model(tmp_path):
    """All commands give it its classes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 2, (60, 28, 28), dtype=np.uint8), rng.integers(0, 3, 60)
    np.savez(tmp_path / "labelled.npz", images=images, labels=labels)
    torch.manual_seed(0)
    tiny = {"widths": (4,), "patch": 4, "hidden": 16, "iaf_width": 16, "latent_dim": 4}
    save_release(ConvVAE(num_classes=3, **tiny), tmp_path / "release")
    data = ["--data.levels=2", f"--data.path={tmp_path / 'labelled.npz'}", "--data=ArrayFile"]
    release = [str(tmp_path / "release"), "--device=cpu"]
    assert main(["sample", *release, "-n=6", "--label=2", f"--out={tmp_path / 's.png'}"]) == 0
    assert main(["sample", *release, "-n=6", "--label=3", f"--out={tmp_path / 's.png'}"]) == 1
    for command in ("reconstruct", "interpolate"):
        assert main([command, *release, *data, "-n=2", "--split=train", f"--out={tmp_path / command}.png"]) == 0
        assert (tmp_path / f"{command}.png").is_file()


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model with three stochastic layers, on images of 8 x 8."""
    folder = tmp_path_factory.mktemp("layered")
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 2, (90, 8, 8), dtype=np.uint8))
    (folder / "tiny.yaml").write_text(
        "model: {class_path: ResNetVAE, init_args: {layers: '8x2, 4x1', feature_maps: [4], latent_channels: 2}}\n"
        f"data: {{class_path: ArrayFile, init_args: {{path: {folder / 'images.npy'}, levels: 2, batch_size: 20}}}}\n"
        "training: {init_images: 20}\n"
        "trainer: {max_epochs: 2, log_every_n_steps: 1, accelerator: cpu, enable_progress_bar: false}\n"
        "images: {count: 4}\n"
    )
    assert main(["fit", "--config", str(folder / "tiny.yaml"), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_shows_its_stochastic_layers(layered, run):
    for name in ("ladder.png", "rate_per_layer.png"):
        with Image.open(layered / name) as picture:
            assert len(picture.convert("L").getcolors()) > 1, f"{name} is blank"
        assert not (run / name).exists()  # of one layer there is nothing to compare
    (metrics,) = layered.glob("metrics/*/metrics.csv")
    columns = metrics.read_text().partition("\n")[0].split(",")
    assert {f"{split}/kl_nats/layer_3_8x8" for split in ("train", "val")} < set(columns)
    assert (
        json.loads((layered / "report.json").read_text())["protocol"]["latent_shapes"] == [[2, 4, 4]] + [[2, 8, 8]] * 2
    )
    assert "| KL of layer 1, 4x4 |" in (layered / "release" / "README.md").read_text()


def test_upper_layers_are_kept_and_lower_ones_drawn_anew(layered, tmp_path, capsys):
    def picture(name: str, *options: str) -> Image.Image:
        out = tmp_path / f"{name}.png"
        assert main(["sample", str(layered), "--device=cpu", f"--out={out}", *options]) == 0
        with Image.open(out) as opened:
            return opened.copy()

    side = 8 * 8 + 2
    one = picture("one", "--keep-top", "1", "-n=3", "--split=val")
    assert one.size == (8 * side + 2, 3 * side + 2)
    assert "3 images of the val split, beside each 7 that keep 1 of its layers" in capsys.readouterr().out
    assert one != picture("seed", "--keep_top=1", "-n=3", "--split=val", "--seed=1")
    assert one == picture("same", "--keep_top=1", "-n=3", "--split=val")
    everything = picture("all", "--keep-top=all", "--alternatives=1", "-n=2")
    assert main(["reconstruct", str(layered), "--device=cpu", "-n=2", f"--out={tmp_path / 'r.png'}"]) == 0
    with Image.open(tmp_path / "r.png") as reconstructions:
        for i in range(2):  # there an original lies above its reconstruction, here to the left of it
            box = (side, i * side, 2 * side, (i + 1) * side)
            assert (
                everything.crop(box).tobytes()
                == reconstructions.crop((i * side, side, (i + 1) * side, 2 * side)).tobytes()
            )


def test_each_layer_takes_its_temperature(layered, run, tmp_path, capsys):
    def samples(*options: str) -> bytes:
        assert main(["sample", str(layered), "-n=9", "--device=cpu", f"--out={tmp_path / 's.png'}", *options]) == 0
        return (tmp_path / "s.png").read_bytes()

    same = samples("--temperature=0.5")
    assert same == samples("--temperature", "[0.5, 0.5, 0.5]")
    assert same != samples("--temperature=[0.5,0.5,1]")  # the last is that of the pixels too
    assert "temperature [0.5, 0.5, 1.0]" in " ".join(capsys.readouterr().out.split())
    assert main(["sample", str(run), "--temperature=[1,1]", f"--out={tmp_path / 's.png'}"]) == 1
    assert "one for each of 1 layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-top=4"], "keep_top=4: ResNetVAE has 3 layers here, wanted 0 to 3"),
        (["--keep-top=-1"], "keep_top=-1: ResNetVAE has 3 layers here, wanted 0 to 3"),
        (["--keep-top=some"], "some"),
        (["--keep-top=1", "--label=3"], "--label: not together with --keep-top"),
        (["--alternatives=3"], "--alternatives: not without --keep-top"),
        (["--keep-top=1", "--alternatives=0"], "--alternatives 0: wanted at least 1"),
        (["-n=0"], "-n 0"),
    ],
)
def test_mistakes_about_layers_are_explained(layered, options, message, capsys):
    try:
        status = main(["sample", str(layered), "--device=cpu", "--split=train", *options])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err


def test_options_may_come_before_the_run(run, tmp_path):
    out = tmp_path / "k.json"
    assert main(["evaluate", "--device", "cpu", "--limit", "20", "--split", "val", f"--out={out}", str(run)]) == 0
    assert json.loads(out.read_text())["protocol"]["data"]["split"] == "val"


def test_resuming_with_another_model_is_refused_and_costs_nothing(run, capsys):
    before = (run / "config.yaml").read_text()
    assert main(["fit", "--resume", str(run), "--model.latent_dim=8"]) == 1
    assert "model.latent_dim=4" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before


def test_callbacks_from_a_configuration_and_no_logger(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        packaged_configs()["quickstart"].read_text()
        + "  callbacks:\n    - class_path: pytorch_lightning.callbacks.EarlyStopping\n"
        + "      init_args: {monitor: val/elbo_nats, mode: max}\n  logger: false\n"
    )
    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--run", str(run), "--trainer.max_epochs=1", *MINIATURE]) == 0
    assert (run / "release" / "model.safetensors").is_file()
    assert not (run / "curves.png").exists()


def test_a_run_too_short_for_a_learning_curve_ends_well_with_what_was_measured(tmp_path):
    """After four steps no bound was logged yet, but the noise scale was."""
    run = tmp_path / "run"
    noise = ["--trainer.callbacks+=NoiseScale", "--trainer.callbacks.every_n_steps=2", "--trainer.max_steps=4"]
    assert main(["fit", "--run", str(run), *MINIATURE, "--trainer.limit_train_batches=1.0", *noise]) == 0
    assert (run / "noise_scale.png").is_file()
    assert not (run / "curves.png").exists()
    assert (run / "release" / "model.safetensors").is_file()


def test_resuming_with_another_learning_rate_is_refused(run, capsys):
    """The schedule's state would override it in silence."""
    assert main(["fit", "--resume", str(run), "--training.learning_rate=1e-5"]) == 1
    assert "training.learning_rate=0.004" in capsys.readouterr().err


def test_fit_without_any_argument_is_the_quickstart(tmp_path, monkeypatch):
    """As in the README, in a folder that it names itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WNGEN_RUN", raising=False)
    monkeypatch.setattr("wngen.cli.run.Run.finish", lambda self, *args: None)
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *args, **kwargs: None)
    assert main(["fit"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("quickstart-")
    assert "wngen.data.BinarizedMNIST" in (run / "config.yaml").read_text()
