from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.cells import Cell, Layout, lay_out, sampled
from mmicl_core.evaluation.controls import BLANK
from mmicl_core.evaluation.demonstrations import Alike
from mmicl_core.evaluation.tasks.base import Item, Metric, Questions, Task, mean_of

NAMES = {"bako": "mute", "mute": "bako"}


@dataclass(frozen=True)
class NoPictures:
    """None is read to lay questions out."""

    def read(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read")


class Pooled(Task):
    """Questions with a pool; two names can be exchanged, and every other query has a counterpart."""

    name = "pooled"
    source = "this test"
    metrics = (Metric("accuracy", mean_of("right")),)
    max_new_tokens = 4

    def __init__(self, queries: int = 6, pool: int = 30, most_shots: int | None = None) -> None:
        self._counts, self.most_shots = (queries, pool), most_shots

    def load(self) -> Questions:
        queries, pool = (
            [
                Item(f"{kind}{n}", (f"{kind}-picture-{n}",), "What?", ("bako", "mute")[n % 2])
                for n in range(count)
            ]
            for kind, count in zip(("query", "pool"), self._counts, strict=True)
        )
        return Questions(queries, pool, NoPictures())

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item] | None:
        return [replace(item, answer=NAMES[item.answer]) for item in demonstrations]

    def counterpart(self, query: Item, demonstrations: Sequence[Item]) -> tuple[Item, list[Item]] | None:
        if query.answer == "bako":
            return None
        return replace(query, answer="bako"), list(demonstrations)


class Owning(Pooled):
    """Each query has its own demonstrations, of names that three queries in a row share."""

    name = "owning"
    needs_its_own = True

    def __init__(self, queries: int = 6, names_of: int = 3) -> None:
        super().__init__(queries, pool=0)
        self._names_of = names_of

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item] | None:
        number = int(query.id.removeprefix("query"))
        names = [f"{name}{number // self._names_of}" for name in ("bako", "mute")]
        return [
            Item(f"{query.id}/{shot}", (f"{query.id}-{shot}",), "What?", names[shot % 2])
            for shot in range(shots)
        ]


def _laid_out(task: Task | None = None, similar: Any = None, **settings: Any) -> Layout:
    settings = {"controls": (), "shots": (0, 4), **settings}
    return lay_out(task or Pooled(), EvaluateConfig(**settings), similar)


def _told(layout: Layout) -> list[tuple[int, str | None]]:
    return [(cell.shots, cell.control) for cell in layout.cells]


def _queries(cell: Cell) -> list[str]:
    return [shown.query.id for shown in cell.shown]


def test_all_cells_have_the_same_queries_in_the_same_order() -> None:
    controls = ("swapped", "blank", "other", "reversed")
    layout = _laid_out(Pooled(queries=20), shots=(0, 2, 4), controls=controls, queries=7)
    plain = [(0, None), (2, None), (4, None)]
    assert _told(layout) == [*plain, *((4, control) for control in controls)]
    assert [item.id for item in layout.questions.queries] == _queries(layout.cells[0])
    assert len(layout.cells[0].shown) == 7
    for cell in layout.cells:
        assert [shown.query for shown in cell.shown] == list(layout.questions.queries)
        assert all(len(shown.demonstrations) == cell.shots for shown in cell.shown)
        assert cell.note == ""
    assert layout.left_out == {}


def test_queries_are_drawn_by_the_seed_and_stay_in_their_order() -> None:
    drawn = [_queries(_laid_out(Pooled(queries=40), seed=seed, queries=10).cells[0]) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(queries) for queries in drawn}) == 3
    for queries in drawn:
        numbers = [int(key.removeprefix("query")) for key in queries]
        assert len(set(numbers)) == 10
        assert numbers == sorted(numbers)


def test_what_is_sampled_is_all_where_there_is_no_more() -> None:
    items = list(Pooled(queries=5).load().queries)
    assert sampled(items, None, 1, "queries") == sampled(items, 5, 1, "queries") == items
    assert len(sampled(items, 4, 1, "queries")) == 4


def test_demonstrations_come_from_as_much_of_the_pool_as_is_allowed() -> None:
    def shown(**settings: Any) -> set[str]:
        layout = _laid_out(Pooled(queries=30), shots=(4,), **settings)
        return {item.id for one in layout.cells[0].shown for item in one.demonstrations}

    assert len(shown()) > 20
    few = shown(pool=5)
    assert len(few) == 5
    assert few == shown(pool=5)
    assert few != shown(pool=5, seed=2)


def test_larger_number_of_shots_adds_to_the_smaller() -> None:
    layout = _laid_out(shots=(2, 4, 8))
    fewer, more, most = (
        [{item.id for item in one.demonstrations} for one in cell.shown] for cell in layout.cells
    )
    for place in range(len(fewer)):
        assert fewer[place] < more[place] < most[place]


def test_shots_that_a_task_cannot_take_are_left_out_and_counted() -> None:
    layout = _laid_out(Pooled(most_shots=4), shots=(0, 4, 8, 16), controls=("blank",))
    assert _told(layout) == [(0, None), (4, None), (4, "blank")]
    assert layout.left_out == {"8 shots are too many": 6, "16 shots are too many": 6}


def test_task_that_takes_none_of_the_shots_says_what_it_takes() -> None:
    with pytest.raises(DataError, match=r"pooled takes at most 1 demonstrations.* \[2, 8\]: add 1"):
        _laid_out(Pooled(most_shots=1), shots=(2, 8))


def test_control_that_does_not_apply_to_some_queries_is_counted_and_asks_the_others() -> None:
    layout = _laid_out(Pooled(queries=5), controls=("query_rule",))
    cell = layout.cells[-1]
    assert cell.control == "query_rule"
    assert _queries(cell) == ["query1", "query3"]
    assert layout.left_out == {"query_rule does not apply": 3}


def test_control_that_applies_to_no_query_is_no_cell() -> None:
    layout = _laid_out(shots=(0, 1), controls=("reversed", "shuffled"))
    assert _told(layout) == [(0, None), (1, None)]
    assert layout.left_out == {"reversed does not apply": 6, "shuffled does not apply": 6}


def test_control_changes_the_cell_with_the_most_demonstrations() -> None:
    plain, blank = _laid_out(shots=(2, 4), controls=("blank",)).cells[1:]
    for before, after in zip(plain.shown, blank.shown, strict=True):
        assert [(BLANK + item.pictures[0],) for item in before.demonstrations] == [
            item.pictures for item in after.demonstrations
        ]


def test_other_gives_each_query_the_demonstrations_of_the_next() -> None:
    plain, other = _laid_out(shots=(4,), controls=("other",)).cells
    following = [*plain.shown[1:], plain.shown[0]]
    assert [one.demonstrations for one in other.shown] == [one.demonstrations for one in following]


def test_other_gives_what_says_something_else_where_queries_have_their_own() -> None:
    plain, other = _laid_out(Owning(), shots=(4,), controls=("other",)).cells
    for before, after in zip(plain.shown, other.shown, strict=True):
        names, others = ({item.answer for item in one.demonstrations} for one in (before, after))
        assert not names & others, before.query.id


def test_other_does_not_apply_to_a_single_query() -> None:
    layout = _laid_out(Pooled(queries=1), shots=(4,), controls=("other",))
    assert layout.left_out == {"other does not apply": 1}


def test_no_shots_in_the_words_of_open_flamingo_are_two_demonstrations_without_pictures() -> None:
    zero, four = _laid_out(style="open_flamingo", shots=(0, 4)).cells
    assert (zero.shots, zero.note) == (0, "2 demonstrations without pictures")
    assert four.note == ""
    for text_only, shown in zip(zero.shown, four.shown, strict=True):
        assert text_only.query == shown.query
        assert text_only.query.pictures
        assert list(text_only.demonstrations) == [
            replace(item, pictures=()) for item in shown.demonstrations[:2]
        ]


def test_task_without_demonstrations_has_none_in_the_words_of_open_flamingo() -> None:
    (cell,) = _laid_out(Pooled(most_shots=0), style="open_flamingo", shots=(0,)).cells
    assert all(not shown.demonstrations for shown in cell.shown)
    assert cell.note == ""


def test_task_without_questions_is_refused() -> None:
    with pytest.raises(DataError, match="task pooled has no questions: this test"):
        _laid_out(Pooled(queries=0))


def test_task_without_a_pool_is_asked_without_demonstrations_alone() -> None:
    assert _told(_laid_out(Pooled(pool=0), shots=(0,))) == [(0, None)]
    with pytest.raises(DataError, match="pooled has 0 answered items"):
        _laid_out(Pooled(pool=0), shots=(0, 1))


@dataclass
class Ranking:
    """Ranks the pool from its end, and remembers what it was asked to compare."""

    asked: list[Questions]

    def __call__(self, questions: Questions) -> Alike:
        self.asked.append(questions)
        return lambda query: range(len(questions.pool) - 1, -1, -1)


@pytest.mark.parametrize(("style", "shots"), [("chat", (0, 2)), ("open_flamingo", (0,))])
def test_similar_demonstrations_are_the_first_of_a_ranking_of_the_whole_pool(
    style: str, shots: tuple[int, ...]
) -> None:
    ranking = Ranking([])
    layout = _laid_out(
        Pooled(queries=20), ranking, demonstrations="similar", shots=shots, pool=5, queries=4, style=style
    )
    (questions,) = ranking.asked
    assert len(questions.pool) == 30
    assert len(questions.queries) == 4
    assert all(
        [item.id for item in shown.demonstrations] == ["pool28", "pool29"] for shown in layout.cells[-1].shown
    )


@pytest.mark.parametrize(("how", "shots"), [("random", 2), ("similar", 0)])
def test_nothing_is_compared_where_no_similar_demonstrations_are_shown(how: str, shots: int) -> None:
    ranking = Ranking([])
    _laid_out(similar=ranking, demonstrations=how, shots=(shots,))
    assert not ranking.asked


class Seen(Pooled):
    """The one demonstration of the last query is about the picture of the one before."""

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item]:
        shown = "query-picture-1" if query.id == "query2" else f"shown-{query.id}"
        return [Item(f"about-{query.id}", (shown,), "What?", f"answer-{query.id}")]


def test_other_never_shows_the_picture_that_is_asked_about() -> None:
    _, other = _laid_out(Seen(queries=3), shots=(1,), controls=("other",)).cells
    for shown in other.shown:
        keys = {key for item in shown.demonstrations for key in item.pictures}
        assert not keys & set(shown.query.pictures), shown.query.id
