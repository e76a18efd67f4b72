from __future__ import annotations

from mmicl_core.data.neighbours import Concept, draw_weights, rank_neighbours


def _concepts(*rows: tuple[str, str, str, str]) -> dict[str, Concept]:
    return {
        name: Concept(name, name, frozenset(keywords.split()), category, subcategory)
        for name, keywords, category, subcategory in rows
    }


CONCEPTS = _concepts(
    ("tiger", "cat stripes wild", "animals", "mammals"),
    ("zebra", "stripes wild", "animals", "mammals"),
    ("kitten", "cat", "animals", "mammals"),
    ("cow", "farm", "animals", "mammals"),
    ("salmon", "wild fish", "animals", "fish"),
    ("cup", "cat", "objects", "cups"),
    ("plate", "cup", "objects", "plates"),
)


def test_neighbours_are_of_the_same_subcategory_with_most_shared_keywords_first() -> None:
    assert rank_neighbours(CONCEPTS, 10)["tiger"] == ["zebra", "kitten", "cow"]


def test_neighbours_come_from_the_category_only_where_a_concept_is_alone() -> None:
    ranked = rank_neighbours(CONCEPTS, 10)
    assert ranked["salmon"][0] in ("tiger", "zebra")
    assert set(ranked["salmon"]) == {"tiger", "zebra", "kitten", "cow"}
    assert ranked["plate"] == ["cup"]


def test_neighbours_are_cut_at_the_limit_and_never_hold_the_concept_itself() -> None:
    whole = rank_neighbours(CONCEPTS, 10)
    for name, nearest in rank_neighbours(CONCEPTS, 2).items():
        assert nearest == whole[name][:2]
        assert name not in whole[name]


def test_weights_are_those_of_the_paper() -> None:
    # p_j = (101 - j) / 5050 for j = 1 .. 100.
    weights = list(draw_weights(100))
    assert weights == [101 - rank for rank in range(1, 101)]
    assert sum(weights) == 5050
