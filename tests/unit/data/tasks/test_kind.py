from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from mmicl_core.config.episodes import Part
from tests.fakes import HELD_OUT_STYLE
from tests.unit.data.draws import (
    concept_of,
    concept_pool,
    concept_rows,
    config_of,
    draw_rows,
    pictures_of,
    reasons_of,
    style_of,
)


def _draw(folder: Path, demonstrations: int, rows: Any = None, **settings: Any) -> list[dict[str, Any]]:
    config = config_of(6, {"type": "kind", "demonstrations": demonstrations}, **settings)
    return draw_rows(concept_pool(folder, config, rows), config)


def _kind(picture: str) -> str:
    return concept_of(picture).partition("-")[0]


def test_kind_is_asked_without_demonstrations_and_scored(tmp_path: Path) -> None:
    episodes = _draw(tmp_path, 0)
    for episode in episodes:
        (turn,) = episode["turns"]
        assert turn["question"] == "What kind is it?" and turn["scored"]
        assert turn["answer"] == episode["answer"] == _kind(turn["picture"])
        assert episode["shots_of_both_classes"] == 0
    met = [concept_of(episode["turns"][0]["picture"]) for episode in episodes]
    assert chisquare([met.count(concept) for concept in set(met)]).pvalue > 1e-3


def test_one_demonstration_is_of_the_kind_that_is_asked_and_of_another_concept(tmp_path: Path) -> None:
    places = []
    for episode in _draw(tmp_path, 3):
        *shown, query = pictures_of(episode)
        assert len(shown) == 3
        assert [turn["answer"] for turn in episode["turns"]] == [
            _kind(picture) for picture in (*shown, query)
        ]
        assert [turn["scored"] for turn in episode["turns"]] == [False] * 3 + [True]
        alike = [place for place, picture in enumerate(shown) if _kind(picture) == _kind(query)]
        assert len(alike) == 1
        assert concept_of(shown[alike[0]]) != concept_of(query)
        assert len({concept_of(picture) for picture in shown}) == 3
        places += alike
    assert chisquare([places.count(place) for place in range(3)]).pvalue > 1e-3


@pytest.mark.parametrize("part", ["known_concepts", "held_out_style"])
def test_held_out_style_is_asked_about_and_never_shown(tmp_path: Path, part: Part) -> None:
    for episode in _draw(tmp_path, 2, part=part):
        *shown, query = pictures_of(episode)
        assert style_of(query) == HELD_OUT_STYLE
        assert HELD_OUT_STYLE not in {style_of(picture) for picture in shown}


def test_picture_that_looks_like_the_query_is_never_shown(tmp_path: Path) -> None:
    # Every picture of one style is the same picture, whatever concept it is said to be of.
    rows = [row | {"perceptual_hash": hash(row["style"]) % 2**62} for row in concept_rows()]
    for episode in _draw(tmp_path, 2, rows):
        *shown, query = pictures_of(episode)
        assert style_of(query) not in {style_of(picture) for picture in shown}


def test_corpus_without_kinds_or_with_too_few_is_a_reason(tmp_path: Path) -> None:
    bare = [row | {"subcategory": None} for row in concept_rows()]
    config = config_of(6, {"type": "kind"})
    assert reasons_of(concept_pool(tmp_path / "bare", config, bare), config) == {
        "kind: no concept has a kind"
    }
    config = config_of(6, {"type": "kind", "demonstrations": 99})
    told = reasons_of(concept_pool(tmp_path / "few", config), config)
    assert told == {"kind: fewer than 99 concepts of its kind and of others"}
