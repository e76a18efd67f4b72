from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import support_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST_README = 180


def section(title: str) -> str:
    return re.split(r"^## ", README.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def mapped_files() -> list[str]:
    """Lines of the map: a folder at the margin, its files indented below, a phrase behind each."""
    files, folder = [], ""
    for line in section("Files").split("```")[1].strip().splitlines():
        name, phrase = line.split(maxsplit=1)
        assert phrase, line
        if line.startswith(" "):
            files.append(folder + name)
        else:
            folder = name
    return files


def says_something(module: Path) -> bool:
    body = ast.parse(module.read_text(encoding="utf-8")).body
    return module.name != "__init__.py" or any(not isinstance(node, ast.Expr) for node in body)


def test_map_names_every_module_and_recipe_and_nothing_else():
    found = [path for name in ("mmicl_core", "pipelines", "cluster") for path in (ROOT / name).rglob("*.py")]
    found = [path for path in found if says_something(path)]
    found += (ROOT / "pipelines" / "recipes").glob("*.yaml")
    assert sorted(mapped_files()) == sorted(str(path.relative_to(ROOT)) for path in found)


def test_map_names_folders_that_exist():
    lines = section("Files").split("```")[1].strip().splitlines()
    folders = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert [name for name in folders if not (ROOT / name).is_dir()] == []


def test_reading_order_names_files_that_exist():
    named = re.findall(r"^\d+\. `([^`]+)`", section("Read the code in this order"), re.MULTILINE)
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w./]+/[\w./]*)`", README))))
def test_path_that_is_named_exists(name):
    assert name.startswith("runs/") or (ROOT / name).exists()


@pytest.mark.parametrize("word", sorted(set(re.findall(r"make (\w+)", README))))
def test_word_that_is_named_is_in_the_makefile(word):
    assert f"\n{word}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_both_first_commands_are_named():
    assert "make quickstart\n" in README
    assert "make test\n" in README


def test_readme_without_its_map_is_short():
    assert README.count("\n") - section("Files").count("\n") < LONGEST_README


def test_support_table_is_what_the_parity_tests_run():
    told = README.split("<!-- support: begin -->\n", 1)[1].split("\n<!-- support: end -->", 1)[0]
    assert told == support_table()
