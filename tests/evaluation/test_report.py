"""A report keeps figures and protocol, and shows them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from wngen.checkpoint import save_release
from wngen.evaluation import Evaluation, Report, weights_sha256
from wngen.evaluation.card import model_card
from wngen.evaluation.report import per_image_path
from wngen.models import ConvVAE

DATA: dict[str, Any] = {
    "name": "BinarizedMNIST",
    "split": "test",
    "images": 500,
    "split_images": 10_000,
    "binarization": "static",
    "seed": 3,
    "sha256": "ab" * 32,
}


@pytest.fixture(scope="module")
def model() -> ConvVAE:
    torch.manual_seed(0)
    vae = ConvVAE(1, 8, 8, 2, latent_dim=3, widths=(4,), blocks=1, hidden=8, iaf_width=8)
    vae.latent_shapes = ((2, 4, 3), (3,))  # as if it had two layers
    return vae


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    rng = np.random.default_rng(0)
    return Evaluation(
        index=np.arange(500),
        distortion_nats=rng.normal(90, 20, 500),
        layer_kl_nats=rng.gamma(20, 0.5, (500, 2)),
        log_likelihood_nats=rng.normal(-75, 20, 500),
        is_exact=False,
        importance_samples=5000,
        seed=11,
        dtype="float32",
        device="cpu",
        wall_seconds=12.5,
    )


def show(report: Report, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(report)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_figures_in_both_units(model: ConvVAE, evaluation: Evaluation):
    report = Report.of(evaluation, model, DATA, "ema")
    assert list(report.nats) == ["elbo", "distortion", "rate", "kl_layer_1", "kl_layer_2", "log_likelihood"]
    assert report.nats["elbo"].mean == pytest.approx(evaluation.elbo_nats.mean(), rel=1e-12)
    assert report.nats["kl_layer_2"].mean == pytest.approx(evaluation.layer_kl_nats[:, 1].mean(), rel=1e-12)
    dims = 64 * math.log(2)
    for name in ("elbo", "log_likelihood"):
        nats, bits = report.nats[name], report.bits_per_dim[name]
        assert nats.low < nats.mean < nats.high < 0 < bits.low < bits.mean < bits.high
        assert (bits.mean, bits.low) == pytest.approx((-nats.mean / dims, -nats.high / dims), rel=1e-12)
        assert bits.standard_error == pytest.approx(nats.standard_error / dims, rel=1e-12)
    assert report.bits_per_dim["rate"].mean == pytest.approx(report.nats["rate"].mean / dims, rel=1e-12)


def test_the_protocol_is_complete(model: ConvVAE, evaluation: Evaluation):
    report = Report.of(evaluation, model, DATA, "raw")
    assert report.model == {**model.config, "widths": [4]}
    assert report.schema == 1
    stated = {
        "data": DATA,
        "images": 500,
        "weights": "raw",
        "weights_sha256": weights_sha256(model),
        "dtype": "float32",
        "seed": 11,
        "estimator": "importance-weighted",
        "importance_samples": 5000,
        "latent_shapes": [[2, 4, 3], [3]],
        "confidence": 0.95,
        "device": "cpu",
        "wall_seconds": 12.5,
    }
    assert stated.items() <= report.protocol.items()
    assert report.protocol["versions"]["torch"] == torch.__version__
    assert report.protocol["versions"]["wngen"]


def test_round_trip(model: ConvVAE, evaluation: Evaluation, tmp_path: Path):
    report = Report.of(evaluation, model, DATA, "ema")
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema"] == 1
    assert content["nats"]["elbo"].keys() == {"mean", "standard_error", "low", "high"}


def test_a_failed_write_leaves_the_old_report(model: ConvVAE, evaluation: Evaluation, tmp_path: Path):
    path = tmp_path / "report.json"
    report = Report.of(evaluation, model, DATA, "ema")
    report.write(path)
    with pytest.raises(TypeError):
        replace(report, protocol={**report.protocol, "data": {"sha256": object()}}).write(path)
    assert Report.read(path) == report


def test_what_is_no_report_is_refused(tmp_path: Path):
    path = tmp_path / "report.json"
    for text, complaint in (
        ("{", "Expecting"),
        ("[]", "not a report"),
        ('{"schema": 99}', "schema 99, this version of wngen reads 1"),
        ('{"schema": 1, "nats": {"elbo": {"mean": 1}}}', "standard_error"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint) as error:
            Report.read(path)
        assert str(path) in str(error.value)


def test_another_number_of_images_is_refused(model: ConvVAE, evaluation: Evaluation):
    with pytest.raises(ValueError, match="500 images were evaluated, but the data's protocol says 10000"):
        Report.of(evaluation, model, {**DATA, "images": 10_000}, "ema")


def test_the_table_shows_figures_and_protocol(model: ConvVAE, evaluation: Evaluation):
    report = Report.of(evaluation, model, DATA, "ema")
    text = show(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for title, name in (("ELBO", "elbo"), ("KL of layer 2", "kl_layer_2"), ("importance-weighted,", "log_likelihood")):
        (first,) = [i for i, line in enumerate(lines) if title in line]
        nats, bits = report.nats[name], report.bits_per_dim[name]
        assert f"{nats.mean:.2f} ± {nats.standard_error:.2f}" in lines[first]
        assert f"{nats.low:.2f} to {nats.high:.2f}" in lines[first]
        assert f"{bits.mean:.4f} ± {bits.standard_error:.4f}" in lines[first + 1]
        assert f"{bits.low:.4f} to {bits.high:.4f}" in lines[first + 1]
    assert "K = 5,000" in lines[first + 1]
    for words in ("ConvVAE on BinarizedMNIST test", "static binarization", "500 of 10,000 images", "drawn with seed 3"):
        assert words in " ".join(text.split())
    for words in ("EMA weights", "float32", "noise seed 11", weights_sha256(model)[:12], "abababababab"):
        assert words in " ".join(text.split())


def test_the_precision_of_training_is_stated_if_it_is_known(model: ConvVAE, evaluation: Evaluation, tmp_path: Path):
    known = Report.of(evaluation, model, DATA, "ema", "bf16-mixed")
    assert known.protocol["training_precision"] == "bf16-mixed"
    assert "float32 (trained in bf16-mixed)" in known.protocol_line
    card = model_card(model, "conv-vae", known)
    assert known.protocol_line in card.text
    assert all(result.metric_args["training_precision"] == "bf16-mixed" for result in card.data.eval_results)
    unknown = Report.of(evaluation, model, DATA, "ema")
    assert unknown.protocol["training_precision"] is None
    older = replace(unknown, protocol={k: v for k, v in unknown.protocol.items() if k != "training_precision"})
    older.write(tmp_path / "report.json")
    older = Report.read(tmp_path / "report.json")
    for report in (unknown, older):
        assert "trained" not in report.protocol_line
        card = model_card(model, "conv-vae", report)
        assert "training_precision" not in card.data.eval_results[0].metric_args


def test_layers_are_told_by_their_resolution_where_it_is_known(model: ConvVAE, evaluation: Evaluation):
    report = Report.of(evaluation, model, DATA, "ema")
    assert report.layers == ("layer_1_4x3", "layer_2")
    assert [row[0] for row in report.rows][3:5] == ["KL of layer 1, 4x3", "KL of layer 2"]
    older = replace(report, protocol={k: v for k, v in report.protocol.items() if k != "latent_shapes"})
    assert [row[0] for row in older.rows][3:5] == ["KL of layer 1", "KL of layer 2"]


def test_the_rate_is_not_shown_twice(model: ConvVAE, evaluation: Evaluation):
    single = replace(evaluation, layer_kl_nats=evaluation.layer_kl_nats[:, :1], log_likelihood_nats=None)
    single = replace(single, importance_samples=None)
    report = Report.of(single, model, DATA, "ema")
    assert report.nats["kl_layer_1"] == report.nats["rate"]
    assert [row[0] for row in report.rows] == ["ELBO", "distortion", "rate"]
    assert report.protocol["estimator"] == "elbo"


def test_an_exact_model_has_one_figure(model: ConvVAE, evaluation: Evaluation):
    exact = replace(
        evaluation,
        is_exact=True,
        importance_samples=None,
        layer_kl_nats=np.zeros((500, 0)),
        log_likelihood_nats=-evaluation.distortion_nats,
    )
    report = Report.of(exact, model, DATA, "ema")
    assert [row[0] for row in report.rows] == ["log-likelihood (exact)"]
    assert report.protocol["estimator"] == "exact"


def test_the_hash_is_of_names_shapes_and_bytes(model: ConvVAE):
    layer = torch.nn.Linear(2, 1)
    expected = hashlib.sha256()
    for name, tensor in (("bias", layer.bias), ("weight", layer.weight)):
        expected.update(f"{name} torch.float32 {tuple(tensor.shape)}\n".encode())
        expected.update(tensor.detach().numpy().tobytes())
    assert weights_sha256(layer) == expected.hexdigest()
    before = weights_sha256(model)
    with torch.no_grad():
        weight = next(model.parameters())
        weight.view(-1)[0] += 1e-6
        assert weights_sha256(model) != before
        weight.view(-1)[0] -= 1e-6


def test_the_card_holds_the_figures(model: ConvVAE, evaluation: Evaluation):
    report = Report.of(evaluation, model, DATA, "ema")
    card = model_card(model, "conv-vae", report)
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results.keys() == {"elbo_nats", "elbo_bits_per_dim", "log_likelihood_nats", "log_likelihood_bits_per_dim"}
    bound = results["log_likelihood_nats"]
    assert bound.metric_value == pytest.approx(report.nats["log_likelihood"].mean, abs=1e-6)
    assert bound.metric_args["importance_samples"] == 5000
    assert "importance_samples" not in results["elbo_nats"].metric_args
    assert (bound.dataset_split, bound.dataset_type) == ("test", "binarizedmnist")
    assert "static binarization" in bound.dataset_name
    for row in report.rows:
        assert f"| {' | '.join(row)} |" in card.text
    assert 'wngen.load("conv-vae")' in card.text
    assert "# conv-vae" in card.text


def test_a_card_without_a_report_claims_nothing(model: ConvVAE):
    card = model_card(model, "conv-vae")
    assert card.data.eval_results is None
    assert "nats" not in card.text


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_snippet_of_a_card_runs_beside_the_release(
    num_classes: int | None, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny = ConvVAE(
        1, 8, 8, 2, latent_dim=3, widths=(4,), blocks=1, hidden=8, iaf_width=8, num_classes=num_classes
    ).eval()
    single = replace(evaluation, layer_kl_nats=evaluation.layer_kl_nats[:, :1])
    save_release(tiny, tmp_path / "tiny", Report.of(single, tiny, DATA, "ema"))
    text = (tmp_path / "tiny" / "README.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["images"].shape == (16, 1, 8, 8)
    assert scope["images"].dtype == torch.uint8
    assert "(16, 1, 8, 8)" in snippet
    assert ("unconditional-image-generation" in text) == (num_classes is None)
    assert ("pipeline_tag" in text) == (num_classes is None)
    assert ("type: conditional-image-generation" in text) == (num_classes is not None)


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_density_is_refused_with_the_reason(model: ConvVAE, evaluation: Evaluation, is_exact: bool):
    """Gaussian densities of pixels, say; probabilities that rounding has made a little more than 1 are let pass."""
    distortion = evaluation.distortion_nats.copy()
    distortion[3] = -1e-5
    rounded = replace(evaluation, distortion_nats=distortion, is_exact=is_exact, log_likelihood_nats=-distortion)
    Report.of(rounded, model, DATA, "ema")
    distortion[3] = -250.0
    what = r"log p\(x\)" if is_exact else r"log p\(x \| z\)"
    with pytest.raises(ValueError, match=f"{what} of the image with index {evaluation.index[3]} is 250 nats.*density"):
        Report.of(rounded, model, DATA, "ema")


def test_figures_of_images_lie_beside_their_report():
    names = {"report.json": "per_image.npz", "a/last-report-k5.json": "a/last-per_image-k5.npz", "x.json": "x.npz"}
    assert {str(per_image_path(report)) for report in names} == set(names.values())
