"""The committed corpus keeps what its docstring and its split promise."""

from __future__ import annotations

import io
from collections import Counter
from functools import cache
from typing import Any

import pytest
from PIL import Image

from mmicl_core.assets import resolve
from mmicl_core.config.episodes import CaptionConfig, EpisodeConfig, Part, ShotStage, TwoWayConfig
from mmicl_core.data.open_emoji import STYLES, THINGS
from mmicl_core.data.splits import Split
from mmicl_core.data.storage import Location
from tests.corpora import Opened, drawn_episodes, open_shards, read_shards

CORPUS = resolve("embedded:open_emoji")
SPLIT = Split.load(Location(str(CORPUS)))
LARGEST_CORPUS_BYTES = 16 * 2**20
TOLD = ("concept", "name", "keywords", "category", "subcategory", "style", "licence", "source")
ATTRIBUTION_FREE_TO_PASS_ON = {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT"}


@cache
def _rows() -> list[dict[str, Any]]:
    return [row.pair | {"encoded": row.encoded, "skipped": row.skipped} for row in read_shards(CORPUS)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Opened:
    return open_shards(CORPUS, tmp_path_factory.mktemp("catalogue"))


def _trains_on(row: dict[str, Any]) -> bool:
    return not SPLIT.holds_out(row["concept"]) and row["style"] != SPLIT.held_out_style


def test_committed_corpus_is_small_enough_and_wholly_usable() -> None:
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) <= LARGEST_CORPUS_BYTES
    assert Counter(row["skipped"] for row in _rows()).keys() == {None}
    assert len(_rows()) >= 7000
    keys = [row["picture"] for row in _rows()]
    assert len(set(keys)) == len(keys)


def test_every_sample_of_the_corpus_has_all_metadata() -> None:
    for row in _rows():
        assert all(row[name] for name in TOLD), row
        assert row["category"] in THINGS
        assert row["picture"].partition("/")[2] == f"{row['concept']}__{row['style']}"


def test_every_concept_of_the_corpus_has_one_name_and_one_place() -> None:
    places: dict[str, set[tuple[str, ...]]] = {}
    for row in _rows():
        place = (row["name"], row["category"], row["subcategory"], *row["keywords"])
        places.setdefault(row["concept"], set()).add(place)
    assert all(len(place) == 1 for place in places.values())


def test_pictures_of_the_corpus_are_opaque_and_of_64_to_96_pixels() -> None:
    for row in _rows():
        with Image.open(io.BytesIO(row["encoded"])) as picture:
            assert picture.format in ("PNG", "WEBP")
            assert 64 <= min(picture.size) <= max(picture.size) <= 96
            assert "A" not in picture.getbands() and "transparency" not in picture.info


def test_licences_of_the_samples_are_open_and_those_of_their_styles() -> None:
    told = {(row["style"], row["licence"], row["source"]) for row in _rows()}
    assert told == {(style.name, style.licence, f"npm:{style.package}") for style in STYLES}
    assert {style.licence for style in STYLES} <= ATTRIBUTION_FREE_TO_PASS_ON


def test_split_holds_out_enough_concepts_spread_over_subcategories_and_one_style() -> None:
    place = {row["concept"]: row["subcategory"] for row in _rows()}
    assert len(SPLIT.held_out_concepts) >= 150
    assert place.keys() >= SPLIT.held_out_concepts
    spread = Counter(place[concept] for concept in SPLIT.held_out_concepts)
    # A held-out concept alone in its subcategory would never meet a hard negative.
    assert len(spread) >= 20 and min(spread.values()) >= 2
    assert SPLIT.held_out_style in {style.name for style in STYLES}


def _drawn(opened: Opened, part: Part, shots: int, count: int, **settings: Any) -> list[dict[str, Any]]:
    stage = ShotStage(episodes=count, min_shots_of_both_classes=shots, max_shots_of_both_classes=shots)
    episodes = drawn_episodes(opened, EpisodeConfig(part=part, stages=(stage,), **settings))
    # One in a thousand has too many look-alikes of its query.
    assert len(episodes) > 0.95 * count
    return episodes


def test_nothing_held_out_is_in_a_training_episode(opened: Opened) -> None:
    kept_back = {row["picture"] for row in _rows() if not _trains_on(row)}
    assert kept_back
    tasks = (TwoWayConfig(weight=0.7), CaptionConfig(weight=0.3))
    for episode in _drawn(opened, "train", 8, 400, tasks=tasks):
        assert not kept_back & {turn["picture"] for turn in episode["turns"]}
        assert not SPLIT.held_out_concepts & {turn["concept"] for turn in episode["turns"]}


@pytest.mark.parametrize("part", ["held_out_concepts", "held_out_style"])
def test_held_out_parts_show_nothing_trained_on_and_can_be_asked_with_eight_shots(
    opened: Opened, part: Part
) -> None:
    trained_on = {row["picture"] for row in _rows() if _trains_on(row)}
    place = {row["concept"]: row["subcategory"] for row in _rows()}
    for episode in _drawn(opened, part, 16, 100):
        assert not trained_on & {turn["picture"] for turn in episode["turns"]}
        assert len({place[concept] for concept in episode["concepts"]}) == 1
