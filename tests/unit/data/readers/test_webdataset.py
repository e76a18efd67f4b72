from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmicl_core.config.corpus import FieldNames, WebdatasetConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers import webdataset
from mmicl_core.data.readers.webdataset import WebdatasetReader
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError
from tests.fakes import draw_picture, encode_picture, metadata, write_tar
from tests.unit.data.readers.shards import (
    PICTURE,
    Elsewhere,
    Member,
    picture_bytes,
    read,
    read_tar,
    sample,
    told,
    zipped,
)

BAD_SAMPLES: dict[str, tuple[list[Member], str, str]] = {
    "no picture": ([("bad.json", b"{}"), ("bad.txt", b"cat")], reasons.NO_PICTURE, "json, txt"),
    "a picture of another kind": ([("bad.tiff", PICTURE), ("bad.txt", b"cat")], reasons.NO_PICTURE, "tiff"),
    "a member without a suffix": ([("bad", b"read me")], reasons.NO_PICTURE, "jpg"),
    "a picture alone": ([("bad.jpg", PICTURE)], reasons.NO_TEXT, "caption"),
    "a blank caption": ([("bad.jpg", PICTURE), ("bad.txt", b" \n")], reasons.NO_TEXT, "caption"),
    "nulls": (
        [
            ("bad.jpg", PICTURE),
            ("bad.json", b'{"caption": null, "concept": "", "url": "https://example.org"}'),
        ],
        reasons.NO_TEXT,
        "concept",
    ),
    "a caption that is not a number": (
        [("bad.jpg", PICTURE), ("bad.json", b'{"caption": NaN}')],
        reasons.NO_TEXT,
        "caption",
    ),
    "half of a JSON": (
        sample("bad")[:1] + [("bad.json", b'{"concept": "c')],
        reasons.BROKEN_METADATA,
        "bad.json",
    ),
    "an empty JSON": (sample("bad")[:1] + [("bad.json", b"")], reasons.BROKEN_METADATA, "bad.json"),
    "a JSON that is not UTF-8": (
        sample("bad")[:1] + [("bad.json", b'{"name": "\xff"}')],
        reasons.BROKEN_METADATA,
        "bad.json",
    ),
    "a JSON without an end": (
        sample("bad")[:1] + [("bad.json", b"[" * 100_000)],
        reasons.BROKEN_METADATA,
        "bad.json",
    ),
    "a caption that is not UTF-8": (
        [("bad.jpg", PICTURE), ("bad.txt", b"caf\xe9")],
        reasons.BROKEN_METADATA,
        "bad.txt",
    ),
    "a list": (sample("bad")[:1] + [("bad.json", b"[]")], reasons.INCOMPLETE_METADATA, "list"),
    "a number for a concept": (sample("bad", concept=5), reasons.INCOMPLETE_METADATA, "'concept'"),
    "text for keywords": (sample("bad", keywords="cat"), reasons.INCOMPLETE_METADATA, "'keywords'"),
    "numbers for keywords": (sample("bad", keywords=["a", 1]), reasons.INCOMPLETE_METADATA, "'keywords'"),
    "a list for a licence": (
        sample("bad", license=["MIT"], licence=None),
        reasons.INCOMPLETE_METADATA,
        "'license'",
    ),
    "text for a similarity": (sample("bad", similarity="0.3"), reasons.INCOMPLETE_METADATA, "'similarity'"),
    "no bound for a similarity": (
        sample("bad", similarity=10**400),
        reasons.INCOMPLETE_METADATA,
        "'similarity'",
    ),
    "truth for a position": (sample("bad", position=True), reasons.INCOMPLETE_METADATA, "'position'"),
    "a place beyond all": (sample("bad", position=2**31), reasons.INCOMPLETE_METADATA, "'position'"),
    "a turn without an answer": (
        sample("bad", turns=[{"question": "what"}]),
        reasons.INCOMPLETE_METADATA,
        "question and answer",
    ),
    "half of a character": (sample("bad", name="cat \ud83d"), reasons.INCOMPLETE_METADATA, "'name'"),
}


@pytest.mark.parametrize("what", BAD_SAMPLES)
@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_tar_reader_names_what_is_wrong_with_a_sample_and_keeps_its_neighbours(
    what: str, name: str, tmp_path: Path
) -> None:
    bad, reason, detail = BAD_SAMPLES[what]
    write_tar(tmp_path / name, [*sample("a"), *bad, *sample("z")])
    rows = read(tmp_path)
    assert told(rows) == [("shard/a", None), ("shard/bad", reason), ("shard/z", None)]
    assert detail in rows[1].detail


def test_tar_reader_gives_what_is_said_of_a_picture_in_the_columns_of_pairs(tmp_path: Path) -> None:
    about = {"url": "https://example.org/a.jpg", "similarity": 0.25, "width": 72, "sha256": None}
    (row,) = read_tar(tmp_path, sample("a", **about))
    expected = metadata("red-cat", "ink") | {"text": "cat number 0", "url": about["url"], "similarity": 0.25}
    assert {name: value for name, value in row.pair.items() if value is not None} == expected | {
        "picture": "shard/a",
        "image": row.pair["image"],
    }


@pytest.mark.parametrize(
    ("about", "caption", "column", "value"),
    [
        ({"caption": "of the JSON"}, b" of the file\n", "text", "of the file"),
        ({"caption": "of the JSON"}, b"\xef\xbb\xbfwith a mark", "text", "with a mark"),
        ({"caption": " of the JSON "}, b"", "text", "of the JSON"),
        ({"caption": "of the JSON"}, None, "text", "of the JSON"),
        ({"concept": "red-panda_cub"}, None, "name", "red panda cub"),
        ({"concept": "red-panda", "name": "Panda"}, None, "name", "Panda"),
        ({"license": "MIT"}, b"cat", "licence", "MIT"),
        ({"license": "MIT", "licence": "CC0-1.0"}, b"cat", "licence", "CC0-1.0"),
        ({"task_name": "counting"}, b"cat", "task", "counting"),
        ({"task": "counting"}, b"cat", "task", "counting"),
    ],
)
def test_tar_reader_follows_the_spellings_of_a_corpus(
    about: dict[str, str], caption: bytes | None, column: str, value: str, tmp_path: Path
) -> None:
    captions = [] if caption is None else [("a.txt", caption)]
    (row,) = read_tar(tmp_path, [("a.jpg", PICTURE), ("a.json", json.dumps(about).encode()), *captions])
    assert row.skipped is None and row.pair[column] == value


def test_tar_reader_takes_caption_and_label_from_the_fields_that_are_named(tmp_path: Path) -> None:
    about = json.dumps({"alt": "a red cat", "species": "cat", "concept": 5, "caption": 6}).encode()
    members = [("a.jpg", PICTURE), ("a.json", about)]
    (row,) = read_tar(tmp_path, members, fields=FieldNames(caption="alt", label="species"))
    assert (row.pair["text"], row.pair["concept"], row.pair["name"]) == ("a red cat", "cat", "cat")


def test_tar_reader_needs_no_json_where_there_is_a_caption(tmp_path: Path) -> None:
    (row,) = read_tar(tmp_path, [("a.webp", PICTURE), ("a.txt", b"cat")])
    assert (row.skipped, row.pair["text"], row.pair["concept"]) == (None, "cat", None)


def test_tar_reader_takes_one_picture_of_a_sample_and_leaves_other_members_alone(tmp_path: Path) -> None:
    members = [
        ("a.seg.png", b"mask"),
        ("a.png", b"two"),
        ("a.JPG", b"one"),
        ("a.npy", b"0"),
        ("a.txt", b"cat"),
    ]
    (row,) = read_tar(tmp_path, members)
    assert row.pair["image"]["member"] == "a.JPG" and picture_bytes(tmp_path, row) == b"one"


def test_tar_reader_gives_an_empty_picture_as_it_is(tmp_path: Path) -> None:
    (row,) = read_tar(tmp_path, [("a.jpg", b""), ("a.txt", b"cat")])
    assert row.skipped is None and row.pair["image"]["size"] == 0


SHARDS = ("shard.tar", "shard.tar.gz", "shard.tgz", "shard.tar.zst", "deep/er/shard.tar")


def write_shard(path: Path, members: Sequence[Member]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = write_tar(path.parent / "plain", members).read_bytes()
    (path.parent / "plain").unlink()
    if path.suffix in (".gz", ".tgz"):
        plain = zipped(plain)
    if path.suffix == ".zst":
        plain = pa.Codec("zstd").compress(plain, asbytes=True)
    path.write_bytes(plain)


@pytest.mark.parametrize("where", [Location, Elsewhere])
@pytest.mark.parametrize("name", SHARDS)
def test_tar_reader_gives_the_bytes_of_every_picture_whatever_holds_them(
    name: str, where: type[Location], tmp_path: Path
) -> None:
    samples = [sample(f"s{number}", number) for number in range(20)]
    write_shard(tmp_path / name, [member for members in samples for member in members])
    rows = read(tmp_path, where=where)
    key = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[0]
    assert told(rows) == [(f"{key}/s{number}", None) for number in range(20)]
    for row, members in zip(rows, samples, strict=True):
        assert picture_bytes(tmp_path, row) == members[0][1]
        assert (row.encoded is None) == name.endswith(".tar")
    assert read(tmp_path, where=where) == rows


def test_tar_reader_reads_a_plain_shard_without_its_pictures(tmp_path: Path) -> None:
    class Counted(Location):
        def open(self, path: str) -> Any:
            opened.append(super().open(path))
            return CountingFile(opened[-1])

    class CountingFile:
        def __init__(self, file: Any) -> None:
            self.size, self.seek, self.close = file.size, file.seek, file.close
            self.file = file

        def read(self, size: int) -> bytes:
            data: bytes = self.file.read(size)
            lengths.append(len(data))
            return data

    opened, lengths = list[Any](), list[int]()
    pictures = [(f"s{n}.jpg", bytes(2**20)) for n in range(4)]
    members = [m for picture in pictures for m in (picture, (picture[0].replace("jpg", "txt"), b"cat"))]
    write_tar(tmp_path / "shard.tar", members)
    assert told(read(tmp_path, where=Counted)) == [(f"shard/s{n}", None) for n in range(4)]
    assert 0 < sum(lengths) < 2**16


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_reader_reads_names_that_are_too_long_for_a_header(kind: int, tmp_path: Path) -> None:
    key = "folder.d/" + "long" * 80 + "\u00fc"
    with tarfile.open(tmp_path / "shard.tar", "w", format=kind) as archive:
        for name, data in sample(key, 3):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (row,) = read(tmp_path)
    assert told([row]) == [(f"shard/{key}", None)]
    assert picture_bytes(tmp_path, row) == sample(key, 3)[0][1]


def test_tar_reader_stores_names_that_are_not_utf_8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, data in sample("caf\xe9"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert told(read(tmp_path)) == [("shard/caf\\xe9", None)]


def test_tar_reader_ignores_what_is_no_file_and_what_is_hidden(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"other{ord(kind)}.jpg")
            member.type, member.linkname = kind, "a.jpg"
            archive.addfile(member)
        # What a Mac adds beside each file.
        for name, data in [*sample("a"), ("./._a.jpg", b"rsrc"), (".DS_Store", b"?"), ("v1/._a.jpg", b"?")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert told(read(tmp_path)) == [("shard/a", None)]


def test_tar_reader_keeps_samples_of_one_name_in_two_folders_apart(tmp_path: Path) -> None:
    # `tar -C folder -c .` writes every member as `./name`, and folders may have dots in their names.
    members = [(f"./{folder}/{name}", data) for folder in ("v1.0", "v1.1") for name, data in sample("a")]
    assert told(read_tar(tmp_path, members)) == [("shard/v1.0/a", None), ("shard/v1.1/a", None)]


def test_tar_reader_tells_repeated_samples_from_scattered_members(tmp_path: Path) -> None:
    a, b, c = sample("a"), sample("b"), sample("c")
    rows = read_tar(tmp_path, [*a, *a, *b, *a, *c[:1], *b[:1], *c[1:], *c])
    assert told(rows) == [
        ("shard/a", None),
        ("shard/a", reasons.REPEATED_KEY),
        ("shard/b", None),
        ("shard/a", reasons.REPEATED_KEY),
        ("shard/c", reasons.NO_TEXT),
        ("shard/b", reasons.REPEATED_KEY),
        ("shard/c", reasons.SCATTERED_KEY),
        ("shard/c", reasons.REPEATED_KEY),
    ]
    assert "json, txt" in rows[6].detail


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_tar_reader_skips_members_that_are_too_large_to_be_what_they_seem(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "MOST_TEXT_BYTES", 1000)
    monkeypatch.setattr(webdataset, "MOST_PICTURE_BYTES", 5000)
    members = [
        ("a.jpg", bytes(5001)),
        ("a.txt", b"cat"),
        ("b.jpg", PICTURE),
        ("b.txt", b"c" * 1001),
        *sample("c"),
    ]
    write_tar(tmp_path / name, members)
    assert [row.skipped for row in read(tmp_path)] == [reasons.TOO_MANY_BYTES, reasons.BROKEN_METADATA, None]


def test_tar_reader_gives_no_row_for_an_archive_of_nothing(tmp_path: Path) -> None:
    assert read_tar(tmp_path, []) == []


def test_tar_reader_lists_shards_in_name_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.tar", "a.0.tar.gz", "a.1.TAR", "c.tgz", "notes.txt", "split.json", ".d.tar"):
        (tmp_path / name).write_bytes(b"12345")
    units = WebdatasetReader(Location(str(tmp_path)), WebdatasetConfig()).units()
    assert [(unit.path, unit.key, unit.size) for unit in units] == [
        ("a.0.tar.gz", "a.0", 5),
        ("a.1.TAR", "a.1", 5),
        ("b.tar", "b", 5),
        ("c.tgz", "c", 5),
    ]


def test_tar_reader_refuses_shards_whose_pictures_would_share_keys(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar and a\.tar\.gz"):
        WebdatasetReader(Location(str(tmp_path)), WebdatasetConfig()).units()


def test_tar_reader_refuses_a_folder_without_a_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar"):
        WebdatasetReader(Location(str(tmp_path)), WebdatasetConfig()).units()


def test_tar_reader_reads_real_pictures_as_they_were_written(tmp_path: Path) -> None:
    pictures = [encode_picture(draw_picture(number), "JPEG") for number in range(3)]
    members = [m for n, data in enumerate(pictures) for m in ((f"s{n}.jpg", data), (f"s{n}.txt", b"cat"))]
    assert [picture_bytes(tmp_path, row) for row in read_tar(tmp_path, members)] == pictures
