"""What the tests of all readers ask of them."""

from __future__ import annotations

import pyarrow as pa

from mmicl_core.data.readers.base import Reader, Row
from mmicl_core.data.schema import PAIR

__all__ = ["read_all", "reasons_of"]


def read_all(reader: Reader) -> list[Row]:
    """The rows of a corpus, held against what is true of any: they repeat, can be stored, and have keys."""
    rows = [row for unit in reader.units() for row in reader.read(unit)]
    assert rows == [row for unit in reader.units() for row in reader.read(unit)]
    pa.Table.from_pylist([row.pair for row in rows], schema=PAIR)
    told = [{"picture": row.pair["picture"], "detail": row.detail} for row in rows]
    pa.Table.from_pylist(told, schema=pa.schema([("picture", pa.string()), ("detail", pa.string())]))
    usable = [row for row in rows if row.skipped is None]
    assert len({row.pair["picture"] for row in usable}) == len(usable)
    assert all(row.pair["image"] or row.encoded is not None or row.url for row in usable)
    return rows


def reasons_of(rows: list[Row]) -> list[tuple[str, str | None]]:
    """Each row's key and why it was skipped."""
    return [(row.pair["picture"], row.skipped) for row in rows]
