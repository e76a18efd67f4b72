from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.data.pool import Catalogues, needed_groupings, open_pool
from mmicl_core.errors import DataError
from tests.fakes import write_catalogue
from tests.unit.data.draws import concept_pool, concept_rows, config_of, mixed_pool, neighbours_of


def test_guard_admits_each_picture_once_and_none_like_the_query(tmp_path: Path) -> None:
    # Hashes that differ from the query's, 0, in as many bits as the name says.
    rows: list[dict[str, Any]] = [
        {"group": "a", "picture": f"bits-{bits:02d}", "perceptual_hash": (1 << bits) - 1}
        for bits in (0, 1, 4, 5, 32, 64)
    ]
    twin = {"group": "b", "picture": "twin", "perceptual_hash": 2**64 - 1}
    pool = concept_pool(tmp_path, config_of(), [*rows, twin], lists={})
    section = pool.section("two_way")
    digest = section.catalogue.fingerprint
    guard = pool.guard(section, 0)
    assert [guard.admits(number) for number in range(6)] == [False, False, False, True, True, True]
    assert not guard.admits(4), "it is shown already"
    assert guard.admits(6) and digest(6)[1] == digest(5)[1], "only the query's look counts"
    strict = open_pool(
        Catalogues(concept=section.catalogue),
        neighbours_of(section.catalogue, {}),
        config_of(near_duplicate_bits=0),
    )
    guard = strict.guard(section, 0)
    assert [guard.admits(number) for number in range(3)] == [False, True, True]


def test_guard_knows_the_same_bytes_in_another_group(tmp_path: Path) -> None:
    rows = [{"group": group, "picture": group, "sha256": b"s" * 32} for group in "ab"]
    pool = concept_pool(tmp_path, config_of(), rows, lists={})
    assert not pool.guard(pool.section("two_way"), 0).admits(1)


def test_first_pictures_of_a_guard_are_none_where_there_are_fewer(tmp_path: Path) -> None:
    rows = [{"group": "a", "picture": f"p{number}"} for number in range(4)]
    pool = concept_pool(tmp_path, config_of(), rows, lists={})
    section = pool.section("two_way")
    assert pool.guard(section, 0).first(iter([0, 3, 3, 1, 2]), 2) == [3, 1]
    assert pool.guard(section, 0).first(iter(range(4)), 4) is None


def test_nearest_pictures_are_those_of_like_direction_among_as_many_as_asked_for(tmp_path: Path) -> None:
    rows = [{"group": "t", "picture": f"p{number:02d}", "text": "x"} for number in range(40)]
    asked = []

    def embed(numbers: Any) -> np.ndarray[Any, Any]:
        asked.append(len(numbers))
        return np.array([[3.0, 4.0 * number] for number in numbers])

    task = {"type": "same_task", "choice": "similar"}
    pool = mixed_pool(tmp_path, config_of(2, task), tasks=rows, embed=embed)
    catalogue = pool.section("same_task").catalogue
    smallest = sorted(range(40), key=lambda number: catalogue.fingerprint(number)[0])[:8]
    # The angles of the pictures grow with their numbers, however long their embeddings are.
    for query in (0, 39):
        nearest = list(pool.nearest(query, 0, range(40), 8))
        assert nearest == sorted(smallest, reverse=query == 39)
    assert asked == [8, 1, 1], "a task is embedded once"


@pytest.mark.parametrize(
    ("tasks", "groupings"),
    [
        (["two_way"], ("concept",)),
        (["instruction", "caption", "two_way"], ("concept", "task")),
        (["same_task", "interleaved"], ("document", "task")),
    ],
)
def test_groupings_are_those_that_some_task_needs(tasks: list[str], groupings: tuple[str, ...]) -> None:
    assert needed_groupings(EpisodeConfig(tasks=[{"type": task} for task in tasks])) == groupings


def test_neighbours_of_another_catalogue_are_refused_with_both_numbers(tmp_path: Path) -> None:
    ours = write_catalogue(tmp_path / "ours", concept_rows())
    other = write_catalogue(tmp_path / "other", concept_rows()[:6])
    with pytest.raises(DataError, match="has 13 concepts and the neighbours are those of 1:"):
        open_pool(Catalogues(concept=ours), neighbours_of(other, {}), config_of())
