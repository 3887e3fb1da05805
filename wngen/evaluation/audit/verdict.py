"""The verdict on a model: what was claimed, measured and found, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wngen.evaluation.audit.claim import Finding

STYLES = {"passed": "green", "FAILED": "bold red", "skipped": "yellow"}


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        model: class name and constructor arguments.
        protocol: images, seed, dtype, device, hash of the weights, versions, seconds.
        findings: of every claim that the model makes.
    """

    model: dict[str, Any]
    protocol: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The claims that do not hold."""
        return tuple(finding for finding in self.findings if finding.status == "FAILED")

    @property
    def passed(self) -> bool:
        """Whether none failed, and not all were skipped."""
        return not self.failed and any(finding.status == "passed" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        counts = {status: sum(finding.status == status for finding in self.findings) for status in STYLES}
        skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
        if self.failed:
            names = ", ".join(finding.name for finding in self.failed)
            return f"{counts['FAILED']} of {len(self.findings)} claims FAILED: {names}{skipped}"
        return f"{counts['passed']} of {len(self.findings)} claims hold{skipped}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        findings = [finding.as_dict() for finding in self.findings]
        return {"passed": self.passed, "model": self.model, "protocol": self.protocol, "findings": findings}

    def write(self, path: Path | str) -> None:
        """Write it as JSON, making the folder if there is none."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def __rich__(self) -> RenderableType:
        """A row for each claim, in a terminal of 80 columns, and the verdict below."""
        p = self.protocol
        title = f"Audit of {self.model['model']}, {p['images']} images, seed {p['seed']}, {p['wall_seconds']:.0f} s"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        table.add_column("claim", ratio=1)
        table.add_column("measured", justify="right")
        table.add_column("limit", justify="right", no_wrap=True)
        for finding in self.findings:
            claim = Text(finding.claim)
            if finding.detail:
                claim.append(f"\n{finding.detail}", "dim")
            if finding.status == "FAILED":
                claim.append(f"\n{finding.meaning}", "red")
            sign = "≥" if finding.at_least else "≤"
            figure = "-" if finding.measured is None else f"{_short(finding.measured)}\n{finding.unit}"
            mark = Text(finding.status, STYLES[finding.status])
            table.add_row(mark, claim, Text(figure), Text(f"{sign} {_short(finding.limit)}"))
        return Group(table, Text(self.verdict, STYLES["FAILED" if not self.passed else "passed"]))


def _short(figure: float) -> str:
    """Whole numbers as such, others with three digits."""
    return f"{figure:,.0f}" if abs(figure) < 1e9 and figure == round(figure) else f"{figure:.3g}"
