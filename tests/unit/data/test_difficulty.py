from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.difficulty import FALSE_NEGATIVES, measure_difficulty
from mmicl_core.data.schema import EPISODE
from mmicl_core.errors import DataError
from tests.fakes import write_catalogue
from tests.unit.data.draws import concept_pool, config_of, draw_rows, near_concepts, neighbours_of

PICTURES = ("one", "two", "three")


def _catalogue(
    folder: Path, said: Mapping[str, Mapping[str, Any]] | None = None, name: str = "cat"
) -> Catalogue:
    """Cats and dogs of three pictures each; `said` lays other columns over some of them."""
    rows = [
        {"group": concept, "picture": f"{concept}-{number}", "name": name if concept == "cat" else concept}
        for concept in ("cat", "dog")
        for number in PICTURES
    ]
    return write_catalogue(folder, [row | dict((said or {}).get(row["picture"], {})) for row in rows])


def _episode(
    number: int,
    pictures: Sequence[str] = ("cat-one", "dog-one", "cat-two", "dog-two", "cat-three"),
    concepts: Sequence[str] = ("cat", "dog"),
    **columns: Any,
) -> dict[str, Any]:
    turns = [{"picture": picture, "concept": picture.rpartition("-")[0]} for picture in pictures]
    row = {"episode": number, "id": f"0-{number}", "task": "two_way", "concepts": concepts, "turns": turns}
    return row | columns


def _measure(catalogue: Catalogue, rows: Sequence[Mapping[str, Any]], **how: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"neighbours": None, "near_duplicate_bits": 4} | how
    return measure_difficulty(pa.Table.from_pylist(rows, schema=EPISODE), catalogue, **given)


def _agreeing(catalogue: Catalogue, rows: Sequence[Mapping[str, Any]], **how: Any) -> dict[str, Any]:
    kinds = _measure(catalogue, rows, **how)["false_negatives"]
    return {kind: (kinds[kind]["agreeing"], kinds[kind]["episodes"]) for kind in FALSE_NEGATIVES}


@pytest.mark.parametrize(
    ("name", "caption", "agrees"),
    [
        ("cat", "A Cat, asleep", True),
        ("cat", "a catalogue of dogs", False),
        ("cat", "a bobcat", False),
        ("red cat", "the red\ncat", True),
        ("red-cat", "my_red_cat_2.jpg", True),
        ("red cat", "a cat, red", False),
        ("c++ (cat)", "c cat", True),
    ],
)
def test_caption_of_the_second_class_counts_where_it_holds_the_words_of_the_first(
    tmp_path: Path, name: str, caption: str, agrees: bool
) -> None:
    catalogue = _catalogue(tmp_path, {"dog-two": {"text": caption}}, name)
    assert _agreeing(catalogue, [_episode(0)])["caption"] == (int(agrees), 1)


def test_captions_of_the_first_class_and_of_pictures_not_shown_count_for_nothing(tmp_path: Path) -> None:
    said = {
        "cat-one": {"text": "a cat"},
        "dog-one": {"text": "a dog"},
        "dog-three": {"text": "a cat beside a dog"},
    }
    assert _agreeing(_catalogue(tmp_path, said), [_episode(0)])["caption"] == (0, 1)


def test_query_of_the_second_class_counts_as_one_of_its_pictures(tmp_path: Path) -> None:
    catalogue = _catalogue(tmp_path, {"dog-three": {"text": "a cat"}})
    asked = ("cat-one", "dog-one", "dog-three")
    assert _agreeing(catalogue, [_episode(0, asked)])["caption"] == (1, 1)


@pytest.mark.parametrize(("name", "caption"), [("cat", None), ("cat", ""), ("\u2764", "a heart")])
def test_episode_without_words_to_compare_is_not_counted_as_agreeing_or_not(
    tmp_path: Path, name: str, caption: str | None
) -> None:
    catalogue = _catalogue(tmp_path, {"dog-one": {"text": caption}}, name)
    assert _agreeing(catalogue, [_episode(0)])["caption"] == (0, 0)


@pytest.mark.parametrize(("bits", "agrees"), [(2, False), (3, True)])
def test_look_alikes_are_told_by_the_bits_in_which_their_hashes_differ(
    tmp_path: Path, bits: int, agrees: bool
) -> None:
    said = {"cat-three": {"perceptual_hash": 0b0111}, "dog-one": {"perceptual_hash": 0}}
    catalogue = _catalogue(tmp_path, said)
    found = _agreeing(catalogue, [_episode(0)], near_duplicate_bits=bits)
    assert found["perceptual_hash"] == found["any"] == (int(agrees), 1)
    assert found["sha256"] == (0, 1)


def test_each_kind_of_false_negative_is_counted_apart_and_once_in_all(tmp_path: Path) -> None:
    same = {"sha256": hashlib.sha256(b"same").digest()}
    said = {"cat-one": same, "dog-one": same | {"text": "a cat"}, "dog-two": {"text": "a dog"}}
    rows = [
        _episode(0, ("cat-one", "dog-one", "cat-two")),
        _episode(1, ("cat-two", "dog-one", "cat-three")),
        _episode(2, ("cat-one", "dog-two", "cat-two")),
    ]
    kinds = _measure(_catalogue(tmp_path, said), rows)["false_negatives"]
    assert {kind: kinds[kind]["examples"] for kind in FALSE_NEGATIVES} == {
        "caption": ["0-0", "0-1"],
        "sha256": ["0-0"],
        "perceptual_hash": [],
        "any": ["0-0", "0-1"],
    }
    assert all(counted["episodes"] == 3 for counted in kinds.values())


def _embed(catalogue: Catalogue, vectors: Mapping[str, Sequence[float]]) -> Any:
    return lambda numbers: np.array([vectors[key] for key in catalogue.column("picture", numbers)])


def test_similarity_of_pairs_leaves_out_the_query_and_what_has_no_embedding(tmp_path: Path) -> None:
    catalogue = _catalogue(tmp_path)
    vectors = {
        "cat-one": (2, 0),
        "cat-two": (0, 1),
        # Were the query a demonstration, it would make pairs of cosine -1.
        "cat-three": (-1, 0),
        "dog-one": (5, 12),
        "dog-two": (0, 0),
    }
    found = _measure(catalogue, [_episode(0)], embed=_embed(catalogue, vectors))["picture_similarity"]
    assert sum(found["positive"]["counts"]) == 1
    assert found["positive"]["mean"] == pytest.approx(0)
    assert sum(found["negative"]["counts"]) == 2
    assert found["negative"]["mean"] == pytest.approx((5 + 12) / 13 / 2)
    edges, counts = (np.array(found["negative"][part]) for part in ("edges", "counts"))
    assert edges[:-1][counts > 0].tolist() == [0.35, 0.9]


def test_similarity_of_pairs_is_the_same_for_any_number_of_episodes_embedded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(4)
    pool = concept_pool(tmp_path, config)
    rows, catalogue = draw_rows(pool, config, 50), pool.section("two_way").catalogue
    table = np.random.default_rng(0).normal(size=(catalogue.num_pictures, 8))

    def embed(numbers: Sequence[int]) -> Any:
        return table[list(numbers)]

    at_once = _measure(catalogue, rows, embed=embed)["picture_similarity"]
    monkeypatch.setattr("mmicl_core.data.difficulty.EPISODES_EMBEDDED_AT_ONCE", 7)
    assert _measure(catalogue, rows, embed=embed)["picture_similarity"] == at_once
    # Of 2 + 2 demonstrations 2 pairs are of one class and 4 of both.
    assert sum(at_once["positive"]["counts"]) == 100
    assert sum(at_once["negative"]["counts"]) == 200


def test_corpus_without_an_embedder_says_that_pictures_were_not_compared(tmp_path: Path) -> None:
    assert _measure(_catalogue(tmp_path), [_episode(0)])["picture_similarity"] is None


def test_class_similarity_counts_every_episode_that_has_one_even_above_one(tmp_path: Path) -> None:
    rows = [_episode(0, similarity=0.25), _episode(1, similarity=2.25), _episode(2, similarity=None)]
    found = _measure(_catalogue(tmp_path), rows)["class_similarity"]
    assert sum(found["counts"]) == 2
    assert found["mean"] == pytest.approx(1.25)
    assert (found["edges"][0], found["edges"][-1]) == (0, 3)
    assert _measure(_catalogue(tmp_path), rows[2:])["class_similarity"] is None


def test_expected_ranks_are_the_average_over_the_neighbours_of_each_first_class(tmp_path: Path) -> None:
    catalogue = write_catalogue(
        tmp_path, [{"group": group, "picture": f"{group}-{n}"} for group in "abc" for n in PICTURES]
    )
    neighbours = neighbours_of(catalogue, {"a": ["b", "c"], "b": ["a"]})
    rows = [
        _episode(0, ("a-one", "b-one", "a-two"), "ab", rank=1),
        _episode(1, ("b-one", "a-one", "b-two"), "ba", rank=1),
        _episode(2, ("c-one", "a-one", "c-two"), "ca", rank=None),
    ]
    ranks = _measure(catalogue, rows, neighbours=neighbours)["ranks"]
    assert (ranks["episodes"], ranks["without_rank"]) == (2, 1)
    assert ranks["bins"] == [[1, 1], [2, 2]]
    assert ranks["observed"] == [1, 0]
    assert ranks["expected"] == pytest.approx([(2 / 3 + 1) / 2, (1 / 3) / 2])


def test_ranks_of_drawn_episodes_come_up_as_often_as_expected(tmp_path: Path) -> None:
    config = config_of(4)
    pool = concept_pool(tmp_path, config)
    catalogue = pool.section("two_way").catalogue
    rows = draw_rows(pool, config, 1000)
    ranks = _measure(catalogue, rows, neighbours=near_concepts(catalogue))["ranks"]
    # 0.05 is three sigma of 1,000 draws; the seed is fixed.
    assert ranks["observed"] == pytest.approx(ranks["expected"], abs=0.05)
    assert sum(ranks["observed"]) == pytest.approx(1) == sum(ranks["expected"])


def test_ranks_of_many_neighbours_are_told_in_ten_bins_that_cover_them_all(tmp_path: Path) -> None:
    groups = [f"g{number:03d}" for number in range(26)]
    catalogue = write_catalogue(tmp_path, [{"group": group, "picture": f"{group}-one"} for group in groups])
    neighbours = neighbours_of(catalogue, {groups[0]: groups[1:]})
    rows = [
        _episode(rank, (f"{groups[0]}-one", f"{groups[rank]}-one"), (groups[0], groups[rank]), rank=rank)
        for rank in (24, 25, 25, 1)
    ]
    ranks = _measure(catalogue, rows, neighbours=neighbours)["ranks"]
    covered = [rank for first, last in ranks["bins"] for rank in range(first, last + 1)]
    assert covered == list(range(1, 26)) and len(ranks["bins"]) == 10
    assert ranks["observed"] == [0.25] + [0] * 8 + [0.75]
    assert sum(ranks["expected"]) == pytest.approx(1)


def test_report_is_plain_values(tmp_path: Path) -> None:
    config = config_of(2)
    pool = concept_pool(tmp_path, config)
    catalogue = pool.section("two_way").catalogue
    table = np.random.default_rng(0).normal(size=(catalogue.num_pictures, 4)).astype(np.float32)
    report = _measure(
        catalogue,
        draw_rows(pool, config, 20),
        neighbours=near_concepts(catalogue),
        embed=lambda numbers: table[list(numbers)],
    )
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("pictures", "concepts", "named"),
    [
        (("cat-one", "dog-nine", "cat-two"), ("cat", "dog"), "'dog-nine'"),
        (("cat-one", "cow-one", "cat-two"), ("cat", "cow"), "'cow'"),
    ],
)
def test_episodes_of_another_catalogue_are_refused_by_what_it_lacks(
    tmp_path: Path, pictures: Sequence[str], concepts: Sequence[str], named: str
) -> None:
    with pytest.raises(DataError, match=named):
        _measure(_catalogue(tmp_path), [_episode(0, pictures, concepts)])
