"""Scores: what counts as a right answer, and how sure a share is."""

from __future__ import annotations

import pytest

from mmicl_core.evaluation.metrics import names_exactly, names_only, wilson_interval


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("bako", True),
        ("Bako.", True),
        ("this is bako", True),
        ("mute", False),
        ("bako or mute", False),
        ("", False),
    ],
)
def test_answer_is_right_only_with_the_right_name_alone(answer: str, right: bool) -> None:
    assert names_only(answer, "bako", "mute") is right


@pytest.mark.parametrize(("answer", "right"), [("Cat", True), (" cat\n", True), ("cat face", False)])
def test_true_name_is_right_only_where_the_answer_is_nothing_else(answer: str, right: bool) -> None:
    assert names_exactly(answer, "cat") is right


def test_wilson_interval_agrees_with_a_worked_example() -> None:
    # 15 of 20 at 95 %, worked out by hand from Wilson's formula with z = 1.959964.
    low, high = wilson_interval(15, 20)
    assert low == pytest.approx(0.5313, abs=1e-4)
    assert high == pytest.approx(0.8881, abs=1e-4)


@pytest.mark.parametrize("trials", [1, 8, 200, 1000])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_wilson_interval_holds_the_share_and_stays_between_zero_and_one(trials: int, share: float) -> None:
    successes = int(share * trials)
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1


def test_wilson_interval_narrows_with_more_trials() -> None:
    few, many = wilson_interval(8, 10), wilson_interval(800, 1000)
    assert many[1] - many[0] < few[1] - few[0]
