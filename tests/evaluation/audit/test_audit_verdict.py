"""The verdict of an audit as a table, as JSON and as a command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from wngen.checkpoint import save_release
from wngen.cli.auditing import audit as command
from wngen.evaluation.audit import CLAIMS, Audit, Claim, Finding, Specimen, audit
from wngen.evaluation.audit.claim import Measured, Skipped, standard_errors
from wngen.image import Batch
from wngen.models import ConvVAE, PixelCNNPP
from wngen.nn import data_dependent_init
from wngen.noise import Noise


def specimen() -> Specimen:
    model = ConvVAE(height=4, width=4, widths=(4,), blocks=0, hidden=4, latent_dim=2, iaf_width=4)
    return Specimen(model, model, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None, torch.arange(2))


def found(seen: Any, at_least: bool = False) -> Finding | None:
    def measure(_: Specimen) -> Any:
        if isinstance(seen, Exception):
            raise seen
        return seen

    return Claim("edges", "Edges are open", "nats", 0.5, at_least, "It is broken.", measure).check(specimen())


def test_a_figure_passes_on_the_right_side_of_its_limit_and_one_that_is_no_number_on_neither():
    for at_least in (False, True):
        for figure, passes in ((0.4, not at_least), (0.5, True), (0.6, at_least), (torch.nan, False)):
            assert found(Measured(figure), at_least).status == ("passed" if passes else "FAILED")
    assert found(None) is None
    assert found(Skipped("too many")).status == "skipped"
    for error in (ValueError("no\nmore"), RuntimeError("no"), IndexError("no"), AssertionError("no")):
        assert found(error).status == "FAILED"
        assert found(error).detail == f"{type(error).__name__}: no"


def test_standard_errors_are_those_of_the_mean():
    sample = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.double)
    assert standard_errors(sample) == pytest.approx(4 / (20 / 3) ** 0.5 * 2)
    assert standard_errors(-sample) == -standard_errors(sample)
    assert standard_errors(0 * sample) == 0
    assert standard_errors(0 * sample - 1) == -torch.inf
    assert standard_errors(sample + torch.nan) != standard_errors(sample + torch.nan)


def verdict(*findings: Finding | None) -> Audit:
    protocol = {"images": 4, "seed": 0, "wall_seconds": 1.5}
    return Audit({"model": "ConvVAE"}, protocol, tuple(finding for finding in findings if finding is not None))


def text(audit: Audit, width: int = 80) -> str:
    file = io.StringIO()
    Console(width=width, file=file).print(audit)
    return file.getvalue()


def test_the_table_fits_and_says_what_failed_and_what_it_means():
    good, bad, left = found(Measured(1e-12, "of 7")), found(Measured(torch.inf)), found(Skipped("too many"))
    table = text(verdict(good, bad, left))
    assert max(map(len, table.splitlines())) <= 80
    for part in ("1e-12", "of 7", "inf", "It is broken.", "too many", "skipped", "≤ 0.5"):
        assert part in table
    assert table.count("It is broken.") == 1
    assert table.rstrip().endswith("1 of 3 claims FAILED: edges, 1 skipped")
    assert text(verdict(good, left)).rstrip().endswith("1 of 2 claims hold, 1 skipped")
    assert not verdict(left).passed


def test_the_verdict_is_kept_as_json_without_figures_that_json_has_no_number_for(tmp_path):
    verdict(found(Measured(torch.nan)), found(Measured(0.25))).write(tmp_path / "new" / "audit.json")
    kept = json.loads((tmp_path / "new" / "audit.json").read_text(), parse_constant=pytest.fail)
    assert not kept["passed"]
    assert [finding["measured"] for finding in kept["findings"]] == ["nan", 0.25]
    assert kept["findings"][1]["status"] == "passed"


def test_every_claim_has_a_name_of_its_own_and_a_meaning():
    assert len({claim.name for claim in CLAIMS}) == len({claim.claim for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.meaning.endswith(".") and claim.name.isidentifier() for claim in CLAIMS)


def test_images_that_the_model_does_not_take_are_refused():
    model, x = specimen().model, torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 image: an audit needs at least 2"):
        audit(model, Batch(x[:1], None, torch.arange(1)))
    with pytest.raises(ValueError, match="highest level is 7"):
        audit(model, Batch(x + 7, None, torch.arange(2)))
    conditional = PixelCNNPP(1, 4, 4, 2, filters=2, blocks=1, num_classes=3)
    with pytest.raises(ValueError, match="conditioned on 3 classes"):
        audit(conditional, Batch(x, None, torch.arange(2)))


# The command


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = ConvVAE(widths=(4,), blocks=0, patch=4, hidden=8, latent_dim=3, iaf_width=8)
    x = torch.randint(2, (32, 1, 28, 28), dtype=torch.uint8)
    data_dependent_init(model, x, None, Noise(0, torch.arange(32)))
    folder = tmp_path_factory.mktemp("releases") / "tiny"
    save_release(model, folder)
    return folder


def test_the_command_prints_the_table_and_keeps_the_findings(release, tmp_path, capsys):
    out = tmp_path / "audit.json"
    command([str(release), "--data", "BinarizedMNIST", "--images", "3", "--seed", "5", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "claims hold" in printed
    kept = json.loads(out.read_text())
    assert kept["passed"]
    assert kept["protocol"]["images"] == len(set(kept["protocol"]["index"])) == 3
    assert kept["protocol"]["seed"] == 5
    assert {"exact_samples", "log_determinant", "brightness"} <= {finding["name"] for finding in kept["findings"]}


def test_the_command_fails_after_the_table_where_a_claim_does(release, tmp_path, capsys):
    broken = tmp_path / "broken"
    model = ConvVAE.from_pretrained(release)
    next(layer for name, layer in model.named_buffers() if name.endswith("initialized")).fill_(False)
    save_release(model, broken)
    with pytest.raises(ValueError, match=r"claims FAILED: initialized$"):
        command([str(broken), "--data", "BinarizedMNIST", "--images", "2"])
    assert "FAILED" in capsys.readouterr().out


def test_mistakes_are_explained(release, capsys):
    for words, said in (
        (["--images", "1"], "--images 1: wanted at least 2"),
        (["--image", "3"], "did you mean '--images'?"),
    ):
        with pytest.raises(SystemExit):
            command([str(release), "--data", "BinarizedMNIST", *words])
        assert said in capsys.readouterr().err
