"""Readers: files of a corpus -> PAIR rows. What cannot be used is a row with a reason, never silence."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmicl_core.data.schema import PAIR
from mmicl_core.errors import DataError

__all__ = ["find_shards", "read_shard"]

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")


def find_shards(folder: Path) -> list[Path]:
    """The webdataset shards of a corpus folder, in name order.

    Raises:
        DataError: the folder is missing or holds no shard.
    """
    if not folder.is_dir():
        raise DataError(f"corpus {folder} is not a folder; `mmicl corpus build open-emoji` makes one")
    shards = sorted([*folder.glob("*.tar"), *folder.glob("*.tar.gz")])
    if not shards:
        raise DataError(f"corpus {folder} holds no *.tar or *.tar.gz shard")
    return shards


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """PAIR rows of one webdataset tar, each with one more key, `skipped`: None or why it is unusable.

    The members of a sample share the part of their name before the first dot and lie together. A
    broken archive ends with one row that says so; the rows before it stand.
    """
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                sample, _, suffix = member.name.partition(".")
                if sample != key and members:
                    yield _pair(key, members)
                    members = {}
                content = archive.extractfile(member)
                assert content is not None
                key = sample
                members[suffix.lower()] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield _skipped(path.name, f"broken shard: {type(error).__name__}")
        return
    if members:
        yield _pair(key, members)


def _pair(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None:
        return _skipped(key, "no picture")
    if "json" not in members:
        return _skipped(key, "no metadata")
    try:
        metadata = json.loads(members["json"])
    except ValueError:
        return _skipped(key, "broken metadata")
    wanted = {field.name for field in PAIR} - {"picture", "image"}
    if not isinstance(metadata, dict) or not wanted <= set(metadata):
        return _skipped(key, "incomplete metadata")
    try:
        with Image.open(io.BytesIO(image)) as picture:
            picture.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return _skipped(key, "broken picture")
    return {"picture": key, "image": image, "skipped": None} | {name: metadata[name] for name in wanted}


def _skipped(key: str, reason: str) -> dict[str, Any]:
    empty: dict[str, Any] = {field.name: None for field in PAIR}
    return empty | {"picture": key, "skipped": reason}
