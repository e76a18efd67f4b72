"""Frozen features on disk: arrays by key, computed once and read by every worker.

A store is a folder of Arrow files with columns `key`, `shape` and `values` (16-bit floats, C order), and of
pictures `ids` and `grid`, their place in a prompt. They are mapped into memory: the workers of a machine
share the pages, and those that nobody reads can go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmicl_core.data.arrow_files import read_arrow
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError

__all__ = ["STORE", "ArrayStore", "PictureStore", "store_columns"]

STORE = pa.schema(
    [
        ("key", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("values", pa.binary()),
        ("ids", pa.list_(pa.int32())),
        ("grid", pa.list_(pa.int32())),
    ]
)
LARGEST = float(np.finfo(np.float16).max)


def store_columns(
    keys: Sequence[str], arrays: Sequence[np.ndarray], pictures: Sequence[PreparedPicture] | None = None
) -> pa.RecordBatch:
    """The batch that a stage writes for `arrays`.

    Args:
        pictures: what the arrays are features of, if of pictures.

    Raises:
        DataError: a value is no number, or larger than 16-bit floats go.
    """
    for key, array in zip(keys, arrays, strict=True):
        if not np.abs(array).max(initial=0) <= LARGEST:
            raise DataError(
                f"the features of {key!r} pass {LARGEST:.0f}, the largest 16-bit float, or are NaN"
            )
    columns = {
        "key": list(keys),
        "shape": [list(array.shape) for array in arrays],
        "values": [np.ascontiguousarray(array, dtype=np.float16).tobytes() for array in arrays],
        "ids": [picture.ids for picture in pictures] if pictures is not None else [None] * len(keys),
        "grid": [picture.grid for picture in pictures] if pictures is not None else [None] * len(keys),
    }
    return pa.record_batch(columns, schema=STORE)


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

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def __getitem__(self, key: str) -> np.ndarray[Any, np.dtype[np.float16]]:
        """The array of `key`, read-only.

        Raises:
            DataError: the store has no such key.
        """
        values = self.column(key, "values").as_buffer()
        return np.frombuffer(values, dtype=np.float16).reshape(self.column(key, "shape").as_py())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def column(self, key: str, name: str) -> Any:
        """One value of the row of `key`, as Arrow has it."""
        if key not in self._where:
            raise DataError(f"the feature store has no {key!r} among its {len(self)} keys")
        number, row = self._where[key]
        return self._batches[number].column(name)[row]


class PictureStore(Mapping[str, PreparedPicture]):
    """Look up what a frozen part made of pictures."""

    def __init__(self, folder: Path) -> None:
        self._arrays = ArrayStore(folder)

    def __len__(self) -> int:
        return len(self._arrays)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __contains__(self, key: object) -> bool:
        # A mapping would ask for the picture, and a store says what it lacks by an error of its own.
        return key in self._arrays

    def __getitem__(self, key: str) -> PreparedPicture:
        ids, grid = (tuple(self._arrays.column(key, name).as_py()) for name in ("ids", "grid"))
        return PreparedPicture(ids, grid, features=self._arrays[key])
