"""Pictures by key, out of a folder of PAIR files; bytes stay where they are until asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from mmicl_core.data.augment import VARIANT_MARK, augment_versions
from mmicl_core.data.images import decode
from mmicl_core.data.schema import PAIR
from mmicl_core.errors import DataError

__all__ = ["PictureStore", "PixelStore", "read_metadata"]

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

    def __contains__(self, key: str) -> bool:
        return key in self._where

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


class PixelStore:
    """Pictures and their augmented versions by `variant_key`, as a vision tower takes them.

    Args:
        pictures: where the pictures are.
        prepare: pictures -> (N, 3, height, width).
    """

    def __init__(self, pictures: PictureStore, prepare: Callable[[Sequence[Image.Image]], Tensor]) -> None:
        self._pictures, self._prepare = pictures, prepare
        self._prepared: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The pixels of a version, (3, height, width).

        Raises:
            DataError: there is no picture of that key.
        """
        picture = key if key in self._pictures else key.rpartition(VARIANT_MARK)[0] or key
        if picture not in self._prepared:
            # Sixteen bits: every pass over the corpus needs all of them again.
            self._prepared[picture] = self._prepare([self._pictures.picture(picture)])[0].half()
        pixels = self._prepared[picture].float()
        return (pixels if key == picture else augment_versions(pixels[None], [key])[0]).numpy()


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no Parquet file of pictures")
    return files
