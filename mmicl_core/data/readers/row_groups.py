"""Parquet files in pieces: a unit is a row group, and its rows come a few at a time.

Of a row group only the columns that are asked for are read, page by page, so memory holds pages and not the
group. How large a page is, its writer decides: pyarrow's puts 1024 pictures into one unless told otherwise.
Checksums of pages are held against the pages, where a file has them.

Hazard: a broken page ends its row group, because where the next row begins nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.data.readers.base import Unit
from mmicl_core.data.readers.units import find_units
from mmicl_core.data.storage import Location

__all__ = ["BREAKS", "UNREADABLE", "find_row_groups", "iter_rows"]

BREAKS = (OSError, pa.ArrowException, UnicodeDecodeError)
"""What is raised for a file that is missing, is no Parquet, or breaks, be it in the name of a column."""

UNREADABLE = -1
"""The part of a unit that stands for a whole file, whose row groups are not known."""

SUFFIX = ".parquet"
BUFFER_BYTES = 2**20
FOOTERS_AT_ONCE = 16


def find_row_groups(location: Location, corpus: str, check: Callable[[str, pa.Schema], object]) -> list[Unit]:
    """The row groups, file by file in name order; a file that cannot be read is one unit, `UNREADABLE`.

    Args:
        corpus: what the reader calls its corpora.
        check: takes the path and the schema of every file, and raises DataError if it cannot be used.

    Raises:
        DataError: there is no file, or `check` raises it.
    """

    def parts(unit: Unit) -> Sequence[int]:
        try:
            with location.open(unit.path) as source:
                file = _open(source)
                check(unit.path, file.schema_arrow)
                return range(file.num_row_groups)
        except BREAKS:
            return (UNREADABLE,)

    files = find_units(location, corpus, (SUFFIX,))
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        found = list(pool.map(parts, files))
    return [replace(file, part=part) for file, numbers in zip(files, found, strict=True) for part in numbers]


def iter_rows(
    location: Location, unit: Unit, columns: Callable[[pa.Schema], Sequence[str]], rows_at_once: int
) -> Iterator[tuple[int, dict[str, pa.Scalar]]]:
    """The rows of a row group, each by its number in its file, from 0, as Arrow's scalars by column.

    Args:
        columns: the schema of the file -> the columns to read.
        rows_at_once: that are unpacked together.

    Raises:
        OSError, ArrowException: `BREAKS`; the rows before stand.
    """
    with location.open(unit.path) as source:
        file = _open(source)
        names = list(columns(file.schema_arrow))
        if not 0 <= unit.part < file.num_row_groups:
            raise OSError(f"it has {file.num_row_groups} row groups, and had others when it was listed")
        number = sum(file.metadata.row_group(part).num_rows for part in range(unit.part))
        for batch in file.iter_batches(rows_at_once, row_groups=[unit.part], columns=names):
            cells = {name: batch.column(name) for name in names}
            for place in range(batch.num_rows):
                yield number, {name: cells[name][place] for name in names}
                number += 1


def _open(source: Any) -> pq.ParquetFile:
    # Without a buffer, Arrow reads all pictures of a row group at once.
    return pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
