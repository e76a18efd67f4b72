"""The page of a finished run."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmicl_core.evaluation.report import CONDITION_LABELS, ShownEpisode, accuracy_table, render_report
from tests.unit.evaluation.drawn import charts_of, texts


@pytest.fixture
def report() -> dict[str, Any]:
    score = {"accuracy": 0.75, "low": 0.6, "high": 0.85}
    return {
        "corpus": {"images": 10, "concepts": 4, "held_out_concepts": 2},
        "episodes": {"built": 5, "skipped_by_reason": {"no neighbour": 1}},
        "train": {
            "steps": 3,
            "world_size": 2,
            "zero_stage": 3,
            "partition": {"parameter": "p", "shard_elements": 8, "full_elements": 16},
            "loss_first": 2.0,
            "loss_last": 1.0,
        },
        "evaluation": {"shots": 8, "queries": 20} | dict.fromkeys(CONDITION_LABELS, score),
        "tokens": {"demonstration_full": 31.0, "demonstration_adapted": 6.0},
        "serve": {"answer": "bako", "expected": "bako", "ttft_ms_full": 20.0, "ttft_ms_pack": 9.0},
        "seconds": {"train": 12.0},
    }


def test_report_needs_nothing_from_elsewhere(report: dict[str, Any]) -> None:
    episode = ShownEpisode([(b"\x89PNG1", "bako"), (b"RIFF", "mute")], b"RIFF2", "bako", "bako", right=True)
    page = render_report(report, episode)
    assert not re.findall(r"(?:src|href)=(?!['\"]?data:)", page)
    assert page.count("<img") == 3
    assert "data:image/png" in page
    assert "data:image/webp" in page


def test_report_shows_an_answer_as_text_even_if_it_is_markup(report: dict[str, Any]) -> None:
    episode = ShownEpisode([], b"RIFF", "<script>x</script>", "bako", right=False)
    page = render_report(report, episode)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_report_tells_how_many_times_fewer_tokens_fused_demonstrations_cost(report: dict[str, Any]) -> None:
    page = render_report(report, ShownEpisode([], b"RIFF", "bako", "bako", right=True))
    assert "5.2 times fewer" in page
    assert ">248<" in page
    assert ">48<" in page
    assert "full demonstrations" in page and "fused demonstrations" in page


def test_report_shows_accuracies_with_their_intervals_beside_chance(report: dict[str, Any]) -> None:
    page = render_report(report, ShownEpisode([], b"RIFF", "bako", "bako", right=True))
    accuracies, tokens = charts_of(page)
    assert texts(accuracies).count("0.750 [0.600, 0.850]") == len(CONDITION_LABELS)
    assert {*CONDITION_LABELS.values(), "chance, 0.500: one of the two names, at random"} <= set(
        texts(accuracies)
    )
    assert "chance" not in tokens


def test_accuracy_table_leaves_out_what_was_not_measured(report: dict[str, Any]) -> None:
    del report["evaluation"]["swapped"]
    labels = [label for label, *_ in accuracy_table(report["evaluation"])]
    assert len(labels) == len(CONDITION_LABELS) - 1
    assert CONDITION_LABELS["swapped"] not in labels
