from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict((plain(name), found) for name, _, found in (line.partition("==") for line in lines) if found)


def test_every_dependency_has_an_exact_pin():
    requirements = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    names = {plain(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
    assert names <= set(pins())


def test_pins_are_versions_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==\d[\w.]*", line)]
    assert not wrong


def test_every_module_that_is_imported_at_run_time_is_a_dependency_or_a_pinned_one():
    # Distributions whose import name differs; everything else is called as it is imported.
    called = {"yaml": "pyyaml", "PIL": "pillow", "resvg_py": "resvg-py", "starlette": "fastapi"}
    called |= {"faiss": "faiss-cpu", "sklearn": "scikit-learn"}
    optional = {"resvg-py", "spacy", "wandb", "mlflow", "nltk", "pycocoevalcap"}
    known = {plain(re.match(r"[\w.-]+", text)[0]) for text in PROJECT["dependencies"]} | optional
    imported = set()
    for package in ("mmicl_core", "pipelines", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            for match in re.finditer(r"^\s*(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M):
                imported.add(match[1])
    ours = {"mmicl_core", "pipelines", "cluster"}
    foreign = {plain(called.get(name, name)) for name in imported - ours - set(sys.stdlib_module_names)}
    assert foreign <= known


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("mmicl_core", "pipelines", "cluster"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", target, source], check=True, capture_output=True, timeout=240)
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_holds_every_module_asset_and_recipe(wheel):
    expected = set()
    for package in ("mmicl_core", "pipelines", "cluster"):
        expected |= {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    assets = ROOT / "mmicl_core" / "assets"
    expected |= {str(path.relative_to(ROOT)) for path in assets.rglob("*") if path.is_file()}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "pipelines" / "recipes").glob("*.yaml")}
    missing = {path for path in expected if "__pycache__" not in path} - set(wheel)
    assert not missing


def test_wheel_holds_licence_and_notice_and_no_tests(wheel):
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert any(name.endswith("licenses/NOTICE") for name in wheel)
    assert not [name for name in wheel if name.startswith("tests")]
