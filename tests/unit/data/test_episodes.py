from __future__ import annotations

from typing import Any, get_args

import pytest

from mmicl_core.config.data import EpisodeConfig, Part, ShotStage
from mmicl_core.data.episodes import Pool, build_pool, draw_episode
from mmicl_core.data.splits import Split
from tests.fakes import HELD_OUT_STYLE, TINY_STYLES, pair_rows

CATS = [f"cat-{number}" for number in range(6)]
CUPS = [f"cup-{number}" for number in range(6)]
LONERS = ["sun"]
STYLES = [*TINY_STYLES, "clay", "wool"]
SPLIT = Split(frozenset({"cat-0", "cat-1", "cup-0", "cup-1"}), HELD_OUT_STYLE)
DRAWS = 300
PARTS: tuple[Part, ...] = get_args(Part)


def _rows() -> list[dict[str, Any]]:
    rows = pair_rows([*CATS, *CUPS, *LONERS], STYLES)
    for row in rows:
        kind = "animals" if row["concept"] in CATS else "objects"
        row |= {"category": kind, "subcategory": row["concept"].partition("-")[0]}
    return rows


def _pool(part: Part = "train", neighbours: int = 100) -> Pool:
    return build_pool(_rows(), SPLIT, part, neighbours)


def _config(shots: int = 3, **settings: Any) -> EpisodeConfig:
    stages = (ShotStage(episodes=100_000, min_shots=shots, max_shots=shots),)
    return EpisodeConfig(**({"stages": stages} | settings))


def _draw(pool: Pool, config: EpisodeConfig, count: int = DRAWS) -> list[dict[str, Any]]:
    drawn = [draw_episode(number, pool, config) for number in range(count)]
    return [episode for episode in drawn if not isinstance(episode, str)]


def _concept(picture: str) -> str:
    return picture.partition("__")[0]


def _style(picture: str) -> str:
    return picture.partition("__")[2]


@pytest.mark.parametrize("part", PARTS)
def test_pool_holds_exactly_the_pictures_of_its_part(part: Part) -> None:
    pool = _pool(part)
    shown = {picture for pictures in pool.shown.values() for picture in pictures}
    asked = {picture for pictures in pool.asked.values() for picture in pictures}
    known = part in ("train", "known_concepts")
    rows = [row for row in _rows() if (row["concept"] in SPLIT.held_out_concepts) != known]
    drawn_by_hand = {row["picture"] for row in rows if row["style"] == HELD_OUT_STYLE}
    others = {row["picture"] for row in rows} - drawn_by_hand
    assert shown == others
    assert asked == (drawn_by_hand if part in ("known_concepts", "held_out_style") else others)


@pytest.mark.parametrize("shots", [1, 4])
@pytest.mark.parametrize("part", PARTS)
def test_episode_never_shows_the_picture_that_it_asks_about_and_none_twice(part: Part, shots: int) -> None:
    episodes = _draw(_pool(part), _config(shots, part=part))
    assert episodes
    for episode in episodes:
        pictures = [turn["picture"] for turn in episode["turns"]]
        assert len(pictures) == 2 * shots + 1
        assert len(set(pictures)) == len(pictures)


def test_episode_names_every_picture_by_its_concept_and_asks_for_the_right_name() -> None:
    rights = set()
    for episode in _draw(_pool(), _config()):
        name_of = dict(zip(episode["concepts"], episode["names"], strict=True))
        assert len(name_of) == 2
        for turn in episode["turns"]:
            assert turn["answer"] == name_of[_concept(turn["picture"])]
        assert episode["answer"] == episode["turns"][-1]["answer"]
        assert {episode["answer"], episode["other"]} == set(episode["names"])
        shown = [turn["answer"] for turn in episode["turns"][:-1]]
        assert all(shown.count(name) == episode["shots"] == 3 for name in episode["names"])
        rights.add(episode["names"].index(episode["answer"]))
    assert rights == {0, 1}


def test_episode_leaves_no_hint_in_the_order_of_its_demonstrations() -> None:
    episodes = _draw(_pool(), _config(), 1000)
    for place in (0, -2):
        anchor = sum(
            _concept(episode["turns"][place]["picture"]) == episode["concepts"][0] for episode in episodes
        )
        right = sum(episode["turns"][place]["answer"] == episode["answer"] for episode in episodes)
        # A fair coin leaves 0.5 +- 0.05 in one of 600 runs of 1,000 throws; the seed is fixed.
        assert 0.45 < anchor / len(episodes) < 0.55
        assert 0.45 < right / len(episodes) < 0.55
    orders = {tuple(turn["answer"] == episode["answer"] for turn in episode["turns"]) for episode in episodes}
    # Three of each class can stand in 20 orders.
    assert len(orders) == 20


def test_episode_is_a_function_of_seed_and_number() -> None:
    pool, config = _pool(), _config()
    shuffled = build_pool(reversed(_rows()), SPLIT, "train", 100)
    forwards = [draw_episode(number, pool, config) for number in range(50)]
    backwards = [draw_episode(number, shuffled, config) for number in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert forwards != [draw_episode(number, pool, _config(seed=1)) for number in range(50)]
    assert forwards[0] != forwards[1] | {"episode": 0}


def test_hard_negative_is_of_the_same_subcategory_where_there_is_one() -> None:
    pool = _pool()
    for episode in _draw(pool, _config()):
        anchor, negative = (pool.concepts[name] for name in episode["concepts"])
        assert anchor != negative
        # The sun is alone in its subcategory, and its category is that of the cups.
        near = anchor.subcategory if anchor.concept != "sun" else "cup"
        assert negative.subcategory == near


def test_share_of_hard_negatives_is_as_asked() -> None:
    pool = _pool()
    episodes = _draw(pool, _config(hard_negative_share=0.0), 1000)
    other = sum(len({pool.concepts[c].subcategory for c in episode["concepts"]}) == 2 for episode in episodes)
    # Of 9 concepts (4 cats, 4 cups, the sun) 12 of 36 pairs are of one subcategory; 0.05 is over 3 sigma.
    assert other / len(episodes) == pytest.approx(24 / 36, abs=0.05)


def test_nearer_neighbours_are_drawn_more_often() -> None:
    pool = _pool()
    ranks = [
        pool.neighbours[episode["concepts"][0]].index(episode["concepts"][1])
        for episode in _draw(pool, _config(), 1000)
        if episode["concepts"][0] != "sun"
    ]
    # Three neighbours with weights 3, 2, 1; 0.05 is three sigma of 900 draws.
    assert [ranks.count(rank) / len(ranks) for rank in range(3)] == pytest.approx(
        [3 / 6, 2 / 6, 1 / 6], abs=0.05
    )


@pytest.mark.parametrize("part", ["known_concepts", "held_out_style"])
def test_held_out_style_is_asked_about_and_never_shown(part: Part) -> None:
    for episode in _draw(_pool(part), _config(part=part)):
        *shown, query = [_style(turn["picture"]) for turn in episode["turns"]]
        assert query == HELD_OUT_STYLE
        assert HELD_OUT_STYLE not in shown


@pytest.mark.parametrize("caption_share", [0.0, 1.0])
def test_training_episode_holds_nothing_that_is_held_out(caption_share: float) -> None:
    for episode in _draw(_pool(), _config(caption_share=caption_share)):
        for turn in episode["turns"]:
            assert SPLIT.trains_on(_concept(turn["picture"]), _style(turn["picture"]))


def test_only_the_query_is_scored_unless_asked() -> None:
    for episode in _draw(_pool(), _config()):
        assert [turn["scored"] for turn in episode["turns"]] == [False] * 6 + [True]


def test_dense_scoring_marks_the_names_met_before_and_no_first_meeting() -> None:
    for episode in _draw(_pool(), _config(answers_scored="dense")):
        names = [turn["answer"] for turn in episode["turns"]]
        expected = [name in names[:place] for place, name in enumerate(names)]
        assert [turn["scored"] for turn in episode["turns"]] == expected
        assert expected.count(False) == 2


def test_one_question_stands_beside_all_pictures_of_an_episode() -> None:
    asked = set()
    for episode in _draw(_pool(), _config(questions=("This is", "Name:"))):
        (question,) = {turn["question"] for turn in episode["turns"]}
        asked.add(question)
    assert asked == {"This is", "Name:"}


def test_shots_follow_the_stages_in_rows_of_equal_number() -> None:
    stages = (
        ShotStage(episodes=20, min_shots=1, max_shots=1),
        ShotStage(episodes=40, min_shots=2, max_shots=4),
    )
    config = EpisodeConfig(stages=stages, same_shots_in_a_row=8)
    shots = [episode["shots"] for episode in _draw(_pool(), config, config.total)]
    assert shots[:20] == [1] * 20
    rows = [shots[start : start + 8] for start in range(20, 60, 8)]
    assert all(len(set(row)) == 1 for row in rows)
    assert {row[0] for row in rows} <= {2, 3, 4} and len({row[0] for row in rows}) > 1


def test_too_few_pictures_are_a_reason_that_names_the_number_needed() -> None:
    assert draw_episode(0, _pool(), _config(5)) == "fewer than two concepts have 6 pictures"
    assert isinstance(draw_episode(0, _pool(), _config(4)), dict)


def test_an_anchor_whose_neighbours_are_all_too_poor_is_a_reason() -> None:
    rows = [row for row in _rows() if row["concept"] in ("cat-2", "cup-2") or row["style"] == "ink"]
    pool = build_pool(rows, SPLIT, "train", 100)
    assert draw_episode(0, pool, _config()) == "no neighbour has 4 pictures"


@pytest.mark.parametrize("caption_share", [0.0, 1.0])
def test_a_part_without_pictures_is_a_reason(caption_share: float) -> None:
    empty = build_pool([], SPLIT, "train", 100)
    assert isinstance(draw_episode(0, empty, _config(caption_share=caption_share)), str)


def test_caption_episode_tells_the_truth_about_as_many_pictures_as_a_link_episode() -> None:
    pool = _pool()
    questions = set()
    for episode in _draw(pool, _config(caption_share=1.0)):
        assert episode["task"] == "caption" and len(episode["turns"]) == 7
        for turn in episode["turns"]:
            concept = pool.concepts[_concept(turn["picture"])]
            assert turn["scored"]
            assert turn["answer"].startswith(concept.name)
            described = turn["question"] == "Describe it:"
            assert described == (concept.subcategory in turn["answer"].removeprefix(concept.name))
            questions.add(turn["question"])
    assert questions == {"Name it:", "Describe it:"}
