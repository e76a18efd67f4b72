from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.data.schema import SKIPPED
from mmicl_core.data.survey import (
    OTHER,
    find_examples,
    iter_left_out,
    iter_remarkable,
    name_groups,
    survey_groups,
    survey_pairs,
)
from tests.fakes import write_catalogue
from tests.unit.data.described import write_described


def _row(number: int, **columns: Any) -> dict[str, Any]:
    image = {"path": "corpus:a.tar", "member": "", "offset": number, "size": 1}
    known = {
        "picture": f"p{number}",
        "image": image,
        "width": 10,
        "height": 10,
        "format": "PNG",
        "remark": "",
    }
    return known | columns


def _table(values: list[str | None]) -> pa.Table:
    rows = [{"picture": f"p{number}", "skipped": value} for number, value in enumerate(values)]
    return pa.Table.from_pylist(rows, schema=SKIPPED)


def test_examples_are_the_first_of_each_reason_and_no_more_than_asked() -> None:
    tables = [_table(["a", "b", "a"]), _table(["b", "a", None])]
    found = find_examples(tables, "skipped", {"a": 3, "b": 2, "c": 0}, most=2)
    named = {reason: [row["picture"] for row in rows] for reason, rows in found.items()}
    assert named == {"a": ["p0", "p2"], "b": ["p1", "p0"], "c": []}


def test_reading_stops_once_every_reason_has_its_examples() -> None:
    def tables() -> Iterator[pa.Table]:
        yield _table(["a", "b"])
        raise AssertionError("read on")

    found = find_examples(tables(), "skipped", {"a": 1, "b": 900}, most=1)
    assert [len(rows) for rows in found.values()] == [1, 1]


def test_cell_with_several_remarks_is_an_example_of_each() -> None:
    table = _table(["CMYK, wrong extension", "", "CMYK"]).rename_columns(
        ["picture", "image", "remark", "detail"]
    )
    found = find_examples([table], "remark", {"CMYK": 2, "wrong extension": 1}, most=3)
    named = {remark: [row["picture"] for row in rows] for remark, rows in found.items()}
    assert named == {"CMYK": ["p0", "p2"], "wrong extension": ["p0"]}


def test_left_out_rows_are_read_from_the_files_written_aside(tmp_path: Path) -> None:
    for number, reason in enumerate("ab"):
        pq.write_table(_table([reason]), tmp_path / f"skipped-{number}.parquet")
    pq.write_table(_table(["c"]), tmp_path / "pairs-0.parquet")
    assert [table.column("skipped").to_pylist() for table in iter_left_out(tmp_path)] == [["a"], ["b"]]


def test_remarkable_pictures_come_with_the_place_of_their_bytes(tmp_path: Path) -> None:
    parts = {
        "0": [_row(0), _row(1, skipped="corrupt picture", detail="bad", format=None)],
        "1": [_row(2)],
        "2": [_row(3, remark="CMYK"), _row(4)],
    }
    folders = write_described(tmp_path, parts)

    def read(column: str) -> list[dict[str, Any]]:
        tables = iter_remarkable(folders["pairs"], folders["looked"], parts, column)
        return [row for table in tables for row in table.to_pylist()]

    (broken,) = read("skipped")
    assert (broken["picture"], broken["detail"], broken["image"]["offset"]) == ("p1", "bad", 1)
    (unusual,) = read("remark")
    assert (unusual["picture"], unusual["remark"], unusual["image"]["offset"]) == ("p3", "CMYK", 3)


def test_numbers_of_a_corpus_are_those_of_all_files_and_of_usable_pictures_alone(tmp_path: Path) -> None:
    sides = list(range(1, 102))
    rows = [_row(n, width=side, height=1000, text="x" * side, licence="MIT") for n, side in enumerate(sides)]
    rows += [_row(200, text=None, width=50, height=50, format="WEBP")]
    rows += [_row(201, text="y" * 9999, skipped="corrupt picture", width=None, format=None)]
    parts = {"0": rows[:40], "1": rows[40:]}
    folders = write_described(tmp_path, parts)
    found = survey_pairs(folders["pairs"], folders["looked"], parts)
    assert found["pictures"] == 102
    assert found["caption_characters"] == {"min": 1, "p10": 11, "median": 51, "p90": 91, "max": 101}
    assert found["shorter_side"]["max"] == 101
    assert (found["longer_side"]["min"], found["longer_side"]["median"]) == (50, 1000)
    assert found["formats"] == {"PNG": 101, "WEBP": 1}
    assert found["licences"] == {"MIT": 101}
    assert (found["without_caption"], found["without_licence"]) == (1, 1)


def test_licences_beyond_the_listed_ones_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmicl_core.data.survey.MOST_VALUES", 50)
    rows = [_row(n, licence=f"licence {n % 90}") for n in range(180)]
    rows += [_row(200 + n, licence="MIT") for n in range(5)]
    folders = write_described(tmp_path, {"0": rows[180:] + rows[:90], "1": rows[90:180]})
    found = survey_pairs(folders["pairs"], folders["looked"], ["0", "1"])["licences"]
    assert next(iter(found.items())) == ("MIT", 5)
    assert len(found) == 21 and sum(found.values()) == 185
    assert found[OTHER] == 185 - 5 - 2 * 19


def test_corpus_without_a_usable_picture_has_no_quantiles(tmp_path: Path) -> None:
    folders = write_described(tmp_path, {"0": [_row(0, skipped="corrupt picture")]})
    found = survey_pairs(folders["pairs"], folders["looked"], ["0"])
    assert (found["pictures"], found["shorter_side"], found["caption_characters"]) == (0, None, None)


def test_groups_are_told_by_their_sizes_and_the_largest_by_name(tmp_path: Path) -> None:
    sizes = {"ant": 1, "bee": 3, "cat": 2}
    rows = [
        {"group": group, "picture": f"{group}-{n}", "name": f"the {group}", "held_out": group == "ant"}
        for group, size in sizes.items()
        for n in range(size)
    ]
    catalogue = write_catalogue(tmp_path, rows, buckets=3)
    found = survey_groups(catalogue)
    assert (found["groups"], found["held_out"], found["pictures"]) == (3, 1, 6)
    assert found["pictures_per_group"] == {"min": 1, "p10": 1, "median": 2, "p90": 3, "max": 3}
    assert [(row["group"], row["name"], row["pictures"]) for row in found["largest"]] == [
        ("bee", "the bee", 3),
        ("cat", "the cat", 2),
        ("ant", "the ant", 1),
    ]
    assert name_groups(catalogue, ["cat", "bee", "cat"]) == {"bee": "the bee", "cat": "the cat"}
