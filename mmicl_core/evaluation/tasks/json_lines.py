"""Data sets as JSON lines: one object a line, whose faults are told with file and number.

Lines are counted from 0, as all over the project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmicl_core.data.readers.json_records import Fault, is_text, read_json_lines
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item, must_exist

__all__ = ["Record", "read_items", "read_records"]

Meaning = TypeVar("Meaning")


@dataclass(frozen=True)
class Record:
    """One line; its methods give fields, and raise DataError where one is absent or not as it should be."""

    path: Path
    number: int
    fields: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The string in a field, which some versions of a data set call by another of `names`."""
        name = next((name for name in names if name in self.fields), names[0])
        value = self._field(name)
        if not is_text(value) or not value.strip():
            raise self.wrong(f"{name} is {value!r} instead of a text")
        return value

    def integer(self, name: str) -> int:
        """The whole number in a field."""
        value = self._field(name)
        if type(value) is not int:
            raise self.wrong(f"{name} is {value!r} instead of a whole number")
        return value

    def one_of(self, name: str, allowed: Mapping[Any, Meaning]) -> Meaning:
        """What the value of a field means."""
        value = self._field(name)
        for known, meaning in allowed.items():
            # In Python true is 1, and so is 1.0.
            if type(value) is type(known) and value == known:
                return meaning
        raise self.wrong(f"{name} is {value!r} instead of one of {list(allowed)}")

    def wrong(self, told: str) -> DataError:
        """What is wrong with the line, and where it is."""
        return DataError(f"{self.path}: line {self.number}: {told}")

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise self.wrong(f"there is no {name}: this split has no answers, or the file is another one")
        return self.fields[name]


def read_items(path: Path, source: str, item_of: Callable[[Record], Item]) -> list[Item]:
    """The items of a file, in its order.

    Args:
        path: the file, one JSON object a line.
        source: where it is to be had.
        item_of: makes an item of a line.

    Raises:
        DataError: the file is missing or empty, a line is broken, or two items have the same id.
    """
    must_exist(path, f"the file {path.name}", source)
    items: list[Item] = []
    lines = dict[str, int]()
    for record in read_records(path):
        item = item_of(record)
        if item.id in lines:
            raise record.wrong(f"its id {item.id} is that of line {lines[item.id]}: remove one of them")
        lines[item.id] = record.number
        items.append(item)
    if not items:
        raise DataError(f"{path} is empty: take the whole file, from {source}")
    return items


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a file that are not blank.

    Raises:
        DataError: one of them is no JSON object.
    """
    for number, value in read_json_lines(Location(str(path.parent)), path.name):
        if isinstance(value, Fault):
            raise DataError(f"{path}: {value.detail}")
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number}: it is a {type(value).__name__} instead of an object")
        yield Record(path, number, value)
