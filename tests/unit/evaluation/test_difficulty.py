from __future__ import annotations

from typing import Any

import pytest

from mmicl_core.evaluation.difficulty import add_intervals, render_difficulty
from mmicl_core.evaluation.metrics import wilson_interval
from tests.unit.evaluation.markup import parse, told


def _measured(**changes: Any) -> dict[str, Any]:
    counted = {"episodes": 200, "agreeing": 30, "examples": ["0-3", "0-9"]}
    histogram = {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "counts": [0, 3, 1, 0], "mean": 0.4}
    measured = {
        "episodes": 200,
        "class_similarity": histogram,
        "picture_similarity": {"positive": histogram, "negative": histogram | {"counts": [0, 0, 4, 0]}},
        "false_negatives": {
            "caption": {"episodes": 0, "agreeing": 0, "examples": []},
            "sha256": {"episodes": 200, "agreeing": 0, "examples": []},
            "perceptual_hash": counted,
            "any": counted,
        },
        "ranks": {
            "episodes": 180,
            "without_rank": 20,
            "bins": [[1, 5], [6, 6]],
            "observed": [0.75, 0.25],
            "expected": [0.5, 0.5],
        },
    }
    return measured | changes


def test_share_of_false_negatives_has_the_interval_of_its_own_episodes() -> None:
    kinds = add_intervals(_measured())["false_negatives"]
    assert kinds["perceptual_hash"]["share"] == 0.15
    assert kinds["perceptual_hash"]["interval"] == list(wilson_interval(30, 200))
    assert kinds["sha256"]["share"] == 0 and kinds["sha256"]["interval"][1] > 0
    assert (kinds["caption"]["share"], kinds["caption"]["interval"]) == (None, None)


def test_report_shows_shares_with_their_numbers_and_says_where_nothing_was_compared() -> None:
    shown = told("".join(render_difficulty(add_intervals(_measured()))))
    for words in (
        "15 % [10.7, 20.6] of 200",
        "0 % [0, 1.88] of 200",
        "nothing to compare",
        "0-3, 0-9",
        "20 it is none of them",
    ):
        assert words in shown


def test_histograms_leave_out_what_is_empty_at_their_ends_and_share_one_axis() -> None:
    page = "".join(render_difficulty(add_intervals(_measured(class_similarity=None, ranks=None))))
    described = (
        "positive, 0.25: 75.00 %; positive, 0.5: 25.00 %; negative, 0.25: 0.00 %; negative, 0.5: 100.00 %"
    )
    assert described in told(page).splitlines()


def test_ranks_show_what_was_observed_beside_what_is_expected() -> None:
    page = "".join(render_difficulty(add_intervals(_measured())))
    shown = told(page)
    for words in ("observed, 1-5: 75.00 %", "expected, 1-5: 50.00 %", "observed, 6: 25.00 %"):
        assert words in shown


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({"picture_similarity": None}, "no embedder"),
        ({"picture_similarity": {"positive": None, "negative": None}}, "have an embedding"),
        ({"class_similarity": None}, "2-way episodes"),
        ({"ranks": None}, "2-way episodes"),
    ],
)
def test_report_goes_without_what_was_not_measured(missing: dict[str, Any], words: str) -> None:
    page = "".join(render_difficulty(add_intervals(_measured(**missing))))
    assert words in told(page)
    assert sum(element == "svg" for element, _ in parse(page)) == 3
