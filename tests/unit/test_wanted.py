from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.data.schema import EPISODE
from mmicl_core.prompts import Turn, demonstration_key
from pipelines.wanted import KEY, as_turn, catalogued_pictures, demonstrations, shown_pictures
from tests.fakes import write_catalogue


def _turn(picture: str | None, question: str, answer: str) -> dict[str, Any]:
    image = None if picture is None else {"path": picture, "member": "", "offset": 0, "size": 1}
    return {"picture": picture, "image": image, "question": question, "answer": answer, "scored": False}


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    rows = [
        {"turns": [_turn("a", "This is", "bako"), _turn("b", "This is", "mute"), _turn("c", "This is", "x")]},
        {"turns": [_turn("d", "What is this?", "a cat"), _turn(None, "And its colour?", "grey")]},
        {"turns": [_turn("a", "This is", "y")]},
    ]
    path = tmp_path / "episodes-00000.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=EPISODE), path)
    return path


def test_pictures_are_those_of_all_turns_that_have_one_each_with_its_place(episodes: Path) -> None:
    rows = shown_pictures(episodes, queries_only=False).to_pylist()
    assert [row[KEY] for row in rows] == ["a", "b", "c", "d", "a"]
    assert all(row["image"]["path"] == row["picture"] == row[KEY] for row in rows)


def test_pictures_of_queries_are_those_of_last_turns(episodes: Path) -> None:
    assert shown_pictures(episodes, queries_only=True).column(KEY).to_pylist() == ["c", "a"]


def test_demonstrations_are_all_turns_before_the_query_under_the_key_that_methods_use(episodes: Path) -> None:
    rows = demonstrations(episodes).to_pylist()
    assert [row["answer"] for row in rows] == ["bako", "mute", "a cat"]
    for row in rows:
        turn = Turn((row["picture"],), row["question"], row["answer"])
        assert row[KEY] == demonstration_key(turn)


def test_demonstration_without_a_picture_is_a_turn_without_one() -> None:
    assert as_turn(None, "And its colour?", "grey") == Turn((), "And its colour?", "grey")
    assert as_turn("a", "This is", "bako") == Turn(("a",), "This is", "bako")


def test_catalogued_pictures_are_those_that_training_may_see(tmp_path: Path) -> None:
    rows = [
        {"group": "cat", "picture": "a"},
        {"group": "cat", "picture": "b", "kept_back": True},
        {"group": "dog", "picture": "c", "held_out": True},
    ]
    write_catalogue(tmp_path, rows)
    assert catalogued_pictures(tmp_path / "pictures-00000.arrow").column(KEY).to_pylist() == ["a"]
