"""Rows on their way to other files: each file gives one batch to each bucket, and a bucket reads one of each.

    file 0 --> batch 0 | batch 1 | ...      bucket 0 <-- batch 0 of every file
    file 1 --> batch 0 | batch 1 | ...      bucket 1 <-- batch 1 of every file

Which bucket a row goes to is decided by a hash of one column, so rows that belong together meet there.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["bucket_of", "read_exchange", "write_exchange"]


def bucket_of(value: str, buckets: int) -> int:
    """The bucket that rows of a value go to."""
    return zlib.crc32(value.encode()) % buckets


def write_exchange(path: Path, rows: pa.Table, buckets: int, by: str) -> None:
    """Write rows, one batch for each bucket, empty ones too; the values of the column `by` decide."""
    distinct = {value: bucket_of(value, buckets) for value in pc.unique(rows.column(by)).to_pylist()}
    where = np.array([distinct[value] for value in rows.column(by).to_pylist()], dtype=np.int64)
    empty = pa.RecordBatch.from_pylist([], schema=rows.schema)
    with pa.ipc.new_file(str(path), rows.schema) as writer:
        for bucket in range(buckets):
            part = rows.filter(pa.array(where == bucket)).combine_chunks()
            writer.write_batch(part.to_batches()[0] if part.num_rows else empty)


def read_exchange(paths: Sequence[Path], bucket: int) -> pa.Table:
    """The rows of a bucket, in the order of the files."""
    batches = []
    for path in paths:
        with pa.memory_map(str(path)) as file:
            batches.append(pa.ipc.open_file(file).get_batch(bucket))
    return pa.Table.from_batches(batches)
