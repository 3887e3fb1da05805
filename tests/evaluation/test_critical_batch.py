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
from wngen.evaluation.batch_figures import draw_noise_scale, noise_scale_curves, trade_off
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
            "trainer": {name: more[name] for name in ("accumulate_grad_batches", "limit_val_batches") if name in more},
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
    assert "slower" in lines["untuned"]
    assert "slower" not in lines["b64"] + lines["again"]
    assert "the fastest is the highest with batches of 64: try beyond." in said
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors()) > 10


def test_without_a_bound_it_is_the_best_that_all_reached(write: Write, capsys):
    critical_batch(
        [write(f"b{size}", size, steps_of(size), last=-93.0 if size == 32 else -91.0) for size in (16, 32, 64)]
    )
    assert "To a validation bound of -93." in capsys.readouterr().out


def bound_of(said: str) -> float:
    return float(said.partition("To a validation bound of ")[2].split()[0])


def test_a_run_that_is_behind_and_ends_is_slower_whatever_the_bound(write: Write, capsys):
    """And so neither changes the bound by default nor has to reach one that is given."""
    runs = [write(f"b{size}", size, steps_of(size)) for size in (16, 32, 64)]
    behind = write("behind", 32, 3 * steps_of(32), last=-150.0, learning_rate=0.1)
    diverged = Path(write("diverged", 64, 9.0, learning_rate=0.2))
    (diverged / "metrics" / "version_0" / "metrics.csv").write_text("step,val/elbo_nats\n9,-300\n19,nan\n29,nan\n")
    critical_batch(runs)
    alone = capsys.readouterr().out
    critical_batch([*runs, behind, str(diverged)])
    said = capsys.readouterr().out
    assert bound_of(said) == bound_of(alone) == pytest.approx(-91.1, abs=0.3)
    assert said.count("never") == 2
    assert "Critical batch size: 90 images" in said
    assert "is the lowest with batches of 32, the lowest with batches of 64: try beyond." in " ".join(said.split())
    critical_batch([*runs, behind, "--bound", "-100"])
    assert "Critical batch size: 90 images" in capsys.readouterr().out


def test_a_run_that_is_ahead_and_ends_lowers_the_bound(write: Write, capsys):
    """As those do that were stopped at a bound; by a higher one the slowest of a batch size could be the fastest."""
    runs = [write(f"b{size}", size, steps_of(size), learning_rate=1e-4) for size in (16, 32, 64)]
    ahead = write("ahead", 32, steps_of(32) / 2, last=-120.0, learning_rate=1e-3)
    critical_batch([*runs, ahead])
    said = capsys.readouterr().out
    assert -123 < bound_of(said) <= -120
    assert [" slower " in line for line in said.splitlines() if " b32 " in line] == [True]
    with pytest.raises(ValueError, match=r"ahead ended at -12\d\.\d\d, where it was ahead of b32\. Choose a bound"):
        critical_batch([*runs, ahead, "--bound", "-100"])


def test_the_recipe_that_reaches_the_bound_with_more_of_its_seeds_counts(write: Write, capsys):
    runs = [write(f"b{size}", size, steps_of(size)) for size in (16, 64)]
    runs += [write(f"sure-{seed}", 32, steps_of(32), seed=seed) for seed in (0, 1)]
    runs += [write("lucky-0", 32, steps_of(32) / 2, learning_rate=0.1)]
    runs += [write(f"lucky-{seed}", 32, steps_of(32) * 2, -150.0, learning_rate=0.1, seed=seed) for seed in (1, 2)]
    runs += [write("hopeless", 32, steps_of(32) * 2, -150.0, learning_rate=0.2)]
    critical_batch([*runs, "--bound", "-100"])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "never" in lines["lucky-1"]
    assert "never" in lines["hopeless"]
    assert "slower" in lines["lucky-0"]
    assert not any(word in lines[name] for word in ("never", "slower") for name in ("sure-0", "sure-1"))


def test_a_rate_between_others_is_tuned(write: Write, capsys):
    runs = [write(f"b{size}", size, steps_of(size)) for size in (16, 32, 64)]
    runs += [write(f"rate-{rate}", 32, 2 * steps_of(32), learning_rate=rate) for rate in (5e-4, 2e-3)]
    critical_batch([*runs, "--bound", "-100"])
    assert "try beyond" not in capsys.readouterr().out


def test_a_row_is_a_line_of_eighty_columns(write: Write, capsys):
    names = [f"batch-{size:03d}-rate-0.001-seed-0000" for size in (16, 32, 64)]
    runs = [write(name, size, steps_of(size)) for name, size in zip(names, (16, 32, 64), strict=True)]
    names.append("batch-064-rate-0.004-seed-0000")
    critical_batch([*runs, write(names[-1], 64, 9 * steps_of(64), learning_rate=4e-3), "--bound", "-100"])
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == names
    assert "slower" in rows[-1]
    assert all(len(row) <= 80 for row in rows)
    assert "learning" in said


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
    with pytest.raises(ValueError, match=r"1 batch size \(16\): two numbers"):
        critical_batch([*runs[:1], "--bound", "-100"])
    other = write("other", 128, 1000, hidden=16)
    with pytest.raises(ValueError, match=r"other has model\.hidden=16, b16 has 8"):
        critical_batch([*runs, other])
    with pytest.raises(ValueError, match=r"empty: no config\.yaml and no metrics/ in it"):
        critical_batch([*runs, str(tmp_path / "empty")])
    (Path(other) / "config.yaml").write_text("data: 3\n")
    with pytest.raises(ValueError, match="does not say the batch size"):
        critical_batch([*runs, other])
    metrics = Path(short) / "metrics" / "version_0" / "metrics.csv"
    metrics.write_text("epoch,step,val/elbo_nats\n0,1,nan\n")
    with pytest.raises(ValueError, match=r"batches of 128: no validation of any run has a finite bound"):
        critical_batch([*runs, short])
    metrics.write_text("epoch,step,train/elbo_nats\n0,1,-100\n")
    with pytest.raises(ValueError, match="wanted a run that was validated"):
        critical_batch([*runs, short])


def test_a_validation_that_was_not_finite_is_passed_over():
    steps = np.array([100.0, 200.0, 300.0])
    for bad in (math.nan, -math.inf):
        assert steps_to(-100, (steps, np.array([-120.0, bad, -95.0]))) == pytest.approx(100 + 200 * 20 / 25)


def test_runs_validated_on_one_batch_or_on_all_or_on_other_binarizations_are_told_apart(write: Write):
    one, every = write("one", 16, 100, limit_val_batches=1), write("every", 32, 100, limit_val_batches=1.0)
    with pytest.raises(ValueError, match="every was validated on all images, one on 16 images"):
        critical_batch([one, every])
    runs = [Path(write(f"seed{seed}", 16 + seed, 100)) for seed in (0, 1)]
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0\n", "seed: 1\n    evaluation_seed: 1\n", 1))
    with pytest.raises(ValueError, match=r"seed1 has data\.evaluation_seed=1, seed0 has None"):
        critical_batch([str(run) for run in runs])


def test_all_must_be_validated_on_as_many_images(write: Write, capsys):
    """Its limit counts batches, those that validation has and not a window of them; a float up to 1 is a share."""
    runs = [write(f"b{size}", size, steps_of(size), limit_val_batches=1280.0 / size) for size in (16, 32, 64)]
    runs.append(write("window", 64, steps_of(128), limit_val_batches=20.0, accumulate_grad_batches=2))
    critical_batch(runs)
    assert "Critical batch size: 90 images" in capsys.readouterr().out
    more = write("more", 128, steps_of(128), limit_val_batches=20.0)
    message = r"more was validated on 2,560 images, b16 on 1,280 images: wanted the same .*limit_val_batches set to one"
    with pytest.raises(ValueError, match=message):
        critical_batch([*runs, more])
    everything = [write(f"all{i}", 32 << i, 100, **limit) for i, limit in enumerate(({}, {"limit_val_batches": 1.0}))]
    half = write("half", 16, 100, limit_val_batches=0.5)
    with pytest.raises(ValueError, match=r"half was validated on 0.5 of all images, all0 on all images"):
        critical_batch([*everything, half])


def test_a_batch_size_is_written_once(tmp_path: Path):
    sizes, steps = [16, 16, 64, 1024], [9000.0, 9100.0, 4000.0, 2100.0]
    axes = trade_off(fit_trade_off(sizes, steps), sizes, steps).axes[0]
    assert {text.get_text(): text.xy for text in axes.texts} == {
        "16": (9100, 16 * 9100), "64": (4000, 64 * 4000), "1,024": (2100, 1024 * 2100)
    }  # fmt: skip
    assert len(axes.texts) == 3


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
