"""Pictures by key, out of a folder of PAIR files; bytes stay where they are until asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mmicl_core.data.images import decode
from mmicl_core.data.schema import PAIR
from mmicl_core.errors import DataError

__all__ = ["PictureStore", "read_metadata"]

METADATA = [field.name for field in PAIR if field.name != "image"]
USABLE = pc.field("skipped").is_null()


def read_metadata(folder: Path) -> list[dict[str, Any]]:
    """All usable PAIR rows without their images, in key order."""
    rows: list[dict[str, Any]] = []
    for file in _files(folder):
        rows += pq.read_table(file, columns=METADATA, filters=USABLE).to_pylist()
    return sorted(rows, key=lambda row: str(row["picture"]))


class PictureStore:
    """Encoded pictures of a corpus by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables = [
            pq.read_table(file, columns=["picture", "image"], filters=USABLE) for file in _files(folder)
        ]
        self._where = {
            key: (number, row)
            for number, table in enumerate(self._tables)
            for row, key in enumerate(table.column("picture").to_pylist())
        }

    def encoded(self, key: str) -> bytes:
        """The bytes of a picture.

        Raises:
            DataError: there is none of that key.
        """
        if key not in self._where:
            raise DataError(f"{self._folder} has no picture {key!r}")
        number, row = self._where[key]
        return bytes(self._tables[number].column("image")[row].as_py())

    def picture(self, key: str) -> Image.Image:
        """A picture, decoded."""
        return decode(self.encoded(key))


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no Parquet file of pictures")
    return files
