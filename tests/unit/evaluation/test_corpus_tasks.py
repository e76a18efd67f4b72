from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.data.tasks.caption import NAME_QUESTION
from mmicl_core.data.wordings import WORDINGS
from mmicl_core.errors import DataError
from mmicl_core.evaluation.answering import request_of
from mmicl_core.evaluation.cells import lay_out
from mmicl_core.evaluation.controls import Shown
from mmicl_core.evaluation.demonstrations import choose
from mmicl_core.evaluation.tasks.base import Item, Prediction, Task
from mmicl_core.evaluation.tasks.corpus import CorpusPictures, EpisodeTask, KindTask, TrueNameTask, TwoWayTask
from tests.unit.evaluation.tasks.scoring import columns_of, numbers_of

NAMES = {"cat": "bako", "cup": "mute"}


class NoPictures:
    """None is read to ask."""

    def read(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read")


def _row(
    key: str, concepts: Sequence[str], questions: Sequence[str], answers: Sequence[str]
) -> dict[str, Any]:
    turns = [
        {
            "picture": f"{key}-{place}",
            "question": question,
            "answer": answer,
            "concept": concept,
            "scored": False,
        }
        for place, (concept, question, answer) in enumerate(zip(concepts, questions, answers, strict=True))
    ]
    return {"id": key, "turns": turns, "names": [], "other": "", "answer": answers[-1]}


def _two_way(concepts: Sequence[str], key: str = "1-0", wording: str = "plain") -> dict[str, Any]:
    """An episode in which the last concept is asked for."""
    words = WORDINGS[wording]
    *shown, asked = concepts
    questions = [words.shown_question or "This is"] * len(shown)
    if questions:
        questions[0] = words.opening + questions[0]
    asked_question = words.asked_questions[0] if words.asked_questions else "This is"
    answers = [words.shown_answer.format(name=NAMES[concept]) for concept in shown]
    row = _row(
        key,
        concepts,
        [*questions, words.asked_prefix + asked_question],
        [*answers, words.asked_answer.format(name=NAMES[asked])],
    )
    (other,) = (name for concept, name in NAMES.items() if concept != asked)
    return row | {"names": list(NAMES.values()), "other": other}


MIXED = ["cat", "cup", "cup", "cat", "cup", "cat", "cat", "cup", "cat"]
"""Four demonstrations of both classes, and a query."""


def _task(concepts: Sequence[str] = MIXED, queries: int = 1, wording: str = "plain") -> TwoWayTask:
    rows = [_two_way(concepts, f"1-{number}", wording) for number in range(queries)]
    opening = WORDINGS[wording].opening
    return TwoWayTask(rows, NoPictures(), opening) if opening else TwoWayTask(rows, NoPictures())


def _shown(task: Task, shots: int, place: int = 0) -> Shown:
    """What is shown before a query."""
    questions = task.load()
    query = questions.queries[place]
    return Shown(query, tuple(choose(task, query, questions.pool, shots, "random", 1, None)))


def _key(item: Item) -> str:
    return item.id


def _concepts(items: Sequence[Item]) -> list[str]:
    return [item.facts["concept"] for item in items]


def test_questions_are_episodes_with_their_own_demonstrations() -> None:
    task = _task(queries=3)
    questions = task.load()
    assert [query.id for query in questions.queries] == ["1-0", "1-1", "1-2"]
    assert not questions.pool
    shown = _shown(task, 8, place=2)
    assert shown.query.pictures == ("1-2-8",)
    assert (shown.query.question, shown.query.answer) == ("This is", "bako")
    assert [item.pictures for item in shown.demonstrations] == [(f"1-2-{place}",) for place in range(8)]
    assert [item.answer for item in shown.demonstrations] == [NAMES[concept] for concept in MIXED[:-1]]


@pytest.mark.parametrize("shots", [2, 4, 6, 8])
def test_two_way_shows_as_many_of_both_classes_in_their_own_order(shots: int) -> None:
    shown = _shown(_task(), shots).demonstrations
    concepts = _concepts(shown)
    assert concepts.count("cat") == concepts.count("cup") == shots // 2
    places = [int(item.id.rpartition("/")[2]) for item in shown]
    assert places == sorted(places)


def test_two_way_of_an_odd_number_shows_one_more_of_either_class() -> None:
    task = _task(queries=20)
    for shots in (1, 3, 5, 7):
        more = [_concepts(_shown(task, shots, place).demonstrations).count("cat") for place in range(20)]
        assert set(more) == {shots // 2, shots // 2 + 1}


def test_two_way_shows_what_it_has_where_it_has_one_more_of_a_class() -> None:
    task = _task(["cat", "cup", "cat", "cup"], queries=20)
    for place in range(20):
        assert len(_shown(task, 3, place).demonstrations) == 3


def test_two_way_demonstrations_are_nested_over_shots() -> None:
    task = _task(queries=10)
    for place in range(10):
        sets = [{item.id for item in _shown(task, shots, place).demonstrations} for shots in range(9)]
        assert [len(one) for one in sets] == list(range(9))
        assert all(fewer < more for fewer, more in zip(sets, sets[1:], strict=False))


@pytest.mark.parametrize("kind", [TwoWayTask, KindTask])
def test_more_demonstrations_than_an_episode_has_are_refused(kind: type[EpisodeTask]) -> None:
    task = kind([_two_way(MIXED)], NoPictures())
    with pytest.raises(DataError, match="question 1-0 has 8 demonstrations, but 9 are asked for"):
        _shown(task, 9)


@pytest.mark.parametrize(
    ("said", "right", "other"),
    [
        ("bako", 1, 0),
        ("A Bako, I think.", 1, 0),
        ("mute", 0, 1),
        ("bako, not mute", 0, 0),
        ("mute bako", 0, 0),
        ("a cat", 0, 0),
        ("", 0, 0),
    ],
)
def test_two_way_answer_is_right_where_it_says_the_right_name_alone(
    said: str, right: int, other: int
) -> None:
    task = _task()
    assert task.score(task.load().queries[0], Prediction(said)) == {"right": right, "other": other}


def test_two_way_metrics_are_shares_of_answers_with_a_chance_of_one_half() -> None:
    task = _task(queries=5)
    columns = columns_of(task, task.load().queries, ["bako", "mute", "mute", "bako mute", "dine"])
    assert numbers_of(task.metrics, columns) == {"accuracy": 0.2, "named the other class": 0.4}
    assert task.metrics[0].chance == 0.5
    assert task.needs_its_own


@pytest.mark.parametrize("wording", WORDINGS)
def test_two_way_exchanged_gives_each_class_the_other_name_in_the_same_words(wording: str) -> None:
    task = _task(wording=wording)
    shown = _shown(task, 8)
    exchanged = task.exchanged(shown.query, shown.demonstrations)
    words = WORDINGS[wording].shown_answer
    for before, after in zip(shown.demonstrations, exchanged, strict=True):
        (other,) = (name for concept, name in NAMES.items() if concept != before.facts["concept"])
        assert after.answer == words.format(name=other)
        assert (after.id, after.pictures, after.question) == (before.id, before.pictures, before.question)
    assert task.exchanged(shown.query, exchanged) == list(shown.demonstrations)


@pytest.mark.parametrize("wording", WORDINGS)
def test_two_way_counterpart_asks_the_last_of_the_other_class_in_the_words_of_the_query(wording: str) -> None:
    task = _task(wording=wording)
    shown = _shown(task, 8)
    turned = task.counterpart(shown.query, shown.demonstrations)
    assert turned is not None
    query, demonstrations = turned
    last = shown.demonstrations[7]
    assert (query.id, query.pictures) == (shown.query.id, last.pictures)
    assert query.question == shown.query.question
    assert query.answer == WORDINGS[wording].asked_answer.format(name="mute")
    assert task.score(query, Prediction("mute")) == {"right": 1, "other": 0}
    assert task.score(query, Prediction("bako")) == {"right": 0, "other": 1}
    assert demonstrations == [item for item in shown.demonstrations if item is not last]


def test_two_way_counterpart_can_be_answered_from_what_is_still_shown() -> None:
    task = _task(queries=20)
    for shots in range(1, 9):
        for place in range(20):
            shown = _shown(task, shots, place)
            turned = task.counterpart(shown.query, shown.demonstrations)
            if turned is None:
                assert _concepts(shown.demonstrations).count("cup") < 2
            else:
                assert set(_concepts(turned[1])) == {"cat", "cup"}


@pytest.mark.parametrize("shots", [2, 4, 8])
def test_opening_of_a_wording_stands_before_the_first_demonstration_that_is_shown(shots: int) -> None:
    opening = WORDINGS["released"].opening
    shown = _shown(_task(wording="released"), shots)
    for demonstrations in (shown.demonstrations, shown.demonstrations[::-1]):
        first, *others = request_of(
            _task(wording="released"), Shown(shown.query, demonstrations), "chat"
        ).turns
        assert first.question.startswith(opening)
        assert not any(opening in turn.question for turn in others)
    (asked,) = request_of(_task(wording="released"), Shown(shown.query, ()), "chat").turns
    assert opening not in asked.question


def _kind_row(key: str, kinds: Sequence[str]) -> dict[str, Any]:
    concepts = [f"{kind}-{place}" for place, kind in enumerate(kinds)]
    return _row(key, concepts, ["What kind is it?"] * len(kinds), kinds)


KINDS = ["cups", "boats", "cats", "trees", "cats"]


@pytest.mark.parametrize("shots", [1, 2, 3, 4])
def test_kind_always_shows_the_one_of_the_querys_kind(shots: int) -> None:
    task = KindTask([_kind_row("1-0", KINDS)], NoPictures())
    shown = _shown(task, shots).demonstrations
    assert len(shown) == shots
    assert [item.answer for item in shown].count("cats") == 1
    assert [item.id for item in shown] == sorted(item.id for item in shown)
    assert set(map(_key, shown)) <= set(map(_key, _shown(task, 4).demonstrations))


def test_kind_shows_as_another_querys_demonstrations_what_has_other_answers() -> None:
    kinds = [["cups", "boats", "cups"], ["trees", "cups", "cups"], ["cats", "hats", "cats"]]
    task = KindTask([_kind_row(f"1-{number}", row) for number, row in enumerate(kinds)], NoPictures())
    plain, other = lay_out(task, EvaluateConfig(shots=(2,), controls=("other",))).cells
    shown = [one.demonstrations for one in plain.shown]
    # The second question stands next to the first, but one of its demonstrations is of the first one's kind.
    assert [one.demonstrations for one in other.shown] == [shown[2], shown[2], shown[0]]
    assert [one.query for one in other.shown] == [one.query for one in plain.shown]


@pytest.mark.parametrize("task_name", ["kind", "true_name"])
@pytest.mark.parametrize(
    ("said", "right"), [("cats", 1), (" Cats ", 1), ("a kind of cats", 0), ("cat", 0), ("", 0)]
)
def test_answer_of_one_name_has_to_be_the_name_and_nothing_else(
    task_name: str, said: str, right: int
) -> None:
    rows = [_kind_row("1-0", KINDS)]
    tasks: Mapping[str, Task] = {
        "kind": KindTask(rows, NoPictures()),
        "true_name": TrueNameTask(rows, NoPictures(), {"cats-4": "cats"}),
    }
    task = tasks[task_name]
    assert task.score(task.load().queries[0], Prediction(said)) == {"right": right}
    assert [metric.name for metric in task.metrics] == ["accuracy"]


def test_true_name_asks_for_the_name_of_the_corpus_without_demonstrations() -> None:
    task = TrueNameTask([_two_way(MIXED)], NoPictures(), {"cat": "red cat", "cup": "blue cup"})
    layout = lay_out(task, EvaluateConfig(shots=(0, 8), controls=("blank",)))
    (cell,) = layout.cells
    (shown,) = cell.shown
    assert (shown.query.question, shown.query.answer) == (NAME_QUESTION, "red cat")
    assert shown.query.pictures == ("1-0-8",)
    assert (cell.shots, shown.demonstrations) == (0, ())
    assert layout.left_out == {"8 shots are too many": 1, "blank does not apply": 1}
    with pytest.raises(DataError, match="true_name takes at most 0 demonstrations"):
        lay_out(task, EvaluateConfig(shots=(8,)))


def test_pictures_of_a_corpus_are_read_where_it_keeps_them() -> None:
    class Reader:
        def read(self, image: Mapping[str, Any]) -> bytes:
            return f"{image['path']} at {image['offset']}".encode()

    reader: Any = Reader()
    pictures = CorpusPictures({"cat__ink": {"path": "tiny-0.tar", "offset": 512}}, reader)
    assert pictures.read("cat__ink") == b"tiny-0.tar at 512"
