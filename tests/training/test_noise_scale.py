"""The gradient noise scale of a training: the same by every path, leaving no trace behind."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from forked import forked
from per_image import estimate, make_training, per_image_gradients
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from wngen.arguments import packaged_configs
from wngen.cli import main
from wngen.data import ArrayFile
from wngen.image import Batch
from wngen.models import PixelCNNPP
from wngen.training import Training
from wngen.training.gradient_noise import Blocks, GradientNoise
from wngen.training.noise_scale import NoiseScale

BATCH = 16


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (96, 6, 6), dtype=np.uint8)
    np.savez(path, train=images, val=images[:8], test=images[:8])
    return path


def images_of(path: Path, batch_size: int = BATCH) -> ArrayFile:
    return ArrayFile(str(path), levels=256, batch_size=batch_size)


def fit(folder: Path, training: Training, data: ArrayFile, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "limit_val_batches": 0}
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        **{"enable_checkpointing": False, "use_distributed_sampler": False, "max_steps": 1, **quiet, **options},
    )
    trainer.fit(training, datamodule=data)
    return trainer


def figures(noise: NoiseScale) -> dict[str, list[float]]:
    return {name: [each.covariance_trace, each.squared_gradient] for name, each in noise.averages.items()}


def same(a: dict[str, list[float]], b: dict[str, list[float]], rel: float = 1e-4) -> None:
    """|G|^2 is a difference of two numbers; what it may be off by is relative to them."""
    assert a.keys() == b.keys()
    for name, (trace, square) in a.items():
        assert trace == pytest.approx(b[name][0], rel=rel), name
        assert square == pytest.approx(b[name][1], rel=rel, abs=rel * trace / BATCH), name


class Steps(pl.Callback):
    """What training itself does: the gradient of each step, and the images it saw."""

    def __init__(self) -> None:
        self.squares: list[Tensor] = []
        self.singles: list[dict[str, GradientNoise]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Training, batch: Batch, batch_idx: int) -> None:
        each = per_image_gradients(pl_module, batch, trainer.global_step + 1)
        self.singles.append(estimate(Blocks(pl_module.model), each, torch.arange(len(batch.index)).split(1)))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Training, optimizer: Any) -> None:
        blocks = Blocks(pl_module.model)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in blocks.parameters]
        self.squares.append(blocks.squared_norms(gradients, blocks.lengths()))


def first_batch(path: Path) -> tuple[Training, Batch]:
    """Of a training that begins, with its layers initialized."""
    training, data = make_training(), images_of(path)
    data.prepare_data()
    data.setup("fit")
    training.initialize(next(iter(data.evaluation_batches("train", 40, limit=40))))
    return training, next(iter(data.train_dataloader()))


@torch.no_grad()
def dividing_floor(path: Path, part: Any) -> float:
    """Free bits between the rate that a group of latents has over the first batch, and that over a part of it."""
    training, batch = first_batch(path)
    (kl,) = training(batch, draw=1).kl_nats
    whole, of_part = kl.mean(dim=0), kl[part].mean(dim=0)
    widest = int((whole - of_part).abs().argmax())
    return float((whole + of_part)[widest] / 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_mean_of_the_parts_is_the_gradient_of_the_step(data_path: Path, tmp_path: Path, precision: Any):
    """With a weight of the rate, and free bits that a part falls on the other side of than the whole batch."""
    noise, steps = NoiseScale(1, parts=3, window=1), Steps()
    training = make_training(free_bits=dividing_floor(data_path, slice(6)), kl_warmup_steps=2)
    fit(tmp_path, training, images_of(data_path), noise, steps, precision=precision)
    means = [g + s / BATCH for name, (s, g) in figures(noise).items() if name != "total"]
    wanted = steps.squares[0].tolist()
    assert means == pytest.approx(wanted, rel=1e-4 if precision == "32-true" else 0.05)
    other = NoiseScale(1, parts=3, window=1)
    fit(tmp_path, make_training(), images_of(data_path), other)
    assert figures(other)["total"] != pytest.approx(figures(noise)["total"], rel=1e-3)


def test_parts_windows_and_single_images_agree(data_path: Path, tmp_path: Path):
    pieces, window, single = NoiseScale(1, 4, 1), NoiseScale(1, 4, 1), NoiseScale(1, BATCH, 1)
    steps = Steps()
    fit(tmp_path, make_training(), images_of(data_path), pieces)
    fit(tmp_path, make_training(), images_of(data_path, BATCH // 4), window, accumulate_grad_batches=4)
    fit(tmp_path, make_training(), images_of(data_path), single, steps)
    same(figures(window), figures(pieces))
    brute = {name: [each.covariance_trace, each.squared_gradient] for name, each in steps.singles[0].items()}
    same(figures(single), brute)


def measured(rank: int, path: Path, folder: Path, floor: float) -> list[Any]:
    """What one of two processes measures, and where its training ends."""
    warnings.simplefilter("ignore")  # of torch's about its own collectives
    results = []
    for parts, free_bits in ((2, 0.0), (BATCH, floor)):
        noise = NoiseScale(1, parts, 1)
        strategy = DDPStrategy(process_group_backend="gloo")
        training = make_training(free_bits=free_bits)
        fit(folder, training, images_of(path), noise, strategy=strategy, devices=2)
        results.append((figures(noise), training.model.state_dict()["posterior.v"].tolist()))
    return results


def test_two_processes_measure_what_one_does(data_path: Path, tmp_path: Path):
    floor = dividing_floor(data_path, slice(0, BATCH, 2))  # that the ranks would decide upon differently
    both = forked(2, measured, data_path, tmp_path, floor)
    assert both[0] == both[1]
    (shares, _), (singles, weights) = both[0]
    alone, training = NoiseScale(1, BATCH, 1), make_training(free_bits=floor)
    fit(tmp_path, training, images_of(data_path), alone)
    same(singles, figures(alone))
    torch.testing.assert_close(torch.tensor(weights), training.model.state_dict()["posterior.v"], rtol=1e-4, atol=1e-5)
    # Of two parts: the shares of the ranks, every second image each, by brute force.
    training, batch = first_batch(data_path)
    each = per_image_gradients(training, batch, draw=1)
    parts = estimate(Blocks(training.model), each, (torch.arange(0, BATCH, 2), torch.arange(1, BATCH, 2)))
    same(shares, {name: [noise.covariance_trace, noise.squared_gradient] for name, noise in parts.items()})


def dropping_out() -> Training:
    torch.manual_seed(0)
    return Training(PixelCNNPP(1, 6, 6, 256, filters=4, blocks=1, scales=1, dropout=0.5), init_images=20)


def count_passes(model: nn.Module, inputs: Any) -> None:
    """In a buffer, as a layer with running statistics would."""
    model.passes += 1


class Generator(pl.Callback):
    """Torch's own generator before and after each step, and what is in .grad when it has been taken."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.states.append(torch.get_rng_state())

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Training, optimizer: Any) -> None:
        self.states += [torch.zeros(1) if p.grad is None else p.grad.clone() for p in pl_module.model.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.states += [torch.get_rng_state(), torch.randn(3)]


@pytest.mark.parametrize("make", [lambda: make_training(free_bits=0.3), dropping_out], ids=["vae", "dropout"])
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}], ids=["", "window"])
def test_training_is_the_same_to_the_last_bit(data_path: Path, tmp_path: Path, make: Any, options: dict[str, Any]):
    left: list[dict[str, Tensor]] = []
    for callbacks in ([], [NoiseScale(2, parts=4)]):
        training, generator = make(), Generator()
        training.model.register_buffer("passes", torch.zeros(()))
        training.model.register_forward_pre_hook(count_passes)
        trainer = fit(tmp_path, training, images_of(data_path), *callbacks, generator, max_steps=5, **options)
        assert not callbacks or callbacks[0].running.count == 2
        moments = [*trainer.optimizers[0].state.values()]
        left.append(
            dict(training.model.state_dict())
            | {f"ema.{name}": value for name, value in training.ema.average.items()}
            | {f"{name} {i}": value for i, each in enumerate(moments) for name, value in each.items()}
            | {f"generator {i}": state for i, state in enumerate(generator.states)}
        )
    without, with_it = left
    assert without.keys() == with_it.keys()
    for name, value in without.items():
        assert torch.equal(value, with_it[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's, about the checks of shapes in tests
def test_compiled_code_is_left_alone(data_path: Path, tmp_path: Path):
    """Parts have another batch size than training: for compiled code a reason to be compiled again."""
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    class Count(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            counts.append(len(compilations))

    counts: list[int] = []
    training, noise = make_training(compiled=True), NoiseScale(4, parts=4)
    training.model.compile = lambda: nn.Module.compile(training.model, backend=backend)
    fit(tmp_path, training, images_of(data_path), noise, Count(), max_steps=5)
    assert noise.running.count == 1
    assert counts[2] == counts[4] > 0  # before the fourth step, which is measured, and after it


def test_measurements_go_on_after_a_resumption(data_path: Path, tmp_path: Path):
    whole, half, rest = NoiseScale(2, 4), NoiseScale(2, 4), NoiseScale(2, 4)
    fit(tmp_path, make_training(), images_of(data_path), whole, max_steps=6)
    trainer = fit(tmp_path, make_training(), images_of(data_path), half, max_steps=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    rest.load_state_dict(saved["callbacks"]["NoiseScale"])
    assert rest.averages == half.averages
    training = make_training()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, callbacks=[rest], logger=False, limit_val_batches=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(training, datamodule=images_of(data_path), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert rest.averages == whole.averages
    assert rest.verdict() == whole.verdict()


def test_a_step_that_is_left_out_is_not_measured(data_path: Path, tmp_path: Path):
    noise, training = NoiseScale(1, 4), make_training(skip_norm=1e-9)
    fit(tmp_path, training, images_of(data_path), noise, max_steps=3)
    assert training.skips.total == 3
    assert noise.running.count == 0
    assert "was not measured" in noise.verdict()
    poisoned, training = NoiseScale(1, 4), make_training()
    calls = []
    training.model.posterior.v.register_hook(lambda g: calls.append(1) or (g * math.nan if len(calls) == 1 else g))
    fit(tmp_path, training, images_of(data_path), poisoned, max_steps=3)  # the first part of the first step
    assert training.skips.total == 0
    assert poisoned.running.count == 2
    assert all(math.isfinite(each.covariance_trace) for each in poisoned.averages.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every_n_steps": 0}, "every_n_steps=0"), ({"parts": 1}, "at least 2 parts"), ({"window": 0}, "window=0")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NoiseScale(**options)


def test_a_batch_of_one_image_has_no_parts(data_path: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="a batch of 1 image has no parts; wanted at least 2"):
        fit(tmp_path, make_training(), images_of(data_path, 1), NoiseScale(1))


def test_a_last_window_of_one_micro_batch_is_passed_over(data_path: Path, tmp_path: Path):
    noise = NoiseScale(1, 4)
    trainer = fit(tmp_path, make_training(), images_of(data_path, 8), noise, accumulate_grad_batches=11, max_steps=2)
    assert trainer.global_step == 2
    assert noise.running.count == 1


def test_parameters_in_pieces_are_refused():
    trainer: Any = SimpleNamespace(strategy=object(), global_step=0)
    with pytest.raises(ValueError, match="NoiseScale with object: wanted whole gradients"):
        NoiseScale().on_train_start(trainer, make_training())


def test_the_command_line_takes_it_logs_and_ends_with_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wngen.cli.run.Run.finish", lambda self, *args: None)
    config = tmp_path / "mine.yaml"
    config.write_text(
        packaged_configs()["quickstart"].read_text()
        + "  callbacks:\n    - class_path: wngen.training.noise_scale.NoiseScale\n      init_args: {every_n_steps: 2}\n"
    )
    small = ["--model.widths=[4]", "--model.patch=4", "--model.hidden=8", "--model.iaf_width=8", "--model.latent_dim=2"]
    short = ["--trainer.max_steps=5", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    run = tmp_path / "run"
    options = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    assert main(["fit", "--config", str(config), "--run", str(run), *small, *short, *options]) == 0
    said = capsys.readouterr().out
    assert "over the last 2 measurements, with batches of 128 images: beyond a batch of about" in said
    assert "up to 20 times too low" in said
    with (run / "metrics" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["noise_scale/total"]]
    assert [row["step"] for row in rows] == ["1", "3"]
    for name in ("total", "encoder", "decoder"):
        scale, trace, square = (
            float(rows[1][f"{figure}/{name}"]) for figure in ("noise_scale", "covariance_trace", "squared_gradient")
        )
        assert scale == pytest.approx(trace / square) or (scale == math.inf and square <= 0)
    assert f"about {float(rows[1]['noise_scale/total']):.0f} images" in said or float(rows[1]["noise_scale/total"]) < 10
