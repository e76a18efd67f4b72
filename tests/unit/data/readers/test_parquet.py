from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.config.corpus import FieldNames, ParquetConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers import parquet
from mmicl_core.data.readers.base import Row, Unit
from mmicl_core.data.readers.parquet import ParquetReader
from mmicl_core.data.schema import PAIR
from mmicl_core.data.storage import IMAGES, Location, PictureReader
from mmicl_core.errors import DataError
from tests.fakes import metadata

ROWS = 40
ROWS_IN_A_GROUP = 15

Told = tuple[str, str | None]


def pictures(count: int = ROWS) -> list[bytes]:
    # Incompressible, so that a page holds few of them.
    return [b"%04d" % number * (500 + number) for number in range(count)]


def write(
    path: Path, columns: Mapping[str, Any], rows_in_a_group: int = ROWS_IN_A_GROUP, **options: Any
) -> Path:
    pq.write_table(pa.table(dict(columns)), path, row_group_size=rows_in_a_group, **options)
    return path


def reader_of(folder: Path, images: Path | None = None, **settings: Any) -> ParquetReader:
    place = None if images is None else Location(str(images))
    return ParquetReader(Location(str(folder)), ParquetConfig(**settings), place)


def read(folder: Path, images: Path | None = None, **settings: Any) -> list[Row]:
    reader = reader_of(folder, images, **settings)
    rows = [row for unit in reader.units() for row in reader.read(unit)]
    pa.Table.from_pylist([row.pair for row in rows], PAIR)
    return rows


def told(rows: Sequence[Row]) -> list[Told]:
    return [(row.pair["picture"], row.skipped) for row in rows]


def captions(count: int = ROWS) -> list[str]:
    return [f"cat number {number}" for number in range(count)]


def test_parquet_reader_gives_every_row_of_every_group_by_its_number_in_the_file(tmp_path: Path) -> None:
    write(tmp_path / "part.1.parquet", {"image": pictures(5), "caption": captions(5)})
    write(tmp_path / "part.0.parquet", {"image": pictures(), "caption": captions()})
    units = reader_of(tmp_path).units()
    assert [(unit.path, unit.part) for unit in units] == [
        ("part.0.parquet", 0),
        ("part.0.parquet", 1),
        ("part.0.parquet", 2),
        ("part.1.parquet", 0),
    ]
    assert {unit.size for unit in units[:3]} == {(tmp_path / "part.0.parquet").stat().st_size}
    rows = read(tmp_path)
    numbers = [("part.0", n) for n in range(ROWS)] + [("part.1", n) for n in range(5)]
    assert told(rows) == [(f"{file}/{n}", None) for file, n in numbers]
    assert [row.encoded for row in rows] == pictures() + pictures(5)
    assert [row.pair["text"] for row in rows] == captions() + captions(5)
    assert read(tmp_path) == rows


def test_parquet_reader_gives_what_is_said_of_a_picture_in_the_columns_of_pairs(tmp_path: Path) -> None:
    known = metadata("red-cat", "ink") | {"text": "cat", "url": "https://example.org", "similarity": 0.25}
    turns = [{"question": "What is it?", "answer": "A cat."}]
    known |= {"turns": turns, "document": "d", "position": 3, "task": "naming"}
    write(tmp_path / "a.parquet", {name: [value] for name, value in (known | {"image": b"?"}).items()})
    (row,) = read(tmp_path)
    assert row.pair == known | {"picture": "a/0", "image": None}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("concept", pa.array(["cat"]).dictionary_encode()),
        ("concept", pa.array(["cat"], pa.large_string())),
        ("concept", pa.array(["cat"], pa.string_view())),
        ("keywords", pa.array([["cat"]], pa.large_list(pa.large_string()))),
        ("similarity", pa.array([1], pa.int8())),
        ("similarity", pa.array([0.5], pa.float64())),
        ("position", pa.array([1], pa.uint64())),
        ("style", pa.nulls(1)),
        ("image", pa.array([b"?"], pa.large_binary())),
        ("image", pa.array([b"?"], pa.binary_view())),
        ("image", pa.array([{"bytes": b"?", "path": None}])),
    ],
)
def test_parquet_reader_takes_every_type_that_holds_the_same_values(
    column: str, values: pa.Array, tmp_path: Path
) -> None:
    write(tmp_path / "a.parquet", {"image": [b"?"], "caption": ["cat"]} | {column: values})
    (row,) = read(tmp_path)
    assert row.skipped is None and row.encoded == b"?"
    if column != "image":
        assert row.pair[column] == values.to_pylist()[0]


@pytest.mark.parametrize(
    ("column", "values", "wanted"),
    [
        ("image", ["base64"], "encoded bytes"),
        ("image", [{"path": "a.jpg"}], "encoded bytes"),
        ("caption", [["one", "two"]], "string, for text"),
        ("concept", [5], "string, for concept"),
        ("keywords", ["cat"], "list<item: string>, for keywords"),
        ("similarity", ["0.5"], "float, for similarity"),
        ("position", [0.5], "int32, for position"),
        ("turns", [[{"question": "?"}]], "for turns"),
    ],
)
def test_parquet_reader_refuses_a_column_whose_type_is_another(
    column: str, values: list[Any], wanted: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.parquet", {"image": [b"?"], "caption": ["cat"]} | {column: values})
    with pytest.raises(DataError, match=f"column '{column}' of a.parquet is .*{wanted}"):
        reader_of(tmp_path).units()


def test_parquet_reader_refuses_keys_and_urls_of_another_type(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": [b"?"], "caption": ["cat"], "url": [b"?"], "id": [0.5]})
    with pytest.raises(DataError, match="'id' of a.parquet is double, and text or whole numbers"):
        reader_of(tmp_path, key="id").units()
    with pytest.raises(DataError, match="'url' of a.parquet is binary, and text"):
        reader_of(tmp_path, image=None, url="url").units()


def test_parquet_reader_names_the_columns_that_there_are_if_one_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"jpg": [b"?"], "caption": ["cat"]})
    with pytest.raises(DataError, match="no column 'image' for the picture, only jpg, caption"):
        reader_of(tmp_path).units()
    with pytest.raises(DataError, match="no column 'uid' for the key, only jpg, caption"):
        reader_of(tmp_path, image="jpg", key="uid").units()


def test_parquet_reader_takes_a_picture_from_a_column_of_any_name(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"source": [b"?"], "caption": ["cat"]})
    (row,) = read(tmp_path, image="source")
    assert (row.skipped, row.encoded, row.pair["source"]) == (None, b"?", None)


def test_parquet_reader_leaves_a_later_spelling_alone(tmp_path: Path) -> None:
    columns = {"image": [b"?"], "alt": ["cat"], "text": [[1, 2]], "license": ["MIT"], "kind": ["red-cat"]}
    write(tmp_path / "a.parquet", columns)
    (row,) = read(tmp_path, fields=FieldNames(caption="alt", label="kind"))
    assert (row.pair["text"], row.pair["licence"]) == ("cat", "MIT")
    assert (row.pair["concept"], row.pair["name"]) == ("red-cat", "red cat")


def test_parquet_reader_says_why_a_row_cannot_be_used(tmp_path: Path) -> None:
    images = [b"?", None, b"?", b"?", b"?", b"", b"too long"]
    texts = pa.array([b"cat", b"cat", None, b"caf\xe9", b" ", b"cat", b"cat"]).cast(pa.string(), safe=False)
    keywords = [None, None, None, None, ["a", None], ["a"], []]
    write(tmp_path / "a.parquet", {"image": images, "caption": texts, "keywords": keywords})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "MOST_PICTURE_BYTES", 7)
        rows = read(tmp_path)
    assert told(rows) == [
        ("a/0", None),
        ("a/1", reasons.NO_PICTURE),
        ("a/2", reasons.NO_TEXT),
        ("a/3", reasons.BROKEN_METADATA),
        ("a/4", reasons.INCOMPLETE_METADATA),
        # An empty picture is seen where pictures are looked at.
        ("a/5", None),
        ("a/6", reasons.TOO_MANY_BYTES),
    ]
    assert rows[5].encoded == b""


def test_parquet_reader_names_rows_by_their_keys_and_never_two_alike(tmp_path: Path) -> None:
    keys = ["x", "y", "x", None, "", "x", "z"]
    write(
        tmp_path / "a.parquet", {"image": [b"?"] * 7, "caption": ["cat"] * 7, "id": keys}, rows_in_a_group=5
    )
    rows = read(tmp_path, key="id")
    assert told(rows) == [
        ("a/0/x", None),
        ("a/0/y", None),
        ("a/2", reasons.REPEATED_KEY),
        ("a/3", reasons.INCOMPLETE_METADATA),
        ("a/4", reasons.INCOMPLETE_METADATA),
        ("a/1/x", None),
        ("a/1/z", None),
    ]


def test_parquet_reader_takes_whole_numbers_and_paths_as_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"?")
    write(tmp_path / "a.parquet", {"file": ["a.jpg"], "caption": ["cat"], "id": [7]})
    assert told(read(tmp_path, tmp_path, image=None, file="file", key="id")) == [("a/0/7", None)]
    assert told(read(tmp_path, tmp_path, image=None, file="file", key="file")) == [("a/0/a.jpg", None)]


FILES = {
    "a.jpg": None,
    "deep/er/b.png": None,
    "missing.jpg": reasons.MISSING_FILE,
    "deep": reasons.MISSING_FILE,
    "x" * 400: reasons.MISSING_FILE,
    "../secret.jpg": reasons.FORGED_PATH,
    "deep/../../secret.jpg": reasons.FORGED_PATH,
    "/etc/hostname": reasons.FORGED_PATH,
    "": reasons.NO_PICTURE,
}


def write_images(folder: Path) -> Path:
    images = folder / "images"
    (images / "deep" / "er").mkdir(parents=True)
    (images / "a.jpg").write_bytes(b"of a")
    (images / "deep" / "er" / "b.png").write_bytes(b"of b, longer")
    (folder / "secret.jpg").write_bytes(b"secret")
    return images


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_reader_finds_pictures_by_their_paths_and_nothing_outside_the_folder(
    as_struct: bool, tmp_path: Path
) -> None:
    images = write_images(tmp_path)
    paths = [*FILES, None]
    cells: list[Any] = [{"bytes": None, "path": path} for path in paths] if as_struct else paths
    cells = pa.array(
        cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}) if as_struct else pa.string()
    )
    write(tmp_path / "a.parquet", {"picture": cells, "caption": ["cat"] * len(paths)})
    settings = {"image": "picture"} if as_struct else {"image": None, "file": "picture"}
    rows = read(tmp_path, images, **settings)
    assert [row.skipped for row in rows] == [*FILES.values(), reasons.NO_PICTURE]
    found = PictureReader({IMAGES: Location(str(images))})
    assert [found.read(row.pair["image"]) for row in rows[:2]] == [b"of a", b"of b, longer"]


def test_parquet_reader_takes_no_path_from_a_struct_where_no_folder_is_named(tmp_path: Path) -> None:
    cells = [{"bytes": None, "path": "a.jpg"}, {"bytes": b"?", "path": "a.jpg"}]
    write(tmp_path / "a.parquet", {"image": cells, "caption": ["cat"] * 2})
    rows = read(tmp_path)
    assert told(rows) == [("a/0", reasons.NO_PICTURE), ("a/1", None)]
    assert "a.jpg" in rows[0].detail and "corpus.images" in rows[0].detail


def test_parquet_reader_gives_the_urls_that_are_to_be_loaded(tmp_path: Path) -> None:
    urls = ["https://example.org/a.jpg ", None, " ", "https://example.org/b.jpg"]
    write(tmp_path / "a.parquet", {"URL": urls, "url": ["https://example.org"] * 4, "caption": ["cat"] * 4})
    rows = read(tmp_path, image=None, url="URL")
    assert [row.skipped for row in rows] == [None, reasons.NO_PICTURE, reasons.NO_PICTURE, None]
    assert [row.url for row in rows] == ["https://example.org/a.jpg", None, None, "https://example.org/b.jpg"]
    assert rows[0].pair["url"] == rows[0].url and rows[0].pair["image"] is None


def test_parquet_reader_reads_no_column_that_it_does_not_need(tmp_path: Path) -> None:
    class Counted(Location):
        def open(self, path: str) -> Any:
            file = super().open(path)
            return pa.PythonFile(CountingFile(file), mode="r")

    class CountingFile:
        def __init__(self, file: Any) -> None:
            self.file, self.closed = file, False
            self.seek, self.tell, self.close, self.size = file.seek, file.tell, file.close, file.size

        def read(self, size: int = -1) -> bytes:
            data: bytes = self.file.read(size)
            lengths.append(len(data))
            return data

    lengths = list[int]()
    noise = [bytes(str(n), "ascii").zfill(10) * 20_000 for n in range(ROWS)]
    columns = {"image": pictures(), "caption": captions(), "other": noise}
    write(tmp_path / "a.parquet", columns, compression="none", use_dictionary=False)
    reader = ParquetReader(Counted(str(tmp_path)), ParquetConfig())
    rows = [row for unit in reader.units() for row in reader.read(unit)]
    assert len(rows) == ROWS and sum(lengths) < 2**20 < sum(map(len, noise))


def test_parquet_reader_holds_pages_and_not_row_groups(tmp_path: Path) -> None:
    large = [bytes(100_000)] * 200
    options: dict[str, Any] = {"write_batch_size": 4, "use_dictionary": False, "compression": "none"}
    write(tmp_path / "a.parquet", {"image": large, "caption": captions(200)}, rows_in_a_group=200, **options)
    del large
    reader, pool = reader_of(tmp_path), pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for row in reader.read(Unit("a.parquet")):
        assert row.skipped is None
        most = max(most, pool.bytes_allocated() - before)
    # A batch of 32 pictures and what was read ahead of them, of 20 megabytes.
    assert most < 10_000_000


def column_start(path: Path, group: int, column: int) -> int:
    found = pq.ParquetFile(path).metadata.row_group(group).column(column)
    return int(found.data_page_offset)


def test_parquet_reader_keeps_the_rows_before_a_broken_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 2)
    path = tmp_path / "a.parquet"
    columns = {"image": pictures(), "caption": captions()}
    options: dict[str, Any] = {"use_dictionary": False, "data_page_size": 4096, "write_batch_size": 2}
    write(path, columns, compression="none", write_page_checksum=True, **options)
    whole = read(tmp_path)
    start = column_start(path, 1, 0)
    data = bytearray(path.read_bytes())
    # Half of the way through the pictures of the second group.
    broken = start + sum(map(len, pictures()[15:22]))
    data[broken] ^= 0xFF
    path.write_bytes(data)
    rows = read(tmp_path)
    lost = [row for row in rows if row.skipped is not None]
    assert told(lost) == [("a.parquet", reasons.BROKEN_FILE)]
    place = rows.index(lost[0])
    assert ROWS_IN_A_GROUP < place <= 22
    assert rows[:place] == whole[:place] and rows[place + 1 :] == whole[2 * ROWS_IN_A_GROUP :]
    assert f"after {place - ROWS_IN_A_GROUP} rows of row group 1" in lost[0].detail


@pytest.mark.parametrize("keep", [0, 3, 1000, -1, -100])
def test_parquet_reader_counts_a_file_that_it_cannot_open_as_one_row(keep: int, tmp_path: Path) -> None:
    broken = write(tmp_path / "b.parquet", {"image": pictures(), "caption": captions()})
    broken.write_bytes(broken.read_bytes()[:keep])
    for name in ("a", "c"):
        write(tmp_path / f"{name}.parquet", {"image": pictures(2), "caption": captions(2)})
    rows = read(tmp_path)
    assert told(rows) == [
        ("a/0", None),
        ("a/1", None),
        ("b.parquet", reasons.BROKEN_FILE),
        ("c/0", None),
        ("c/1", None),
    ]
    assert read(tmp_path) == rows


def test_parquet_reader_says_so_when_a_file_changed_after_it_was_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pictures(), "caption": captions()})
    reader = reader_of(tmp_path)
    units = reader.units()
    write(path, {"image": pictures(5), "caption": captions(5)})
    rows = [row for unit in units for row in reader.read(unit)]
    assert [row.skipped for row in rows] == [None] * 5 + [reasons.BROKEN_FILE] * 2
    path.unlink()
    assert [row.skipped for unit in units for row in reader.read(unit)] == [reasons.BROKEN_FILE] * 3


def test_parquet_reader_gives_no_row_for_a_table_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    assert read(tmp_path) == []


def test_parquet_reader_refuses_a_folder_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        reader_of(tmp_path).units()


def test_parquet_unit_can_be_read_alone_and_in_any_order(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": pictures(), "caption": captions()})
    whole, reader = read(tmp_path), reader_of(tmp_path)
    backwards = [list(reader.read(Unit("a.parquet", part))) for part in (2, 1, 0)]
    assert [row for rows in reversed(backwards) for row in rows] == whole
