"""Bounded samples of what may be larger than memory: episodes of a dataset, pictures of a corpus.

Both are evenly spread, so that a curriculum of shots shows with all its stages and a corpus of many shards
with all of them, and both are the same whenever they are taken. Files are read in pieces.

    looked (usable?) --choose rows--> pairs (text, IMAGE) + concepts (what it shows) --> SAMPLED rows
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmicl_core.data.arrow_files import read_arrow

__all__ = ["SAMPLED_FROM", "sample_episodes", "sample_pictures", "spread"]

SAMPLED_FROM: Mapping[str, tuple[str, ...]] = {
    "pairs": ("picture", "image", "text", "licence"),
    "looked": ("width", "height", "format", "remark"),
    "concepts": ("concept", "name"),
}
"""The columns that a sampled picture takes from each stage."""

MOST_FILES = 64
ROWS_AT_ONCE = 256

Places = np.ndarray[Any, np.dtype[np.int64]]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly far apart from 0 on."""
    chosen = min(count, most)
    return [place * count // chosen for place in range(chosen)]


def sample_episodes(files: Sequence[Path], most: int, task: str | None = None) -> pa.Table:
    """EPISODE rows, at most `most`, of one task or of all.

    Of many files some are left out, so that the cost does not grow with the dataset.

    Args:
        files: `episodes-*.parquet` in the order of their numbers, at least one.
    """
    chosen = [files[place] for place in spread(len(files), MOST_FILES)]
    total = sum(len(rows) for file in chosen for _, rows in _pieces(file, task, ["task"]))
    wanted, start = np.array(spread(total, most), dtype=np.int64), 0
    tables = [pq.read_schema(chosen[0]).empty_table()]
    for file in chosen:
        for table, rows in _pieces(file, task):
            here = _between(wanted, start, start + len(rows))
            start += len(rows)
            if len(here):
                tables.append(table.take(pa.array(rows[here])))
    return pa.concat_tables(tables)


def sample_pictures(
    folders: Mapping[str, Path], sizes: Mapping[str, int], most: int, seed: int
) -> list[dict[str, Any]]:
    """At most `most` usable pictures of a corpus: one of each of as many equal stretches, by a seeded draw.

    Where the draw meets a picture that cannot be used, the next one of the file that can stands in for it,
    or none where that is chosen already.

    Args:
        folders: of the stages that `SAMPLED_FROM` names.
        sizes: PAIR rows by the name of a part, in the order of the parts.

    Returns:
        The columns of `SAMPLED_FROM`, in the order of the corpus.
    """
    rng = random.Random(f"{seed}/pictures")
    edges = [*spread(sum(sizes.values()), most), sum(sizes.values())]
    wanted = np.array([rng.randrange(*ends) for ends in zip(edges, edges[1:], strict=False)], dtype=np.int64)
    rows: list[dict[str, Any]] = []
    start = 0
    for part, size in sizes.items():
        here = _between(wanted, start, start + size)
        start += size
        if len(here):
            rows += _take(folders, part, here)
    return rows


def _between(numbers: Places, start: int, end: int) -> Places:
    """The numbers of a stretch, counted from its start."""
    return numbers[(numbers >= start) & (numbers < end)] - start


def _pieces(
    file: Path, task: str | None, columns: list[str] | None = None
) -> Iterator[tuple[pa.Table, Places]]:
    """Pieces of a file, with the places of the rows of a task in each."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
            is_meant = np.ones(batch.num_rows, dtype=bool)
            if task is not None:
                is_meant = pc.equal(batch.column("task"), task).to_numpy(zero_copy_only=False)
            yield pa.Table.from_batches([batch]), np.flatnonzero(is_meant)


def _take(folders: Mapping[str, Path], part: str, wanted: Places) -> list[dict[str, Any]]:
    looked = read_arrow(folders["looked"] / f"looked-{part}.arrow")
    usable = np.flatnonzero(pc.is_null(looked.column("skipped")).to_numpy())
    if not len(usable):
        return []
    chosen = pa.array(np.unique(usable[np.searchsorted(usable, wanted) % len(usable)]))
    pairs = pq.read_table(folders["pairs"] / f"pairs-{part}.parquet", columns=list(SAMPLED_FROM["pairs"]))
    tables = {
        "pairs": pairs,
        "looked": looked,
        "concepts": read_arrow(folders["concepts"] / f"concepts-{part}.arrow"),
    }
    taken = [tables[kind].select(list(columns)).take(chosen) for kind, columns in SAMPLED_FROM.items()]
    return [
        {name: value for row in rows for name, value in row.items()}
        for rows in zip(*(table.to_pylist() for table in taken), strict=True)
    ]
