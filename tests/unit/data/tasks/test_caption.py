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

CAPTION = {"type": "caption"}


def _draw(folder: Path, shots: int = 6, rows: Any = None, **settings: Any) -> list[dict[str, Any]]:
    config = config_of(shots, CAPTION, **settings)
    return draw_rows(concept_pool(folder, config, rows), config)


def test_caption_episode_tells_the_truth_about_as_many_pictures_as_a_two_way_episode(tmp_path: Path) -> None:
    questions = []
    for episode in _draw(tmp_path):
        assert episode["task"] == "caption" and len(episode["turns"]) == 7
        assert episode["shots_of_both_classes"] == 6
        assert episode["answer"] == episode["turns"][-1]["answer"]
        for turn in episode["turns"]:
            concept = concept_of(turn["picture"])
            name, kind = concept.replace("-", " "), concept.partition("-")[0]
            assert turn["scored"]
            if turn["question"] == "Name it:":
                assert turn["answer"] == name
            else:
                start, *words = turn["answer"].split(", ")
                assert start == f"{name} ({kind})"
                assert sorted(words) == sorted(
                    {kind, "thing", concept} if kind != concept else [kind, kind, "thing"]
                )
            questions.append(turn["question"])
    assert set(questions) == {"Name it:", "Describe it:"}
    assert chisquare([questions.count(question) for question in set(questions)]).pvalue > 1e-3


def test_description_without_a_taxonomy_is_the_caption_and_without_both_the_name(tmp_path: Path) -> None:
    bare = {"keywords": None, "subcategory": None}
    rows = [
        row | bare | {"text": f"seen: {row['picture']}" if row["style"] == "ink" else None}
        for row in concept_rows()
    ]
    met = set()
    for episode in _draw(tmp_path, rows=rows):
        for turn in episode["turns"]:
            captioned = turn["question"] == "Describe it:" and style_of(turn["picture"]) == "ink"
            name = concept_of(turn["picture"]).replace("-", " ")
            assert turn["answer"] == (f"seen: {turn['picture']}" if captioned else name)
            met.add((turn["question"], captioned))
    assert len(met) == 3


@pytest.mark.parametrize("missing", ["keywords", "subcategory"])
def test_description_with_half_a_taxonomy_says_what_is_there(tmp_path: Path, missing: str) -> None:
    rows = [row | {missing: None, "text": "a caption"} for row in concept_rows()]
    for episode in _draw(tmp_path, rows=rows):
        for turn in episode["turns"]:
            if turn["question"] == "Describe it:":
                assert ("(" in turn["answer"]) == (missing == "keywords")
                assert ("thing" in turn["answer"]) == (missing == "subcategory")


def test_no_picture_of_a_caption_episode_is_met_twice(tmp_path: Path) -> None:
    for episode in _draw(tmp_path, shots=16):
        assert len(set(pictures_of(episode))) == 17


@pytest.mark.parametrize("part", ["known_concepts", "held_out_style"])
def test_caption_query_is_of_the_pictures_that_its_part_asks_about(tmp_path: Path, part: Part) -> None:
    for episode in _draw(tmp_path, part=part):
        *shown, query = map(style_of, pictures_of(episode))
        assert query == HELD_OUT_STYLE and HELD_OUT_STYLE not in shown


def test_too_few_distinct_pictures_for_captions_are_a_reason(tmp_path: Path) -> None:
    rows = [{"group": "a", "picture": f"a__{number}"} for number in range(4)]
    config = config_of(4, CAPTION)
    reasons = reasons_of(concept_pool(tmp_path, config, rows, lists={}), config)
    assert reasons == {"caption: too few pictures unlike the one asked about"}


def test_concept_without_a_name_is_never_captioned(tmp_path: Path) -> None:
    rows = [row | {"name": None} if row["group"] == "sun" else row for row in concept_rows()]
    met = {concept_of(picture) for episode in _draw(tmp_path, rows=rows) for picture in pictures_of(episode)}
    assert len(met) == 8 and "sun" not in met
