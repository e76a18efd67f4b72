"""Neighbour concepts: where hard negatives come from (link-context learning, arXiv:2308.07891, section 3.2).

Concepts are the groups of a catalogue, by number. Neighbours are found among concepts of the same side:
those that training may show, or those that are held out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.errors import DataError

__all__ = ["NEIGHBOURS", "Neighbours", "draw_weights"]

NEIGHBOURS = pa.schema(
    [
        # The concept, and its neighbours, nearest first, with their similarity to it.
        ("group", pa.int32()),
        ("neighbours", pa.list_(pa.int32())),
        ("similarity", pa.list_(pa.float32())),
    ]
)

Indices = np.ndarray[Any, np.dtype[np.int32]]
Similarities = np.ndarray[Any, np.dtype[np.float32]]


class Neighbours:
    """The neighbours of every concept: NEIGHBOURS rows, one for each.

    Raises:
        DataError: a concept has no row, or several.
    """

    def __init__(self, table: pa.Table) -> None:
        table = table.sort_by("group").combine_chunks()
        groups = table.column("group").to_numpy()
        misplaced = np.flatnonzero(groups != np.arange(len(groups)))
        if len(misplaced):
            raise DataError(
                f"the neighbours of concept {misplaced[0]} are missing, or some are there twice: row "
                f"{misplaced[0]} is that of concept {groups[misplaced[0]]}"
            )
        lists = table.column("neighbours").combine_chunks()
        self._offsets = lists.offsets.to_numpy()
        self._neighbours: Indices = lists.values.to_numpy()
        self._similarity: Similarities = table.column("similarity").combine_chunks().values.to_numpy()

    @classmethod
    def open(cls, folder: Path) -> Neighbours:
        """Read a finished stage.

        Raises:
            DataError: it holds none.
        """
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise DataError(f"{folder} holds no neighbours: it has no Parquet file")
        return cls(pa.concat_tables([pq.read_table(file, schema=NEIGHBOURS) for file in files]))

    def __len__(self) -> int:
        """Concepts."""
        return len(self._offsets) - 1

    def of(self, group: int) -> tuple[Indices, Similarities]:
        """The neighbours of a concept, nearest first, and how similar each is."""
        span = slice(self._offsets[group], self._offsets[group + 1])
        return self._neighbours[span], self._similarity[span]


def draw_weights(count: int) -> range:
    """Chances of the neighbours by rank, K, K - 1, ... 1: the paper's p_j = (101 - j) / 5050 at 100."""
    return range(count, 0, -1)
