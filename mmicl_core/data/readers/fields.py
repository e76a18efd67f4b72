"""What a corpus says of a picture, in its own words -> columns of PAIR.

A field has the name of its column, except where the settings name another, and may be absent or null. What
is there has the type of its column, or the sample cannot be used: a number where a concept should be is a
corpus that was misunderstood, and turning it into text would hide that.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import pyarrow as pa

from mmicl_core.config.corpus import FieldNames
from mmicl_core.data import reasons
from mmicl_core.data.readers.json_records import is_text
from mmicl_core.data.schema import PAIR

__all__ = ["UnusableError", "check_said", "class_name", "columns_of", "spellings"]

LARGEST_FLOAT32 = 3.4e38


class UnusableError(Exception):
    """A sample that cannot be used: one of `reasons`, and what exactly was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@cache
def spellings(names: FieldNames) -> dict[str, tuple[str, ...]]:
    """The columns of PAIR that a corpus may tell, each with its spellings; the first that is there counts."""
    own = {name: (name,) for name in PAIR.names if name not in ("picture", "image")}
    return own | {
        "text": (names.caption, "text"),
        "concept": (names.label,),
        "task": (names.task, "task"),
        "licence": ("licence", "license"),
    }


def columns_of(record: Mapping[str, Any], names: FieldNames) -> dict[str, Any]:
    """The columns of PAIR that a record tells; those that it does not tell are null.

    A concept without a name has its own, in words.

    Raises:
        UnusableError: a field has another type than its column.
    """
    columns: dict[str, Any] = {}
    for column, fields in spellings(names).items():
        columns[column] = None
        for field in fields:
            value = record.get(field)
            # Not a number is how pandas writes what is missing, captions included.
            if value is None or value != value:
                continue
            kind = PAIR.field(column).type
            if not _fits(value, kind):
                told = f"field {field!r} is {reprlib.repr(value)}, and {_described(kind)} is needed"
                raise UnusableError(reasons.INCOMPLETE_METADATA, told)
            columns[column] = value
            break
    for column in ("text", "concept", "name"):
        columns[column] = (columns[column] or "").strip() or None
    if columns["name"] is None and columns["concept"] is not None:
        columns["name"] = class_name(columns["concept"])
    return columns


def check_said(columns: Mapping[str, Any], names: FieldNames) -> None:
    """Hold that something is said of the picture.

    Raises:
        UnusableError: there is no text, no question and no concept.
    """
    if not (columns["text"] or columns["turns"] or columns["concept"]):
        told = f"neither a caption ({names.caption!r}) nor a label ({names.label!r}) says what it shows"
        raise UnusableError(reasons.NO_TEXT, told)


def class_name(concept: str) -> str:
    """A concept's id in words: `red-panda` and `red_panda` are `red panda`."""
    return concept.replace("-", " ").replace("_", " ")


def _fits(value: Any, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_fits(item, kind.value_type) for item in value)
    if pa.types.is_struct(kind):
        return isinstance(value, dict) and all(_fits(value.get(part.name), part.type) for part in kind)
    if pa.types.is_string(kind):
        return is_text(value)
    if isinstance(value, bool):
        return False
    if pa.types.is_integer(kind):
        return isinstance(value, int) and -(2**31) <= value < 2**31
    return isinstance(value, int | float) and -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32


def _described(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"a list, each item {_described(kind.value_type)},"
    if pa.types.is_struct(kind):
        return "an object with " + " and ".join(part.name for part in kind)
    if pa.types.is_string(kind):
        return "text"
    return "a number"
