"""Scores: what counts as a right answer, and how sure a share is."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mmicl_core.evaluation.metrics import names_as_released, names_exactly, names_only, wilson_interval


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


@pytest.mark.parametrize(
    ("answer", "of_short", "of_long"),
    [
        ("an octopus", True, False),
        ("An Octopus Vacuum.", False, True),
        ("octopus vacuum, no octopus", False, False),
        ("octopus, octopus", True, False),
        ("octopus vacuum octopus vacuum", False, True),
        ("a vacuum", False, False),
    ],
)
def test_longer_of_two_names_is_meant_where_one_lies_in_the_other(
    answer: str, of_short: bool, of_long: bool
) -> None:
    assert names_only(answer, "octopus", "octopus vacuum") is of_short
    assert names_only(answer, "Octopus Vacuum", "octopus") is of_long


def _named(answer: str, one: str, other: str) -> set[str]:
    """Which of two names stand in an answer, apart from what stands inside the other one."""
    spans = {
        (start, start + len(name), name)
        for name in (one.lower(), other.lower())
        for start in range(len(answer))
        if answer.lower().startswith(name, start)
    }
    return {
        name
        for start, end, name in spans
        if not any(
            first <= start and end <= last and (first, last) != (start, end) for first, last, _ in spans
        )
    }


def test_right_name_alone_is_told_as_by_all_places_where_names_stand() -> None:
    rng = random.Random(1)
    names = ["cat", "cat fish", "Ice Cream", "dog", "big dog"]
    words = ["cat", "fish", "Cat fish", "ice cream", "big", "DOG", "and", "."]
    counts = Counter[bool]()
    for _ in range(3000):
        right, other = rng.sample(names, 2)
        answer = " ".join(rng.choice(words) for _ in range(rng.randrange(6)))
        expected = _named(answer, right, other) == {right.lower()}
        assert names_only(answer, right, other) is expected, (answer, right, other)
        counts[expected] += 1
    assert min(counts.values()) > 300


@pytest.mark.parametrize(
    ("answer", "right", "other", "counted"),
    [
        ('there is "icemic" in the image.', "icemic", "ice cream", True),
        ('There is "icemic"', "Icemic", "ice cream", True),
        ("Icemic", "icemic", "ice cream", False),
        ("icemic, not ice cream", "icemic", "ice cream", False),
        ("icemic, not Ice cream", "icemic", "ice cream", True),
        ("octopus vacuum", "octopus vacuum", "octopus", True),
        ("octopus vacuum", "octopus", "octopus vacuum", True),
        ("lady's slipper", "lady's slipper", "orchid", False),
        ("ladys slipper", "lady's slipper", "orchid", True),
    ],
)
def test_name_counts_as_in_the_released_code_slips_included(
    answer: str, right: str, other: str, counted: bool
) -> None:
    assert names_as_released(answer, right, other) is counted


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
