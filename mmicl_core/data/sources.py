"""Readers: files of a corpus -> PAIR rows. What cannot be used is a row with a reason, never silence."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmicl_core.data.images import decode
from mmicl_core.data.schema import PAIR
from mmicl_core.errors import DataError

__all__ = ["find_shards", "read_shard"]

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
TOLD = [field for field in PAIR if field.name not in ("picture", "image")]


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

    The members of a sample share their folder and the part of their name before its first dot, and lie
    together. A broken archive ends with one row that says so; the rows before it stand.
    """
    met = set[str]()
    for key, members in _samples(path):
        row = _skipped(key, members) if isinstance(members, str) else _pair(key, members)
        if row["skipped"] is None and key in met:
            row = _skipped(key, "repeated key")
        met.add(key)
        yield row


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes] | str]]:
    """Keys with the members of each sample by suffix; last, if need be, the shard with what broke it."""
    key, members = "", dict[str, bytes]()
    broken = None
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, slash, file = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = file.partition(".")
                sample, suffix = folder + slash + stem, suffix.lower()
                if members and (sample != key or suffix in members):
                    yield key, members
                    members = {}
                content = archive.extractfile(member)
                assert content is not None
                key = sample
                members[suffix] = content.read()
            _check_end(archive)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        broken = f"broken shard: {type(error).__name__}"
    if members:
        yield key, members
    if broken is not None:
        yield path.name, broken


def _check_end(archive: tarfile.TarFile) -> None:
    # Behind the first member, tarfile takes a broken header for the end; the real end is a block of zeros.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end of the archive is missing")


def _pair(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None:
        return _skipped(key, "no picture")
    if "json" not in members:
        return _skipped(key, "no metadata")
    try:
        metadata = json.loads(members["json"])
    except (ValueError, RecursionError):
        return _skipped(key, "broken metadata")
    if not isinstance(metadata, dict) or not all(_fits(metadata.get(field.name), field) for field in TOLD):
        return _skipped(key, "incomplete metadata")
    try:
        # Only decoding finds the picture that ends too early; found later, it would stop a whole run.
        decode(image)
    except DataError:
        return _skipped(key, "broken picture")
    row = {"picture": key, "image": image, "skipped": None}
    return row | {field.name: metadata[field.name] for field in TOLD}


def _fits(value: Any, field: pa.Field) -> bool:
    if pa.types.is_list(field.type):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def _skipped(key: str, reason: str) -> dict[str, Any]:
    empty: dict[str, Any] = {field.name: None for field in PAIR}
    return empty | {"picture": key, "skipped": reason}
