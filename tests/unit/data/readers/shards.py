"""Shards of samples, and the rows that they are read as."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from pyarrow import fs

from mmicl_core.config.corpus import WebdatasetConfig
from mmicl_core.data.readers.base import Row
from mmicl_core.data.readers.webdataset import WebdatasetReader
from mmicl_core.data.schema import PAIR
from mmicl_core.data.storage import CORPUS, Location, PictureReader
from tests.fakes import metadata, write_tar

BLOCK = 512
# Whatever bytes stand for a picture: the reader does not look at them. An odd size needs padding.
PICTURE = b"\xff\xd8 not looked at"

Member = tuple[str, bytes]
Told = tuple[str, str | None]


class Elsewhere(Location):
    """The disk of this machine, by a filesystem that nobody knows to be local."""

    @property
    def filesystem(self) -> Any:
        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file")))


def sample(key: str, number: int = 0, suffix: str = "jpg", **changes: Any) -> list[Member]:
    about = json.dumps(metadata("red-cat", "ink") | changes).encode()
    return [
        (f"{key}.{suffix}", PICTURE + bytes([number] * (10 + 97 * number))),
        (f"{key}.json", about),
        (f"{key}.txt", f"cat number {number}".encode()),
    ]


def read(folder: Path, config: WebdatasetConfig | None = None, where: type[Location] = Location) -> list[Row]:
    reader = WebdatasetReader(where(str(folder)), config or WebdatasetConfig())
    rows = [row for unit in reader.units() for row in reader.read(unit)]
    pa.Table.from_pylist([row.pair for row in rows], PAIR)
    return rows


def read_tar(folder: Path, members: Sequence[Member], **settings: Any) -> list[Row]:
    write_tar(folder / "shard.tar", members)
    return read(folder, WebdatasetConfig(**settings))


def told(rows: Sequence[Row]) -> list[Told]:
    return [(row.pair["picture"], row.skipped) for row in rows]


def picture_bytes(folder: Path, row: Row) -> bytes:
    if row.encoded is not None:
        return row.encoded
    return PictureReader({CORPUS: Location(str(folder))}).read(row.pair["image"])


def zipped(data: bytes) -> bytes:
    return gzip.compress(data, 1)


def ends_of_members(data: bytes, count: int) -> list[int]:
    """Where the content of each of the first members ends in a plain tar."""
    ends, position = [], 0
    for _ in range(count):
        size = int(data[position + 124 : position + 135], 8)
        ends.append(position + BLOCK + size)
        position += BLOCK + -(-size // BLOCK) * BLOCK
    return ends
