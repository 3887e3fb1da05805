"""What a user gets from the wheel and from the source distribution: one package called wngen, and all of it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Run where neither the clone nor an installed wngen can stand in for the unpacked wheel.
REPORT = """
import json, sys
from importlib.metadata import version
from importlib.resources import files
import wngen, wngen.models
json.dump({
    "root": wngen.__file__,
    "version": version("wngen"),
    "models": [getattr(wngen.models, name).__module__ for name in wngen.models.__all__],
    "configs": sorted(path.name for path in files("wngen.configs").iterdir() if path.name.endswith(".yaml")),
    "data": [path.name for path in files("wngen").joinpath("data").iterdir() if path.name.endswith(".npz")],
}, sys.stdout)
"""


@dataclass(frozen=True)
class Distributions:
    """What the clone builds into."""

    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("packaging")
    clone = folder / "clone"  # a build leaves files behind, and takes up what an earlier one has left
    clone.mkdir()
    for name in ("wngen", "models", "configs", "tests"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, clone)

    def build(source: Path, out: Path, *formats: str) -> None:
        command = [sys.executable, "-m", "build", "--no-isolation", *formats, "--outdir", str(out), str(source)]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    build(clone, folder / "dist", "--sdist", "--wheel")
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    build(source, folder / "again", "--wheel")
    return Distributions(wheel, sdist, folder / "again" / wheel.name)


def package_files() -> set[str]:
    """Every file of the package as the clone has it, models/ and configs/ seen through their links."""
    return {
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "wngen", followlinks=True)
        for name in names
        if not folder.endswith("__pycache__") and not name.startswith(".")
    }


def test_models_and_configs_are_seen_through_relative_links():
    for name in ("models", "configs"):
        assert (ROOT / "wngen" / name).readlink() == Path("..", name)


def test_the_wheel_holds_the_whole_package_and_no_other(built: Distributions):
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        kinds = {stat.S_IFMT(info.external_attr >> 16) for info in wheel.infolist()}
    assert names == package_files()
    assert {"wngen/py.typed", "wngen/models/__init__.py", "wngen/configs/__init__.py"} <= names
    assert any(name.startswith("wngen/configs/") and name.endswith(".yaml") for name in names)
    assert any(name.startswith("wngen/data/") and name.endswith(".npz") for name in names)
    assert kinds == {stat.S_IFREG}


def test_the_source_distribution_builds_the_same_wheel(built: Distributions):
    with zipfile.ZipFile(built.wheel) as wheel, zipfile.ZipFile(built.wheel_from_sdist) as again:
        assert {i.filename: i.CRC for i in wheel.infolist()} == {i.filename: i.CRC for i in again.infolist()}
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    top = {member.name.split("/")[1] for member in members if "/" in member.name}
    assert {"wngen", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= top
    assert not {"models", "configs", "tests"} & top


def test_the_wheel_works_away_from_the_clone(built: Distributions, tmp_path: Path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(site)
    elsewhere.mkdir()
    command = [sys.executable, "-c", REPORT]
    environment = os.environ | {"PYTHONPATH": str(site)}
    report = json.loads(subprocess.run(command, cwd=elsewhere, env=environment, check=True, capture_output=True).stdout)
    assert Path(report["root"]).is_relative_to(site)
    assert report["models"] != []
    assert all(module.startswith("wngen.models") for module in report["models"])
    assert report["configs"] == sorted(path.name for path in (ROOT / "configs").glob("*.yaml")) != []
    assert report["data"] == [path.name for path in (ROOT / "wngen" / "data").glob("*.npz")] != []
    assert report["version"] == PROJECT["version"]
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text().splitlines()


def test_every_import_is_a_declared_dependency():
    declared = {
        re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-") for requirement in PROJECT["dependencies"]
    }
    imported = set()
    for name in package_files():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                    imported.add(node.module.split(".")[0])
    distributions = packages_distributions()
    undeclared = {
        package
        for package in imported - sys.stdlib_module_names - {"wngen"}
        if not declared & {name.lower().replace("_", "-") for name in distributions[package]}
    }
    assert "torch" in imported
    assert undeclared == set()
