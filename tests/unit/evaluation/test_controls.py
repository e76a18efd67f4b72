from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest

from mmicl_core.config.evaluate import Control
from mmicl_core.evaluation.controls import BLANK, CONTROLS, Shown, change, expected
from mmicl_core.evaluation.tasks.base import Item, Metric, Questions, Task, mean_of

NAMES = {"bako": "mute", "mute": "bako"}
SHUFFLES = 30


class Naming(Task):
    """Two names, and a query of the other one where the query says so."""

    name = "naming"
    source = "this test"
    metrics = (Metric("accuracy", mean_of("right")),)
    max_new_tokens = 4

    def load(self) -> Questions:
        raise AssertionError("a control reads no files")

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item] | None:
        if "two" not in query.facts:
            return None
        return [replace(item, answer=NAMES[item.answer]) for item in demonstrations]

    def counterpart(self, query: Item, demonstrations: Sequence[Item]) -> tuple[Item, list[Item]] | None:
        if "two" not in query.facts:
            return None
        return replace(query, pictures=("turned",), answer=NAMES[query.answer]), list(demonstrations[1:])


TASK = Naming()


def _shown(
    answers: Sequence[str] = ("bako", "mute", "mute", "bako"),
    key: str = "q",
    pictures: int = 1,
    two: bool = True,
) -> Shown:
    demonstrations = tuple(
        Item(f"{key}/{place}", tuple(f"{key}-{place}-{n}" for n in range(pictures)), f"{place}?", answer)
        for place, answer in enumerate(answers)
    )
    facts = {"two": True} if two else {}
    query = Item(key, (key,), "What?", "bako", ("bako", "a bako"), "group", facts)
    return Shown(query, demonstrations)


OTHER = _shown(key="other")


def _change(shown: Shown, control: Control, other: Shown = OTHER, seed: int = 1) -> Shown | None:
    return change(TASK, shown, control, other, seed)


def _changed(shown: Shown, control: Control, other: Shown = OTHER, seed: int = 1) -> Shown:
    changed = _change(shown, control, other, seed)
    assert changed is not None
    return changed


def _answers(shown: Shown) -> list[str]:
    return [item.answer for item in shown.demonstrations]


def _without_answers(shown: Shown) -> list[Item]:
    return [replace(item, answer="") for item in shown.demonstrations]


def test_every_control_has_a_label() -> None:
    assert set(CONTROLS) == set(get_args(Control))
    assert len(set(CONTROLS.values())) == len(CONTROLS)


@pytest.mark.parametrize("control", [control for control in CONTROLS if control != "query_rule"])
def test_query_and_what_counts_as_right_stay_as_they_are(control: Control) -> None:
    shown = _shown()
    changed = _changed(shown, control)
    assert changed.query == shown.query
    assert changed.demonstrations != shown.demonstrations
    assert len(changed.demonstrations) == len(shown.demonstrations)


@pytest.mark.parametrize("control", CONTROLS)
def test_query_without_demonstrations_has_no_control(control: Control) -> None:
    assert _change(_shown(()), control) is None


def test_shuffled_deals_the_same_answers_out_in_another_order() -> None:
    orders = set()
    for number in range(SHUFFLES):
        shown = _shown(("bako", "mute", "mute", "bako", "dine"), f"q{number}")
        changed = _changed(shown, "shuffled")
        assert sorted(_answers(changed)) == sorted(_answers(shown))
        assert _answers(changed) != _answers(shown)
        assert _without_answers(changed) == _without_answers(shown)
        orders.add(tuple(_answers(changed)))
    assert len(orders) > 5


def test_shuffled_of_two_different_answers_exchanges_them() -> None:
    assert all(
        _answers(_changed(_shown(("bako", "mute")), "shuffled", seed=seed)) == ["mute", "bako"]
        for seed in range(SHUFFLES)
    )


def test_shuffled_depends_on_seed_and_query_alone() -> None:
    shown = _shown(("bako", "mute", "dine", "vole", "pami"))
    changed = _changed(shown, "shuffled", seed=4)
    assert _changed(shown, "shuffled", _shown(key="somebody else"), seed=4) == changed
    assert any(_changed(shown, "shuffled", seed=seed) != changed for seed in range(5))
    same_answers = [_shown(tuple(_answers(shown)), f"q{number}") for number in range(5)]
    assert len({tuple(_answers(_changed(one, "shuffled", seed=4))) for one in same_answers}) > 1


@pytest.mark.parametrize("answers", [("bako",), ("mute", "mute", "mute")])
def test_shuffled_does_not_apply_where_all_answers_are_equal(answers: Sequence[str]) -> None:
    assert _change(_shown(answers), "shuffled") is None


def test_swapped_gives_each_class_the_name_of_the_other() -> None:
    shown = _shown()
    changed = _changed(shown, "swapped")
    assert _answers(changed) == ["mute", "bako", "bako", "mute"]
    assert _without_answers(changed) == _without_answers(shown)


@pytest.mark.parametrize("control", ["swapped", "query_rule"])
def test_control_of_two_answers_does_not_apply_where_a_task_has_none(control: Control) -> None:
    assert _change(_shown(two=False), control) is None


@pytest.mark.parametrize("pictures", [1, 3])
def test_blank_marks_every_picture_of_the_demonstrations_and_keeps_their_number(pictures: int) -> None:
    shown = _shown(pictures=pictures)
    changed = _changed(shown, "blank")
    for before, after in zip(shown.demonstrations, changed.demonstrations, strict=True):
        assert after.pictures == tuple(BLANK + key for key in before.pictures)
        assert replace(after, pictures=before.pictures) == before


def test_blank_does_not_apply_where_demonstrations_have_no_pictures() -> None:
    assert _change(_shown(pictures=0), "blank") is None


def test_other_shows_the_demonstrations_of_another_query() -> None:
    assert _changed(_shown(), "other").demonstrations == OTHER.demonstrations


def test_other_does_not_apply_where_another_query_has_the_same_demonstrations() -> None:
    shown = _shown()
    same = replace(OTHER, demonstrations=shown.demonstrations)
    assert _change(shown, "other", same) is None


def test_reversed_shows_the_last_demonstration_first() -> None:
    shown = _shown()
    assert _changed(shown, "reversed").demonstrations == shown.demonstrations[::-1]
    assert _change(_shown(("bako",)), "reversed") is None


def test_query_rule_asks_the_query_that_the_task_puts_in_its_place() -> None:
    shown = _shown()
    changed = _changed(shown, "query_rule")
    assert (changed.query.pictures, changed.query.answer) == (("turned",), "mute")
    assert changed.demonstrations == shown.demonstrations[1:]


@pytest.mark.parametrize(
    ("control", "with_own", "without_own"),
    [
        ("shuffled", "falls", "falls"),
        ("swapped", "falls", "falls"),
        ("blank", "falls", "falls"),
        ("other", "falls", "stays"),
        ("reversed", "stays", "stays"),
        ("query_rule", "stays", "stays"),
    ],
)
def test_model_that_learns_is_expected_to_fall_where_demonstrations_lose_what_they_say(
    control: Control, with_own: str, without_own: str
) -> None:
    assert expected(control, own=True) == with_own
    assert expected(control, own=False) == without_own
