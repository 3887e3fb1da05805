"""`wngen evaluate` and `wngen score` as a user sees them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from wngen import load
from wngen.cli import likelihoods, main
from wngen.data import BinarizedMNIST
from wngen.distributions import Bernoulli
from wngen.evaluation import Evaluation, Report

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
LADDER = "resnet-vae-mnist-static"


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a released model, which results may be written beside; and the terminal of a reader."""
    monkeypatch.setenv("COLUMNS", "80")
    return Path(shutil.copytree(CHECKPOINTS / LADDER, tmp_path / LADDER))


def figures(path: Path) -> dict[str, float]:
    return {name: figure["mean"] for name, figure in json.loads(path.read_text())["nats"].items()}


def test_figures_of_each_image_lie_beside_the_report(released: Path):
    assert main(["evaluate", str(released), "--limit=12", "--importance-samples=2", "--device=cpu"]) == 0
    evaluation = Evaluation.read(released / "per_image-test-k2-n12.npz")
    means = figures(released / "report-test-k2-n12.json")
    assert means["elbo"] == pytest.approx(evaluation.elbo_nats.mean(), abs=1e-12)
    assert means["log_likelihood"] == pytest.approx(evaluation.best_nats.mean(), abs=1e-12)
    assert means["rate"] == pytest.approx(evaluation.rate_nats.mean(), abs=1e-12)
    assert not list(released.glob(".*")), "nothing is left of what an interruption would have needed"


def test_double_precision_is_stated_and_leaves_single_precision_near(released: Path):
    for dtype in ("float32", "float64"):
        out = released / f"{dtype}.json"
        assert main(["evaluate", str(released), "--limit=12", "--dtype", dtype, f"--out={out}", "--device=cpu"]) == 0
        assert json.loads(out.read_text())["protocol"]["dtype"] == dtype
    single, double = (Evaluation.read(released / f"{dtype}.npz").elbo_nats for dtype in ("float32", "float64"))
    assert 0 < np.abs(single - double).max() < 1e-3


def test_models_are_compared_image_by_image(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exact = CHECKPOINTS / "pixelcnn-pp-mnist-static"
    again = Path(shutil.copytree(exact, tmp_path / exact.name))
    out = tmp_path / "comparison.json"
    assert main(["evaluate", str(released), str(again), "--limit=12", f"--out={out}", "--device=cpu"]) == 0
    text = capsys.readouterr().out
    assert f"Beside {LADDER}, image by image" in text
    content = json.loads(out.read_text())
    assert list(content["reports"]) == [LADDER, again.name]
    (difference,) = content["differences"]
    ladder, pixels = (Evaluation.read(path / "per_image-test-n12.npz") for path in (released, again))
    assert difference["nats"]["mean"] == pytest.approx((pixels.best_nats - ladder.elbo_nats).mean(), abs=1e-12)
    assert f"{difference['nats']['mean']:+.2f}" in text
    assert main(["evaluate", str(released), str(released), "--limit=12", "--device=cpu"]) == 1
    assert "name each once" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on_by_the_same_command(
    released: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments = ["evaluate", str(released), "--limit=12", "--chunk=4", "--device=cpu"]
    encoded: list[int] = []
    loads = likelihoods.loaded

    def loaded(*args: object) -> torch.nn.Module:
        model = loads(*args)  # type: ignore[arg-type]
        encode = model.encode

        def watched(x: torch.Tensor, y: torch.Tensor | None = None) -> object:
            if len(x) > 1:  # one alone is looked at beforehand
                encoded.append(len(x))
                if encoded == [4, 4, 4]:
                    raise KeyboardInterrupt
            return encode(x, y)  # type: ignore[operator]

        model.encode = watched  # type: ignore[assignment]
        return model

    monkeypatch.setattr(likelihoods, "loaded", loaded)
    assert main(arguments) == 130
    said = capsys.readouterr().err
    assert "interrupted: the same command goes on after the images that are done" in said
    assert "WNGEN_TRACEBACK" not in said
    assert not (released / "report-test-n12.json").exists()
    assert main(arguments) == 0
    assert encoded == [4, 4, 4, 4], "the two parts that were done are not encoded again"
    resumed = Evaluation.read(released / "per_image-test-n12.npz")
    monkeypatch.undo()
    assert main([*arguments, f"--out={released / 'whole.json'}"]) == 0
    whole = Evaluation.read(released / "whole.npz")
    np.testing.assert_array_equal(resumed.index, whole.index)
    np.testing.assert_allclose(resumed.elbo_nats, whole.elbo_nats, rtol=0, atol=1e-9)


def test_images_are_sorted_by_likelihood_and_told_from_known_ones(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The model's own images as reference, and black and white noise to tell from them."""
    noise = tmp_path / "noise.npy"
    np.save(noise, np.random.default_rng(0).integers(0, 2, (20, 28, 28), dtype=np.uint8))
    reference, out = tmp_path / "known.json", tmp_path / "scores.csv"
    common = [str(released), "--device=cpu"]
    assert main(["evaluate", *common, "--limit=20", f"--out={reference}"]) == 0
    data = ["--data=ArrayFile", f"--data.path={noise}", "--data.levels=2", "--split=train", "--limit=12"]
    capsys.readouterr()
    arguments = ["score", *common, *data, f"--reference={tmp_path / 'known.npz'}", f"--out={out}"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "area under the ROC curve 1.000 by low" in text
    assert "arXiv:1810.09136" in text
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["elbo_nats"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert {row["quantile"] for row in rows} == {"0.0"}
    assert main([*arguments, "--importance-samples=2"]) == 1
    assert "importance_samples None, wanted 2" in capsys.readouterr().err


def test_a_bound_is_checked_by_annealing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Few steps leave annealing below the bound, by no more than the gap between its directions, but for chance."""
    released = Path(shutil.copytree(CHECKPOINTS / "conv-vae-iaf-mnist", tmp_path / "released"))
    out = tmp_path / "report.json"
    arguments = ["--data.binarization=static", "--limit=8", "--importance-samples=20", f"--out={out}", "--device=cpu"]
    assert main(["evaluate", str(released), *arguments, "--ais=12", "--ais-chains=2", "--ais-images=5"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    check = json.loads(out.read_text())["annealing"]
    assert (check["steps"], check["chains"], check["images"], check["simulated_images"]) == (12, 2, 5, 5)
    annealed, bound, difference = (
        check[name]["mean"] for name in ("log_likelihood_nats", "bound_nats", "difference_nats")
    )
    assert difference == pytest.approx(annealed - bound, abs=1e-9)
    indices = BinarizedMNIST().evaluation_batches("test", 8, 5)
    chosen = np.concatenate([batch.index.numpy() for batch in indices])
    evaluation = Evaluation.read(tmp_path / "per_image.npz")
    assert bound == pytest.approx(evaluation.best_nats[np.isin(evaluation.index, chosen)].mean(), abs=1e-9)
    assert -check["gap_nats"]["mean"] * 2 < difference < 0
    assert f"{difference:+.2f} ± {check['difference_nats']['standard_error']:.2f} nats. Its own error" in text
    exact = ["evaluate", str(CHECKPOINTS / "pixelcnn-pp-mnist-static"), "--ais=10", "--device=cpu"]
    assert main(exact) == 1
    assert "there is no bound to check" in capsys.readouterr().err


def test_a_density_is_refused_before_anything_is_measured(released: Path, monkeypatch, capsys):
    """A Gaussian of a level scaled to [-1, 1], whose values at two levels sum to no 1, and stay below it."""

    def density(self: Bernoulli, x: torch.Tensor) -> torch.Tensor:
        scaled = x.to(self.logits) * 2 - 1
        return -0.5 * (scaled - self.logits.tanh()).square() - 0.5 * math.log(2 * math.pi)

    monkeypatch.setattr(Bernoulli, "log_prob", density)
    monkeypatch.setattr(type(load(released)), "forward", None)
    assert main(["evaluate", str(released), "--limit=4", "--device=cpu"]) == 1
    assert re.search(
        r"2 levels of a sub-pixel have probabilities that sum to 0\.\d+, wanted 1", capsys.readouterr().err
    )


def test_reports_of_other_data_seeds_and_checkpoints_have_names_of_their_own(released: Path, tmp_path: Path):
    common = ["--limit=4", "--device=cpu"]
    other = ["--data.binarization=threshold"]
    if "WNGEN_DATA" in os.environ:
        assert main(["evaluate", str(released), *common, *other]) == 0
        assert (released / "report-binarizedmnist-threshold-test-n4.json").is_file()
    assert main(["evaluate", str(released), *common, "--seed=3"]) == 0
    assert (released / "report-test-n4-seed3.json").is_file()
    assert (released / "per_image-test-n4-seed3.npz").is_file()
    assert main(["evaluate", str(released), *common, "--data.evaluation_seed=2"]) == 0
    (report,) = released.glob("report-*-evaluation_seed2.json")
    assert Report.read(report).protocol["data"]["seed"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out=figures.npz"], "ends in .json"),
        (["--limit=1"], "at least 2 images"),
        (["--ais=0"], "at least 1 step"),
        (["--ais=5", "--ais-images=1"], "2 images"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_before(options: list[str], message: str, released: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(released), "--device=cpu", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_reference_of_another_model_is_refused(released: Path, capsys):
    exact = CHECKPOINTS / "pixelcnn-pp-mnist-static" / "per_image.npz"
    assert main(["score", str(released), f"--reference={exact}", "--limit=4", "--device=cpu"]) == 1
    assert "was not measured as these images are: weights_sha256" in capsys.readouterr().err
