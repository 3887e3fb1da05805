"""The README's Python snippets run, and its shell commands exist."""

import re
from pathlib import Path

import pytest

from wngen.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README_PATH = ROOT / "README.md"
README = README_PATH.read_text()
PAGES = [README_PATH, *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippet_runs(snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    scope: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert len(scope) > 2


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_exist(page):
    blocks = " ".join(re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(), flags=re.DOTALL))
    mentioned = set(re.findall(r"\bwngen ([\w-]+)", blocks))
    assert mentioned
    assert mentioned <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert links or page != README_PATH
    for link in links:
        assert (page.parent / link).exists(), link
