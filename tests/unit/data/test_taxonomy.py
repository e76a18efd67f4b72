from __future__ import annotations

import pyarrow as pa
import pytest

from mmicl_core.data.catalogue import GROUP
from mmicl_core.data.taxonomy import rank_by_taxonomy
from mmicl_core.errors import DataError

PLACES = {
    "lion": ("animals", "cats", ["mane", "cat", "wild"]),
    "tiger": ("animals", "cats", ["stripes", "cat", "wild"]),
    "kitten": ("animals", "cats", ["cat", "small"]),
    "whale": ("animals", "fish", ["sea"]),
    "mug": ("things", "cups", None),
    "glass": ("things", "cups", ["cup"]),
}


def _groups(held_out: frozenset[str] = frozenset()) -> pa.Table:
    rows = [
        {"group": name, "category": category, "subcategory": sub, "keywords": words}
        | {"held_out": name in held_out}
        for name, (category, sub, words) in PLACES.items()
    ]
    return pa.Table.from_pylist(rows, schema=GROUP)


def _named(held_out: frozenset[str] = frozenset(), count: int = 100) -> dict[str, list[str]]:
    names = list(PLACES)
    neighbours, _ = rank_by_taxonomy(_groups(held_out), count)
    return {name: [names[other] for other in near] for name, near in zip(names, neighbours, strict=True)}


def test_neighbours_are_of_the_same_subcategory_and_share_most_keywords_first() -> None:
    assert _named()["lion"] == ["tiger", "kitten"]
    assert _named()["mug"] == ["glass"]
    assert _named(count=1)["lion"] == ["tiger"]


def test_a_concept_alone_in_its_subcategory_takes_those_of_its_category() -> None:
    assert sorted(_named()["whale"]) == ["kitten", "lion", "tiger"]


def test_neighbours_stand_on_the_same_side_of_the_split() -> None:
    named = _named(frozenset({"tiger", "kitten"}))
    assert named["tiger"] == ["kitten"] and named["lion"] == ["whale"]


def test_similarity_is_the_share_of_keywords_in_common() -> None:
    _, similarity = rank_by_taxonomy(_groups(), 100)
    assert similarity[0] == [2 / 4, 1 / 4]
    assert similarity[list(PLACES).index("mug")] == [0.0]


def test_a_corpus_without_categories_is_told_what_else_there_is() -> None:
    rows = [{"group": "a", "held_out": False}, {"group": "b", "held_out": False}]
    with pytest.raises(DataError, match="neighbours.by to 'similarity'"):
        rank_by_taxonomy(pa.Table.from_pylist(rows, schema=GROUP), 5)
