"""Frozen features on disk: arrays by key, computed once and read by every worker.

A store is a folder of Parquet files with columns `key`, `shape` and `values` (16-bit floats, C
order). Reading keeps the Arrow buffers and copies nothing until an array is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.errors import DataError

__all__ = ["STORE", "ArrayStore", "store_columns"]

STORE = pa.schema([("key", pa.string()), ("shape", pa.list_(pa.int32())), ("values", pa.binary())])
LARGEST = float(np.finfo(np.float16).max)


def store_columns(keys: Sequence[str], arrays: Sequence[np.ndarray]) -> pa.Table:
    """The rows that a stage writes for `arrays`.

    Raises:
        DataError: a value is no number, or larger than 16-bit floats go.
    """
    for key, array in zip(keys, arrays, strict=True):
        if not np.abs(array).max(initial=0) <= LARGEST:
            raise DataError(
                f"the features of {key!r} pass {LARGEST:.0f}, the largest 16-bit float, or are NaN"
            )
    values = [np.ascontiguousarray(array, dtype=np.float16).tobytes() for array in arrays]
    shapes = [list(array.shape) for array in arrays]
    return pa.table({"key": list(keys), "shape": shapes, "values": values}, schema=STORE)


class ArrayStore:
    """Look arrays up by key."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise DataError(f"feature store {folder} holds no Parquet file: the stage before did not run")
        # One table for each file: together their values may pass Arrow's 2 GiB limit of one column chunk.
        self._tables = [pq.read_table(file, schema=STORE, memory_map=True) for file in files]
        self._where = {
            key: (number, row)
            for number, table in enumerate(self._tables)
            for row, key in enumerate(table.column("key").to_pylist())
        }

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __getitem__(self, key: str) -> np.ndarray[Any, np.dtype[np.float16]]:
        """The array of `key`, read-only.

        Raises:
            DataError: the store has no such key.
        """
        if key not in self._where:
            raise DataError(f"the feature store has no {key!r} among its {len(self)} keys")
        number, row = self._where[key]
        table = self._tables[number]
        values = table.column("values")[row].as_buffer()
        shape = table.column("shape")[row].as_py()
        return np.frombuffer(values, dtype=np.float16).reshape(shape)
