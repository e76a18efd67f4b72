"""The stages of a described corpus, written by hand: no picture is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.data.grouping import CONCEPT
from mmicl_core.data.schema import LOOKED, PAIR

__all__ = ["write_described"]

SCHEMAS = {"pairs": PAIR, "looked": LOOKED, "concepts": CONCEPT}


def write_described(folder: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Path]:
    """Write the files of the stages `pairs`, `looked` and `concepts`; gives their folders.

    Args:
        parts: by their name, rows with any columns of the three.
    """
    folders = {stage: folder / stage for stage in SCHEMAS}
    for stage, schema in SCHEMAS.items():
        folders[stage].mkdir(parents=True)
        for part, rows in parts.items():
            known = [{name: row.get(name) for name in schema.names} for row in rows]
            table = pa.Table.from_pylist(known, schema=schema)
            if stage == "pairs":
                pq.write_table(table, folders[stage] / f"pairs-{part}.parquet")
            else:
                with pa.ipc.new_file(str(folders[stage] / f"{stage}-{part}.arrow"), schema) as writer:
                    writer.write_table(table)
    return folders
