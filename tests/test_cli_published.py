"""`wngen published`, and what others published below the table of `wngen evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wngen.cli import main
from wngen.cli.subject import Measurement, Subject
from wngen.evaluation import Evaluation, Report, published_figures
from wngen.evaluation.published import published_data

RELEASED = Path(__file__).parents[1] / "checkpoints" / "conv-vae-iaf-mnist"


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_data_sets_are_listed(capsys):
    assert main(["published"]) == 0
    text = capsys.readouterr().out
    for name in published_data():
        (line,) = (line for line in text.splitlines() if name in line)
        assert str(len(published_figures(name))) in line.split()


def test_the_figures_of_a_data_set_are_listed_best_first(capsys):
    assert main(["published", "cifar10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    models = [next(i for i, line in enumerate(lines) if name in line) for name in ("VDM", "PixelSNAIL", "PixelCNN++")]
    assert models == sorted(models)
    assert any("https://arxiv.org/abs/1701.05517" in line for line in lines)


@pytest.mark.parametrize(("name", "hint"), [("mnist-statc", "'mnist-static'"), ("svhn", "mnist-static, mnist-dynamic")])
def test_an_unknown_data_set_is_refused_with_the_right_names(name, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["published", name])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"no data set '{name}'" in message
    assert hint in message


@pytest.mark.parametrize(("images", "shown"), [(10_000, True), (20, False)])
def test_evaluate_shows_them_below_its_own_figures_of_the_whole_test_split(
    images, shown, capsys, tmp_path, monkeypatch
):
    report = Report.read(RELEASED / "report.json")
    report = replace(report, protocol={**report.protocol, "images": images})
    few = np.ones(2)
    evaluation = Evaluation(np.arange(2), few, few[:, None], None, False, None, 0, "float32", "cpu", 1.0)
    monkeypatch.setattr(Subject, "measure", lambda *_: Measurement(report, evaluation))
    out = tmp_path / "report.json"
    assert main(["evaluate", str(RELEASED), "--data=BinarizedMNIST", f"--out={out}", "--device=cpu"]) == 0
    text = capsys.readouterr().out
    assert ("Published figures of the same protocol" in text) == shown
    if shown:
        assert text.index("distortion") < text.index("Published") < text.index("this model") < text.index("Written to")
    assert Report.read(out) == report
