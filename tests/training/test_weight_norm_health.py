"""||v||, angle of a step and effective learning rate: against closed forms and brute force, leaving training alone."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from layer_zoo import ZOO, unit_weights
from little_run import fit, images_in
from per_image import make_training
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from wngen.cli import main
from wngen.data import ArrayFile
from wngen.nn import MaskedWNLinear, WeightNormalized, WNConv2d
from wngen.training import Training
from wngen.training.weight_norm_health import WeightNormHealth, layer_health


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ArrayFile:
    return images_in(tmp_path_factory.mktemp("data"))


def units(layer: WeightNormalized, direction: Tensor) -> list[Tensor]:
    """In double precision, those that can turn, under the mask."""
    mask = torch.ones_like(direction) if layer.mask is None else layer.mask
    masked = direction.detach().double() * mask
    pairs = zip(unit_weights(layer, masked), unit_weights(layer, mask), strict=True)
    return [unit.flatten() for unit, inputs in pairs if inputs.sum() > 1]


def angle(before: Tensor, after: Tensor) -> float:
    """By the part of a vector that is orthogonal to the other."""
    along = float(before @ after / before.norm())
    return math.atan2(float((after - along * before / before.norm()).norm()), along)


class Witness(pl.Callback):
    """v and gradients at each step, before it, and v after it."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.learning_rates: list[float] = []

    @staticmethod
    def layers(training: Training) -> dict[str, WeightNormalized]:
        modules = training.model.named_modules()
        return {name: layer for name, layer in modules if isinstance(layer, WeightNormalized)}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Training, optimizer: Any) -> None:
        layers = self.layers(pl_module)
        self.before.append({name: layer.v.detach().clone() for name, layer in layers.items()})
        self.gradients.append({name: layer.v.grad.clone() for name, layer in layers.items()})
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Training, *args: Any) -> None:
        if len(self.after) < trainer.global_step:
            self.after.append({name: layer.v.detach().clone() for name, layer in self.layers(pl_module).items()})


class Descent(Training):
    """Plain gradient descent."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), self.options["learning_rate"])


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("size", [1e-6, 0.1, 100.0])
def test_figures_of_a_layer_are_those_of_its_units(kind: str, size: float):
    layer = ZOO[kind][0]()
    before = layer.v.detach().clone()
    torch.nn.init.normal_(layer.v, std=0.05)
    with torch.no_grad():
        layer.v.copy_(before + size * layer.v)
    found = layer_health(layer, before if layer.mask is None else before * layer.mask, 0.01).tolist()
    pairs = list(zip(units(layer, before), units(layer, layer.v), strict=True))
    wanted = [
        mean(float(old.norm()) for old, _ in pairs),
        mean(angle(old, new) for old, new in pairs),
        mean(0.01 / float(old.norm()) for old, _ in pairs),
    ]
    assert found == pytest.approx(wanted, rel=1e-8)


def test_what_cannot_turn_does_not_count():
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).float()
    layer = MaskedWNLinear(mask)
    before = layer.direction.detach().clone()
    with torch.no_grad():
        layer.v[0] = torch.tensor([-before[0, 1], before[0, 0], 0.0]) * 3  # a right angle, and longer
        layer.v[1:] *= -7
        before[0, 2] = 0
    assert layer_health(layer, before, 1.0).tolist()[1] == pytest.approx(math.pi / 2)
    for lone in (MaskedWNLinear(mask[1:]), WNConv2d(1, 4, 1)):
        assert all(map(math.isnan, layer_health(lone, lone.direction, 1.0).tolist()))


def test_gradient_descent_lengthens_v_by_the_closed_form(images: ArrayFile):
    """A gradient is orthogonal to v: a step c ||v|| long turns v by atan c, and makes it sqrt(1 + c^2) as long."""
    torch.manual_seed(0)
    training = Descent(make_training().model, init_images=40, learning_rate=1e-5, clip_norm=1e9)
    health, witness = WeightNormHealth(1), Witness()
    fit(training, images, health, witness, max_steps=3)
    layers = Witness.layers(training)
    assert health.count == 3
    assert set(health.last) == {name for name, layer in layers.items() if units(layer, layer.v)}
    for name, found in health.last.items():
        before, gradients = (units(layers[name], of[2][name]) for of in (witness.before, witness.gradients))
        relative = [
            (float(v.norm()), 1e-5 * float(gradient.norm() / v.norm()))
            for v, gradient in zip(before, gradients, strict=True)
        ]
        assert found.angle == pytest.approx(mean(math.atan(c) for _, c in relative), rel=1e-4)
        longer = [float(v.norm()) for v in units(layers[name], layers[name].v)]
        assert longer == pytest.approx([norm * math.sqrt(1 + c**2) for norm, c in relative], rel=1e-6)
    assert max(found.angle for found in health.last.values()) > 0.01


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_what_is_logged_is_found_by_brute_force(images: ArrayFile, tmp_path: Path, optimizer: Any):
    training = make_training(optimizer=optimizer, warmup_steps=6)
    health, witness = WeightNormHealth(2), Witness()
    logger = CSVLogger(tmp_path, name=None, version="")
    trainer = fit(
        training, images, health, witness, logger=logger, log_every_n_steps=1, max_steps=5, accumulate_grad_batches=2
    )
    assert trainer.global_step == 5
    with (tmp_path / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["angle/median"]}
    assert list(rows) == [1, 3]
    for step, row in rows.items():
        found = {quantity: [] for quantity in ("v_norm", "angle", "effective_learning_rate")}
        for name, layer in Witness.layers(training).items():
            before, after = (units(layer, when[step][name]) for when in (witness.before, witness.after))
            if not before:
                assert f"angle/{name}" not in row
                continue
            norms = [float(v.norm()) for v in before]
            found["v_norm"].append(mean(norms))
            found["angle"].append(mean(angle(old, new) for old, new in zip(before, after, strict=True)))
            found["effective_learning_rate"].append(witness.learning_rates[step] * mean(1 / norm for norm in norms))
            for quantity, values in found.items():
                assert float(row[f"{quantity}/{name}"]) == pytest.approx(values[-1], rel=1e-6), name
        for quantity, values in found.items():
            assert float(row[f"{quantity}/median"]) == pytest.approx(median(values), rel=1e-6)
    first = {name: units(layer, witness.before[0][name]) for name, layer in Witness.layers(training).items()}
    assert health.begun == pytest.approx({name: mean(float(v.norm()) for v in vs) for name, vs in first.items() if vs})


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}], ids=["", "window"])
def test_training_is_the_same_to_the_last_bit(images: ArrayFile, options: dict[str, Any]):
    left: list[dict[str, Tensor]] = []
    for callbacks in ([], [WeightNormHealth(1)]):
        training = make_training(free_bits=0.3)
        trainer = fit(training, images, *callbacks, max_steps=5, **options)
        assert not callbacks or callbacks[0].count == 5
        moments = [*trainer.optimizers[0].state.values()]
        left.append(
            dict(training.model.state_dict())
            | {f"ema.{name}": value for name, value in training.ema.average.items()}
            | {f"{name} {i}": value for i, each in enumerate(moments) for name, value in each.items()}
            | {"generator": torch.get_rng_state()}
        )
    without, with_it = left
    assert without.keys() == with_it.keys()
    for name, value in without.items():
        assert torch.equal(value, with_it[name]), name


def test_a_step_that_is_left_out_is_not_measured(images: ArrayFile):
    health, training = WeightNormHealth(1), make_training()
    calls: list[int] = []
    training.model.posterior.v.register_hook(lambda g: calls.append(1) or (g * math.nan if len(calls) == 2 else g))
    fit(training, images, health)
    assert (training.skips.total, health.count) == (1, 3)
    none = WeightNormHealth(1)
    fit(make_training(skip_norm=1e-9), images, none)
    assert none.count == 0
    assert "was not measured" in none.verdict()


def test_measurements_go_on_after_a_resumption(images: ArrayFile, tmp_path: Path):
    whole, half, rest = WeightNormHealth(2), WeightNormHealth(2), WeightNormHealth(2)
    fit(make_training(), images, whole, max_steps=6)
    fit(make_training(), images, half, max_steps=3).save_checkpoint(tmp_path / "half.ckpt")
    fit(make_training(), images, rest, max_steps=6, ckpt_path=tmp_path / "half.ckpt")
    assert rest.count == 3
    assert rest.state_dict() == whole.state_dict()
    assert rest.verdict() == whole.verdict()
    fit(make_training(), images, rest, max_steps=2)  # a new training, with the same callback
    assert rest.count == 1


def test_the_verdict_tells_what_became_of_v():
    health = WeightNormHealth()
    health.count, health.begun = 4, {"a": 1.0, "b": 2.0}
    health.angles = {"a": 0.08, "b": 0.004}
    for norms, told in (
        ((3.0, 2.5), "||v|| grew by up to 3.0 times (a), and by as much the effective learning rate fell"),
        ((0.9, 0.5), "||v|| shrank by up to 4.0 times (b): the effective learning rate rose"),
        ((1.019, 2.0), "||v|| is within 2% of where it began."),
    ):
        state = health.state_dict() | {"last": {"a": [norms[0], 0, 0], "b": [norms[1], 0, 0]}}
        health.load_state_dict(state)
        assert told in health.verdict()
        assert "over 4 measured steps: one turned v by 0.001 rad (b) to 0.02 rad (a)" in health.verdict()


def test_what_it_cannot_measure_is_refused():
    with pytest.raises(ValueError, match="every_n_steps=0: wanted at least 1"):
        WeightNormHealth(0)
    trainer: Any = SimpleNamespace(strategy=object(), global_step=0, ckpt_path=None)
    with pytest.raises(ValueError, match="WeightNormHealth with object: wanted whole weights"):
        WeightNormHealth().on_train_start(trainer, make_training())


def test_the_command_line_takes_it_and_ends_with_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wngen.cli.run.Run.finish", lambda self, *args: None)
    small = ["--model.widths=[4]", "--model.patch=4", "--model.hidden=8", "--model.iaf_width=8", "--model.latent_dim=2"]
    short = ["--trainer.max_steps=5", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    place = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--run", str(tmp_path / "run")]
    callback = ["--trainer.callbacks+=WeightNormHealth", "--trainer.callbacks.every_n_steps=2"]
    assert main(["fit", *place, *small, *short, *callback]) == 0
    assert "Weight-norm health, over 2 measured steps: one turned v by" in capsys.readouterr().out
    with (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["angle/median"]]
    assert [row["step"] for row in rows] == ["1", "3"]
    assert float(rows[1]["angle/posterior"]) > 0
