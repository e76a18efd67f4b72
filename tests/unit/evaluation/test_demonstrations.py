from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import get_args

import pytest

from mmicl_core.config.evaluate import Choice
from mmicl_core.errors import DataError
from mmicl_core.evaluation.demonstrations import choose
from mmicl_core.evaluation.tasks.base import Item, Metric, Questions, Task, mean_of

CHOICES: tuple[Choice, ...] = get_args(Choice)
MANY = 40


class Pooled(Task):
    """Any of the pool will do."""

    name = "pooled"
    source = "this test"
    metrics = (Metric("accuracy", mean_of("right")),)
    max_new_tokens = 4

    def load(self) -> Questions:
        raise AssertionError("demonstrations are chosen from what was read")


class Owning(Pooled):
    """Each query has its own demonstrations."""

    name = "owning"

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item] | None:
        drawn = rng.random()
        return [Item(f"{query.id}/{place}", (), "", str(drawn)) for place in range(shots)]


def _pool(count: int = MANY, picture: str = "p{}") -> list[Item]:
    """Every third one is of the answer bako."""
    return [
        Item(str(place), (picture.format(place),), "What?", "mute" if place % 3 else "bako")
        for place in range(count)
    ]


def _query(key: str = "q", *pictures: str) -> Item:
    return Item(key, pictures or ("asked",), "What?", "bako")


def _from_the_middle(pool: Sequence[Item]) -> Callable[[Item], Sequence[int]]:
    """What ranks places nearest to the middle of the pool first."""
    ranked = sorted(range(len(pool)), key=lambda place: (abs(place - len(pool) // 2), place))
    return lambda query: ranked


def _ids(
    how: Choice, shots: int, query: Item | None = None, seed: int = 1, pool: Sequence[Item] | None = None
) -> list[str]:
    some = _pool() if pool is None else pool
    chosen = choose(Pooled(), query or _query(), some, shots, how, seed, _from_the_middle(some))
    assert all(item in some for item in chosen)
    return [item.id for item in chosen]


@pytest.mark.parametrize("how", CHOICES)
def test_demonstrations_are_as_many_as_asked_for_and_no_item_is_shown_twice(how: Choice) -> None:
    for shots in (0, 1, 2, 5, 8):
        chosen = _ids(how, shots)
        assert len(chosen) == len(set(chosen)) == shots


@pytest.mark.parametrize("how", CHOICES)
def test_demonstrations_are_a_function_of_seed_and_query(how: Choice) -> None:
    first = _ids(how, 6)
    random.seed(5)
    assert _ids(how, 6) == first


@pytest.mark.parametrize("how", ["random", "fixed", "hard"])
def test_another_seed_draws_other_demonstrations(how: Choice) -> None:
    assert len({tuple(_ids(how, 6, seed=seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(("how", "different"), [("random", 20), ("fixed", 1)])
def test_random_is_drawn_for_each_query_and_fixed_is_the_same_for_all(how: Choice, different: int) -> None:
    chosen = {tuple(_ids(how, 6, _query(f"q{number}"))) for number in range(20)}
    assert len(chosen) == different


def test_random_draws_every_item_of_the_pool_about_as_often() -> None:
    counts = dict.fromkeys((item.id for item in _pool(10)), 0)
    for number in range(300):
        for key in _ids("random", 3, _query(f"q{number}"), pool=_pool(10)):
            counts[key] += 1
    # 90 of each are expected, with a deviation of 8.
    assert all(50 < count < 130 for count in counts.values())


@pytest.mark.parametrize("how", CHOICES)
def test_more_demonstrations_are_a_superset_of_fewer(how: Choice) -> None:
    for number in range(10):
        query = _query(f"q{number}")
        sets = [set(_ids(how, shots, query)) for shots in range(9)]
        assert all(fewer < more for fewer, more in zip(sets, sets[1:], strict=False))


@pytest.mark.parametrize("how", CHOICES)
def test_picture_of_the_query_is_never_shown(how: Choice) -> None:
    pool = _pool(12)
    again = [Item(f"again/{item.id}", ("more", *item.pictures), "What else?", item.answer) for item in pool]
    query = _query("q", "p5", "p6", "p7")
    for seed in range(10):
        chosen = _ids(how, 8, query, seed, [*pool, *again])
        assert not {key.removeprefix("again/") for key in chosen} & {"5", "6", "7"}


def test_fixed_leaves_out_the_picture_of_a_query_for_that_query_alone() -> None:
    fixed = _ids("fixed", 4)
    asked = _ids("fixed", 4, _query("q", f"p{fixed[0]}"))
    assert asked[:3] == fixed[1:]
    assert asked[3] not in fixed


def test_similar_shows_the_nearest_with_the_most_similar_last() -> None:
    assert _ids("similar", 5, pool=_pool(20)) == ["12", "8", "11", "9", "10"]


@pytest.mark.parametrize(("shots", "of_another_answer"), [(2, 1), (4, 2), (8, 4), (5, 2), (1, 0)])
def test_hard_shows_the_nearest_of_which_half_have_another_answer(shots: int, of_another_answer: int) -> None:
    pool, query = _pool(), _query()
    nearest = [pool[place] for place in _from_the_middle(pool)(query)]
    chosen = set(_ids("hard", shots))
    other = [item.id for item in nearest if item.answer != query.answer][:of_another_answer]
    same = [item.id for item in nearest if item.answer == query.answer][: shots - of_another_answer]
    assert chosen == {*other, *same}


def test_hard_has_no_place_for_the_right_answer() -> None:
    answers = {item.id: item.answer for item in _pool()}
    last = [answers[_ids("hard", 4, _query(f"q{number}"))[-1]] for number in range(60)]
    # 30 are expected, with a deviation of 3.9.
    assert 15 < last.count("bako") < 45


def test_hard_fills_up_with_other_answers_where_few_are_like_the_querys() -> None:
    pool = [Item(str(place), (f"p{place}",), "What?", "mute") for place in range(9)]
    pool[3] = Item("3", ("p3",), "What?", "bako")
    chosen = _ids("hard", 6, pool=pool)
    assert len(chosen) == 6
    assert "3" in chosen


@pytest.mark.parametrize("how", CHOICES)
def test_too_few_items_are_told_with_how_many_there_are(how: Choice) -> None:
    query = _query("17", "p0")
    told = rf"pooled has 4 answered items for {how} demonstrations of question 17, but 6 .* evaluate\.shots"
    with pytest.raises(DataError, match=told):
        _ids(how, 6, query, pool=[*_pool(5)])


def test_empty_pool_is_told() -> None:
    with pytest.raises(DataError, match="pooled has 0 answered items"):
        _ids("random", 1, pool=[])


@pytest.mark.parametrize("how", CHOICES)
def test_demonstrations_of_a_querys_own_are_taken_whatever_is_asked_for(how: Choice) -> None:
    chosen = choose(Owning(), _query(), _pool(), 3, how, 1, None)
    assert [item.id for item in chosen] == ["q/0", "q/1", "q/2"]
    assert choose(Owning(), _query(), _pool(), 3, how, 1, None) == chosen
    for key, seed in (("q", 2), ("another", 1)):
        assert choose(Owning(), _query(key), (), 3, how, seed, None)[0].answer != chosen[0].answer


def test_no_demonstrations_need_no_pool() -> None:
    assert choose(Pooled(), _query(), (), 0, "similar", 1, None) == []
