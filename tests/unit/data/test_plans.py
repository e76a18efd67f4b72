from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmicl_core.data.plans import NO_PICTURE, Plan, Slot, episode_id, parse_id, render
from mmicl_core.data.pool import Catalogues, Pool, open_pool
from mmicl_core.data.schema import EPISODE
from mmicl_core.errors import DataError
from tests.fakes import write_catalogue
from tests.unit.data.draws import concept_rows, config_of, near_concepts


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    by_concept = write_catalogue(tmp_path / "concept", concept_rows(), buckets=4)
    tasks = [{"group": "vqa", "picture": f"vqa-{n}", "concept": None} for n in range(3)]
    catalogues = Catalogues(concept=by_concept, task=write_catalogue(tmp_path / "task", tasks))
    config = config_of(2, {"type": "two_way"}, {"type": "instruction"})
    return open_pool(catalogues, near_concepts(by_concept), config)


def _link(number: int, pictures: list[int], **more: Any) -> Plan:
    answers = [f"answer {picture}" for picture in pictures]
    scored = [False] * (len(pictures) - 1) + [True]
    questions = ["This is"] * len(pictures)
    shots = len(pictures) - 1
    return Plan(Slot(3, number, shots), "two_way", pictures, questions, answers, scored, shots, **more)


def _talk(number: int) -> Plan:
    pictures = [2, NO_PICTURE, NO_PICTURE]
    return Plan(
        Slot(3, number, 0), "instruction", pictures, ["q1", "q2", "q3"], ["a1", "a2", "a3"], [True] * 3, 0
    )


def test_rendered_episode_says_where_the_bytes_of_its_pictures_lie(pool: Pool) -> None:
    catalogue = pool.section("two_way").catalogue
    plan = _link(
        5, [40, 7, 77], concepts=(9, 2), names=("lofa", "geti"), other="geti", rank=3, similarity=0.5
    )
    table = render([plan], pool)
    assert table.schema == EPISODE
    (row,) = table.to_pylist()
    looked_up = catalogue.take([40, 7, 77], ["picture", "image", "sha256", "concept"]).to_pylist()
    for turn, expected in zip(row.pop("turns"), looked_up, strict=True):
        told = {"question": "This is", "scored": expected is looked_up[-1]}
        answer = {"answer": f"answer {catalogue.scan('picture').to_pylist().index(expected['picture'])}"}
        assert turn == expected | told | answer
    assert row == {
        "episode": 5,
        "id": "3-5",
        "task": "two_way",
        "shots_of_both_classes": 2,
        "concepts": [catalogue.ids[9], catalogue.ids[2]],
        "names": ["lofa", "geti"],
        "rank": 3,
        "similarity": 0.5,
        "answer": "answer 77",
        "other": "geti",
    }


def test_turn_without_a_picture_has_nulls_for_it_and_its_words(pool: Pool) -> None:
    (row,) = render([_talk(1)], pool).to_pylist()
    first, *others = row["turns"]
    assert first["picture"] == "vqa-2" and first["image"]["member"] == "vqa-2" and first["concept"] is None
    for turn, number in zip(others, (2, 3), strict=True):
        assert turn["picture"] is turn["image"] is turn["sha256"] is turn["concept"] is None
        assert (turn["question"], turn["answer"], turn["scored"]) == (f"q{number}", f"a{number}", True)
    assert (row["concepts"], row["names"], row["rank"], row["similarity"]) == ([], [], None, None)


def test_row_of_an_episode_is_the_same_whatever_else_is_in_its_batch(pool: Pool) -> None:
    plans = [_link(0, [5, 3, 5]), _talk(1), _talk(2), _link(3, [70, 1], concepts=(0, 12)), _link(4, [9])]
    together = render(plans, pool)
    assert together.column("episode").to_pylist() == [0, 1, 2, 3, 4]
    for number, plan in enumerate(plans):
        assert render([plan], pool).to_pylist() == together.slice(number, 1).to_pylist()
    assert render(plans[::-1], pool).to_pylist() == together.to_pylist()[::-1]


def test_no_plans_are_no_rows(pool: Pool) -> None:
    assert render([], pool).equals(EPISODE.empty_table())


@pytest.mark.parametrize(("seed", "number"), [(0, 0), (17, 123_456_789), (-4, 2)])
def test_id_of_an_episode_leads_back_to_its_seed_and_number(seed: int, number: int) -> None:
    assert parse_id(episode_id(seed, number)) == (seed, number)


@pytest.mark.parametrize("text", ["", "7", "0-", "-1", "0--1", "0-1 ", "0-1-2-", "a-1", "0-1.5", "\u0663-1"])
def test_text_that_is_no_id_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(DataError, match="is not the id of an episode: it is SEED-NUMBER, as in 0-17"):
        parse_id(text)
