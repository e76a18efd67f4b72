from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.data.pool import Pool
from tests.unit.data.draws import DRAWS, config_of, draw_rows, mixed_pool, pictures_of, reasons_of


def _config(**settings: Any) -> EpisodeConfig:
    return config_of(2, {"type": "same_task", **settings})


def _task(name: str, pictures: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"group": name, "picture": f"{name}-{number:03d}", "text": f"{name} {number}", **more}
        for number in range(pictures)
    ]


def _number(picture: str) -> int:
    return int(picture.rpartition("-")[2])


def _pool(folder: Path, config: EpisodeConfig, rows: list[dict[str, Any]]) -> Pool:
    """Pictures of a task lie on an arc, so that those of near numbers are similar."""

    def embed(numbers: Any) -> np.ndarray[Any, Any]:
        keys = pool.section("same_task").catalogue.column("picture", numbers)
        angles = np.array([_number(key) / 200 for key in keys])
        return 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    pool = mixed_pool(folder, config, tasks=rows, embed=embed)
    return pool


def test_demonstrations_are_distinct_pictures_of_the_querys_task(tmp_path: Path) -> None:
    config = _config(demonstrations=4)
    for episode in draw_rows(_pool(tmp_path, config, [*_task("vqa", 6), *_task("ocr", 9)]), config):
        pictures = pictures_of(episode)
        assert len(set(pictures)) == 5
        assert len({picture.partition("-")[0] for picture in pictures}) == 1
        assert [turn["scored"] for turn in episode["turns"]] == [False] * 4 + [True]
        assert episode["shots_of_both_classes"] == 4
        assert episode["answer"] == episode["turns"][-1]["answer"]


def test_tasks_are_drawn_equally_often_and_in_them_all_pictures(tmp_path: Path) -> None:
    config = _config()
    pool = _pool(tmp_path, config, [*_task("vqa", 4), *_task("ocr", 40), *_task("tiny", 2)])
    queries = Counter(pictures_of(episode)[-1] for episode in draw_rows(pool, config, 2000))
    assert len(queries) == 44
    expected = [1000 / (4 if query.startswith("vqa") else 40) for query in queries]
    assert chisquare(list(queries.values()), expected).pvalue > 1e-3


def test_question_is_the_pictures_own_first_one_or_else_the_settings_and_its_caption(tmp_path: Path) -> None:
    talk = [{"question": "Who?", "answer": "Ann"}, {"question": "Where?", "answer": "here"}]
    rows = [row | ({"turns": talk} if _number(row["picture"]) % 2 else {}) for row in _task("mix", 8)]
    config = _config(question="Say it:")
    met = set()
    for episode in draw_rows(_pool(tmp_path, config, rows), config):
        for turn in episode["turns"]:
            number = _number(turn["picture"])
            expected = ("Who?", "Ann") if number % 2 else ("Say it:", f"mix {number}")
            assert (turn["question"], turn["answer"]) == expected
            met.add(number % 2)
    assert met == {0, 1}


def test_picture_of_which_nothing_is_told_is_never_drawn(tmp_path: Path) -> None:
    silent = [row | {"picture": f"{row['picture']}9", "text": None} for row in _task("vqa", 8)]
    mute = [row | {"picture": f"{row['picture']}8", "text": "", "turns": []} for row in _task("vqa", 8)]
    config = _config()
    episodes = draw_rows(_pool(tmp_path, config, [*silent, *mute, *_task("vqa", 3)]), config, 60)
    assert {picture for episode in episodes for picture in pictures_of(episode)} == {
        "vqa-000",
        "vqa-001",
        "vqa-002",
    }
    assert len(episodes) == 60
    reasons = reasons_of(_pool(tmp_path / "none", config, silent), config)
    assert reasons == {"same_task: task with fewer than 3 texts"}


def test_similar_demonstrations_are_the_nearest_ones_with_the_most_similar_last(tmp_path: Path) -> None:
    config = _config(choice="similar", demonstrations=4)
    for episode in draw_rows(_pool(tmp_path, config, _task("vqa", 60)), config, 100):
        *shown, query = map(_number, pictures_of(episode))
        gaps = [abs(number - query) for number in shown]
        assert gaps == sorted(gaps, reverse=True)
        others = sorted(abs(number - query) for number in range(60) if number != query)
        assert sorted(gaps) == others[:4]


def test_similar_demonstrations_are_looked_for_in_a_pool_that_no_seed_decides(tmp_path: Path) -> None:
    rows = _task("vqa", 60)
    found = []
    for seed in (0, 1):
        config = config_of(2, {"type": "same_task", "choice": "similar", "pool": 9}, seed=seed)
        pool = _pool(tmp_path / str(seed), config, rows)
        episodes = draw_rows(pool, config, 400)
        found.append({key for episode in episodes for key in pictures_of(episode)[:-1]})
        assert {pictures_of(episode)[-1] for episode in episodes} > found[-1]
    assert found[0] == found[1] and len(found[0]) == 9


@pytest.mark.parametrize("choice", ["random", "similar"])
def test_picture_like_the_query_is_no_demonstration_however_similar(tmp_path: Path, choice: str) -> None:
    # Twins by look: 2n and 2n + 1, each most similar to the other.
    rows = [
        row | {"perceptual_hash": (0x9E37_79B9_7F4A_7C15 * (_number(row["picture"]) // 2 + 1)) % 2**64}
        for row in _task("vqa", 20)
    ]
    config = _config(choice=choice, demonstrations=3)
    episodes = draw_rows(_pool(tmp_path, config, rows), config)
    assert len(episodes) == DRAWS
    for episode in episodes:
        *shown, query = [_number(picture) // 2 for picture in pictures_of(episode)]
        assert query not in shown


@pytest.mark.parametrize("choice", ["random", "similar"])
def test_tasks_too_small_or_full_of_look_alikes_are_a_reason(tmp_path: Path, choice: str) -> None:
    config = _config(choice=choice)
    small = _pool(tmp_path / "small", config, _task("vqa", 2))
    assert reasons_of(small, config) == {"same_task: no task has 3 pictures"}
    alike = _pool(tmp_path / "alike", config, _task("vqa", 8, perceptual_hash=3))
    assert reasons_of(alike, config) == {"same_task: too few pictures unlike the one asked about"}
