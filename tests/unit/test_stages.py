from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.episodes import EpisodeConfig
from pipelines.stages import Stage, read_manifest


class _Build:
    """Something to build, which counts how often it is."""

    def __init__(self, rows: int = 3) -> None:
        self.rows, self.runs = rows, 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.runs += 1
        (folder / "rows.txt").write_text("x" * self.rows, encoding="utf-8")
        return {"rows": self.rows}


def test_finished_stage_is_built_once_and_answers_the_same_afterwards(tmp_path: Path) -> None:
    build = _Build()
    first = Stage(tmp_path, "rows", config=EpisodeConfig()).run(build)
    second = Stage(tmp_path, "rows", config=EpisodeConfig()).run(build)
    assert first == second == {"rows": 3}
    assert build.runs == 1
    assert read_manifest(Stage(tmp_path, "rows", config=EpisodeConfig()).folder) == first


def test_failed_build_leaves_nothing_and_the_next_run_builds(tmp_path: Path) -> None:
    build = _Build()

    def fail(folder: Path) -> dict[str, Any]:
        build(folder)
        raise OSError("no space left")

    stage = Stage(tmp_path, "rows", number=1)
    with pytest.raises(OSError, match="no space"):
        stage.run(fail)
    assert not stage.complete and list(tmp_path.iterdir()) == []
    assert stage.run(build) == {"rows": 3}
    assert build.runs == 2


def test_folder_without_a_manifest_is_not_taken_for_finished(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "rows", number=1)
    stage.folder.mkdir(parents=True)
    (stage.folder / "half").write_text("", encoding="utf-8")
    stage.run(_Build())
    assert sorted(path.name for path in stage.folder.iterdir()) == [
        "_config.json",
        "_manifest.json",
        "rows.txt",
    ]


def test_changed_setting_gives_another_folder_and_keeps_the_old_one(tmp_path: Path) -> None:
    build = _Build()
    settings: list[dict[str, Any]] = [
        {"config": EpisodeConfig()},
        {"config": EpisodeConfig(seed=1)},
        {"config": EpisodeConfig(), "held_out": ["cat"]},
        {"config": EpisodeConfig(), "held_out": ["cup"]},
    ]
    stages = [Stage(tmp_path, "rows", **setting) for setting in settings]
    stages.append(Stage(tmp_path, "columns", **settings[0]))
    for stage in stages:
        stage.run(build)
    assert build.runs == len({stage.folder for stage in stages}) == len(list(tmp_path.iterdir())) == 5


def test_name_of_a_stage_depends_on_its_settings_and_not_on_their_order_or_place(tmp_path: Path) -> None:
    one = Stage(tmp_path, "rows", first=1, second={"a": 1, "b": 2})
    other = Stage(tmp_path / "elsewhere", "rows", second={"b": 2, "a": 1}, first=1)
    assert one.folder.name == other.folder.name


def test_settings_are_saved_beside_the_result(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "rows", config=EpisodeConfig(seed=7))
    stage.run(_Build())
    saved = json.loads((stage.folder / "_config.json").read_text(encoding="utf-8"))
    assert EpisodeConfig.model_validate(saved["config"]) == EpisodeConfig(seed=7)
