"""Matplotlib's figures as pictures within a page: in its colours, light or dark, and for wide and narrow screens."""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from wngen.evaluation.figures import RULE, TRAIN, VAL

WIDE, NARROW = 7.4, 3.8  # inches
THEME = {"#000000": "--ink", "#ffffff": "--paper", TRAIN: "--muted", VAL: "--accent", RULE: "--line"}
LIFTED = 0.68  # the lightness that a colour has at least on a dark page


@dataclass(frozen=True)
class Chart:
    """A figure drawn for wide and for narrow screens.

    Attributes:
        wide: an `<svg>`.
        narrow: another.
    """

    wide: Markup
    narrow: Markup


def chart(name: str, draw: Callable[[float], Figure], alt: str) -> Chart:
    """Draw a figure in both widths.

    Args:
        name: no other chart of the page has it.
        draw: makes it of a width in inches.
        alt: what it shows, for those who do not see it.
    """
    return Chart(_svg(f"{name}-wide", draw(WIDE), alt), _svg(f"{name}-narrow", draw(NARROW), alt))


def _svg(name: str, figure: Figure, alt: str) -> Markup:
    """An `<svg>` whose text is text, whose colours are the page's, and whose ids are its own."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "wngen"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _, _, body = file.getvalue().partition("<svg")
    attributes, _, body = body.partition(">")
    box = re.search(r'viewBox="[^"]*"', attributes)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _themed, body)
    head = Markup('<svg {} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{}">')
    return head.format(Markup(box[0]), alt) + Markup(body.strip())


def _themed(found: re.Match[str]) -> str:
    """A colour as the page's own, or else with a lighter one beside it for dark pages."""
    prop, colour = found.groups()
    if colour in THEME:
        return f"{prop}: var({THEME[colour]})"
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    lifted = colorsys.hls_to_rgb(hue, max(lightness, LIFTED), saturation)
    light = "#" + "".join(f"{round(255 * part):02x}" for part in lifted)
    return f"{prop}: {colour}; {prop}: light-dark({colour}, {light})"
