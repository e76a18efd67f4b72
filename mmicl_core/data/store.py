"""Frozen features on disk: arrays by key, computed once and read by every worker.

A store is a folder of Arrow files with columns `key`, `shape` and `values` (16-bit floats, C order). They
are mapped into memory: the workers of a machine share the pages, and those that nobody reads can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmicl_core.data.arrow_files import read_arrow
from mmicl_core.errors import DataError

__all__ = ["STORE", "ArrayStore", "store_columns"]

STORE = pa.schema([("key", pa.string()), ("shape", pa.list_(pa.int32())), ("values", pa.binary())])
LARGEST = float(np.finfo(np.float16).max)


def store_columns(keys: Sequence[str], arrays: Sequence[np.ndarray]) -> pa.RecordBatch:
    """The batch that a stage writes for `arrays`.

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
    return pa.record_batch({"key": list(keys), "shape": shapes, "values": values}, schema=STORE)


class ArrayStore:
    """Look arrays up by key."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.arrow"))
        if not files:
            raise DataError(f"feature store {folder} holds no Arrow file: the stage before did not run")
        self._batches = [batch for file in files for batch in read_arrow(file).to_batches()]
        self._where = {
            key: (number, row)
            for number, batch in enumerate(self._batches)
            for row, key in enumerate(batch.column("key").to_pylist())
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
        batch = self._batches[number]
        values = batch.column("values")[row].as_buffer()
        shape = batch.column("shape")[row].as_py()
        return np.frombuffer(values, dtype=np.float16).reshape(shape)
