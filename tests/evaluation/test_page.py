"""The page says what the report says, needs nothing but itself, and fits a phone as well as a desk."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wngen.evaluation import Evaluation, Report, published_figures
from wngen.evaluation.page import Entry, differences, drawn, extreme_indices, extremes, page, summary
from wngen.image import Batch
from wngen.models import ConvVAE, PixelCNN

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = 'a<b>&"bold"</b>\'s `data`'
IMAGES = 60
DATA: dict[str, Any] = {
    "name": "BinarizedMNIST",
    "split": "test",
    "images": IMAGES,
    "split_images": IMAGES,  # as if these were all, so that published figures stand beside them
    "channels": 1,
    "height": 28,
    "width": 28,
    "levels": 2,
    "binarization": "static",
    "seed": None,
    "sha256": "ab" * 32,
}


class Parsed(HTMLParser):
    """A page taken apart: its elements, its text, and the numbers that it states for machines."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.data: list[tuple[str, str]] = []
        self.headings: list[tuple[int, str]] = []
        self._within = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self._within = tag
        if tag == "data":
            self.data.append((attributes["value"], ""))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "style":
            return
        self.words.append(data)
        if self._within == "data":
            self.data[-1] = self.data[-1][0], data
        if re.fullmatch("h[1-6]", self._within):
            self.headings[-1] = self.headings[-1][0], data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def evaluated(layers: int, seed: int = 0, shift: float = 0.0) -> Evaluation:
    rng = np.random.default_rng(seed)
    return Evaluation(
        index=np.arange(IMAGES) * 3,
        distortion_nats=rng.normal(60, 10, IMAGES) + shift,
        layer_kl_nats=rng.gamma(20, 0.5, (IMAGES, layers)),
        log_likelihood_nats=None,
        is_exact=False,
        importance_samples=None,
        seed=11,
        dtype="float32",
        device="cpu",
        wall_seconds=12.5,
    )


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [
        "train/epochs,step,train/elbo_nats,train/rate_nats,train/distortion_nats,train/learning_rate,val/elbo_nats"
    ]
    lines += [f"{(s + 1) / 50},{s},{-90 - 100 / (s + 1)},20,{70 + 100 / (s + 1)},0.002," for s in range(0, 200, 10)]
    lines += [f",{s},,,,,{-91 - 100 / s}" for s in range(49, 200, 50)]
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def latent(metrics: Path) -> Entry:
    """With everything that a page can show: a hierarchy of two layers, by its report."""
    torch.manual_seed(0)
    model = ConvVAE(1, 28, 28, 2, latent_dim=3, widths=(4,), blocks=1, patch=4, hidden=8, iaf_width=8).eval()
    images = torch.randint(2, (16, 1, 28, 28), dtype=torch.uint8)
    pictures = tuple(drawn(model, 8, Batch(images, None, torch.arange(16))))
    model.latent_shapes = ((2, 4, 3), (3,))
    evaluation = evaluated(2)
    report = Report.of(evaluation, model, DATA, "ema", "bf16-mixed")
    best, worst = (
        tuple(extremes(evaluation, Batch(images[: len(places)], None, torch.tensor(places)), 2))
        for places in extreme_indices(evaluation)
    )
    return Entry("my-run", report, 12_345, evaluation, (metrics,), (7, 2), pictures, best, worst)


@pytest.fixture(scope="module")
def exact(metrics: Path) -> Entry:
    """A model that draws pixel by pixel, on the same images, with a name that is a trap."""
    torch.manual_seed(0)
    model = PixelCNN(1, 28, 28, 2, filters=3, blocks=1).eval()
    evaluation = evaluated(0, seed=1)
    evaluation = replace(evaluation, is_exact=True, log_likelihood_nats=-evaluation.distortion_nats)
    report = Report.of(evaluation, model, {**DATA, "name": NASTY, "split_images": 9999}, "raw")
    pictures = tuple(drawn(model, 2, None))
    return Entry(NASTY, report, None, evaluation, (metrics,), pictures=pictures, missing={"data": "No `data` here"})


@pytest.fixture(scope="module")
def single(latent: Entry) -> str:
    return page([latent])


@pytest.fixture(scope="module")
def several(latent: Entry, exact: Entry) -> str:
    third = replace(latent, name="third", evaluation=None, missing={"evaluation": "Run `wngen evaluate third`"})
    return page([latent, exact, third])


def test_every_number_is_that_of_the_report(latent: Entry, single: str):
    stated = Parsed(single).data
    known = {latent.parameters, *(extreme.nats for extreme in latent.best + latent.worst)}
    figures = {
        number
        for unit in (latent.report.nats, latent.report.bits_per_dim)
        for estimate in unit.values()
        for number in vars(estimate).values()
    }
    published = {figure.nats for figure in published_figures("mnist-static")}
    assert {float(value) for value, _ in stated} == known | figures | published
    for value, shown in stated:
        plain = shown.replace("\N{MINUS SIGN}", "-").replace(",", "")
        digits = len(plain.partition(".")[2])
        assert float(plain) == pytest.approx(float(value), abs=0.50001 * 10**-digits), value


def test_the_protocol_stands_there_in_full(latent: Entry, single: str):
    def leaves(content: Any) -> list[Any]:
        parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else None
        return [content] if parts is None else [leaf for part in parts for leaf in leaves(part)]

    text = Parsed(single).text
    section = text[text.index("Protocol") :]
    for leaf in [*leaves(latent.report.protocol), *leaves(latent.report.model)]:
        assert leaf is None or str(leaf) in section or f"{leaf:,}" in section, leaf


@pytest.mark.parametrize("name", ["single", "several"])
def test_nothing_but_the_file_is_needed(name: str, request: pytest.FixtureRequest):
    text = request.getfixturevalue(name)
    parsed = Parsed(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not any(attribute.startswith("on") for attribute in attributes)
        for link in (attributes.get("href"), attributes.get("xlink:href")):
            assert link is None or link.startswith("#") or (tag == "a" and link.startswith("https://"))
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


@pytest.mark.parametrize("name", ["single", "several"])
def test_it_is_well_formed(name: str, request: pytest.FixtureRequest):
    text = request.getfixturevalue(name)
    parsed = Parsed(text)
    assert text.startswith("<!DOCTYPE html>")
    assert parsed.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    levels = [level for level, _ in parsed.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = Counter(attributes["id"] for _, attributes in parsed.elements if "id" in attributes)
    assert max(ids.values()) == 1
    for tag, attributes in parsed.elements:
        if tag in ("img", "svg"):
            assert attributes.get("alt") or attributes.get("aria-label")
        for reference in (
            attributes.get("aria-labelledby"),
            (attributes.get("href") or "").removeprefix("#") if tag == "a" else None,
        ):
            assert not reference or reference.startswith("https:") or reference in ids
        for used in re.findall(r"url\(#([^)]+)\)", attributes.get("style", "") + attributes.get("clip-path", "")):
            assert used in ids


def test_names_are_text_and_never_markup(several: str):
    parsed = Parsed(several)
    assert NASTY in [heading for _, heading in parsed.headings]
    assert f"PixelCNN; {NASTY} test" in parsed.text
    assert any(NASTY in attributes.get("aria-label", "") for attributes in parsed.all("svg"))
    assert "<b>&" not in several
    assert html.escape(NASTY, quote=False).replace('"', "&#34;").replace("'", "&#39;") in several


def test_what_is_missing_is_said(several: str, exact: Entry):
    text = Parsed(several).text
    assert "No data here" in text  # the backticks have become <code>
    assert "third: Run wngen evaluate third" in text
    assert "<code>wngen evaluate third</code>" in several
    bare = Parsed(page([Entry("bare", exact.report, missing={"model": "Not there.", "evaluation": "Not kept."})])).text
    assert "Not there." in bare
    assert "Not kept." in bare
    assert "Learning curves" not in bare


def test_differences_are_taken_image_by_image(latent: Entry):
    """A model that is better by the same at every image is better by exactly that, however the images vary."""
    shifted = evaluated(2, shift=-1.5)
    part = {**latent.report.protocol, "data": {**DATA, "split_images": 9999}}  # beside which no published figures stand
    latent = replace(latent, report=replace(latent.report, protocol=part), metrics=())
    other = replace(latent, name="other", evaluation=shifted)
    (difference,) = differences([latent, other])
    assert (difference.model, difference.baseline) == ("other", "my-run")
    assert vars(difference.nats) == pytest.approx({"mean": 1.5, "standard_error": 0, "low": 1.5, "high": 1.5}, abs=1e-9)
    stated = [float(value) for value, shown in Parsed(page([latent, other])).data if shown.startswith("+")]
    assert stated[:3] == [difference.nats.mean, difference.nats.low, difference.nats.high]
    protocol = {**other.report.protocol, "data": {**DATA, "sha256": "cd" * 32}}
    elsewhere = replace(other, report=replace(other.report, protocol=protocol))
    assert differences([latent, elsewhere]) == []
    assert differences([latent, replace(other, evaluation=replace(shifted, index=shifted.index + 1))]) == []


def test_the_summary_holds_all_figures(latent: Entry, exact: Entry):
    content = json.loads(json.dumps(summary([latent, exact]), allow_nan=False))
    assert content["schema"] == 1
    first, second = content["runs"]
    assert first["report"]["nats"]["rate"] == vars(latent.report.nats["rate"])
    assert len(first["published"]) == len(published_figures("mnist-static"))
    assert (second["name"], second["parameters"], second["published"]) == (NASTY, None, [])
    assert content["differences"][0]["nats"]["mean"] == pytest.approx(
        np.mean(exact.evaluation.best_nats - latent.evaluation.best_nats)
    )


def test_the_likeliest_images_and_the_least_likely(latent: Entry, single: str):
    values = latent.evaluation.best_nats
    order = np.argsort(-values)
    assert [extreme.index for extreme in latent.best] == (order[:8] * 3).tolist()
    assert [extreme.index for extreme in latent.worst] == (order[::-1][:8] * 3).tolist()
    assert [extreme.nats for extreme in latent.worst] == values[order[::-1][:8]].tolist()
    tiles = [attributes for attributes in Parsed(single).all("img") if attributes["alt"].endswith("of the test split")]
    assert [attributes["alt"].split()[1] for attributes in tiles] == [str(e.index) for e in latent.best + latent.worst]


def test_a_picture_is_the_image_itself():
    image = torch.randint(5, (1, 3, 4, 6), dtype=torch.uint8)
    evaluation = replace(evaluated(0), index=np.arange(IMAGES))
    (extreme,) = extremes(evaluation, Batch(image, None, torch.tensor([7])), levels=5)
    assert extreme.nats == evaluation.best_nats[7]
    png = base64.b64decode(extreme.picture.uri.partition(",")[2])
    seen = np.asarray(Image.open(io.BytesIO(png)))
    assert seen.shape == (extreme.picture.height, extreme.picture.width, 3) == (4, 6, 3)
    assert np.array_equal(seen, (image[0] * 255.0 / 4).round().byte().permute(1, 2, 0).numpy())


def test_charts_take_the_colours_of_the_page(single: str):
    charts = re.findall(r"<svg.*?</svg>", single, re.DOTALL)
    assert len(charts) == 8  # four, each for wide and for narrow screens
    for chart in charts:
        colours = re.findall(r"(?:fill|stroke): ([^;\"]+)", chart)
        assert "var(--ink)" in colours
        assert not {"#000000", "#ffffff"} & set(colours)
        for plain in (colour for colour in colours if colour.startswith("#")):
            assert f"light-dark({plain}, #" in chart  # with another for dark pages


def test_two_of_one_name_are_refused(latent: Entry):
    with pytest.raises(ValueError, match="each with a name of its own"):
        page([latent, latent])
    with pytest.raises(ValueError, match="wanted at least one"):
        page([])


MEASURE = """
<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, width = frame.contentWindow.innerWidth;
    const beyond = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1);
    return {
      width, scroll: page.documentElement.scrollWidth, beyond: beyond.map(e => e.outerHTML.slice(0, 120)),
      images: [...page.images].map(image => image.complete && image.naturalWidth),
      charts: [...page.querySelectorAll("svg")].map(e => e.getBoundingClientRect().width).filter(w => w > 0),
    };
  });
  document.body.textContent = JSON.stringify(seen);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome")
def test_it_fits_every_screen_in_a_browser(single: str, several: str, tmp_path: Path):
    """On a phone, on a tablet and on a desk: nothing reaches beyond the edge, and every picture is there."""
    assert BROWSER is not None
    widths = (360, 700, 800, 1280)
    frames = [
        f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(text)}"></iframe>'
        for text in (single, several)
        for width in widths
    ]
    path = tmp_path / "frames.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{MEASURE}<body>{''.join(frames)}", encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=10000 --window-size=1400,900 --dump-dom"
    )
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    measured = json.loads(html.unescape(re.search(r"<body>(.*?)</body>", shown, re.DOTALL)[1]))  # type: ignore[index]
    assert [frame["width"] for frame in measured] == [*widths, *widths]
    for frame in measured:
        assert frame["beyond"] == []
        assert frame["scroll"] <= frame["width"]
        assert frame["images"]
        assert all(frame["images"])
    assert [len(frame["charts"]) for frame in measured] == [4] * 4 + [10] * 4  # one of each two is shown
