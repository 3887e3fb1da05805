"""What is logged of a model with several stochastic layers: the rate of each, over all images, each counted once."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from recording import Recorder

from wngen.data import ArrayFile
from wngen.evaluation import evaluate
from wngen.model import Bound
from wngen.models import ConvVAE, ResNetVAE
from wngen.training import Training

NAMES = ["kl_nats/layer_1_3x3", "kl_nats/layer_2_6x6", "kl_nats/layer_3_6x6"]


@pytest.fixture
def training() -> Training:
    torch.manual_seed(0)
    model = ResNetVAE(1, 6, 6, 2, "6x2, 3x1", (4,), 2, iaf_layers=0)
    return Training(model, init_images=20, ema_decay=0)


def bound(n: int) -> Bound:
    return Bound(torch.rand(n), (torch.rand(n, 2), torch.rand(n, 2), torch.rand(n, 2)))


def test_the_rate_of_each_layer_is_logged_beside_the_whole(training: Training, tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 2, (77, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train=images[:40], val=images[40:])  # two batches, of 20 and 17
    data = ArrayFile(str(tmp_path / "images.npz"), levels=2, batch_size=20, test=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(tmp_path, name="metrics"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(training, datamodule=data)
    with (tmp_path / "metrics" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for split, times in (("train", 2), ("val", 1)):
        assert [name for name in rows[0] if name.startswith(f"{split}/kl_nats/")] == [f"{split}/{n}" for n in NAMES]
        logged = [row for row in rows if row[f"{split}/rate_nats"]]
        assert len(logged) == times
        for row in logged:
            layers = [float(row[f"{split}/{name}"]) for name in NAMES]
            assert sum(layers) == pytest.approx(float(row[f"{split}/rate_nats"]), rel=1e-5)
            assert float(row[f"{split}/kl_nats_at/3x3"]) == pytest.approx(layers[0], rel=1e-6)
            assert float(row[f"{split}/kl_nats_at/6x6"]) == pytest.approx(layers[1] + layers[2], rel=1e-6)
    measured = evaluate(training.model, data.evaluation_batches("val", 37), 37, seed=0)
    for i, layer in enumerate(measured.layer_kl_nats.T):
        assert float(logged[0][f"val/{NAMES[i]}"]) == pytest.approx(layer.mean(), rel=1e-5)


def test_what_is_written_of_a_step_is_of_that_step(training: Training, tmp_path: Path):
    np.savez(tmp_path / "images.npz", train=np.random.default_rng(0).integers(0, 2, (60, 6, 6), dtype=np.uint8))
    rows = {}
    for every in (1, 3):
        data = ArrayFile(str(tmp_path / "images.npz"), levels=2, batch_size=10, test=0, validation=0)
        logger = CSVLogger(tmp_path, name=f"every{every}")
        again = Training(copy.deepcopy(training.model), init_images=20, ema_decay=0, warmup_steps=6)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=logger, log_every_n_steps=every, enable_checkpointing=False,
            limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(again, datamodule=data)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows[every] = {row["step"]: row for row in csv.DictReader(file)}
    assert list(rows[1]) == ["0", "1", "2", "3", "4", "5"]
    assert rows[3] == {step: rows[1][step] for step in ("2", "5")}
    assert rows[3]["2"]["train/learning_rate"] != rows[3]["5"]["train/learning_rate"]


def test_images_of_all_processes_count_alike(training: Training, monkeypatch: pytest.MonkeyPatch):
    """Process 0 has 5 images in two batches, process 1 has 2, process 2 none."""
    parts = [bound(3), bound(2), bound(2)]
    elsewhere = Training(training.model)
    for process, part in zip((training, training, elsewhere), parts, strict=True):
        process._add(part)
    nowhere = Training(training.model)._totals
    strategy = SimpleNamespace(reduce=lambda totals, reduce_op: totals + elsewhere._totals + nowhere)
    training._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    logged: dict[str, float] = {}
    monkeypatch.setattr(
        training, "log_dict", lambda figures, **_: logged.update({name: float(each) for name, each in figures.items()})
    )
    training._log_totals("val")
    layers = torch.cat([part.layer_kl_nats for part in parts]).double()
    for i, name in enumerate(NAMES):
        assert logged[f"val/{name}"] == pytest.approx(float(layers[:, i].mean()), rel=1e-6)
    assert logged["val/rate_nats"] == pytest.approx(float(layers.sum(dim=1).mean()), rel=1e-6)
    distortion = torch.cat([part.distortion_nats for part in parts])
    assert logged["val/elbo_nats"] == pytest.approx(-logged["val/rate_nats"] - float(distortion.mean()), rel=1e-6)
    assert not training._totals.any()


def test_a_validation_waits_for_no_batch(training: Training):
    with Recorder():
        training._add(bound(4))


def test_of_one_layer_the_rate_says_it(monkeypatch: pytest.MonkeyPatch):
    training = Training(ConvVAE(1, 6, 6, 2, latent_dim=2, widths=(4,), blocks=1, hidden=8, iaf_width=8))
    logged: dict[str, float] = {}
    monkeypatch.setattr(
        training, "log_dict", lambda figures, **_: logged.update({name: float(each) for name, each in figures.items()})
    )
    means = training._figures(Bound(torch.ones(2), (torch.ones(2, 2),))).mean(dim=0).tolist()
    training._log_figures("train", means)
    assert logged.keys() == {f"train/{name}" for name in ("elbo_nats", "bits_per_dim", "distortion_nats", "rate_nats")}
