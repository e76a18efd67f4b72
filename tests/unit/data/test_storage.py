from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mmicl_core.data import storage
from mmicl_core.data.readers.base import image_at
from mmicl_core.data.storage import (
    CORPUS,
    IMAGES,
    FoundFile,
    Location,
    PictureReader,
    locate,
)
from mmicl_core.errors import ConfigError, DataError

FILES = ("a.tar", "b.tar.gz", "deep/er/c.TAR", "deep/d.tar", "notes.txt")
HIDDEN = (".e.tar", ".git/f.tar", "_SUCCESS.tar", "deep/.cache/g.tar", "deep/_h/i.tar")


def write(folder: Path, files: Sequence[str] = (*FILES, *HIDDEN)) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def paths(found: Sequence[FoundFile]) -> list[str]:
    return [file.path for file in found]


def as_uri(path: Path) -> str:
    return "file://" + quote(str(path))


@pytest.fixture(params=["plainly", "by URI"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    folder = write(tmp_path / "a folder, 100%")
    return locate(str(folder) if request.param == "plainly" else as_uri(folder))


def test_location_finds_files_in_name_order_and_none_that_is_hidden(corpus: Location) -> None:
    assert paths(corpus.find(".tar", ".tar.gz")) == ["a.tar", "b.tar.gz", "deep/d.tar", "deep/er/c.TAR"]
    assert paths(corpus.find("")) == sorted(FILES)
    assert corpus.find(".parquet") == []


def test_location_finds_files_of_one_folder_by_their_paths_from_the_first(corpus: Location) -> None:
    assert paths(corpus.find(".tar", folder="deep")) == ["deep/d.tar", "deep/er/c.TAR"]
    assert paths(corpus.find(".tar", folder="deep", recursive=False)) == ["deep/d.tar"]
    assert paths(corpus.find(".tar", recursive=False)) == ["a.tar"]
    with pytest.raises(DataError, match="/missing is not a folder"):
        corpus.find("", folder="missing")
    with pytest.raises(DataError, match="leads out"):
        corpus.find("", folder="../a")


def test_location_tells_the_size_and_the_time_of_a_file(corpus: Location, tmp_path: Path) -> None:
    path = tmp_path / "a folder, 100%" / "deep" / "d.tar"
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    (found,) = [file for file in corpus.find(".tar") if file.path == "deep/d.tar"]
    assert found == FoundFile("deep/d.tar", len("deep/d.tar"), 1_700_000_000_123_456_789)


def test_location_opens_what_it_found(corpus: Location) -> None:
    for file in corpus.find(""):
        assert corpus.exists(file.path)
        with corpus.open(file.path) as opened, corpus.stream(file.path) as streamed:
            assert opened.read() == streamed.read() == file.path.encode()
    assert not corpus.exists("deep") and not corpus.exists("missing.tar")
    with pytest.raises(OSError, match=r"missing\.tar"):
        corpus.open("missing.tar")


def test_location_lists_the_folders_right_below(corpus: Location) -> None:
    assert corpus.folders() == ["deep"]


def test_location_travels_to_workers(corpus: Location) -> None:
    corpus.find("")
    assert pickle.loads(pickle.dumps(corpus)).find("") == corpus.find("")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a.tar", ["a.tar"]),
        ("deep/d.tar", ["deep/d.tar"]),
        ("*.tar", ["a.tar", "deep/d.tar"]),
        ("deep/*", ["deep/d.tar", "deep/er/c.TAR"]),
        ("[ab].tar*", ["a.tar", "b.tar.gz"]),
        ("?.tar", ["a.tar"]),
        ("*/d.tar", ["deep/d.tar"]),
        ("d*p/d.tar", ["deep/d.tar"]),
        ("*.parquet", []),
    ],
)
def test_locate_takes_a_file_or_a_glob_for_what_is_meant(
    pattern: str, found: list[str], tmp_path: Path
) -> None:
    write(tmp_path)
    location = locate(f"{tmp_path}/{pattern}")
    # The folder is the last one without a wildcard, or the file's own.
    base = Path(location.uri).relative_to(tmp_path)
    assert [str(base / path) for path in paths(location.find(".tar", ".tar.gz"))] == found


def test_locate_takes_a_uri_of_a_file_or_a_glob(tmp_path: Path) -> None:
    write(tmp_path)
    assert paths(locate(as_uri(tmp_path) + "/a.tar").find(".tar")) == ["a.tar"]
    assert paths(locate(as_uri(tmp_path) + "/*.tar").find(".tar")) == ["a.tar", "deep/d.tar"]


def test_locate_takes_a_path_from_where_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path / "deep")
    location = locate("er")
    monkeypatch.chdir(tmp_path)
    assert paths(location.find("")) == ["c.TAR"]


def test_locate_takes_a_folder_for_itself_although_its_name_could_be_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "corpus [v2]")
    assert paths(locate(str(tmp_path / "corpus [v2]")).find(".tar.gz")) == ["b.tar.gz"]
    assert paths(locate(str(tmp_path / "corpus [v2]" / "a.tar")).find("")) == ["a.tar"]
    # The last folder without a wildcard would be the one above.
    assert paths(locate(str(tmp_path / "corpus [v2]" / "*.gz")).find("")) == ["b.tar.gz"]


def test_locate_takes_a_file_for_itself_although_its_name_could_be_a_glob(tmp_path: Path) -> None:
    write(tmp_path, ["shard [1].tar", "shard 1.tar"])
    assert paths(locate(str(tmp_path / "shard [1].tar")).find(".tar")) == ["shard [1].tar"]
    assert paths(locate(str(tmp_path / "shard [12].tar")).find(".tar")) == ["shard 1.tar"]


def test_locate_refuses_what_is_not_there_and_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing does not exist: name a folder"):
        locate(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="ftps://example.org/corpus cannot be opened"):
        locate("ftps://example.org/corpus")
    with pytest.raises(DataError, match="is not a folder"):
        locate(str(tmp_path / "missing" / "*.tar")).find(".tar")


def test_location_says_which_name_no_text_can_hold(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(b"?")
    with pytest.raises(DataError, match=r"caf\\xe9.jpg', is not UTF-8: rename it"):
        Location(str(tmp_path)).find("")


@pytest.mark.parametrize(
    "path", ["../secret", "deep/../../secret", "/etc/hostname", "..", "deep\\..\\..\\secret", "a\0b"]
)
def test_location_lets_no_path_lead_out_of_its_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    location = Location(str(write(tmp_path / "corpus")))
    for use in (location.full, location.open, location.stream, location.exists):
        with pytest.raises(DataError, match="leads out of"):
            use(path)
    with pytest.raises(DataError, match="leads out of"):
        PictureReader({CORPUS: location}).read(image_at(CORPUS + path, size=6))


def test_location_takes_dots_in_names_for_what_they_are(tmp_path: Path) -> None:
    write(tmp_path, ["..a/b...c"])
    assert Location(str(tmp_path)).exists("..a/b...c")


def test_picture_reader_reads_exactly_the_bytes_of_a_reference(tmp_path: Path) -> None:
    data = os.urandom(1000)
    (tmp_path / "shard").write_bytes(data)
    pictures = PictureReader({CORPUS: Location(str(tmp_path))})
    for offset, size in ((0, 1000), (0, 1), (17, 600), (999, 1), (500, 0), (1000, 0)):
        assert (
            pictures.read(image_at("corpus:shard", offset=offset, size=size)) == data[offset : offset + size]
        )
    pictures.close()


def test_picture_reader_looks_in_the_folder_that_a_reference_begins_with(tmp_path: Path) -> None:
    for name in ("corpus", "images"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(name.encode())
    places = {CORPUS: Location(str(tmp_path / "corpus")), IMAGES: Location(str(tmp_path / "images"))}
    pictures = PictureReader(places)
    assert pictures.read(image_at("corpus:a.jpg", size=6)) == b"corpus"
    assert pictures.read(image_at("images:a.jpg", size=6)) == b"images"
    for path in ("copy:a.jpg", "a.jpg"):
        with pytest.raises(DataError, match="begins with none of corpus:, images:"):
            pictures.read(image_at(path, size=6))


def test_picture_reader_says_what_became_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(100))
    pictures = PictureReader({CORPUS: Location(str(tmp_path))})
    with pytest.raises(DataError, match=r"holds 20 of the 50 bytes of 'a\.jpg' from byte 80"):
        pictures.read(image_at("corpus:shard", member="a.jpg", offset=80, size=50))
    with pytest.raises(DataError, match="shard holds 0 of the 50 bytes"):
        pictures.read(image_at("corpus:shard", offset=1000, size=50))
    with pytest.raises(DataError, match="corpus:gone cannot be read"):
        pictures.read(image_at("corpus:gone", size=1))


def test_picture_reader_keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(Location):
        def open(self, path: str) -> Any:
            opened.append(super().open(path))
            return opened[-1]

    monkeypatch.setattr(storage, "MOST_OPEN_FILES", 3)
    opened = list[Any]()
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(b"%d" % number)
    pictures = PictureReader({CORPUS: Counted(str(tmp_path))})
    for number in (*range(10), 7, 5, 7, 9):
        assert pictures.read(image_at(f"corpus:{number}", size=1)) == b"%d" % number
        assert sum(not file.closed for file in opened) <= 3
    # For 5, the one that was used longest ago is closed: 8, because 7 was used again.
    assert len(opened) == 11
    pictures.close()
    assert all(file.closed for file in opened)
