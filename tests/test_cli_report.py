"""`wngen report`: of runs, releases and single reports, as a page, a model card and JSON."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from wngen.checkpoint import Metadata, load, save_release
from wngen.cli.reporting import report
from wngen.data import BinarizedMNIST
from wngen.evaluation import Evaluation, Report, evaluate
from wngen.models import ConvVAE

RELEASED = Path(__file__).parents[1] / "checkpoints"
LIMIT = 40
FIGURE = re.compile(r'<data value="([^"]+)">')


def made(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Report, Evaluation]:
    """A release of a tiny model, evaluated on some images of the embedded data set."""
    torch.manual_seed(seed)
    model = ConvVAE(1, 28, 28, 2, latent_dim=3, widths=(4,), blocks=1, patch=4, hidden=8, iaf_width=8).eval()
    data = BinarizedMNIST()
    evaluation = evaluate(model.to(dtype), data.evaluation_batches("test", 64, LIMIT), LIMIT)
    written = Report.of(evaluation, model, data.protocol("test", LIMIT), "ema")
    save_release(model.float(), folder, written, Metadata(model.config, data.config))
    return written, evaluation


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of them, both with the figures of each image."""
    folder = tmp_path_factory.mktemp("releases")
    for seed, name in enumerate(("one", "two")):
        _, evaluation = made(folder / name, seed)
        evaluation.write(folder / name / "per_image.npz")
    return folder


@pytest.fixture
def release(releases: Path, tmp_path: Path) -> Path:
    """The first, in a place of its own."""
    return Path(shutil.copytree(releases / "one", tmp_path / "mine" / "one"))


def test_a_page_of_a_release(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    report([str(release), "--samples=4"])
    output = capsys.readouterr()
    assert output.out == "Written to report.html\n"
    assert output.err == ""
    text = (tmp_path / "report.html").read_text()
    stated = set(map(float, FIGURE.findall(text)))
    kept, evaluation = Report.read(release / "report.json"), Evaluation.read(release / "per_image.npz")
    assert {kept.nats["elbo"].mean, kept.bits_per_dim["rate"].high} <= stated
    assert {evaluation.best_nats.max(), evaluation.best_nats.min()} <= stated
    worst = evaluation.index[evaluation.best_nats.argmin()]
    assert f'alt="Image {worst} of the test split"' in text
    for words in ("4 samples", "Reconstructions", kept.protocol["weights_sha256"]):
        assert words in text
    assert 'class="missing"' not in text
    report([str(release), "--samples=4", "--out=again.html"])
    assert (tmp_path / "again.html").read_text() == text  # nothing in it is left to chance


def test_a_comparison(releases: Path, tmp_path: Path):
    out = tmp_path / "new" / "page.html"
    report([str(releases / "one"), str(releases / "two"), "--samples=1", f"--out={out}"])
    one, two = (Evaluation.read(releases / name / "per_image.npz").elbo_nats for name in ("one", "two"))
    stated = list(map(float, FIGURE.findall(out.read_text())))
    assert any(value == pytest.approx((two - one).mean(), rel=1e-12) for value in stated)


def test_figures_for_machines(releases: Path, tmp_path: Path, capsys):
    report([str(releases / "one"), str(releases / "two"), "--format=json"])
    content = json.loads(capsys.readouterr().out)
    kept = json.loads((releases / "one" / "report.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["one", "two"]
    assert content["runs"][0]["report"] == kept
    assert content["runs"][0]["parameters"] == sum(p.numel() for p in load(releases / "one").parameters())
    (difference,) = content["differences"]
    assert (difference["model"], difference["baseline"], difference["figure"]) == ("two", "one", "elbo")


def test_the_card_is_the_one_of_the_release(release: Path, capsys):
    report([str(release), "--format=markdown"])
    text = capsys.readouterr().out
    assert text == (release / "README.md").read_text()
    card = ModelCard(text)
    head = yaml.safe_load(text.split("---")[1])
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(
        Report.read(release / "report.json").nats["elbo"].mean, abs=1e-6
    )
    assert card.data.to_dict() == ModelCard.load(release / "README.md").data.to_dict()
    report([str(release), "--format=markdown", f"--out={release / 'README.md'}"])
    assert (release / "README.md").read_text() == text


@pytest.mark.parametrize("name", sorted(path.name for path in RELEASED.iterdir()))
def test_the_cards_of_released_models_are_written_by_this_command(name: str, capsys):
    report([str(RELEASED / name), "--format=markdown"])
    assert capsys.readouterr().out == (RELEASED / name / "README.md").read_text(), (
        f"wngen report checkpoints/{name} --format markdown --out checkpoints/{name}/README.md"
    )


def test_what_is_not_there_is_said_and_the_rest_shown(release: Path, tmp_path: Path, capsys):
    out = tmp_path / "page.html"
    (release / "per_image.npz").unlink()
    (release / "metrics" / "version_0").mkdir(parents=True)
    (release / "metrics" / "version_0" / "metrics.csv").write_text("damaged")
    config = json.loads((release / "config.json").read_text())
    config["wngen"]["data"]["data"] = "Nowhere"
    (release / "config.json").write_text(json.dumps(config))
    report([str(release), "--samples=4", f"--out={out}"])
    text, said = out.read_text(), capsys.readouterr().err
    command = f"wngen evaluate {release} --limit {LIMIT} --out {release / 'report.json'}"
    assert f"<code>{command}</code>" in text
    for reason in (f"`{command}`", "not a metrics.csv", "does not say on which data"):
        assert reason in said
        assert reason.strip("`") in text
    assert "4 samples" in text
    (release / "model.safetensors").write_bytes(b"no")
    report([str(release), f"--out={out}"])
    text = out.read_text()
    assert "is missing, cut short or damaged" in text
    assert "<img" not in text
    assert str(Report.read(release / "report.json").nats["elbo"].mean) in text


def test_a_data_set_that_cannot_be_had_is_said(release: Path, tmp_path: Path):
    config = json.loads((release / "config.json").read_text())
    shape = {"height": 28, "width": 28, "channels": 1, "levels": 2}
    config["wngen"]["data"] = {"data": "ImageFolder", "path": str(tmp_path / "gone"), **shape}
    (release / "config.json").write_text(json.dumps(config))
    report([str(release), "--samples=4", f"--out={tmp_path / 'page.html'}"])
    text = (tmp_path / "page.html").read_text()
    assert "gone" in text
    assert "4 samples" in text
    assert "Reconstructions" not in text


def test_other_weights_images_or_figures_than_the_reports_are_not_shown_as_its_own(release: Path, tmp_path: Path):
    """A page would show pictures of one model beside the figures of another."""
    kept = Report.read(release / "report.json")
    evaluation = Evaluation.read(release / "per_image.npz")
    out = tmp_path / "page.html"
    data = {**kept.protocol["data"], "sha256": "00" * 32}
    replace(kept, protocol={**kept.protocol, "data": data}).write(release / "report.json")
    replace(evaluation, distortion_nats=evaluation.distortion_nats + 1).write(release / "per_image.npz")
    report([str(release), "--samples=4", f"--out={out}"])
    text = out.read_text()
    assert "are not those that were evaluated" in text
    assert "is of another evaluation than" in text
    assert "Reconstructions" not in text
    replace(kept, protocol={**kept.protocol, "weights_sha256": "00" * 32}).write(release / "report.json")
    report([str(release), "--samples=4", f"--out={out}"])
    assert "holds other weights than those" in out.read_text()
    with pytest.raises(ValueError, match="holds other weights than those"):
        report([str(release), "--format=markdown"])


def test_a_further_report_of_another_precision_has_its_own_name(release: Path, tmp_path: Path, capsys):
    written, evaluation = made(tmp_path / "double", 0, torch.float64)
    written.write(release / "report-double.json")
    evaluation.write(release / "per_image-double.npz")
    report([str(release), str(release / "report-double.json"), "--format=json"])
    output = capsys.readouterr()
    assert output.err == ""
    content = json.loads(output.out)
    assert [run["name"] for run in content["runs"]] == ["one", "one (report-double)"]
    assert content["differences"][0]["nats"]["mean"] == pytest.approx(0, abs=1e-3)


def test_the_release_within_a_run_is_found(release: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(release, run / "release")
    report([str(run), "--format=json"])
    assert json.loads(capsys.readouterr().out)["runs"][0]["name"] == "run"


def test_mistakes_are_explained(release: Path, tmp_path: Path, capsys):
    with pytest.raises(ValueError, match="nowhere: wanted the folder of a run or of a release"):
        report(["nowhere"])
    with pytest.raises(ValueError, match=rf"holds no report.json. `wngen evaluate {tmp_path} --out"):
        report([str(tmp_path)])
    shutil.copy(release / "report.json", tmp_path / "report-val.json")
    with pytest.raises(ValueError, match=r"there is .*report-val.json: name that"):
        report([str(tmp_path)])
    with pytest.raises(ValueError, match="is there twice"):
        report([str(release), str(release), "--format=json"])
    (tmp_path / "report-bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not a report"):
        report([str(tmp_path / "report-bad.json")])
    for arguments, complaint in (
        (["--samples=0"], "--samples 0: wanted at least 1"),
        ([str(tmp_path), "--format=pdf"], "pdf"),
        (["--format=json", f"--out={release / 'report.json'}"], "that is the report itself"),
    ):
        with pytest.raises(SystemExit) as stop:
            report([str(release), *arguments])
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report([str(release), str(RELEASED / "conv-vae-iaf-mnist"), "--format=markdown"])
    assert "a model card is of one model, these are 2" in capsys.readouterr().err
