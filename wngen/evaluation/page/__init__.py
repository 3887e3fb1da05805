"""The report of runs as a page that lies in one file: readable on a phone, on a desk and in print, light or dark."""

from wngen.evaluation.page.content import page
from wngen.evaluation.page.entry import Entry, differences, summary
from wngen.evaluation.page.pictures import Extreme, Picture, drawn, extreme_indices, extremes

__all__ = [
    "Entry",
    "Extreme",
    "Picture",
    "differences",
    "drawn",
    "extreme_indices",
    "extremes",
    "page",
    "summary",
]
