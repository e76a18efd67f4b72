from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmicl_core.data.files import atomic_directory, folder_digest, write_atomic

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from mmicl_core.data.files import atomic_directory
with atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    with atomic_directory(target) as folder:
        (folder / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["result"]


def test_a_failed_block_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_new_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "result"
    for name in ("old", "new"):
        with atomic_directory(target) as folder:
            (folder / name).write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    with atomic_directory(target) as folder:
        (folder / "file").write_text("old")
    rename = Path.rename

    def refuse(path: Path, name: Path) -> Path:
        if Path(name) == target and path.name != "result":
            raise OSError("no space left")
        return rename(path, name)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no space"), atomic_directory(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_killed_writer_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with atomic_directory(target) as folder:
        (folder / "file").write_text("old")
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(target)]
    repository = Path(__file__).parents[3]
    done = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": str(repository)})
    assert done.returncode == -signal.SIGKILL
    assert (target / "file").read_text() == "old"
    assert [path.name for path in target.iterdir()] == ["file"]


def test_results_can_be_read_by_other_users(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "folder"):
        pass
    write_atomic(tmp_path / "file", "text")
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new and longer")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_folder_digest_follows_names_and_content_of_what_counts(tmp_path: Path) -> None:
    for name in ("one", "same", "content", "name", "log"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("b.json" if name == "name" else "a.json")).write_text(
            "2" if name == "content" else "1"
        )
    (tmp_path / "log" / "a.txt").write_text("does not count")
    one, same, content, name, log = (
        folder_digest(tmp_path / folder, (".json",)) for folder in ("one", "same", "content", "name", "log")
    )
    assert one == same == log
    assert len({one, content, name}) == 3
