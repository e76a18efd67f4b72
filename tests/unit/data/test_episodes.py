from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from scipy.stats import chisquare

from mmicl_core.config.episodes import EpisodeConfig, Part, ShotStage
from mmicl_core.data.episodes import draw, draw_shots, render, shot_weights, shots_of
from mmicl_core.data.pool import Catalogues, Pool, open_pool
from tests.fakes import HELD_OUT_STYLE, write_catalogue
from tests.unit.data.draws import (
    HELD_OUT_CONCEPTS,
    concept_pool,
    concept_rows,
    config_of,
    draw_rows,
    near_concepts,
    reasons_of,
)

TASKS = ("two_way", "caption", "interleaved", "same_task", "instruction")
PARTS: tuple[Part, ...] = get_args(Part)
DRAWS = 100_000


def _told_rows(group: str) -> list[dict[str, Any]]:
    """The small corpus again, by document or task."""
    rows = []
    for number, row in enumerate(concept_rows()):
        turns = [{"question": "What?", "answer": row["group"]}, {"question": "How?", "answer": row["style"]}]
        held_out = row["group"] in HELD_OUT_CONCEPTS or row["style"] == HELD_OUT_STYLE
        rows.append(
            row
            | {"group": f"{group}-{number % 4}", "concept": row["group"], "position": number}
            | {"text": f"a {row['group']}", "turns": turns, "kept_back": held_out, "held_out": False}
        )
    return rows


def _whole_pool(folder: Path, config: EpisodeConfig, buckets: int = 1, *, backwards: bool = False) -> Pool:
    catalogues = {}
    for grouping, rows in (
        ("concept", concept_rows()),
        ("document", _told_rows("page")),
        ("task", _told_rows("task")),
    ):
        given = rows[::-1] if backwards else rows
        catalogues[grouping] = write_catalogue(folder / grouping, given, buckets=buckets)
    return open_pool(Catalogues(**catalogues), near_concepts(catalogues["concept"]), config)


def _all_tasks(**settings: Any) -> EpisodeConfig:
    return config_of(4, *({"type": task} for task in TASKS), **settings)


def _plans(pool: Pool, config: EpisodeConfig, numbers: range) -> list[Any]:
    plans = [draw(number, pool, config) for number in numbers]
    assert not any(isinstance(plan, str) for plan in plans)
    return plans


def test_episode_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    config = _all_tasks()
    pool = _whole_pool(tmp_path / "one", config)
    other = _whole_pool(tmp_path / "other", config, backwards=True)
    forwards = render(_plans(pool, config, range(50)), pool)
    backwards = render(_plans(other, config, range(49, -1, -1))[::-1], other)
    assert forwards.equals(backwards)
    assert forwards != render(_plans(pool, _all_tasks(seed=1), range(50)), pool)
    links = [str(row["turns"]) for row in forwards.to_pylist() if row["task"] == "two_way"]
    assert len(set(links)) == len(links) > 5


def test_episodes_are_the_same_in_batches_of_any_size(tmp_path: Path) -> None:
    config = _all_tasks()
    pool = _whole_pool(tmp_path, config)
    whole = render(_plans(pool, config, range(60)), pool)
    for size in (1, 7, 60):
        batches = [
            render(_plans(pool, config, range(start, min(start + size, 60))), pool)
            for start in range(0, 60, size)
        ]
        assert pa.concat_tables(batches).equals(whole)


def test_episodes_are_the_same_from_any_number_of_buckets(tmp_path: Path) -> None:
    config = _all_tasks()
    pools = [_whole_pool(tmp_path / str(buckets), config, buckets) for buckets in (1, 5)]
    numbers = [pool.section("two_way").catalogue.ids for pool in pools]
    assert numbers[0] != numbers[1]
    one, other = (render(_plans(pool, config, range(60)), pool) for pool in pools)
    assert one.equals(other)


@pytest.mark.parametrize("part", PARTS)
def test_episode_of_any_task_holds_only_what_its_part_may(tmp_path: Path, part: Part) -> None:
    config = _all_tasks(part=part)
    episodes = draw_rows(_whole_pool(tmp_path, config), config)
    assert {episode["task"] for episode in episodes} == set(TASKS)
    for episode in episodes:
        by_concept = episode["task"] in ("two_way", "caption")
        for turn in episode["turns"]:
            if turn["picture"] is None:
                continue
            concept, _, style = turn["picture"].partition("__")
            held_out = concept in HELD_OUT_CONCEPTS
            if part == "train":
                assert not held_out and style != HELD_OUT_STYLE
            elif by_concept:
                assert held_out == part.startswith("held_out")
            else:
                assert held_out or style == HELD_OUT_STYLE


def test_tasks_are_drawn_by_their_weights(tmp_path: Path) -> None:
    weights = dict(zip(TASKS, (1, 2, 3, 0.5, 4), strict=True))
    config = config_of(4, *({"type": task, "weight": weight} for task, weight in weights.items()))
    pool = _whole_pool(tmp_path, config)
    tasks = Counter(plan.task for plan in _plans(pool, config, range(1000)))
    expected = [1000 * weight / sum(weights.values()) for weight in weights.values()]
    assert chisquare([tasks[task] for task in TASKS], expected).pvalue > 1e-3


def test_reason_begins_with_the_name_of_its_task(tmp_path: Path) -> None:
    config = config_of(16, {"type": "two_way"}, {"type": "caption"})
    reasons = reasons_of(concept_pool(tmp_path, config, []), config)
    assert reasons == {
        "two_way: fewer than two concepts have 9 pictures",
        "caption: no concept has a name and a picture",
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("part", PARTS)
def test_part_without_pictures_is_a_reason_for_every_task(tmp_path: Path, task: str, part: Part) -> None:
    config = config_of(4, {"type": task}, part=part)
    empty = write_catalogue(tmp_path, [])
    pool = open_pool(Catalogues(empty, empty, empty), near_concepts(empty), config)
    (reason,) = reasons_of(pool, config)
    assert reason is not None and reason.startswith(f"{task}: ")


def test_shots_follow_the_stages_in_rows_of_equal_number(tmp_path: Path) -> None:
    stages = (
        ShotStage(episodes=20, min_shots_of_both_classes=2, max_shots_of_both_classes=2),
        ShotStage(episodes=40, min_shots_of_both_classes=4, max_shots_of_both_classes=8),
    )
    config = EpisodeConfig(stages=stages, same_shots_in_a_row=8)
    shots = [row["shots_of_both_classes"] for row in draw_rows(concept_pool(tmp_path, config), config, 60)]
    assert shots == [shots_of(number, config) for number in range(config.total)]
    assert shots[:20] == [2] * 20
    rows = [shots[start : start + 8] for start in range(20, 60, 8)]
    assert all(len(set(row)) == 1 for row in rows)
    assert {row[0] for row in rows} <= {4, 6, 8} and len({row[0] for row in rows}) > 1


def test_rows_of_equal_shots_are_drawn_apart_from_each_other_and_by_the_seed() -> None:
    stages = (ShotStage(episodes=4000, min_shots_of_both_classes=2, max_shots_of_both_classes=8),) * 2
    one, other = (EpisodeConfig(stages=stages, same_shots_in_a_row=2, seed=seed) for seed in (0, 1))
    shots, others = ([shots_of(n, config) for n in range(0, 8000, 2)] for config in (one, other))
    assert shots != others and shots[:2000] != shots[2000:]
    assert chisquare([shots.count(k) for k in (2, 4, 6, 8)]).pvalue > 1e-3


@pytest.mark.parametrize("preset", ["2-way-random", "2-way-weight", "released-2way-random-shot"])
def test_shots_of_a_preset_are_drawn_by_its_weights(preset: str) -> None:
    (stage,) = EpisodeConfig(preset=preset).stages
    rng = random.Random(0)
    drawn = Counter(draw_shots(stage, rng) for _ in range(DRAWS))
    weights = shot_weights(stage)
    assert set(drawn) <= set(weights)
    expected = {k: DRAWS * weight / sum(weights.values()) for k, weight in weights.items()}
    # Chi-square wants five expected draws in a cell: rarer ones are counted together.
    common = [k for k in expected if expected[k] >= 5]
    observed = [drawn[k] for k in common]
    counted = [expected[k] for k in common]
    if len(common) < len(weights):
        observed.append(DRAWS - sum(observed))
        counted.append(DRAWS - sum(counted))
    assert chisquare(observed, counted).pvalue > 1e-3


def test_shot_weights_are_the_constants_of_the_paper_and_of_its_code() -> None:
    def chances(preset: str) -> dict[int, float]:
        weights = shot_weights(EpisodeConfig(preset=preset).stages[0])
        return {k: weight / sum(weights.values()) for k, weight in weights.items()}

    weighted = chances("2-way-weight")
    by_hand = {k: math.exp(k) / sum(math.exp(m) for m in range(2, 17)) for k in range(2, 17)}
    assert weighted == pytest.approx(by_hand)
    assert [round(weighted[k], 4) for k in (16, 15)] == [0.6321, 0.2325]
    assert chances("2-way-random") == pytest.approx(dict.fromkeys(range(2, 17), 1 / 15))
    # The code weighs s = k / 2 shots of each class, 1 to 16, by exp(s / 2).
    released = chances("released-2way-random-shot")
    assert [*released] == [2 * s for s in range(1, 17)]
    assert [round(released[2 * s], 3) for s in (16, 15, 14, 13)] == [0.394, 0.239, 0.145, 0.088]
    assert chances("2-way") == {16: 1.0}


@pytest.mark.parametrize("growth", [-50.0, 50.0])
def test_shot_weights_of_steep_growth_stay_finite(growth: float) -> None:
    stage = ShotStage(
        episodes=1, min_shots_of_both_classes=2, max_shots_of_both_classes=128, odd_shots=True, growth=growth
    )
    weights = shot_weights(stage)
    assert max(weights.values()) == 1 and all(map(math.isfinite, weights.values()))
    assert draw_shots(stage, random.Random(0)) == (128 if growth > 0 else 2)
