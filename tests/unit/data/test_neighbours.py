from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.data.neighbours import NEIGHBOURS, Neighbours, draw_weights
from mmicl_core.errors import DataError

ROWS = [
    {"group": 0, "neighbours": [2, 1], "similarity": [0.5, 0.25]},
    {"group": 1, "neighbours": [], "similarity": []},
    {"group": 2, "neighbours": [0], "similarity": [0.5]},
    {"group": 3, "neighbours": [2, 0, 1], "similarity": [1.0, 0.5, 0.25]},
]


def _write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=NEIGHBOURS), folder / name)


def test_neighbours_are_found_by_concept_whatever_the_order_of_rows_and_files(tmp_path: Path) -> None:
    _write(tmp_path, "b.parquet", [ROWS[0], ROWS[2]])
    _write(tmp_path, "a.parquet", [ROWS[3], ROWS[1]])
    neighbours = Neighbours.open(tmp_path)
    assert len(neighbours) == 4
    for row in ROWS:
        numbers, similarity = neighbours.of(row["group"])
        assert numbers.tolist() == row["neighbours"]
        assert similarity.tolist() == row["similarity"]


def test_folder_without_neighbours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no neighbours"):
        Neighbours.open(tmp_path)


@pytest.mark.parametrize(("left", "place"), [([0, 2, 3], 1), ([0, 1, 1, 2, 3], 2), ([1, 2, 3], 0)])
def test_concept_without_a_row_of_its_own_is_refused_by_number(left: list[int], place: int) -> None:
    rows = [ROWS[number] for number in left]
    with pytest.raises(DataError, match=f"concept {place} are missing, or some are there twice"):
        Neighbours(pa.Table.from_pylist(rows, schema=NEIGHBOURS))


def test_corpus_without_concepts_has_no_neighbours() -> None:
    assert len(Neighbours(NEIGHBOURS.empty_table())) == 0


def test_weights_are_those_of_the_paper() -> None:
    # p_j = (101 - j) / 5050 for j = 1 .. 100.
    weights = list(draw_weights(100))
    assert weights == [101 - rank for rank in range(1, 101)]
    assert sum(weights) == 5050


def test_weights_of_the_released_code_are_36_of_666_and_down() -> None:
    weights = list(draw_weights(36))
    assert (weights[0], weights[-1], sum(weights)) == (36, 1, 666)
