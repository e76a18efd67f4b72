"""Tables as Arrow files: mapped into memory, so that the processes of a machine share their pages."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

__all__ = ["read_arrow", "write_arrow"]


def read_arrow(path: Path) -> pa.Table:
    """The table of a file; its pages are read when they are touched."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as one record batch."""
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table.combine_chunks())
