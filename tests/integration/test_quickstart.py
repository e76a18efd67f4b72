"""The whole loop as a user starts it, with fewer episodes, steps and questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command

RECIPE = """
episodes:
  stages: [{episodes: 16, min_shots_of_both_classes: 2, max_shots_of_both_classes: 2}]
train: {steps: 4, global_batch: 4, micro_batch: 2}
evaluate: {queries: 8, shots: [0, 4]}
"""
SCORES = ("zero_shot", "full", "adapted", "shipped", "swapped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def _run(folder: Path) -> tuple[str, str]:
    arguments = ("--output", str(folder / "run"), "--recipe", str(folder / "recipe.yaml"))
    with Command("quickstart", *arguments) as command:
        code, out, err = command.end()
        assert code == 0, err
        command.wait_until_nothing_is_left()
    return out, err


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[str, str]:
    return _run(folder)


@pytest.fixture
def report(folder: Path, first: tuple[str, str]) -> dict[str, Any]:
    return json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))


def test_report_holds_what_every_part_measured(report):
    assert report["corpus"]["images"] > report["corpus"]["concepts"] > report["corpus"]["held_out_concepts"]
    assert (report["episodes"]["built"], report["episodes"]["skipped_by_reason"]) == (16, {})
    train = report["train"]
    assert (train["steps"], train["world_size"], train["zero_stage"]) == (4, 2, 3)
    assert train["partition"]["shard_elements"] * 2 == train["partition"]["full_elements"]
    assert report["evaluation"]["queries"] == 8
    assert report["evaluation"]["shots"] == 4
    for name in SCORES:
        score = report["evaluation"][name]
        assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
    tokens = report["tokens"]
    assert tokens["demonstration_full"] >= 5 * tokens["demonstration_adapted"]
    assert report["serve"]["ttft_ms_full"] > 0 and report["serve"]["ttft_ms_pack"] > 0
    assert len(report["seconds"]) == 4


def test_model_without_demonstrations_knows_no_made_up_name(report):
    assert report["evaluation"]["zero_shot"]["accuracy"] == 0


def test_page_needs_nothing_but_itself_and_shows_every_picture_of_the_episode(folder, report):
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 * 2 + 1
    assert not re.findall(r"(?:src|href)=(?!['\"]?data:)", page)
    assert report["serve"]["expected"] in page


def test_table_alone_is_printed_with_a_line_for_every_condition(first):
    out, _ = first
    head, *_, foot = out.strip().splitlines()
    assert head.startswith("8 held-out questions")
    assert foot.startswith("report: ")
    for words in ("no demonstrations", "full demonstrations", "just trained", "shipped", "swapped", "tokens"):
        assert words in out


def test_second_run_reuses_what_is_unchanged_and_says_so(folder, report):
    _, err = _run(folder)
    reused = [line.split(":")[0] for line in err.splitlines() if "unchanged, reused" in line]
    assert "train-aim" in reused
    assert reused.count("evaluate") == 1
    assert "to do" not in err
    again = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    for part in ("corpus", "episodes", "train", "evaluation", "tokens"):
        assert again[part] == report[part]
