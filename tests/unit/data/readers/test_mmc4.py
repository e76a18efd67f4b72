from __future__ import annotations

import gzip
import json
import random
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.corpus import Mmc4Config
from mmicl_core.data import reasons
from mmicl_core.data.readers.base import Row
from mmicl_core.data.readers.mmc4 import Mmc4Reader
from mmicl_core.data.storage import IMAGES, Location, PictureReader
from mmicl_core.errors import DataError
from tests.fakes import write_tar
from tests.readers import read_all, reasons_of

SHARD = "docs_no_face_shard_7_v2"

# The form of the released documents, with fields that nobody reads.
PUBLISHED = {
    "image_info": [
        {
            "face_detections": None,
            "image_name": "b9040a0dbb22.jpg",
            "matched_sim": 0.27694183588027954,
            "matched_text_index": 2,
            "raw_url": "http://www.example.com/pics/3/2/index.90.jpg",
        },
        {
            "face_detections": None,
            "image_name": "db1c21bc8474.jpg",
            "matched_sim": 0.3234919607639313,
            "matched_text_index": 1,
            "raw_url": "http://www.example.com/pics/3/2/index.91.jpg",
        },
    ],
    "similarity_matrix": [
        [0.24363446235656738, 0.31758785247802734, 0.27694183588027954],
        [0.2233106791973114, 0.3234919607639313, 0.26118797063827515],
    ],
    "text_list": ["Lock the driver’s door.", "Press the master switch as shown.", "All doors lock 🚗."],
    "url": "http://www.example.com/hofi-48.html",
    "could_have_url_duplicate": 0,
}


def _document(matches: Iterable[tuple[int, float]], sentences: int = 4) -> dict[str, Any]:
    """A document of sentences `s0.` `s1.` ... and pictures with these matches."""
    pictures = [
        {"image_name": f"{number}.jpg", "raw_url": None, "matched_text_index": sentence, "matched_sim": score}
        for number, (sentence, score) in enumerate(matches)
    ]
    return {"text_list": [f"s{number}." for number in range(sentences)], "image_info": pictures, "url": None}


def _lines(documents: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


def _reader(folder: Path, content: bytes, suffix: str = ".jsonl", **settings: Any) -> Mmc4Reader:
    """A reader of one shard; its pictures are `folder/images`."""
    corpus, images = folder / "docs", folder / "images"
    corpus.mkdir(exist_ok=True)
    images.mkdir(exist_ok=True)
    path = corpus / (SHARD + suffix)
    if suffix.lower().endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{SHARD}.jsonl", content)
    else:
        path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)
    config = Mmc4Config(min_similarity=settings.pop("min_similarity", 0.0))
    return Mmc4Reader(Location(str(corpus)), config, Location(str(images)), **{"fetch": True} | settings)


def _read(folder: Path, *documents: Any, **settings: Any) -> list[Row]:
    """The rows of documents whose pictures, where they have a URL, are to be loaded."""
    for document in documents:
        for picture in document["image_info"]:
            picture["raw_url"] = picture["raw_url"] or f"http://example.com/{picture['image_name']}"
    return read_all(_reader(folder, _lines(documents), **settings))


def _texts(rows: Iterable[Row]) -> dict[str, str]:
    return {row.pair["picture"]: row.pair["text"] for row in rows if row.skipped is None}


def test_mmc4_document_as_published_becomes_pairs_in_the_order_of_its_sentences(tmp_path: Path) -> None:
    second, first = read_all(_reader(tmp_path, _lines([PUBLISHED])))
    assert first.pair | {"picture": None} == second.pair | {
        "picture": None,
        "position": 0,
        "text": "Lock the driver’s door. Press the master switch as shown.",
        "similarity": 0.3234919607639313,
        "url": "http://www.example.com/pics/3/2/index.91.jpg",
    }
    assert second.pair["picture"] == f"{SHARD}/0/0" and first.pair["picture"] == f"{SHARD}/0/1"
    assert (second.pair["document"], second.pair["position"]) == (f"{SHARD}/0", 1)
    assert second.pair["text"] == "All doors lock 🚗."
    assert second.pair["source"] == "http://www.example.com/hofi-48.html"


def test_mmc4_pairs_of_a_document_hold_each_of_its_sentences_once(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(200):
        sentences = rng.randint(1, 8)
        matches = [(rng.randrange(sentences), rng.uniform(-0.2, 0.4)) for _ in range(rng.randint(1, 6))]
        document = _document(matches, sentences)
        rows = _read(tmp_path, document, min_similarity=0.1)
        assert [row.pair["picture"] for row in rows] == [f"{SHARD}/0/{n}" for n in range(len(matches))]
        pairs = sorted((row.pair for row in rows if row.skipped is None), key=lambda pair: pair["position"])
        assert {row.skipped for row in rows} <= {None, reasons.UNMATCHED_PICTURE}
        assert bool(pairs) == any(similarity >= 0.1 for _, similarity in matches)
        if pairs:
            assert " ".join(pair["text"] for pair in pairs).split() == document["text_list"]
        for pair in pairs:
            sentence, similarity = matches[int(pair["picture"].rpartition("/")[2])]
            assert f"s{sentence}." in pair["text"].split() and pair["similarity"] == similarity


def test_mmc4_sentence_of_several_pictures_goes_to_the_most_similar(tmp_path: Path) -> None:
    rows = _read(tmp_path, _document([(2, 0.2), (2, 0.3), (1, 0.1), (2, 0.3)]))
    assert _texts(rows) == {f"{SHARD}/0/1": "s2. s3.", f"{SHARD}/0/2": "s0. s1."}
    assert [row.skipped for row in rows if row.skipped] == [reasons.UNMATCHED_PICTURE] * 2


def test_mmc4_picture_below_the_least_similarity_leaves_its_sentences_to_the_one_before(
    tmp_path: Path,
) -> None:
    document = _document([(0, 0.3), (2, 0.1)])
    assert set(_texts(_read(tmp_path, document)).values()) == {"s0. s1.", "s2. s3."}
    rows = _read(tmp_path, document, min_similarity=0.2)
    assert _texts(rows) == {f"{SHARD}/0/0": "s0. s1. s2. s3."}
    assert (rows[1].skipped, rows[1].detail) == (reasons.UNMATCHED_PICTURE, "similarity 0.1000 is below 0.2")


def test_mmc4_similarity_is_that_of_the_matrix_where_there_is_one(tmp_path: Path) -> None:
    document = _document([(1, 0.9)], sentences=2) | {"similarity_matrix": [[0.1, 0.25]]}
    (row,) = _read(tmp_path, document)
    assert row.pair["similarity"] == 0.25


UNFIT_PICTURES: dict[str, dict[str, Any]] = {
    "no name": {"image_name": None},
    "an empty name": {"image_name": ""},
    "a number for a name": {"image_name": 3},
    "half a character for a name": {"image_name": "\ud83d.jpg"},
    "a list for a url": {"raw_url": ["http://example.com"]},
    "no sentence": {"matched_text_index": None},
    "a sentence past the end": {"matched_text_index": 4},
    "a sentence before the beginning": {"matched_text_index": -1},
    "a truth value for a sentence": {"matched_text_index": True},
    "no similarity": {"matched_sim": None},
    "a similarity that is no number": {"matched_sim": float("nan")},
    "a similarity beyond 1": {"matched_sim": 10**400},
    "text for a similarity": {"matched_sim": "0.3"},
}


@pytest.mark.parametrize("what", UNFIT_PICTURES)
def test_mmc4_picture_of_another_form_is_told_and_its_neighbours_stay(what: str, tmp_path: Path) -> None:
    document = _document([(0, 0.3), (1, 0.3), (2, 0.3)])
    for picture in document["image_info"]:
        picture["raw_url"] = "http://example.com/a.jpg"
    document["image_info"][1] |= UNFIT_PICTURES[what]
    rows = read_all(_reader(tmp_path, _lines([document])))
    assert [row.skipped for row in rows] == [None, reasons.INCOMPLETE_METADATA, None]
    assert _texts(rows) == {f"{SHARD}/0/0": "s0. s1.", f"{SHARD}/0/2": "s2. s3."}


@pytest.mark.parametrize("matrix", [[[0.1]], [], {}, "ab", [None], [[0.1, "x", 0.2, 0.3]], 5])
def test_mmc4_matrix_without_a_place_for_the_match_is_told(matrix: Any, tmp_path: Path) -> None:
    rows = _read(tmp_path, _document([(1, 0.3)]) | {"similarity_matrix": matrix})
    assert [row.skipped for row in rows] == [reasons.INCOMPLETE_METADATA]


GOOD = json.dumps(PUBLISHED).encode()
UNFIT_LINES: dict[str, tuple[bytes, str]] = {
    "half a document": (GOOD[: len(GOOD) // 2], reasons.BROKEN_METADATA),
    "text that is not utf-8": (b'{"text_list": ["\xff"]}', reasons.BROKEN_METADATA),
    "nested without end": (b"[" * 200_000, reasons.BROKEN_METADATA),
    "nested deep in a field": (
        b'{"text_list": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        reasons.BROKEN_METADATA,
    ),
    "a longer number than can be read": (b'{"text_list": ' + b"9" * 5000 + b"}", reasons.BROKEN_METADATA),
    "a list": (b"[1, 2]", reasons.INCOMPLETE_METADATA),
    "null": (b"null", reasons.INCOMPLETE_METADATA),
    "an empty object": (b"{}", reasons.INCOMPLETE_METADATA),
    "no texts": (json.dumps(PUBLISHED | {"text_list": None}).encode(), reasons.INCOMPLETE_METADATA),
    "a number among texts": (
        json.dumps(PUBLISHED | {"text_list": ["a", 1]}).encode(),
        reasons.INCOMPLETE_METADATA,
    ),
    "half a character": (
        json.dumps(PUBLISHED | {"text_list": ["\ud83d"]}).encode(),
        reasons.INCOMPLETE_METADATA,
    ),
    "pictures by name": (
        json.dumps(PUBLISHED | {"image_info": {"a": {}}}).encode(),
        reasons.INCOMPLETE_METADATA,
    ),
    "null for a picture": (
        json.dumps(PUBLISHED | {"image_info": [None]}).encode(),
        reasons.INCOMPLETE_METADATA,
    ),
    "a number for a url": (json.dumps(PUBLISHED | {"url": 5}).encode(), reasons.INCOMPLETE_METADATA),
    "no pictures": (json.dumps(PUBLISHED | {"image_info": []}).encode(), reasons.NO_PICTURE),
}


@pytest.mark.parametrize("what", UNFIT_LINES)
def test_mmc4_document_of_another_form_is_one_row_and_its_neighbours_stay(what: str, tmp_path: Path) -> None:
    line, reason = UNFIT_LINES[what]
    rows = reasons_of(read_all(_reader(tmp_path, b"\n".join([GOOD, line, b"", GOOD]))))
    good = [(f"{SHARD}/{line}/{number}", None) for line in (0, 3) for number in (0, 1)]
    assert rows == [*good[:2], (f"{SHARD}/1", reason), *good[2:]]


def test_mmc4_pair_whose_sentences_are_empty_says_so(tmp_path: Path) -> None:
    document = _document([(0, 0.3), (1, 0.3)], sentences=2) | {"text_list": ["a", " "]}
    assert [row.skipped for row in _read(tmp_path, document)] == [None, reasons.NO_TEXT]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zip", ".JSONL.ZIP"])
def test_mmc4_shard_reads_the_same_however_it_is_packed(suffix: str, tmp_path: Path) -> None:
    documents = [PUBLISHED, _document([(0, 0.2)]), [], PUBLISHED]
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    assert read_all(_reader(packed, _lines(documents), suffix)) == read_all(_reader(plain, _lines(documents)))


def test_mmc4_shard_cut_anywhere_keeps_every_document_before_the_cut(tmp_path: Path) -> None:
    content = _lines([PUBLISHED] * 4)
    one = len(content) // 4
    for cut in range(0, len(content), 97):
        rows = read_all(_reader(tmp_path, content[:cut]))
        # A document without its line's end is whole.
        whole = (cut + 1) // one
        assert [row.skipped for row in rows if row.skipped is None] == [None] * 2 * whole, cut
        torn = cut % one not in (0, one - 1)
        assert [row.skipped for row in rows[2 * whole :]] == [reasons.BROKEN_METADATA] * torn, cut


def test_mmc4_gzip_shard_cut_anywhere_ends_with_a_row_that_says_so(tmp_path: Path) -> None:
    # Different documents, so that the shard is not compressed to nothing.
    rng = random.Random(0)
    noise = [PUBLISHED | {"text_list": [rng.randbytes(200).hex() for _ in range(3)]} for _ in range(20)]
    reader = _reader(tmp_path, _lines(noise), ".jsonl.gz")
    path = tmp_path / "docs" / f"{SHARD}.jsonl.gz"
    packed, everything = path.read_bytes(), read_all(reader)
    kept = []
    for cut in range(0, len(packed), len(packed) // 40):
        path.write_bytes(packed[:cut])
        rows = read_all(reader)
        *before, last = rows
        assert (last.pair["picture"], last.skipped) == (f"{SHARD}.jsonl.gz", reasons.BROKEN_FILE)
        assert before == everything[: len(before)] and len(before) % 2 == 0
        kept.append(len(before))
    assert kept == sorted(kept) and kept[-1] >= 36


@pytest.mark.parametrize("names", [[], ["a.txt"], ["a.jsonl", "b.jsonl"]])
def test_mmc4_zip_that_holds_something_else_is_one_row(names: list[str], tmp_path: Path) -> None:
    reader = _reader(tmp_path, b"", ".jsonl.zip")
    with zipfile.ZipFile(tmp_path / "docs" / f"{SHARD}.jsonl.zip", "w") as archive:
        for name in names:
            archive.writestr(name, GOOD)
    assert reasons_of(read_all(reader)) == [(f"{SHARD}.jsonl.zip", reasons.BROKEN_FILE)]


def test_mmc4_zip_with_flipped_bytes_never_stops_the_corpus(tmp_path: Path) -> None:
    reader = _reader(tmp_path, _lines([PUBLISHED] * 3), ".jsonl.zip")
    path = tmp_path / "docs" / f"{SHARD}.jsonl.zip"
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        rows = read_all(reader)
        assert len(rows) == 6 or rows[-1].skipped in (reasons.BROKEN_FILE, reasons.BROKEN_METADATA)


@pytest.mark.parametrize("place", ["", f"{SHARD}_images/", f"{SHARD}.jsonl_images/"])
def test_mmc4_picture_file_is_found_in_the_folder_or_in_the_shards_own(place: str, tmp_path: Path) -> None:
    reader = _reader(tmp_path, _lines([PUBLISHED]), fetch=False)
    (tmp_path / "images" / place).mkdir(exist_ok=True)
    (tmp_path / "images" / place / "db1c21bc8474.jpg").write_bytes(b"the picture")
    missing, found = read_all(reader)
    assert missing.skipped == reasons.MISSING_FILE and "b9040a0dbb22.jpg" in missing.detail
    assert _bytes_of(found, tmp_path) == b"the picture"
    assert found.pair["url"] == "http://www.example.com/pics/3/2/index.91.jpg" and found.url is None


def test_mmc4_picture_of_the_shards_tar_is_given_by_its_place(tmp_path: Path) -> None:
    reader = _reader(tmp_path, _lines([PUBLISHED]), fetch=False)
    members = [
        ("00/b9040a0dbb22.jpg", b"one"),
        ("notes.txt", b"two"),
        ("./00/db1c21bc8474.jpg", b"three" * 200),
    ]
    write_tar(tmp_path / "images" / f"{SHARD}.tar", members)
    rows = read_all(reader)
    assert [_bytes_of(row, tmp_path) for row in rows] == [b"one", b"three" * 200]


def test_mmc4_picture_behind_the_break_of_the_shards_tar_is_missing_and_says_why(tmp_path: Path) -> None:
    reader = _reader(tmp_path, _lines([PUBLISHED]), fetch=False)
    members = [("b9040a0dbb22.jpg", b"one"), ("db1c21bc8474.jpg", b"three" * 2000)]
    tar = write_tar(tmp_path / "images" / f"{SHARD}.tar", members)
    tar.write_bytes(tar.read_bytes()[:6000])
    found, missing = read_all(reader)
    assert _bytes_of(found, tmp_path) == b"one"
    assert missing.skipped == reasons.MISSING_FILE and f"{SHARD}.tar is broken" in missing.detail


def _bytes_of(row: Row, folder: Path) -> bytes:
    reader = PictureReader({IMAGES: Location(str(folder / "images"))})
    try:
        return reader.read(row.pair["image"])
    finally:
        reader.close()


def test_mmc4_picture_without_a_file_is_loaded_only_if_fetching_is_on(tmp_path: Path) -> None:
    content = _lines([PUBLISHED])
    rows = read_all(_reader(tmp_path, content, fetch=False))
    assert [row.skipped for row in rows] == [reasons.MISSING_FILE] * 2
    rows = read_all(_reader(tmp_path, content, fetch=True))
    urls = [picture["raw_url"] for picture in PUBLISHED["image_info"]]  # type: ignore[attr-defined]
    assert [(row.skipped, row.url, row.pair["url"]) for row in rows] == [(None, url, url) for url in urls]
    nameless = _document([(0, 0.3)])
    assert [row.skipped for row in read_all(_reader(tmp_path, _lines([nameless])))] == [reasons.MISSING_FILE]


def test_mmc4_without_a_folder_of_pictures_has_those_that_can_be_loaded(tmp_path: Path) -> None:
    _reader(tmp_path, _lines([PUBLISHED]))
    found = []
    for fetch in (False, True):
        reader = Mmc4Reader(Location(str(tmp_path / "docs")), Mmc4Config(), None, fetch=fetch)
        found.append([row.skipped for row in read_all(reader)])
    assert found == [[reasons.MISSING_FILE] * 2, [None] * 2]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..\\b.jpg", "a\0.jpg"])
@pytest.mark.parametrize("fetch", [True, False])
def test_mmc4_name_that_leads_out_of_the_folder_is_never_followed(
    name: str, fetch: bool, tmp_path: Path
) -> None:
    (tmp_path / "b.jpg").write_bytes(b"secret")
    document = _document([(0, 0.3)])
    document["image_info"][0] |= {"image_name": name, "raw_url": "http://example.com/a.jpg"}
    rows = read_all(_reader(tmp_path, _lines([document]), fetch=fetch))
    assert reasons_of(rows) == [(f"{SHARD}/0/0", reasons.FORGED_PATH)]


def test_mmc4_name_too_long_for_a_file_is_missing(tmp_path: Path) -> None:
    document = _document([(0, 0.3)])
    document["image_info"][0]["image_name"] = "x" * 5000
    (row,) = read_all(_reader(tmp_path, _lines([document])))
    assert row.skipped == reasons.MISSING_FILE and len(row.detail) < 200


def test_mmc4_shards_are_found_in_name_order_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    reader = _reader(tmp_path, GOOD)
    for name in ("b.jsonl.zip", "a.jsonl.gz", "c.json", "d.parquet"):
        (tmp_path / "docs" / name).write_bytes(b"")
    assert [unit.path for unit in reader.units()] == ["a.jsonl.gz", "b.jsonl.zip", f"{SHARD}.jsonl"]
    (tmp_path / "docs" / "b.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.jsonl and b\.jsonl\.zip"):
        reader.units()


def test_mmc4_folder_without_a_shard_is_refused_with_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.jsonl\.zip"):
        Mmc4Reader(Location(str(tmp_path)), Mmc4Config(), None).units()
