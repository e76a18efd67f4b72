from __future__ import annotations

import random
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from scipy.stats import chisquare

from mmicl_core.config.episodes import Part
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.episodes import draw
from mmicl_core.data.names import clash
from mmicl_core.data.plans import Plan
from mmicl_core.data.pool import Pool
from mmicl_core.data.tasks.two_way import draw_neighbour
from mmicl_core.data.wordings import PHRASINGS
from tests.fakes import HELD_OUT_STYLE
from tests.unit.data.draws import (
    CATS,
    DRAWS,
    HELD_OUT_CONCEPTS,
    concept_of,
    concept_pool,
    concept_rows,
    config_of,
    draw_rows,
    pictures_of,
    reasons_of,
    style_of,
)

PARTS: tuple[Part, ...] = get_args(Part)
MANY = 100_000


def _two_way(**settings: Any) -> dict[str, Any]:
    return {"type": "two_way", **settings}


def _twins(groups: str, pictures: int, **same: Any) -> list[dict[str, Any]]:
    """Rows of groups whose pictures are the same in each, number by number."""
    rows = []
    for group in groups:
        for number in range(pictures):
            given = {name: value(number) for name, value in same.items()}
            rows.append({"group": group, "picture": f"{group}__{number}", **given})
    return rows


def _catalogue(pool: Pool) -> Catalogue:
    return pool.section("two_way").catalogue


@pytest.mark.parametrize("shots", [2, 8])
@pytest.mark.parametrize("part", PARTS)
def test_episode_never_shows_the_picture_that_it_asks_about_and_none_twice(
    tmp_path: Path, part: Part, shots: int
) -> None:
    config = config_of(shots, part=part)
    episodes = draw_rows(concept_pool(tmp_path, config), config)
    assert episodes
    for episode in episodes:
        pictures = pictures_of(episode)
        assert len(pictures) == shots + 1
        assert len(set(pictures)) == len(pictures)


def test_episode_names_every_picture_by_its_concept_and_asks_for_the_right_name(tmp_path: Path) -> None:
    config = config_of()
    rights = Counter[int]()
    for episode in draw_rows(concept_pool(tmp_path, config), config):
        name_of = dict(zip(episode["concepts"], episode["names"], strict=True))
        assert len(name_of) == 2
        for turn in episode["turns"]:
            assert turn["answer"] == name_of[turn["concept"]] == name_of[concept_of(turn["picture"])]
        assert episode["answer"] == episode["turns"][-1]["answer"]
        assert {episode["answer"], episode["other"]} == set(episode["names"])
        shown = [turn["answer"] for turn in episode["turns"][:-1]]
        assert all(shown.count(name) == 3 for name in episode["names"])
        assert episode["shots_of_both_classes"] == 6
        rights[episode["names"].index(episode["answer"])] += 1
    assert chisquare([rights[0], rights[1]]).pvalue > 1e-3


def test_every_order_of_the_classes_comes_equally_often_whichever_is_asked(tmp_path: Path) -> None:
    config = config_of(4)
    orders = Counter(
        tuple(turn["concept"] == episode["concepts"][0] for turn in episode["turns"])
        for episode in draw_rows(concept_pool(tmp_path, config), config, 1500)
    )
    # Two of each class in 6 orders, and either class asked about.
    expected = {
        (*order, asked) for order in permutations((True, True, False, False)) for asked in (True, False)
    }
    assert set(orders) == expected and len(expected) == 12
    assert chisquare(list(orders.values())).pvalue > 1e-3


def test_odd_shot_goes_to_either_class_equally_often_whichever_is_asked(tmp_path: Path) -> None:
    config = config_of(5)
    seen = Counter[tuple[int, bool]]()
    for episode in draw_rows(concept_pool(tmp_path, config), config, 1000):
        *shown, query = [turn["concept"] == episode["concepts"][0] for turn in episode["turns"]]
        seen[sum(shown), query] += 1
    assert set(seen) == {(2, True), (2, False), (3, True), (3, False)}
    assert chisquare(list(seen.values())).pvalue > 1e-3


def test_every_picture_of_a_class_is_shown_and_asked_about_equally_often(tmp_path: Path) -> None:
    config = config_of(2)
    rows = _twins("ab", 5)
    episodes = draw_rows(concept_pool(tmp_path, config, rows, {"a": ["b"], "b": ["a"]}), config, 1500)
    for turns in (slice(-1), slice(-1, None)):
        seen = Counter(turn["picture"] for episode in episodes for turn in episode["turns"][turns])
        assert len(seen) == 10 and chisquare(list(seen.values())).pvalue > 1e-3


def test_hard_negative_is_a_neighbour_and_carries_its_rank_and_similarity(tmp_path: Path) -> None:
    config = config_of()
    pool = concept_pool(tmp_path, config)
    ids = _catalogue(pool).ids
    for episode in draw_rows(pool, config):
        anchor, negative = episode["concepts"]
        near = [ids[number] for number in pool.neighbours(ids.index(anchor))[0]]
        assert near[episode["rank"] - 1] == negative
        assert episode["similarity"] == 1 - (episode["rank"] - 1) / 8


def test_share_of_hard_negatives_is_as_asked(tmp_path: Path) -> None:
    count = 1000
    for share in (0.0, 0.5, 1.0):
        config = config_of(6, _two_way(hard_negative_share=share))
        pool = concept_pool(tmp_path / str(share), config)
        episodes = draw_rows(pool, config, count)
        near = sum(episode["rank"] is not None for episode in episodes)
        # Of 9 anchors 4 cats and 4 cups have 3 neighbours, the sun has 4, and any other concept is one of 8.
        by_chance = (8 * 3 / 8 + 4 / 8) / 9
        # Four standard deviations of 1,000 throws are 0.063 at most.
        assert near / count == pytest.approx(share + (1 - share) * by_chance, abs=0.063)


def test_any_other_concept_is_drawn_equally_often_where_no_neighbour_is_wanted(tmp_path: Path) -> None:
    config = config_of(6, _two_way(hard_negative_share=0))
    pairs = Counter(tuple(e["concepts"]) for e in draw_rows(concept_pool(tmp_path, config), config, 1500))
    assert len(pairs) == 9 * 8 and all(one != other for one, other in pairs)
    assert chisquare(list(pairs.values())).pvalue > 1e-3


def test_neighbours_are_drawn_with_the_chances_of_the_paper() -> None:
    rng = random.Random(0)
    drawn = Counter(draw_neighbour(np.ones(100, dtype=bool), rng) for _ in range(MANY))
    expected = [MANY * (101 - rank) / 5050 for rank in range(1, 101)]
    assert chisquare([drawn[place] for place in range(100)], expected).pvalue > 1e-3


def test_neighbours_that_cannot_be_drawn_leave_their_chance_to_the_others_in_proportion() -> None:
    able = np.random.default_rng(0).random(36) < 0.4
    rng = random.Random(1)
    drawn = Counter(draw_neighbour(able, rng) for _ in range(20_000))
    places = np.flatnonzero(able)
    weights = 36 - places
    expected = 20_000 * weights / weights.sum()
    assert set(drawn) == set(places.tolist())
    assert chisquare([drawn[place] for place in places.tolist()], expected).pvalue > 1e-3
    assert draw_neighbour(np.zeros(5, dtype=bool), rng) is None
    assert draw_neighbour(np.zeros(0, dtype=bool), rng) is None


def test_ranks_of_drawn_episodes_follow_the_weights(tmp_path: Path) -> None:
    config = config_of(2)
    names = [f"thing-{number}" for number in range(8)]
    rows = [{"group": name, "picture": f"{name}__{n}"} for name in names for n in range(3)]
    lists = {name: [other for other in names if other != name] for name in names}
    pool = concept_pool(tmp_path, config, rows, lists)
    drawn = [draw(number, pool, config) for number in range(2500)]
    ranks = Counter(plan.rank for plan in drawn if isinstance(plan, Plan))
    expected = [2500 * (8 - rank) / 28 for rank in range(1, 8)]
    assert chisquare([ranks[rank] for rank in range(1, 8)], expected).pvalue > 1e-3


@pytest.mark.parametrize("part", ["known_concepts", "held_out_style"])
def test_held_out_style_is_asked_about_and_never_shown(tmp_path: Path, part: Part) -> None:
    config = config_of(part=part)
    for episode in draw_rows(concept_pool(tmp_path, config), config):
        *shown, query = map(style_of, pictures_of(episode))
        assert query == HELD_OUT_STYLE
        assert HELD_OUT_STYLE not in shown
        assert all(
            (concept in HELD_OUT_CONCEPTS) == (part == "held_out_style") for concept in episode["concepts"]
        )


def test_only_the_query_is_scored_unless_asked(tmp_path: Path) -> None:
    config = config_of()
    for episode in draw_rows(concept_pool(tmp_path, config), config):
        assert [turn["scored"] for turn in episode["turns"]] == [False] * 6 + [True]


def test_dense_scoring_marks_the_names_met_before_and_no_first_meeting(tmp_path: Path) -> None:
    config = config_of(6, _two_way(answers_scored="dense"))
    for episode in draw_rows(concept_pool(tmp_path, config), config):
        names = [turn["answer"] for turn in episode["turns"]]
        expected = [name in names[:place] for place, name in enumerate(names)]
        assert [turn["scored"] for turn in episode["turns"]] == expected
        assert expected.count(False) == 2


def test_one_question_stands_beside_all_pictures_of_an_episode(tmp_path: Path) -> None:
    config = config_of(6, _two_way(questions=("This is", "Name:")))
    asked = set()
    for episode in draw_rows(concept_pool(tmp_path, config), config):
        (question,) = {turn["question"] for turn in episode["turns"]}
        asked.add(question)
    assert asked == {"This is", "Name:"}


def test_true_name_is_given_to_the_class_that_asks_for_it(tmp_path: Path) -> None:
    config = config_of(6, _two_way(positive_name="random_letters", negative_name="true_name"))
    for episode in draw_rows(concept_pool(tmp_path, config), config):
        first, second = episode["names"]
        assert second == episode["concepts"][1].replace("-", " ")
        assert first.isalpha() and first.islower() and 1 <= len(first) <= 10 and not clash(first, second)


def test_two_true_names_never_lie_inside_one_another(tmp_path: Path) -> None:
    names = {"a": "cat", "b": "Wild Cat", "c": "dog", "d": "CAT", "e": "hot dog stand"}
    rows = [row | {"name": names[row["group"]]} for row in _twins("abcde", 4)]
    lists = {group: [other for other in names if other != group] for group in names}
    for share in (0.0, 1.0):
        task = _two_way(positive_name="true_name", negative_name="true_name", hard_negative_share=share)
        config = config_of(4, task)
        episodes = draw_rows(concept_pool(tmp_path / str(share), config, rows, lists), config)
        met = {frozenset(episode["concepts"]) for episode in episodes}
        assert len(episodes) == DRAWS
        assert met == {frozenset(pair) for pair in ("ac", "ae", "bc", "be", "cd", "de")}
        for episode in episodes:
            assert episode["names"] == [names[concept] for concept in episode["concepts"]]


def test_concept_whose_neighbours_all_have_clashing_names_is_a_reason(tmp_path: Path) -> None:
    rows = [row | {"name": "cat" * (row["group"] == "a") or "cats"} for row in _twins("ab", 4)]
    lists = {"a": ["b"], "b": ["a"]}
    config = config_of(4, _two_way(positive_name="true_name", negative_name="true_name"))
    reasons = reasons_of(concept_pool(tmp_path, config, rows, lists), config)
    assert reasons == {"two_way: one name lies inside the other"}


def test_concept_without_a_name_is_never_drawn_where_true_names_are_wanted(tmp_path: Path) -> None:
    rows = [row | {"name": " " if row["group"] == "b" else row["group"]} for row in _twins("abc", 4)]
    lists = {"a": ["b", "c"], "b": ["a", "c"], "c": ["b", "a"]}
    config = config_of(4, _two_way(positive_name="true_name"))
    episodes = draw_rows(concept_pool(tmp_path / "some", config, rows, lists), config)
    assert {concept for episode in episodes for concept in episode["concepts"]} == {"a", "c"}
    nameless = [row | {"name": ""} for row in rows]
    reasons = reasons_of(concept_pool(tmp_path / "none", config, nameless, lists), config)
    assert reasons == {"two_way: fewer than two concepts have a name and 3 pictures"}


def test_same_bytes_in_both_classes_are_met_once_in_an_episode(tmp_path: Path) -> None:
    # Every picture lies in both classes; seven distinct ones are needed, and ten are there.
    rows = _twins("ab", 10, sha256=lambda number: bytes([number]) * 32)
    config = config_of()
    episodes = draw_rows(concept_pool(tmp_path, config, rows, {"a": ["b"], "b": ["a"]}), config)
    assert len(episodes) == DRAWS
    for episode in episodes:
        digests = [turn["sha256"] for turn in episode["turns"]]
        assert len(set(digests)) == 7


def test_picture_that_looks_like_the_query_is_never_shown_and_others_that_look_alike_are(
    tmp_path: Path,
) -> None:
    # Numbers 2n and 2n + 1 differ in 4 bits and from all others in 28 or more.
    looks = [(0x5A3C_96F0_1248_8421 * (n // 2 * 2 + 1)) % 2**64 ^ (0xF if n % 2 else 0) for n in range(12)]
    distances = {(looks[m] ^ looks[n]).bit_count() for m in range(12) for n in range(m) if m // 2 != n // 2}
    assert min(distances) > 8
    rows = _twins("ab", 12, perceptual_hash=lambda number: looks[number])
    lists = {"a": ["b"], "b": ["a"]}

    def episodes(bits: int) -> list[list[int]]:
        config = config_of(8, near_duplicate_bits=bits)
        drawn = draw_rows(concept_pool(tmp_path / str(bits), config, rows, lists), config)
        assert len(drawn) == DRAWS
        return [[int(style_of(key)) // 2 for key in pictures_of(episode)] for episode in drawn]

    guarded = episodes(4)
    assert all(query not in shown for *shown, query in guarded)
    assert any(len(set(shown)) < len(shown) for *shown, _ in guarded)
    # Of the same look only the other class's twin is as near as 0 bits.
    assert any(query in shown for *shown, query in episodes(0))


def test_class_of_look_alikes_only_is_a_reason(tmp_path: Path) -> None:
    rows = _twins("ab", 9, perceptual_hash=lambda number: 7)
    config = config_of(4)
    reasons = reasons_of(concept_pool(tmp_path, config, rows, {"a": ["b"], "b": ["a"]}), config)
    assert reasons == {"two_way: too few pictures unlike the one asked about"}


def test_classes_of_just_enough_pictures_can_be_drawn_and_smaller_ones_are_a_reason(tmp_path: Path) -> None:
    lists = {"a": ["b"], "b": ["a"]}
    for pictures, shots, reasons in (
        (4, 6, {None}),
        (4, 5, {None}),
        (4, 8, {"two_way: fewer than two concepts have 5 pictures"}),
        (4, 7, {"two_way: fewer than two concepts have 5 pictures"}),
    ):
        config = config_of(shots)
        pool = concept_pool(tmp_path / str(shots), config, _twins("ab", pictures), lists)
        assert reasons_of(pool, config) == reasons


def test_anchor_whose_neighbours_are_all_too_poor_is_a_reason(tmp_path: Path) -> None:
    rows = [row for row in concept_rows() if row["group"] in ("cat-2", "cup-2") or row["style"] == "ink"]
    config = config_of()
    assert reasons_of(concept_pool(tmp_path, config, rows), config) == {
        "two_way: no neighbour has 4 pictures"
    }


def test_hard_negative_is_of_the_same_side_and_kind_in_every_part(tmp_path: Path) -> None:
    for part in PARTS:
        config = config_of(part=part)
        for episode in draw_rows(concept_pool(tmp_path / part, config), config):
            one, other = episode["concepts"]
            assert (one in HELD_OUT_CONCEPTS) == (other in HELD_OUT_CONCEPTS)
            assert (one in CATS) == (other in CATS)


def test_released_wording_stands_around_every_turn_and_one_of_many_phrasings_asks(tmp_path: Path) -> None:
    config = config_of(4, _two_way(wording="released"))
    asked = Counter[str]()
    for episode in draw_rows(concept_pool(tmp_path, config), config, 2000):
        *shown, query = episode["turns"]
        opening, begin, question = shown[0]["question"].partition("[BEGIN EXAMPLE]")
        assert opening.startswith("You should find the causal relationship") and begin
        assert {turn["question"] for turn in shown[1:]} == {begin + question}
        told = [turn["answer"] for turn in shown]
        assert set(told) == {f'there is "{name}" in the image. [END EXAMPLE]' for name in episode["names"]}
        right = next(name for name in episode["names"] if name != episode["other"])
        assert query["answer"] == f'there is "{right}" in the image.'
        assert query["question"].startswith("[FINAL QUESTION]: ")
        asked[query["question"].removeprefix("[FINAL QUESTION]: ")] += 1
    assert set(asked) == set(PHRASINGS) and len(PHRASINGS) == 66
    assert chisquare(list(asked.values())).pvalue > 1e-3


def test_evaluation_asks_in_the_one_phrasing_of_the_released_code(tmp_path: Path) -> None:
    config = config_of(2, _two_way(wording="released", varied=False))
    for episode in draw_rows(concept_pool(tmp_path, config), config, 20):
        question = episode["turns"][-1]["question"]
        assert question == "[FINAL QUESTION]: Based on the previous examples, what is in the image?"


def test_dense_scoring_goes_by_names_and_not_by_the_sentences_around_them(tmp_path: Path) -> None:
    config = config_of(6, _two_way(wording="released", answers_scored="dense"))
    for episode in draw_rows(concept_pool(tmp_path, config), config, 50):
        met = set[str]()
        for turn in episode["turns"][:-1]:
            (name,) = (name for name in episode["names"] if f'"{name}"' in turn["answer"])
            assert turn["scored"] == (name in met)
            met.add(name)
        assert episode["turns"][-1]["scored"]
