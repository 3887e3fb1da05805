"""The README's Python snippets run, and its shell commands exist."""

import re
from pathlib import Path

import pytest

from wngen.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippet_runs(snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    scope: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert len(scope) > 2


def test_commands_exist():
    mentioned = set(
        re.findall(r"\bwngen (\w+)", " ".join(re.findall(r"```(?:bash)?\n(.*?)```", README, flags=re.DOTALL)))
    )
    assert mentioned <= set(COMMANDS)
    assert "fit" in mentioned
