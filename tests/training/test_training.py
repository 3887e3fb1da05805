"""Training: resumed equals uninterrupted, averages start from the initialized weights, harmful steps are left out."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from wngen import load
from wngen.data import ArrayFile
from wngen.models import ConvVAE
from wngen.training import AtomicCheckpointIO, Training

IMAGES, BATCH = 60, 20

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture
def data(tmp_path: Path) -> ArrayFile:
    images = np.random.default_rng(0).integers(0, 2, (100, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train=images[:IMAGES], val=images[60:80], test=images[80:])
    return ArrayFile(str(tmp_path / "images.npz"), levels=2, batch_size=BATCH)


def make_training(**options: object) -> Training:
    torch.manual_seed(0)
    model = ConvVAE(1, 6, 6, 2, latent_dim=2, widths=(4,), blocks=1, hidden=8, iaf_width=8)
    return Training(model, **{"init_images": 30, "warmup_steps": 2, **options})


def make_trainer(folder: Path, **options: object) -> pl.Trainer:
    keep_all = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=True)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "log_every_n_steps": 1}
    return pl.Trainer(
        accelerator="cpu",
        callbacks=[keep_all],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        **quiet,
        **options,
    )


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def test_what_is_logged_of_a_step_is_the_mean_over_its_micro_batches(data, tmp_path):
    """And so are its figures those of the same step in one batch."""
    logged = []
    for size, parts in ((20, 1), (10, 2)):
        data.batch_size = size
        loop = make_trainer(tmp_path / str(parts), max_steps=3, accumulate_grad_batches=parts, limit_val_batches=0)
        loop.fit(make_training(), datamodule=data)
        logged.append({name: float(value) for name, value in loop.callback_metrics.items()})
    whole, accumulated = logged
    assert whole["train/epochs"] == accumulated["train/epochs"] == 1
    for name in ("elbo_nats", "distortion_nats", "rate_nats", "objective_nats"):
        assert accumulated[f"train/{name}"] == pytest.approx(whole[f"train/{name}"], rel=1e-5)


def test_a_schedule_towards_an_end_wants_one(data, tmp_path):
    for decay in ("linear", "cosine"):
        with pytest.raises(ValueError, match=f"decay='{decay}' needs a training with an end: set trainer.max_epochs"):
            make_trainer(tmp_path, max_epochs=-1).fit(make_training(decay=decay), datamodule=data)


@pytest.mark.parametrize("steps_before", [3, 4], ids=["between epochs", "within an epoch"])
@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(data, tmp_path, steps_before, optimizer):
    whole = make_training(optimizer=optimizer)
    make_trainer(tmp_path / "whole", max_epochs=3).fit(whole, datamodule=data)
    first = tmp_path / "whole" / f"step={steps_before}.ckpt"
    rest = make_training(optimizer=optimizer)
    torch.manual_seed(99)  # what the second process's own generator does must not matter
    make_trainer(tmp_path / "whole", max_epochs=3).fit(rest, datamodule=data, ckpt_path=first, weights_only=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(rest)[name]), name
    for name, value in whole.ema.average.items():
        assert torch.equal(value, rest.ema.average[name]), name


def test_the_average_starts_from_the_initialized_weights_and_follows_its_recursion(data, tmp_path):
    training = make_training(ema_decay=0.9)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(training, datamodule=data)
    initialized = make_training()
    initialized.initialize(next(iter(data.evaluation_batches("train", 30, limit=30))))
    average = dict(initialized.model.named_parameters())
    for step in range(1, 4):
        raw = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        decay = min(0.9, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * raw[f"model.{name}"] for name, value in average.items()}
    for name, value in average.items():
        torch.testing.assert_close(training.ema.average[name], value)
        assert not torch.equal(value, raw[f"model.{name}"])


def test_validation_sees_the_averaged_weights_and_training_the_raw_ones(data, tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            seen.append(pl_module.model.posterior.v.detach().clone())

        def on_validation_end(self, trainer, pl_module):
            seen.append(pl_module.ema.average["posterior.v"].clone())

    training = make_training(ema_decay=0.99)
    trainer = make_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    trainer.callbacks.append(Look())
    trainer.fit(training, datamodule=data)
    during, averaged = seen
    assert torch.equal(during, averaged)
    assert not torch.equal(training.model.posterior.v, averaged)


def test_checkpoints_load_as_models_with_averaged_or_raw_weights(data, tmp_path):
    training = make_training()
    make_trainer(tmp_path, max_epochs=1).fit(training, datamodule=data)
    averaged, raw = load(tmp_path / "last.ckpt"), load(tmp_path / "last.ckpt", weights="raw")
    assert not averaged.training
    assert torch.equal(raw.posterior.v, training.model.posterior.v)
    assert torch.equal(averaged.posterior.v, training.ema.average["posterior.v"])
    assert all(value.initialized for value in averaged.modules() if hasattr(value, "initialized"))


def test_steps_with_a_gradient_that_is_not_finite_are_left_out_counted_and_given_up_on(data, tmp_path):
    training = make_training(give_up_after=3)
    poisoned = training.model.posterior.v.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="left out 3 steps in a row up to step 2"):
        make_trainer(tmp_path, max_epochs=3).fit(training, datamodule=data)
    initialized = make_training()
    initialized.initialize(next(iter(data.evaluation_batches("train", 30, limit=30))))
    assert training.skips.total == 3
    assert torch.equal(training.model.posterior.v, initialized.model.posterior.v)
    poisoned.remove()


def test_a_step_with_an_exploding_gradient_is_left_out_and_the_run_goes_on(data, tmp_path):
    training = make_training(skip_norm=1e4)
    calls = []

    def explode_once(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad * 1e9 if len(calls) == 2 else grad

    training.model.posterior.v.register_hook(explode_once)
    make_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(training, datamodule=data)
    steps = [torch.load(tmp_path / f"step={n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2, 3)]
    name = "model.posterior.v"
    assert torch.equal(steps[0][name], steps[1][name])
    assert not torch.equal(steps[1][name], steps[2][name])
    assert (training.skips.total, training.skips.in_a_row) == (1, 0)


def test_a_failed_write_leaves_the_previous_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)

    def full_disk(content: object, file: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*previous one is untouched.*last.ckpt"):
        writer.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_of_another_model_is_refused(data, tmp_path):
    make_trainer(tmp_path, max_epochs=1).fit(make_training(), datamodule=data)
    other = Training(
        ConvVAE(1, 6, 6, 2, latent_dim=2, widths=(4,), blocks=1, hidden=8, iaf_width=8, iaf_form="location_scale")
    )
    with pytest.raises(ValueError, match="iaf_form"):
        make_trainer(tmp_path / "other", max_epochs=2).fit(
            other, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"learning_rate": 0.0}, "learning_rate"), ({"free_bits": -1.0}, "free_bits"), ({"ema_decay": 1.0}, "ema_decay")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_training(**options)


def test_data_dependent_init_without_a_data_module_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="datamodule"):
        make_trainer(tmp_path, max_epochs=1).fit(make_training(), train_dataloaders=[0], val_dataloaders=[0])
