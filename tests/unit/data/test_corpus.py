"""The committed corpus keeps what its docstring and its split promise."""

from __future__ import annotations

import io
from collections import Counter
from functools import cache
from typing import Any

from PIL import Image

from mmicl_core.assets import resolve
from mmicl_core.config.data import EpisodeConfig, Part, ShotStage
from mmicl_core.data.episodes import build_pool, draw_episode
from mmicl_core.data.open_emoji import STYLES, THINGS
from mmicl_core.data.sources import find_shards, read_shard
from mmicl_core.data.splits import Split

CORPUS = resolve("embedded:open_emoji")
SPLIT = Split.load(CORPUS)
LARGEST_CORPUS_BYTES = 16 * 2**20
ATTRIBUTION_FREE_TO_PASS_ON = {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT"}


@cache
def _rows() -> list[dict[str, Any]]:
    return [row for shard in find_shards(CORPUS) for row in read_shard(shard)]


def test_committed_corpus_is_small_enough_and_wholly_usable() -> None:
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) <= LARGEST_CORPUS_BYTES
    assert Counter(row["skipped"] for row in _rows()).keys() == {None}
    assert len(_rows()) >= 7000
    keys = [row["picture"] for row in _rows()]
    assert len(set(keys)) == len(keys)


def test_every_sample_of_the_corpus_has_all_metadata() -> None:
    for row in _rows():
        told = {key: value for key, value in row.items() if key not in ("skipped", "image")}
        assert all(told.values()), told
        assert row["category"] in THINGS
        assert row["picture"] == f"{row['concept']}__{row['style']}"


def test_every_concept_of_the_corpus_has_one_name_and_one_place() -> None:
    places: dict[str, set[tuple[str, ...]]] = {}
    for row in _rows():
        place = (row["name"], row["category"], row["subcategory"], *row["keywords"])
        places.setdefault(row["concept"], set()).add(place)
    assert all(len(place) == 1 for place in places.values())


def test_pictures_of_the_corpus_are_opaque_and_of_64_to_96_pixels() -> None:
    for row in _rows():
        with Image.open(io.BytesIO(row["image"])) as picture:
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


def test_nothing_held_out_is_in_a_training_pool_or_a_training_episode() -> None:
    kept_back = {row["picture"] for row in _rows() if not SPLIT.trains_on(row["concept"], row["style"])}
    pool = build_pool(_rows(), SPLIT, "train", 100)
    assert kept_back and not pool.concepts.keys() & SPLIT.held_out_concepts
    for pictures in (*pool.shown.values(), *pool.asked.values()):
        assert not kept_back & set(pictures)
    config = EpisodeConfig(stages=(ShotStage(episodes=400, min_shots=1, max_shots=8),), caption_share=0.3)
    for number in range(config.total):
        episode = draw_episode(number, pool, config)
        assert isinstance(episode, dict)
        assert not kept_back & {turn["picture"] for turn in episode["turns"]}


def test_held_out_parts_never_show_what_is_trained_on_and_can_be_asked_with_eight_shots() -> None:
    trained_on = {row["picture"] for row in _rows() if SPLIT.trains_on(row["concept"], row["style"])}
    parts: tuple[Part, ...] = ("held_out_concepts", "held_out_style")
    for part in parts:
        pool = build_pool(_rows(), SPLIT, part, 100)
        config = EpisodeConfig(part=part, stages=(ShotStage(episodes=100, min_shots=8, max_shots=8),))
        for number in range(config.total):
            episode = draw_episode(number, pool, config)
            assert isinstance(episode, dict)
            assert not trained_on & {turn["picture"] for turn in episode["turns"]}
            near = {pool.concepts[concept].subcategory for concept in episode["concepts"]}
            assert len(near) == 1
