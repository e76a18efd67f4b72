"""Records of data sets that are one JSON file: an array of objects, by itself or in a field of an object.

The text of a file is in memory while it is read, and of its objects only what `slim` keeps. Records are
counted from 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmicl_core.data.readers.json_records import is_text
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.json_lines import Record

__all__ = ["Entry", "read_entries"]


@dataclass(frozen=True)
class Entry(Record):
    """One object of an array."""

    def texts(self, name: str) -> tuple[str, ...]:
        """The strings in a field, one or more. Some data sets have blank ones."""
        values = self._field(name)
        if not isinstance(values, list) or not values or not all(is_text(value) for value in values):
            raise self.wrong(f"{name} is {values!r} instead of a list of strings")
        return tuple(values)

    def wrong(self, told: str) -> DataError:
        """What is wrong with the object, and where it is."""
        return DataError(f"{self.path}: record {self.number}: {told}")


def read_entries(
    path: Path, field: str | None, slim: Callable[[dict[str, Any]], Any] | None = None
) -> Iterator[Entry]:
    """The objects of a file's array, in its order.

    Args:
        field: where the array is; None where the file is the array.
        slim: takes each object of the file, inner ones first, and gives what is kept in its place.

    Raises:
        DataError: the file is no JSON, has no such array, or an empty one; or something in it is no object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            told = json.load(file, object_hook=slim)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as JSON ({error}): it is broken or cut, take it again"
        ) from error
    values = told
    if field is not None:
        values = told.get(field) if isinstance(told, dict) else None
    if not isinstance(values, list) or not values:
        place = "as a whole" if field is None else f"in its field {field!r}"
        raise DataError(f"{path} has no records {place}: the file is another one, or cut")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(f"{path}: record {number}: it is a {type(value).__name__} instead of an object")
        yield Entry(path, number, value)
