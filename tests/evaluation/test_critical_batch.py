"""The hyperbola of steps and examples is recovered from noisy runs with an interval that holds; mistakes are named."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from wngen.cli.scaling import critical_batch
from wngen.evaluation.batch_figures import draw_noise_scale, noise_scale_curves
from wngen.evaluation.critical_batch import fit_trade_off, steps_to

SIZES = [16, 32, 64, 128, 256, 512]
LEAST_STEPS, CRITICAL = 2000.0, 90.0


def steps_of(size: float) -> float:
    """From the hyperbola as the paper has it, solved for S by bisection, and not from the formula that is fitted."""
    least_examples = LEAST_STEPS * CRITICAL
    low, high = LEAST_STEPS, 1e9
    for _ in range(200):
        steps = (low + high) / 2
        is_above = (steps / LEAST_STEPS - 1) * (steps * size / least_examples - 1) > 1
        low, high = (low, steps) if is_above else (steps, high)
    return steps


def test_exact_runs_give_the_hyperbola_itself():
    fit = fit_trade_off(SIZES, [steps_of(size) for size in SIZES])
    assert fit.least_steps == pytest.approx(LEAST_STEPS, rel=1e-5)
    assert fit.least_examples == pytest.approx(LEAST_STEPS * CRITICAL, rel=1e-5)
    assert fit.critical_batch == pytest.approx(CRITICAL, rel=1e-5)
    assert fit.low == pytest.approx(fit.high, rel=1e-4)
    assert fit.steps(CRITICAL) == pytest.approx(2 * LEAST_STEPS, rel=1e-5)
    assert fit.steps(CRITICAL) * CRITICAL == pytest.approx(2 * fit.least_examples, rel=1e-5)


@pytest.mark.parametrize("sizes", [SIZES, [16, 64, 256], [16, 16, 64, 64, 256, 256]], ids=["six", "three", "twice"])
def test_the_interval_holds_the_truth_as_often_as_it_says(sizes: list[int]):
    generator = np.random.default_rng(0)
    exact = np.array([steps_of(size) for size in sizes])
    held = 0
    estimates = []
    for _ in range(100):
        fit = fit_trade_off(sizes, (exact * np.exp(0.05 * generator.standard_normal(len(sizes)))).tolist(), 0.9)
        assert fit.low <= fit.critical_batch <= fit.high
        held += fit.low <= CRITICAL <= fit.high
        estimates.append(math.log(fit.critical_batch / CRITICAL))
    assert 84 <= held <= 96  # of a binomial distribution with p = 0.9, two standard deviations
    assert abs(np.mean(estimates)) < 4 * np.std(estimates) / 10


def test_the_residual_is_the_scatter_of_the_runs():
    sizes = SIZES * 100
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(sizes))
    fit = fit_trade_off(sizes, [steps_of(size) * math.exp(e) for size, e in zip(sizes, noise, strict=True)])
    assert fit.residual == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "steps", "message"),
    [
        ([16, 32, 16], [9, 8, 9], r"2 batch sizes \(16, 32\).*wanted runs at 3 or more"),
        ([16, 32, 64], [9, 8], "3 batch sizes and 2 numbers of steps"),
        ([16, 32, 0], [9, 8, 7], "wanted positive"),
        ([16, 32, 64], [9, 8, math.nan], "wanted positive"),
        ([16, 32, 64], [4000, 2000, 1000], "fall as fast as batches grow from 16 to 64.*try larger"),
        ([16, 32, 64], [1000, 1001, 1000], "do not become fewer.*try smaller"),
    ],
)
def test_what_cannot_be_fitted_is_said(sizes: list[float], steps: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        fit_trade_off(sizes, steps)


def test_steps_to_a_bound_lie_between_two_validations():
    curve = np.array([100.0, 200.0, 300.0, 400.0]), np.array([-120.0, -100.0, -104.0, -90.0])
    assert steps_to(-105.0, curve) == pytest.approx(175)
    assert steps_to(-100.0, curve) == pytest.approx(200)
    assert steps_to(-95.0, curve) == pytest.approx(300 + 100 * 9 / 14)
    assert steps_to(-89.0, curve) is None
    with pytest.raises(ValueError, match=r"after 100 steps, had -120.00 nats already"):
        steps_to(-130.0, curve)


# The command

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the folder of a run whose bound rises to -90 and is -100 after so many steps."""

    def write(name: str, batch_size: int, steps: float, last: float = -91.0, **more: object) -> str:
        metrics = tmp_path / name / "metrics" / "version_0" / "metrics.csv"
        metrics.parent.mkdir(parents=True)
        rate = math.log(11) / steps  # the bound is -90 - 110 exp(-rate n), and -100 at n = steps
        with metrics.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "step", "train/elbo_nats", "val/elbo_nats"])
            for n in np.linspace(0.02, 3, 150) * steps:
                bound = -90 - 110 * math.exp(-rate * n)
                if bound <= last:
                    writer.writerow([0, n - 1, "", bound])
        config = {
            "model": {"class_path": "wngen.models.ConvVAE", "init_args": {"hidden": more.get("hidden", 8)}},
            "data": {"class_path": "wngen.data.BinarizedMNIST", "init_args": {"batch_size": batch_size, "seed": 0}},
            "training": {"learning_rate": more.get("learning_rate", 1e-3), "seed": more.get("seed", 0)},
            "trainer": {"accumulate_grad_batches": more.get("accumulate_grad_batches", 1)},
        }
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
        return str(tmp_path / name)

    return write


def test_the_command_fits_runs_by_their_whole_batch_and_draws(write: Write, tmp_path: Path, capsys):
    runs = [write(f"b{size}", size, steps_of(size)) for size in (16, 32, 64, 256)]
    runs.append(write("window", 32, steps_of(128), accumulate_grad_batches=4, learning_rate=2e-3))
    runs.append(write("untuned", 64, 3 * steps_of(64), learning_rate=1e-5))
    runs.append(write("again", 64, steps_of(64), seed=1))
    picture = tmp_path / "pictures" / "batch.png"
    critical_batch([*runs, "--bound", "-100", "--out", str(picture)])
    said = capsys.readouterr().out
    assert "Critical batch size: 90 images" in said
    assert "it takes 2,000 steps; however small, 180,0" in " ".join(said.split())
    lines = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert " 128 " in lines["window"]
    assert "not fitted" in lines["untuned"]
    assert "not fitted" not in lines["b64"] + lines["again"]
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors()) > 10


def test_without_a_bound_it_is_the_best_that_all_reached(write: Write, capsys):
    critical_batch(
        [write(f"b{size}", size, steps_of(size), last=-93.0 if size == 32 else -91.0) for size in (16, 32, 64)]
    )
    assert "To a validation bound of -93." in capsys.readouterr().out


def test_runs_that_do_not_tell_are_said_not_to(write: Write, capsys):
    critical_batch([write(f"b{size}", size, steps) for size, steps in ((16, 348), (64, 277), (256, 200))])
    said = capsys.readouterr().out
    assert "These runs do not tell the critical batch size: the 95 % interval has no limits" in said
    assert "scatter by 16 %" in said


def test_mistakes_are_named(write: Write, tmp_path: Path):
    runs = [write(f"b{size}", size, steps_of(size)) for size in (16, 32, 64)]
    short = write("short", 128, steps_of(128), last=-110.0)
    with pytest.raises(ValueError, match=r"--bound -100.00: short never reached it, its best was -110\."):
        critical_batch([*runs, short, "--bound", "-100"])
    with pytest.raises(ValueError, match=r"b16: its first validation, after .*or validations more often"):
        critical_batch([*runs, "--bound", "-300"])
    with pytest.raises(ValueError, match="2 batch sizes"):
        critical_batch([*runs[:2], "--bound", "-100"])
    other = write("other", 128, 1000, hidden=16)
    with pytest.raises(ValueError, match=r"other has model\.hidden=16, b16 has 8"):
        critical_batch([*runs, other])
    with pytest.raises(ValueError, match=r"empty: no config\.yaml and no metrics/ in it"):
        critical_batch([*runs, str(tmp_path / "empty")])
    (Path(other) / "config.yaml").write_text("data: 3\n")
    with pytest.raises(ValueError, match="does not say the batch size"):
        critical_batch([*runs, other])
    metrics = Path(short) / "metrics" / "version_0" / "metrics.csv"
    metrics.write_text("epoch,step,train/elbo_nats\n0,1,-100\n")
    with pytest.raises(ValueError, match="wanted a run that was validated"):
        critical_batch([*runs, short])


def test_noise_scales_of_a_run_are_drawn_block_by_block(tmp_path: Path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,noise_scale/total,noise_scale/encoder\n49,10,3\n99,20,inf\n")
    axes = noise_scale_curves(metrics).axes[0]
    assert [line.get_label() for line in axes.lines] == ["encoder", "all parameters"]
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[49, 10], [99, 20]])
    draw_noise_scale(tmp_path / "new" / "noise.png", metrics)
    with Image.open(tmp_path / "new" / "noise.png") as image:
        assert len(image.convert("L").getcolors()) > 10
    metrics.write_text("step,val/elbo_nats\n1,2\n")
    with pytest.raises(ValueError, match="train with the callback NoiseScale"):
        noise_scale_curves(metrics)
