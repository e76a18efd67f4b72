"""Parquet with one picture a row -> PAIR rows.

The picture is a cell of encoded bytes (as Hugging Face datasets write it, too: a struct of `bytes` and
`path`), the path of a file, or a URL; see `ParquetConfig`. Other columns of PAIR are taken from columns of
their names, of the type that they have in PAIR. A unit is a row group.

A row's key is the file's name and the number of the row in it. With a column of keys it is the file's name,
the row group's number and the key, because only within its row group is a key known to be unique.

Hazard: what a broken page ends is one row, whose detail tells how many came before; so the counts of a
broken file are those of its rows that were read, and one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from mmicl_core.config.corpus import ParquetConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers.base import MOST_PICTURE_BYTES, Row, Unit, skip, usable
from mmicl_core.data.readers.fields import UnusableError, check_said, columns_of, spellings
from mmicl_core.data.readers.picture_files import find_picture
from mmicl_core.data.readers.row_groups import BREAKS, UNREADABLE, find_row_groups, iter_rows
from mmicl_core.data.schema import PAIR
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError

__all__ = ["ParquetReader"]

ROWS_AT_ONCE = 32

TEXT, BYTES, WHOLE_NUMBER = pa.string(), pa.binary(), pa.int64()


@dataclass(frozen=True)
class ParquetReader:
    """Reads Parquet files; `images` is the folder of the pictures that they name by path."""

    location: Location
    config: ParquetConfig
    images: Location | None = None

    def units(self) -> list[Unit]:
        """The row groups, file by file in name order; a file that cannot be read is one unit.

        Raises:
            DataError: there is no file, or the columns of one are not what the settings say.
        """
        return find_row_groups(self.location, "Parquet with one picture a row", self._columns)

    def read(self, unit: Unit) -> Iterator[Row]:
        """The rows of a row group; one that says so follows those before a broken page."""
        group, given = _RowGroup(unit, self.config, self.images), 0
        columns = partial(self._columns, unit.path)
        try:
            for number, cells in iter_rows(self.location, unit, columns, ROWS_AT_ONCE):
                yield group.row(number, cells)
                given += 1
        except BREAKS as error:
            where = "" if unit.part == UNREADABLE else f" after {given} rows of row group {unit.part}"
            yield skip(unit.path, reasons.BROKEN_FILE, f"{unit.path} breaks{where}: {error}")

    def _columns(self, path: str, schema: pa.Schema) -> list[str]:
        picture, key = _picture_column(self.config), self.config.key
        for role, name in (("picture", picture), ("key", key)):
            if name is not None and name not in schema.names:
                raise DataError(
                    f"{path} has no column {name!r} for the {role}, only {', '.join(schema.names)}: name one "
                    "of these in the reader's settings"
                )
        kind = schema.field(picture).type
        if self.config.image is None:
            _check(path, picture, kind, "text", _holds(kind, TEXT))
        else:
            fits = _has(kind, "bytes", BYTES) if pa.types.is_struct(kind) else _holds(kind, BYTES)
            _check(path, picture, kind, "encoded bytes", fits)
        if key is not None:
            kind = schema.field(key).type
            fits = _holds(kind, TEXT) or _holds(kind, WHOLE_NUMBER)
            _check(path, key, kind, "text or whole numbers", fits)
        return sorted({picture, *([key] if key else []), *self._told(path, schema)})

    def _told(self, path: str, schema: pa.Schema) -> Iterator[str]:
        """The columns that columns of PAIR are taken from."""
        for column, names in spellings(self.config.fields).items():
            there = (name for name in names if name in schema.names and name != _picture_column(self.config))
            if (name := next(there, None)) is not None:
                kind, wanted = schema.field(name).type, PAIR.field(column).type
                _check(path, name, kind, f"{wanted}, for {column},", _holds(kind, wanted))
                yield name


class _RowGroup:
    """What is the same for all rows of a row group, and which keys it had."""

    def __init__(self, unit: Unit, config: ParquetConfig, images: Location | None) -> None:
        self._unit, self._config, self._images = unit, config, images
        self._picture = _picture_column(config)
        self._met = set[str]()

    def row(self, number: int, cells: Mapping[str, pa.Scalar]) -> Row:
        """The row of that number in its file."""
        key = f"{self._unit.key}/{number}"
        try:
            # Arrow stores whatever bytes it is given as text.
            record = {name: cell.as_py() for name, cell in cells.items()}
        except UnicodeDecodeError as error:
            return skip(key, reasons.BROKEN_METADATA, f"text is not UTF-8: {error}")
        told = {name: value for name, value in record.items() if name != self._picture}
        try:
            if self._config.key is not None:
                key = self._key(record[self._config.key])
            columns = columns_of(told, self._config.fields)
            check_said(columns, self._config.fields)
            return usable(key, **columns | self._find(record[self._picture]))
        except UnusableError as fault:
            return skip(key, fault.reason, fault.detail)

    def _key(self, value: str | int | None) -> str:
        if value is None or value == "":
            told = f"the key, column {self._config.key!r}, is {value!r}"
            raise UnusableError(reasons.INCOMPLETE_METADATA, told)
        if str(value) in self._met:
            told = f"row group {self._unit.part} has another row {value!r} before it"
            raise UnusableError(reasons.REPEATED_KEY, told)
        self._met.add(str(value))
        return f"{self._unit.key}/{self._unit.part}/{value}"

    def _find(self, cell: Any) -> dict[str, Any]:
        """The picture that a cell holds or names, as `usable` takes it."""
        if isinstance(cell, dict):
            # Hugging Face's struct; one without bytes names a file.
            cell = cell.get("path") if cell["bytes"] is None else cell["bytes"]
        if isinstance(cell, bytes):
            if len(cell) > MOST_PICTURE_BYTES:
                told = f"it has {len(cell)} bytes, {MOST_PICTURE_BYTES} are read at most"
                raise UnusableError(reasons.TOO_MANY_BYTES, told)
            return {"encoded": cell}
        if not isinstance(cell, str) or not cell.strip():
            raise UnusableError(reasons.NO_PICTURE, f"column {self._picture!r} has none")
        if self._config.url is not None:
            return {"load": cell.strip(), "url": cell.strip()}
        if self._images is None:
            told = f"column {self._picture!r} names the file {cell!r}, and corpus.images is none"
            raise UnusableError(reasons.NO_PICTURE, told)
        return {"image": find_picture(self._images, cell)}


def _picture_column(config: ParquetConfig) -> str:
    column = config.image or config.file or config.url
    assert column is not None, "the settings refuse rows without a picture"
    return column


def _check(path: str, column: str, kind: pa.DataType, wanted: str, fits: bool) -> None:
    if not fits:
        raise DataError(
            f"column {column!r} of {path} is {kind}, and {wanted} is needed: rename or cast it, or name "
            "another one in the reader's settings"
        )


def _holds(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether the values of one type are, in Python, what those of another are."""
    of = pa.types
    if of.is_dictionary(kind):
        kind = kind.value_type
    if of.is_null(kind):
        return True
    if of.is_list(wanted):
        is_list = of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind)
        return is_list and _holds(kind.value_type, wanted.value_type)
    if of.is_struct(wanted):
        return of.is_struct(kind) and all(_has(kind, part.name, part.type) for part in wanted)
    if of.is_string(wanted):
        fits = of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)
    elif of.is_binary(wanted):
        fits = of.is_binary(kind) or of.is_large_binary(kind) or of.is_binary_view(kind)
    else:
        fits = of.is_integer(kind) or (of.is_floating(wanted) and of.is_floating(kind))
    return bool(fits)


def _has(kind: pa.DataType, name: str, wanted: pa.DataType) -> bool:
    return any(part.name == name and _holds(part.type, wanted) for part in kind)
