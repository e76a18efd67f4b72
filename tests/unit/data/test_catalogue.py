from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmicl_core.data import reasons
from mmicl_core.data.catalogue import (
    CATALOGUED,
    GROUP,
    Catalogue,
    make_bucket,
    write_bucket,
)
from mmicl_core.data.exchange import bucket_of
from mmicl_core.data.schema import SKIPPED
from mmicl_core.errors import DataError
from tests.fakes import write_catalogue


def _rows(groups: int = 7, pictures: int = 5) -> list[dict[str, Any]]:
    rows = [
        {
            "group": f"group-{group}",
            "picture": f"picture-{group}-{number}",
            "text": f"text {group} {number}",
            "kept_back": number % 3 == 0,
            "held_out": group % 2 == 0,
        }
        for group in range(groups)
        for number in range(pictures)
    ]
    random.Random(0).shuffle(rows)
    return rows


def _bucket(rows: list[dict[str, Any]], min_pictures: int = 1) -> tuple[pa.Table, pa.Table, pa.Table]:
    # Null hashes are no hindrance to sorting.
    given = [
        {"kept_back": False, "held_out": False, "sha256": _digest(row["picture"]), **row} for row in rows
    ]
    return make_bucket(pa.Table.from_pylist(given, schema=CATALOGUED), min_pictures)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("buckets", [1, 3, 16])
def test_group_has_its_open_pictures_first_and_then_those_kept_back(tmp_path: Path, buckets: int) -> None:
    rows = _rows()
    catalogue = write_catalogue(tmp_path, rows, buckets=buckets)
    assert (len(catalogue), catalogue.num_pictures) == (7, 35)
    met = set()
    for number, group in enumerate(catalogue.ids):
        for kept_back in (False, True):
            found = catalogue.pictures(number, kept_back=kept_back)
            expected = sorted(
                row["picture"] for row in rows if row["group"] == group and row["kept_back"] == kept_back
            )
            assert catalogue.column("picture", list(found)).tolist() == expected
            met |= set(found)
        assert bool(catalogue.held_out[number]) == (int(group[-1]) % 2 == 0)
        assert catalogue.names[number] == group.replace("-", " ")
    assert met == set(range(35))


def test_groups_of_a_bucket_are_those_whose_hash_says_so(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path, _rows(40), buckets=4)
    where = [bucket_of(group, 4) for group in catalogue.ids]
    assert where == sorted(where) and set(where) == {0, 1, 2, 3}


def test_taken_rows_come_in_the_order_asked_for_and_may_repeat(tmp_path: Path) -> None:
    rows = _rows()
    text_of = {row["picture"]: row["text"] for row in rows}
    catalogue = write_catalogue(tmp_path, rows, buckets=4)
    numbers = random.Random(1).choices(range(35), k=200)
    taken = catalogue.take(numbers, ["text", "picture", "image"])
    assert taken.column_names == ["text", "picture", "image"]
    keys = catalogue.scan("picture").to_pylist()
    assert taken.column("picture").to_pylist() == [keys[number] for number in numbers]
    assert taken.column("text").to_pylist() == [text_of[keys[number]] for number in numbers]
    assert [image["member"] for image in taken.column("image").to_pylist()] == [keys[n] for n in numbers]
    assert catalogue.take([], ["picture"]).num_rows == 0


def test_fingerprints_are_those_of_the_rows(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path, _rows(), buckets=16)
    rows = catalogue.take(range(35), ["sha256", "perceptual_hash"]).to_pylist()
    found = [catalogue.fingerprint(number) for number in range(35)]
    assert found == [(row["sha256"], row["perceptual_hash"]) for row in rows]


def test_pictures_that_were_not_looked_at_are_refused_when_asked_for(tmp_path: Path) -> None:
    rows = [{"group": "a", "picture": "one"}, {"group": "a", "picture": "two", "perceptual_hash": None}]
    catalogue = write_catalogue(tmp_path, rows)
    with pytest.raises(DataError, match="0 pictures without sha256 and 1 without perceptual hash"):
        catalogue.fingerprint(0)


def test_documents_keep_the_order_of_their_positions(tmp_path: Path) -> None:
    places = [3, 0, 11, 7, 2]
    rows = [{"group": "page", "picture": f"p{place}", "position": place} for place in places]
    catalogue = write_catalogue(tmp_path, rows)
    assert catalogue.column("picture", range(5)).tolist() == ["p0", "p2", "p3", "p7", "p11"]


def test_repeated_picture_of_a_group_is_left_out_with_its_reason_and_one_that_training_may_show_is_kept() -> (
    None
):
    same = _digest("same")
    rows = [
        {"group": "a", "picture": "kept back", "sha256": same, "kept_back": True},
        {"group": "a", "picture": "second", "sha256": same},
        {"group": "a", "picture": "first", "sha256": same},
        {"group": "a", "picture": "another"},
        {"group": "b", "picture": "elsewhere", "sha256": same},
    ]
    pictures, groups, left_out = _bucket(rows)
    assert pictures.column("picture").to_pylist() == ["another", "first", "elsewhere"]
    assert groups.column("total").to_pylist() == [2, 1]
    assert left_out.schema.names == SKIPPED.names
    told = [(row["picture"], row["skipped"], row["detail"]) for row in left_out.to_pylist()]
    assert sorted(told) == [
        ("kept back", reasons.REPEATED_PICTURE, "group a"),
        ("second", reasons.REPEATED_PICTURE, "group a"),
    ]


def test_group_of_too_few_distinct_pictures_is_left_out_whole() -> None:
    rows = [
        {"group": "rare", "picture": "r1", "sha256": _digest("r")},
        {"group": "rare", "picture": "r2", "sha256": _digest("r")},
        {"group": "common", "picture": "c1"},
        {"group": "common", "picture": "c2"},
    ]
    pictures, groups, left_out = _bucket(rows, min_pictures=2)
    assert groups.column("group").to_pylist() == ["common"]
    reason_of = {row["picture"]: row["skipped"] for row in left_out.to_pylist()}
    assert reason_of == {"r1": reasons.RARE_CONCEPT, "r2": reasons.REPEATED_PICTURE}
    assert pictures.num_rows + left_out.num_rows == len(rows)


def test_bucket_without_rows_is_empty_and_can_be_opened(tmp_path: Path) -> None:
    pictures, groups, left_out = make_bucket(CATALOGUED.empty_table(), 2)
    assert pictures.num_rows == groups.num_rows == left_out.num_rows == 0
    assert groups.schema == GROUP
    write_bucket(tmp_path, 0, pictures, groups)
    catalogue = Catalogue(tmp_path)
    assert (len(catalogue), catalogue.num_pictures, catalogue.ids) == (0, 0, [])
    assert catalogue.scan("text").to_pylist() == []


def test_folder_without_a_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no catalogue"):
        Catalogue(tmp_path)
