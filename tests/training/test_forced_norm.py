"""Forced weight normalization: the function stays, the length is kept, and runs resume and spread as without it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from forked import forked
from layer_zoo import ZOO, randomized, unit_weights
from little_run import fit, images_in
from per_image import make_training
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from wngen.data import ArrayFile
from wngen.nn import MaskedWNLinear, WeightNormalized
from wngen.training import Training
from wngen.training.forced_norm import ForcedWeightNorm, force_norm, norm_of_rms
from wngen.training.weight_norm_health import WeightNormHealth


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ArrayFile:
    return images_in(tmp_path_factory.mktemp("data"))


def layers(training: Training) -> dict[str, WeightNormalized]:
    return {name: m for name, m in training.model.named_modules() if isinstance(m, WeightNormalized)}


def lengths(layer: WeightNormalized, v: Tensor, per_input: bool = False) -> list[float]:
    """||v||, or the root mean square, of the units that have an input, in double precision."""
    mask = torch.ones_like(v) if layer.mask is None else layer.mask
    pairs = zip(unit_weights(layer, v.detach().double() * mask), unit_weights(layer, mask), strict=True)
    return [float(u.norm() / (inputs.sum().sqrt() if per_input else 1)) for u, inputs in pairs if inputs.any()]


class Steps(pl.Callback):
    """v after each step, as the average sees it; given after `ForcedWeightNorm`."""

    def __init__(self) -> None:
        self.begun: dict[str, Tensor] = {}
        self.after: list[dict[str, Tensor]] = []

    def copy(self, training: Training) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in training.model.named_parameters()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Training) -> None:
        self.begun = self.copy(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Training, *args: Any) -> None:
        self.after.append(self.copy(pl_module))


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("rms", [None, 0.05])
def test_the_function_of_every_layer_stays(kind: str, gain: str, rms: float | None):
    make, shape = ZOO[kind]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        layer = randomized(make(gain=gain)).to(dtype)
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            before = layer(x)
            force_norm(layer, norm_of_rms(layer, rms))
            torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance * float(before.abs().max()))
        wanted = pytest.approx(1 if rms is None else rms, rel=tolerance)
        assert all(length == wanted for length in lengths(layer, layer.v, rms is not None))


def test_the_norm_is_taken_in_single_precision():
    """A sum of squares that overflows in half precision, and one that vanishes in it."""
    for size, dtype in ((300.0, torch.float16), (1e-5, torch.float16), (0.3, torch.bfloat16)):
        layer = MaskedWNLinear(torch.ones(3, 500)).to(dtype)
        torch.nn.init.normal_(layer.v, std=size)
        before = layer.v.detach().double()
        force_norm(layer, norm_of_rms(layer))
        wanted = before / before.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.v.detach().double(), wanted, rtol=2**-8, atol=2**-24)


def test_what_is_hidden_becomes_zero_and_signs_stay():
    layer = MaskedWNLinear(torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).float())
    before = layer.v.detach().clone()
    force_norm(layer, norm_of_rms(layer))
    after = layer.v.detach().clone()
    assert after[1].tolist() == [0, math.copysign(1, before[1, 1]), 0]
    assert after[2].tolist() == [0, 0, 0]
    assert after[0, 2] == 0
    layer.v.data[0] = 0  # a row of zeros
    force_norm(layer, norm_of_rms(layer))
    assert layer.v[0].tolist() == [0, 0, 0]
    assert torch.equal(layer.v[1:], after[1:])


@pytest.mark.parametrize("rms", [None, 0.05])
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "max_steps": 5}],
    ids=["", "window across epochs"],
)
def test_v_keeps_its_length_and_the_average_is_of_such(images: ArrayFile, rms: float | None, options: dict[str, Any]):
    training, steps = make_training(ema_decay=0.5), Steps()
    fit(training, images, ForcedWeightNorm(rms), steps, **options)
    wanted = pytest.approx(1 if rms is None else rms, rel=1e-6)
    for name, layer in layers(training).items():
        for parameters in (steps.begun, *steps.after):
            assert all(length == wanted for length in lengths(layer, parameters[f"{name}.v"], rms is not None)), name
    window = options.get("accumulate_grad_batches", 1)
    assert torch.equal(steps.after[0]["posterior.v"], steps.begun["posterior.v"]) == (window > 1)
    assert not torch.equal(steps.after[-1]["posterior.v"], steps.begun["posterior.v"])
    average, taken = steps.begun, [each for i, each in enumerate(steps.after) if (i % 6 + 1) % window == 0]
    for t, parameters in enumerate(taken, start=1):
        decay = min(0.5, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * p for name, p in parameters.items()}
    for name, value in training.ema.average.items():
        torch.testing.assert_close(value, average[name])


def test_gradient_descent_turns_as_if_the_gradient_were_of_unit_v(images: ArrayFile):
    """The step that ends at a length of sqrt(1 + c^2) is cut back to 1: w = (v - learning_rate G) / sqrt(1 + c^2)."""

    class Descent(Training):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), 1e-4)

    class Gradients(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Training, optimizer: Any) -> None:
            named = pl_module.model.named_parameters()
            self.of = {name: (p.detach().clone(), p.grad.clone()) for name, p in named}

    gradients, training = Gradients(), Descent(make_training().model, init_images=40, clip_norm=1e9)
    fit(training, images, ForcedWeightNorm(), gradients, max_steps=1)
    turned = []
    for name, layer in layers(training).items():
        if layer.lone is not None:
            continue
        v, gradient = gradients.of[f"{name}.v"]
        mask = torch.ones_like(v) if layer.mask is None else layer.mask
        trios = zip(*(unit_weights(layer, t.double() * mask) for t in (v, gradient, layer.v.detach())), strict=True)
        for before, slope, after in trios:
            c = float(1e-4 * slope.norm())
            turned.append(math.atan(c))
            torch.testing.assert_close(after, (before - 1e-4 * slope) / math.sqrt(1 + c**2), rtol=1e-5, atol=1e-6)
    assert max(turned) > 0.01


@pytest.mark.parametrize("rms", [None, 0.05])
def test_adam_turns_a_unit_by_the_root_of_its_inputs(images: ArrayFile, rms: float | None):
    """Its first step moves every entry by the learning rate: v by learning_rate sqrt(n), less what is along v."""
    health, training = WeightNormHealth(1), make_training(learning_rate=1e-3)
    fit(training, images, ForcedWeightNorm(rms), health, max_steps=1)
    checked = 0
    for name, layer in layers(training).items():
        if layer.mask is None and layer.lone is None:
            inputs = layer.v.numel() / layer.gain_parameter.numel()
            most = 1e-3 * math.sqrt(inputs) if rms is None else 1e-3 / rms
            assert 0.8 * most < health.last[name].angle < 1.05 * most, name
            checked += inputs > 30
    assert checked == 2


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(images: ArrayFile, tmp_path: Path, optimizer: Any):
    whole = make_training(optimizer=optimizer)
    first = fit(whole, images, ForcedWeightNorm(), max_steps=6)
    for step in (1, 4):
        part, rest = make_training(optimizer=optimizer), make_training(optimizer=optimizer)
        fit(part, images, ForcedWeightNorm(), max_steps=step).save_checkpoint(tmp_path / f"{step}.ckpt")
        trainer = fit(rest, images, ForcedWeightNorm(), max_steps=6, ckpt_path=tmp_path / f"{step}.ckpt")
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, rest.model.state_dict()[name]), (step, name)
            assert name not in whole.ema.average or torch.equal(whole.ema.average[name], rest.ema.average[name])
        moments = zip(first.optimizers[0].state.values(), trainer.optimizers[0].state.values(), strict=True)
        assert all(torch.equal(one[name], other[name]) for one, other in moments for name in one)
        before = {name: layer.v.detach().clone() for name, layer in layers(part).items()}
        for layer in layers(part).values():
            force_norm(layer, norm_of_rms(layer))  # once more would not leave every last bit
        assert not all(torch.equal(before[name], layer.v) for name, layer in layers(part).items())


def test_a_step_that_is_left_out_leaves_all_as_it_was(images: ArrayFile):
    training, steps, calls = make_training(), Steps(), []
    training.model.posterior.v.register_hook(lambda g: calls.append(1) or (g * math.nan if len(calls) == 3 else g))
    fit(training, images, ForcedWeightNorm(), steps)
    assert training.skips.total == 1
    for name, value in steps.after[1].items():
        assert torch.equal(value, steps.after[2][name]), name
    assert not torch.equal(steps.after[2]["posterior.v"], steps.after[3]["posterior.v"])


def of_rank(rank: int, path: Path) -> tuple[dict[str, list[Any]], dict[str, Any], dict[str, float]]:
    warnings.simplefilter("ignore")  # of torch's about its own collectives
    health, training, data = WeightNormHealth(1), make_training(), ArrayFile(str(path), levels=256, batch_size=16)
    fit(training, data, ForcedWeightNorm(), health, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    norms = [length for layer in layers(training).values() for length in lengths(layer, layer.v)]
    state = {name: value.tolist() for name, value in training.model.state_dict().items()}
    return state, health.state_dict(), {"least": min(norms), "most": max(norms)}


def test_processes_hold_the_same_to_the_last_bit(images: ArrayFile):
    first, second = forked(2, of_rank, Path(images.path))
    assert first == second
    assert first[2] == pytest.approx({"least": 1, "most": 1}, rel=1e-6)
    health, training = WeightNormHealth(1), make_training()
    fit(training, images, ForcedWeightNorm(), health)
    for name, value in training.model.state_dict().items():
        torch.testing.assert_close(torch.tensor(first[0][name]), value, rtol=1e-4, atol=1e-5)


def test_it_does_not_matter_which_callback_comes_first(images: ArrayFile):
    seen = []
    for order in (1, -1):
        health, training = WeightNormHealth(1), make_training()
        fit(training, images, *[ForcedWeightNorm(), health][::order])
        seen.append((health, training.model.state_dict()))
    (one, weights), (other, same) = seen
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert one.begun == other.begun
    for name, health in one.last.items():
        assert health == pytest.approx(other.last[name], rel=1e-4)
        assert health.v_norm == pytest.approx(1, rel=1e-6)


def test_only_a_run_that_began_so_goes_on_so(images: ArrayFile, tmp_path: Path):
    for callbacks in ([], [ForcedWeightNorm(0.05)]):
        fit(make_training(), images, *callbacks, max_steps=2).save_checkpoint(tmp_path / f"{len(callbacks)}.ckpt")
    with pytest.raises(ValueError, match="with unit norm: the run was begun without ForcedWeightNorm"):
        fit(make_training(), images, ForcedWeightNorm(), ckpt_path=tmp_path / "0.ckpt")
    with pytest.raises(ValueError, match=r"with unit norm: the run was begun with rms=0.05"):
        fit(make_training(), images, ForcedWeightNorm(), ckpt_path=tmp_path / "1.ckpt")


@pytest.mark.parametrize("rms", [0.0, -1.0, math.inf, math.nan])
def test_a_length_out_of_range_is_refused(rms: float):
    with pytest.raises(ValueError, match="wanted a positive number, such as"):
        ForcedWeightNorm(rms)


def test_what_it_cannot_normalize_is_refused(images: ArrayFile):
    trainer: Any = SimpleNamespace(strategy=object(), global_step=0, ckpt_path=None)
    with pytest.raises(ValueError, match="ForcedWeightNorm with object: wanted whole weights"):
        ForcedWeightNorm().on_train_start(trainer, make_training())
    frozen = make_training(init_images=0)
    for layer in layers(frozen).values():
        layer.v.requires_grad_(False)
    with pytest.raises(ValueError, match="ConvVAE has no weight-normalized layer that is trained"):
        fit(frozen, images, ForcedWeightNorm())
