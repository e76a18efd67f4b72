from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from mmicl_core.config.corpus import ClassFoldersConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers import class_folders
from mmicl_core.data.readers.base import Row
from mmicl_core.data.readers.class_folders import ClassFolderReader
from mmicl_core.data.schema import PAIR
from mmicl_core.data.storage import CORPUS, Location, PictureReader, locate
from mmicl_core.errors import DataError

CORPUS_FILES = {
    "LICENSE": b"CC0",
    "README.md": b"read me",
    ".hidden.jpg": b"?",
    "grey_wolf/a.jpg": b"wolf a",
    "grey_wolf/b.JPEG": b"wolf b, longer",
    "grey_wolf/deep/er/a.png": b"",
    "grey_wolf/Thumbs.db": b"thumbs",
    "grey_wolf/.DS_Store": b"?",
    "St. Bernard/a.webp": b"dog a",
    "St. Helens/a.tiff": b"mountain a",
    ".git/a.jpg": b"?",
    "_cache/a.jpg": b"?",
}


def write(folder: Path, files: Mapping[str, bytes] = CORPUS_FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def reader_of(folder: Path, names: str | None = None) -> ClassFolderReader:
    return ClassFolderReader(locate(str(folder)), ClassFoldersConfig(names=names))


def read(folder: Path, names: str | None = None) -> list[Row]:
    reader = reader_of(folder, names)
    rows = [row for unit in reader.units() for row in reader.read(unit)]
    pa.Table.from_pylist([row.pair for row in rows], PAIR)
    return rows


def told(rows: Sequence[Row]) -> list[tuple[str, str | None]]:
    return [(row.pair["picture"], row.skipped) for row in rows]


def test_folder_reader_gives_every_file_of_every_class_by_its_place(tmp_path: Path) -> None:
    rows = read(write(tmp_path))
    assert told(rows) == [
        ("St. Bernard/a.webp", None),
        ("St. Helens/a.tiff", None),
        ("grey_wolf/Thumbs.db", reasons.UNSUPPORTED_FORMAT),
        ("grey_wolf/a.jpg", None),
        ("grey_wolf/b.JPEG", None),
        ("grey_wolf/deep/er/a.png", None),
    ]
    pictures = PictureReader({CORPUS: Location(str(tmp_path))})
    assert [pictures.read(row.pair["image"]) for row in rows] == [
        CORPUS_FILES[row.pair["picture"]] for row in rows
    ]
    assert read(tmp_path) == rows


def test_folder_reader_takes_the_folder_for_the_concept_and_its_words_for_the_name(tmp_path: Path) -> None:
    wolf = read(write(tmp_path))[3]
    known = {name: value for name, value in wolf.pair.items() if value is not None and name != "image"}
    assert known == {"picture": "grey_wolf/a.jpg", "concept": "grey_wolf", "name": "grey wolf"}


@pytest.mark.parametrize("where", ["names.json", "about/names.json", "ABSOLUTE"])
def test_folder_reader_takes_names_from_a_file(where: str, tmp_path: Path) -> None:
    names = {"grey_wolf": "Canis lupus", "St. Bernard": "dog", "St. Helens": "mountain", "other": "?"}
    corpus = write(tmp_path / "corpus")
    path = tmp_path / "elsewhere.json" if where == "ABSOLUTE" else corpus / ".about" / "names.json"
    if where == "names.json":
        path = corpus / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(names), encoding="utf-8")
    given = {"names.json": where, "about/names.json": ".about/names.json", "ABSOLUTE": str(path)}[where]
    rows = read(corpus, given)
    assert {row.pair["concept"]: row.pair["name"] for row in rows if row.skipped is None} == {
        "St. Bernard": "dog",
        "St. Helens": "mountain",
        "grey_wolf": "Canis lupus",
    }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"grey_wolf": "wolf", "St. Bernard": "dog"}', "no name for the class folder 'St. Helens'"),
        (b'{"grey_wolf": ["n02114367", "wolf"]}', "not an object of folder -> name"),
        (b'{"grey_wolf": " "}', "not an object of folder -> name"),
        (b'["wolf"]', "not an object of folder -> name"),
        (b'{"grey_wolf": ', "cannot be read"),
        (b'{"grey_wolf": "\xff"}', "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_folder_reader_refuses_names_that_it_would_have_to_guess(
    content: bytes | None, complaint: str, tmp_path: Path
) -> None:
    write(tmp_path)
    if content is not None:
        (tmp_path / "names.json").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        reader_of(tmp_path, "names.json").units()


def test_folder_reader_counts_pictures_that_lie_beside_the_class_folders(tmp_path: Path) -> None:
    rows = read(write(tmp_path, CORPUS_FILES | {"b.jpg": b"?", "a.png": b"?"}))
    assert told(rows[:3]) == [
        ("a.png", reasons.NO_CONCEPT),
        ("b.jpg", reasons.NO_CONCEPT),
        ("St. Bernard/a.webp", None),
    ]


def test_folder_reader_skips_files_that_are_too_large_for_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_folders, "MOST_PICTURE_BYTES", 5)
    rows = read(write(tmp_path, {"cat/a.jpg": b"12345", "cat/b.jpg": b"123456"}))
    assert told(rows) == [("cat/a.jpg", None), ("cat/b.jpg", reasons.TOO_MANY_BYTES)]


def test_folder_units_change_with_their_files_and_only_then(tmp_path: Path) -> None:
    write(tmp_path)
    before = reader_of(tmp_path).units()
    assert [(unit.path, unit.size) for unit in before] == [
        ("St. Bernard", 5),
        ("St. Helens", 10),
        ("grey_wolf", 26),
    ]
    assert reader_of(tmp_path).units() == before
    (tmp_path / "St. Helens" / "b.jpg").write_bytes(b"?")
    after = reader_of(tmp_path).units()
    assert after[1] != before[1] and (after[0], after[2]) == (before[0], before[2])


def test_folder_reader_reads_only_what_a_glob_names(tmp_path: Path) -> None:
    rows = read(write(tmp_path) / "St.*")
    assert told(rows) == [("St. Bernard/a.webp", None), ("St. Helens/a.tiff", None)]


def test_folder_reader_refuses_a_folder_without_class_folders(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"?", ".git/a.jpg": b"?"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no class folder with files"):
        reader_of(tmp_path).units()
