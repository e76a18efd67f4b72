"""A stage of parts whose end is broken off at every single step on the file system."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.data.files import file_digest
from mmicl_core.errors import DataError
from pipelines.parts import Counts, add_counts, finish_parts, make_parts, reuse_finished, run_parts
from pipelines.stages import Stage, read_manifest

pytestmark = pytest.mark.usefixtures("ray_cluster")

PARTS = [{"name": f"{number:05d}", "number": number, "size": 1} for number in range(3)]
STEPS_OF_AN_END = ("mkdir", "rename", "replace", "rmdir", "unlink")


class _Killed(BaseException):
    pass


def _build(part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
    (folder / f"squares-{part['name']}.txt").write_text(str(part["number"] ** 2), encoding="utf-8")
    (folder / f"passing-{part['name']}.txt").write_text("on the way", encoding="utf-8")
    rows = {f"squares-{part['name']}.txt": 1, f"passing-{part['name']}.txt": 1}
    return rows, {"read": 1, "skipped": {"odd": part["number"] % 2}}


def _finish(stage: Stage) -> dict[str, Any]:
    return finish_parts(stage, PARTS, drop="passing-*")


def _make(root: Path) -> dict[str, Any]:
    stage = Stage(root, "squares")
    if reuse_finished(stage):
        return read_manifest(stage.folder)
    make_parts(stage, PARTS, _build, title="Squaring", total=3)
    return _finish(stage)


def _digests(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): file_digest(path) for path in root.rglob("*") if path.is_file()}


def _die_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Every step after so many raises, as a dead process takes none, not even to tidy up."""
    left = steps

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            if left == 0:
                raise _Killed
            left -= 1
            return step(*arguments, **keywords)

        return run

    for name in STEPS_OF_AN_END:
        patch.setattr(os, name, counted(getattr(os, name)))


def test_stage_whose_end_is_broken_off_anywhere_reuse_finished_by_the_next_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    make_parts(Stage(made, "squares"), PARTS, _build, title="Squaring", total=3)
    whole = tmp_path / "whole"
    shutil.copytree(made, whole)
    _make(whole)
    for steps in range(100):
        root = tmp_path / f"killed-{steps}"
        shutil.copytree(made, root)
        try:
            with monkeypatch.context() as patch:
                _die_after(patch, steps)
                _finish(Stage(root, "squares"))
            break
        except _Killed:
            _make(root)
        assert _digests(root) == _digests(whole), steps
    assert steps > len(PARTS) * 2


def test_stage_is_made_once_and_names_what_its_parts_counted(tmp_path: Path) -> None:
    manifest = _make(tmp_path)
    assert manifest["files"].keys() == {f"squares-0000{number}.txt" for number in range(3)}
    assert (manifest["read"], manifest["skipped"]) == (3, {"odd": 1})
    before = _digests(tmp_path)
    assert _make(tmp_path) == manifest
    assert _digests(tmp_path) == before


def test_only_parts_without_a_note_are_made_again(tmp_path: Path) -> None:
    folder = make_parts(Stage(tmp_path, "squares"), PARTS, _build, title="Squaring", total=3)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("squares-*")}
    (folder / ".notes" / "00001.json").unlink()
    make_parts(Stage(tmp_path, "squares"), PARTS, _build, title="Squaring", total=3)
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("squares-*")}
    assert {name for name in times if times[name] != again[name]} == {"squares-00001.txt"}


def test_check_that_refuses_the_counts_leaves_the_parts_for_a_run_that_allows_them(tmp_path: Path) -> None:
    def refuse(counts: Counts) -> None:
        if counts["skipped"]["odd"]:
            raise DataError("too many odd ones")

    stage = Stage(tmp_path, "squares")
    with pytest.raises(Exception, match="too many odd ones"):
        run_parts(stage, PARTS, _build, title="Squaring", total=3, check=refuse)
    assert not stage.complete
    run_parts(stage, PARTS, _build, title="Squaring", total=3)
    with pytest.raises(DataError, match="too many odd ones"):
        run_parts(stage, PARTS, _build, title="Squaring", total=3, check=refuse)


def test_counts_are_added_by_name_however_deep() -> None:
    one, other = {"read": 1, "skipped": {"small": 2}}, {"read": 3, "skipped": {"broken": 1, "small": 1}}
    assert add_counts(one, other) == {"read": 4, "skipped": {"small": 3, "broken": 1}}
