"""Pictures that are rows of bytes in a file, as CIFAR and MNIST have them."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmicl_core.errors import DataError

__all__ = ["RowPictures", "idx_header_bytes", "read_idx", "read_rows"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class RowPictures:
    """Pictures as PNG; a key is the name of a file and the number of a row, as in `test_batch.bin/17`.

    The pixels of a row are the planes of its colours one after the other, or one plane of grey.
    """

    folder: Path
    header_bytes: int
    """Before the first row."""
    shape: tuple[int, ...]
    """Planes x height x width, or height x width."""
    label_bytes: int = 0
    """At the beginning of a row, before its pixels."""

    def read(self, key: str) -> bytes:
        """The PNG of a row."""
        name, _, number = key.rpartition("/")
        row_bytes = self.label_bytes + math.prod(self.shape)
        rows = read_rows(self.folder / name, self.header_bytes, row_bytes)
        if not number.isdecimal() or int(number) >= len(rows):
            raise DataError(f"picture {key!r} is not in {self.folder}: {name} has rows 0 to {len(rows) - 1}")
        pixels = rows[int(number), self.label_bytes :].reshape(self.shape)
        if pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        encoded = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(encoded, "PNG")
        return encoded.getvalue()


def read_rows(path: Path, header_bytes: int, row_bytes: int) -> Bytes:
    """The rows of a file behind its header: rows x bytes. What is not in gzip is read as it is needed.

    Raises:
        DataError: the file cannot be read, or has not a whole number of rows.
    """
    content = _content(path)
    rows, rest = divmod(len(content) - header_bytes, row_bytes)
    if rows < 1 or rest:
        raise DataError(
            f"{path} has {len(content)} bytes, which is not {header_bytes} and a multiple of {row_bytes}: it "
            "is cut, or another version of the data set; take it anew"
        )
    return content[header_bytes:].reshape(rows, row_bytes)


def read_idx(path: Path, shape: tuple[int, ...]) -> Bytes:
    """The rows of an IDX file of unsigned bytes (LeCun et al., MNIST): rows x bytes of a shape.

    Raises:
        DataError: as `read_rows`, or its header says something else.
    """
    header_bytes = idx_header_bytes(shape)
    rows = read_rows(path, header_bytes, math.prod(shape))
    told = np.frombuffer(_content(path)[:header_bytes].tobytes(), ">u4").tolist()
    # Two bytes of 0, 8 for unsigned bytes, the number of dimensions; then their sizes.
    wanted = [0x0800 + 1 + len(shape), len(rows), *shape]
    if told != wanted:
        raise DataError(
            f"{path} begins with {told} instead of {wanted}: it is cut, or another file; take it anew"
        )
    return rows


def idx_header_bytes(shape: tuple[int, ...]) -> int:
    """Bytes before the first row of an IDX file whose rows have a shape."""
    return 4 * (2 + len(shape))


# All files of a data set: five of training and one of testing are the most.
@lru_cache(maxsize=8)
def _content(path: Path) -> Bytes:
    try:
        if path.suffix == ".gz":
            return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
