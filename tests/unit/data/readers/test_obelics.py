from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.data import reasons
from mmicl_core.data.readers.base import Row
from mmicl_core.data.readers.obelics import ObelicsReader
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError
from tests.readers import read_all, reasons_of

FILE = "train-00000-of-01335"
URL = pa.string()
BYTES = pa.binary()
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

END = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"


def _document(*slots: str | None, **changes: Any) -> dict[str, Any]:
    """A document of texts, and of pictures where a slot begins with `http`; None is an empty place."""
    images = [slot if slot and slot.startswith("http") else None for slot in slots]
    texts = [slot if slot and not slot.startswith("http") else None for slot in slots]
    about = [image and {"src": image, "alt_text": "ä", "original_width": 640} for image in images]
    general = {"url": "https://example.com/news", "warc_filename": "CC-MAIN-2021", "warc_record_offset": 31}
    document = {"texts": texts, "images": images, "metadata": json.dumps(about)}
    return document | {"general_metadata": json.dumps(general)} | changes


def _write(
    folder: Path, documents: Sequence[dict[str, Any]], picture: pa.DataType = URL, **settings: Any
) -> ObelicsReader:
    """A reader of one file in the published layout; `picture` is the type of one."""
    schema = pa.schema(
        [
            ("images", pa.list_(picture)),
            ("metadata", pa.string()),
            ("general_metadata", pa.string()),
            ("texts", pa.list_(pa.string())),
        ]
    )
    table = pa.Table.from_pylist(list(documents), schema=schema)
    pq.write_table(table, folder / f"{FILE}.parquet", **settings)
    return ObelicsReader(Location(str(folder)))


def _told(rows: Sequence[Row]) -> list[tuple[str, Any, Any, Any]]:
    """Key, document, position and text of the pairs."""
    columns = ("picture", "document", "position", "text")
    return [tuple(row.pair[name] for name in columns) for row in rows if row.skipped is None]  # type: ignore[misc]


def _texts(rows: Sequence[Row]) -> dict[int, str]:
    """Text of the pairs by the place of the picture."""
    return {int(picture.rpartition("/")[2]): text for picture, _, _, text in _told(rows)}


def test_obelics_document_as_published_becomes_pairs_of_pictures_and_the_texts_behind(tmp_path: Path) -> None:
    document = _document("Über uns.", "http://a/1.jpg", "Ein Haus 🏠.", "http://a/2.jpg", "A car.")
    rows = read_all(_write(tmp_path, [document]))
    key = f"{FILE}/0"
    assert _told(rows) == [
        (f"{key}/1", key, 0, "Über uns.\n\nEin Haus 🏠."),
        (f"{key}/3", key, 1, "A car."),
    ]
    assert [(row.url, row.pair["url"], row.pair["source"]) for row in rows] == [
        (url, url, "https://example.com/news") for url in ("http://a/1.jpg", "http://a/2.jpg")
    ]


@pytest.mark.parametrize(
    ("slots", "texts"),
    [
        (["http:0", "a"], {0: "a"}),
        (["a", "http:1"], {1: "a"}),
        (["a", "http:1", "b", "c", "http:4", "d"], {1: "a\n\nb\n\nc", 4: "d"}),
        (["http:0", "http:1", "a"], {1: "a"}),
        (["a", "http:1", "http:2"], {2: "a"}),
        (["a", "http:1", "http:2", "b"], {2: "a\n\nb"}),
        (["http:0", "a", "http:2", "http:3"], {0: "a"}),
        (["http:0"], {}),
        (["http:0", None, "a", None], {0: "a"}),
        (["http:0", " ", "http:2", "a"], {2: "a"}),
    ],
)
def test_obelics_text_belongs_to_the_picture_right_before_it(
    slots: list[str | None], texts: dict[int, str], tmp_path: Path
) -> None:
    rows = read_all(_write(tmp_path, [_document(*slots)]))
    assert _texts(rows) == texts
    pictures = [number for number, slot in enumerate(slots) if slot and slot.startswith("http")]
    assert [row.pair["picture"] for row in rows] == [f"{FILE}/0/{number}" for number in pictures]
    assert all(row.skipped in (None, reasons.UNMATCHED_PICTURE) for row in rows)


def test_obelics_mark_of_an_end_begins_another_document(tmp_path: Path) -> None:
    document = _document(
        f"lead\n\n{END}", "http:1", f"a\n\n{END}\n\nb\n\n{END}\n\nc", "http:3", "d", "http:5", f"{END}"
    )
    rows = read_all(_write(tmp_path, [document]))
    assert _told(rows) == [
        (f"{FILE}/0/1", f"{FILE}/0", 0, "a"),
        (f"{FILE}/0/3", f"{FILE}/0+1", 0, "c\n\nd"),
    ]
    assert reasons_of(rows)[2] == (f"{FILE}/0/5", reasons.UNMATCHED_PICTURE)


def test_obelics_pairs_of_a_document_hold_all_of_its_text_in_order(tmp_path: Path) -> None:
    rng = random.Random(0)
    documents = []
    for _ in range(100):
        kinds = [rng.choice(("http", "text", None)) for _ in range(rng.randint(1, 9))]
        documents.append(_document(*(kind and f"{kind}{place}" for place, kind in enumerate(kinds))))
    rows = read_all(_write(tmp_path, documents, row_group_size=7))
    for number, document in enumerate(documents):
        mine = [row for row in rows if f"{row.pair['picture']}/".startswith(f"{FILE}/{number}/")]
        pictures = sum(image is not None for image in document["images"])
        assert len(mine) == max(pictures, 1)
        pairs = sorted((row.pair for row in mine if row.skipped is None), key=lambda pair: pair["position"])
        assert [pair["position"] for pair in pairs] == list(range(len(pairs)))
        texts = [text for text in document["texts"] if text is not None]
        assert bool(pairs) == bool(pictures and texts)
        if pairs:
            assert [text for pair in pairs for text in pair["text"].split("\n\n")] == texts
    assert len(rows) == sum(max(1, sum(image is not None for image in d["images"])) for d in documents)


@pytest.mark.parametrize("rows_per_group", [1, 2, 5, 100])
def test_obelics_rows_are_the_same_for_any_size_of_row_groups(rows_per_group: int, tmp_path: Path) -> None:
    documents = [_document(f"http:{number}", f"text {number}") for number in range(11)]
    whole = read_all(_write(tmp_path, documents))
    reader = _write(tmp_path, documents, row_group_size=rows_per_group)
    assert len(reader.units()) == -(-11 // rows_per_group)
    assert read_all(reader) == whole


@pytest.mark.parametrize("kind", [BYTES, STRUCT, pa.large_binary()])
def test_obelics_pictures_in_the_file_are_given_with_the_url_that_they_came_from(
    kind: pa.DataType, tmp_path: Path
) -> None:
    def cell(data: bytes | None) -> Any:
        return {"bytes": data, "path": "a.jpg"} if kind == STRUCT else data

    document = _document("http://a/0.jpg", "a", "http://a/2.jpg", "b")
    document["images"] = [cell(b"one"), None, cell(b""), None]
    rows = read_all(_write(tmp_path, [document], kind))
    assert [(row.encoded, row.url, row.pair["url"]) for row in rows] == [
        (b"one", None, "http://a/0.jpg"),
        (b"", None, "http://a/2.jpg"),
    ]
    assert _texts(rows) == {0: "a", 2: "b"}


def test_obelics_picture_without_bytes_or_url_is_told(tmp_path: Path) -> None:
    document = _document("http:0", "a", images=[{"bytes": None, "path": "a.jpg"}, None])
    rows = read_all(_write(tmp_path, [document], STRUCT))
    assert reasons_of(rows) == [(f"{FILE}/0/0", reasons.NO_PICTURE)]
    rows = read_all(_write(tmp_path, [_document("", "a", images=["", None], texts=[None, "a"])]))
    assert reasons_of(rows) == [(f"{FILE}/0/0", reasons.NO_PICTURE)]


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "no places": (_document(), reasons.NO_PICTURE),
    "only texts": (_document("a", "b"), reasons.NO_PICTURE),
    "only empty places": (_document(None, None), reasons.NO_PICTURE),
    "fewer texts": (_document("http:0", "a", texts=[None]), reasons.INCOMPLETE_METADATA),
    "fewer pictures": (_document("http:0", "a", images=["http:0"]), reasons.INCOMPLETE_METADATA),
    "a place with both": (_document("http:0", texts=["a"]), reasons.INCOMPLETE_METADATA),
    "null for the texts": (_document("http:0", texts=None), reasons.INCOMPLETE_METADATA),
    "null for the pictures": (_document("a", images=None), reasons.INCOMPLETE_METADATA),
    "broken metadata": (_document("http:0", "a", general_metadata='{"url"'), reasons.BROKEN_METADATA),
    "nested metadata": (_document("http:0", "a", general_metadata="[" * 200_000), reasons.BROKEN_METADATA),
    "a list of metadata": (_document("http:0", "a", general_metadata="[]"), reasons.INCOMPLETE_METADATA),
}


@pytest.mark.parametrize("what", UNFIT)
def test_obelics_document_of_another_form_is_one_row_and_its_neighbours_stay(
    what: str, tmp_path: Path
) -> None:
    document, reason = UNFIT[what]
    good = _document("http:0", "a")
    rows = read_all(_write(tmp_path, [good, document, good]))
    assert reasons_of(rows) == [(f"{FILE}/0/0", None), (f"{FILE}/1", reason), (f"{FILE}/2/0", None)]


def test_obelics_metadata_that_speaks_of_other_places_is_told(tmp_path: Path) -> None:
    document = _document("http:0", "a", images=[b"one", None], metadata='[{"src": "http:7"}]')
    assert reasons_of(read_all(_write(tmp_path, [document], BYTES))) == [
        (f"{FILE}/0", reasons.INCOMPLETE_METADATA)
    ]


@pytest.mark.parametrize("general", [None, "{}", '{"url": 5}', '{"url": "\\ud83d"}'])
def test_obelics_document_without_a_usable_address_has_no_source(general: str | None, tmp_path: Path) -> None:
    (row,) = read_all(_write(tmp_path, [_document("http:0", "a", general_metadata=general)]))
    assert (row.skipped, row.pair["source"]) == (None, None)


def test_obelics_text_that_is_not_utf8_costs_its_document_alone(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(1, *pa.array([b"\xff\xfe"]).buffers()[1:])
    texts = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 6]),
        pa.concat_arrays(
            [pa.array([None, "a", None], pa.string()), broken, pa.array([None, "b"], pa.string())]
        ),
    )
    images = pa.array([["http:0", None]] * 3, pa.list_(pa.string()))
    pq.write_table(pa.table({"texts": texts, "images": images}), tmp_path / f"{FILE}.parquet")
    rows = read_all(ObelicsReader(Location(str(tmp_path))))
    assert reasons_of(rows) == [
        (f"{FILE}/0/0", None),
        (f"{FILE}/1", reasons.BROKEN_METADATA),
        (f"{FILE}/2/0", None),
    ]


def test_obelics_columns_may_have_the_large_types_and_extra_neighbours(tmp_path: Path) -> None:
    large = pa.large_list(pa.large_string())
    table = pa.table(
        {
            "texts": pa.array([[None, "a"]], large),
            "images": pa.array([["http:0", None]], large),
            "score": [0.5],
        }
    )
    pq.write_table(table, tmp_path / f"{FILE}.parquet")
    assert _texts(read_all(ObelicsReader(Location(str(tmp_path))))) == {0: "a"}


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"texts": [["a"]], "image": [["http:0"]]}, "texts, image and no 'images'"),
        ({"images": [["http:0"]]}, "no 'texts'"),
        ({"texts": ["a"], "images": [["http:0"]]}, "'texts' is string"),
        ({"texts": [["a"]], "images": [[5]]}, "'images' is list<.*int64>"),
        ({"texts": [["a"]], "images": [[{"path": "a.jpg"}]]}, "'images' is list<.*struct"),
    ],
)
def test_obelics_file_of_another_corpus_is_refused_by_the_names_of_its_columns(
    columns: dict[str, Any], named: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=named):
        ObelicsReader(Location(str(tmp_path))).units()


def test_obelics_folder_without_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.parquet"):
        ObelicsReader(Location(str(tmp_path))).units()


def test_obelics_file_cut_anywhere_is_one_row_and_its_neighbour_stays(tmp_path: Path) -> None:
    reader = _write(tmp_path, [_document("http:0", "a")] * 20, row_group_size=6)
    path = tmp_path / f"{FILE}.parquet"
    whole = path.read_bytes()
    path.with_name("z.parquet").write_bytes(whole)
    for cut in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:cut])
        rows = reasons_of(read_all(reader))
        assert rows[0] == (f"{FILE}.parquet", reasons.BROKEN_FILE), cut
        assert [reason for _, reason in rows[1:]] == [None] * 20, cut


def test_obelics_flipped_bytes_cost_row_groups_and_never_stop_the_corpus(tmp_path: Path) -> None:
    documents = [_document(f"http:{number}", f"text {number}") for number in range(24)]
    reader = _write(tmp_path, documents, row_group_size=6, write_page_checksum=True)
    path = tmp_path / f"{FILE}.parquet"
    whole, everything, rng = path.read_bytes(), read_all(reader), random.Random(0)
    end_of_pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    lost = 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(4, end_of_pages)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        rows = read_all(reader)
        kept = [row for row in rows if row.skipped is None]
        assert all(row in everything for row in kept)
        lost += len(kept) < 24
        assert len(kept) == 24 or reasons.BROKEN_FILE in {row.skipped for row in rows}
    assert lost > 10


def test_obelics_file_that_is_cut_after_it_was_listed_is_told(tmp_path: Path) -> None:
    reader = _write(tmp_path, [_document("http:0", "a")] * 4, row_group_size=2)
    units = reader.units()
    _write(tmp_path, [_document("http:0", "a")] * 2, row_group_size=2)
    rows = [row for unit in units for row in reader.read(unit)]
    assert [row.skipped for row in rows] == [None, None, reasons.BROKEN_FILE]
    (tmp_path / f"{FILE}.parquet").unlink()
    assert [row.skipped for unit in units for row in reader.read(unit)] == [reasons.BROKEN_FILE] * 2
