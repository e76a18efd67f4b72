"""Webdataset tars as img2dataset and DataComp write them -> PAIR rows.

The members of a sample share their folder and the part of their name before its first dot, and lie
together: `KEY.jpg` (or jpeg, png, webp; the first of these that there is), `KEY.txt` with the caption,
`KEY.json` with what else is known. Hidden members are no samples. A group of members is one row, so counts
are exact: what a broken archive breaks off is one row as well, and the rows before it stand.

A picture in a plain tar is given by its place and not read; one in a compressed tar, by its bytes.

Hazard: at the place where an archive breaks, a sample may lack members that nobody has seen. It is given
only if it is usable and has as many members as the sample before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmicl_core.config.corpus import WebdatasetConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers.base import MOST_PICTURE_BYTES, Row, Unit, image_at, skip, usable
from mmicl_core.data.readers.fields import UnusableError, check_said, columns_of
from mmicl_core.data.readers.tar import TAR_SUFFIXES, BrokenTarError, Member, compression_of, iter_members
from mmicl_core.data.readers.units import find_units
from mmicl_core.data.storage import CORPUS, Location

__all__ = ["WebdatasetReader"]

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json")
MOST_TEXT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class WebdatasetReader:
    """Reads tar shards; a unit is a shard."""

    location: Location
    config: WebdatasetConfig

    def units(self) -> list[Unit]:
        """The shards, in name order.

        Raises:
            DataError: there is none, or the names of two differ only in their suffixes.
        """
        return find_units(self.location, "webdataset", TAR_SUFFIXES)

    def read(self, unit: Unit) -> Iterator[Row]:
        """The rows of a shard; see the module's text for what is one."""
        shard = _Shard(unit, self.config)
        name, members, members_before = "", dict[str, Member](), 0
        try:
            for member in iter_members(self.location, unit.path, shard.wants):
                sample, suffix = _split(member.name)
                if _is_hidden(sample):
                    continue
                if members and (sample != name or suffix in members):
                    yield shard.row(name, members)
                    members, members_before = {}, len(members)
                name = sample
                members[suffix] = member
        except BrokenTarError as error:
            is_cut = _split(error.cut)[0] == name or len(members) < members_before
            row = shard.row(name, members) if members and not is_cut else None
            if row is not None and row.skipped is None:
                yield row
            yield skip(unit.path, reasons.BROKEN_FILE, str(error))
            return
        if members:
            yield shard.row(name, members)


class _Shard:
    """What is the same for all samples of a shard, and which samples it had."""

    def __init__(self, unit: Unit, config: WebdatasetConfig) -> None:
        self._unit, self._config = unit, config
        self._is_compressed = compression_of(unit.path) is not None
        self._met: dict[str, set[str]] = {}

    def wants(self, name: str, size: int) -> bool:
        """Whether the content of a member is read."""
        suffix = _split(name)[1]
        if suffix in TEXT_SUFFIXES:
            return size <= MOST_TEXT_BYTES
        return self._is_compressed and suffix in PICTURE_SUFFIXES and size <= MOST_PICTURE_BYTES

    def row(self, name: str, members: dict[str, Member]) -> Row:
        """The row of a sample, of which `members` are by their suffixes."""
        key = f"{self._unit.key}/{name}"
        picture = next((members[suffix] for suffix in PICTURE_SUFFIXES if suffix in members), None)
        image = None
        if picture is not None and picture.offset is not None:
            place = CORPUS + self._unit.path
            image = image_at(place, member=picture.name, offset=picture.offset, size=picture.size)
        try:
            self._check_key(name, members)
            self._check_picture(picture, members)
            columns = self._columns(members)
        except UnusableError as fault:
            return skip(key, fault.reason, fault.detail, image)
        encoded = picture.content if picture is not None and image is None else None
        return usable(key, image=image, encoded=encoded, **columns)

    def _check_key(self, name: str, members: dict[str, Member]) -> None:
        if name not in self._met:
            self._met[name] = set(members)
            return
        late = sorted(members.keys() - self._met[name])
        self._met[name].update(members)
        if late:
            told = f"{', '.join(late)} come after other samples: write the members of a sample side by side"
            raise UnusableError(reasons.SCATTERED_KEY, told)
        raise UnusableError(reasons.REPEATED_KEY, f"{self._unit.path} has another sample {name!r} before it")

    def _check_picture(self, picture: Member | None, members: dict[str, Member]) -> None:
        if picture is None:
            told = (
                f"there are {', '.join(sorted(members))}; a picture is one of {', '.join(PICTURE_SUFFIXES)}"
            )
            raise UnusableError(reasons.NO_PICTURE, told)
        if picture.size > MOST_PICTURE_BYTES:
            told = f"{picture.name} has {picture.size} bytes, {MOST_PICTURE_BYTES} are read at most"
            raise UnusableError(reasons.TOO_MANY_BYTES, told)

    def _columns(self, members: dict[str, Member]) -> dict[str, Any]:
        record = _record(members["json"]) if "json" in members else {}
        columns = columns_of(record, self._config.fields)
        if "txt" in members:
            columns["text"] = _text(members["txt"]) or columns["text"]
        check_said(columns, self._config.fields)
        return columns


def _split(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and its suffix in small letters."""
    # `tar -C folder -c .` writes every name as `./name`.
    folder, slash, file = name.removeprefix("./").rpartition("/")
    # A dot at its beginning hides a file, and is no suffix.
    stem, _, suffix = file[1:].partition(".")
    return folder + slash + file[:1] + stem, suffix.lower()


def _is_hidden(sample: str) -> bool:
    return sample.startswith(".") or "/." in sample


def _record(member: Member) -> dict[str, Any]:
    content = _content(member)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableError(reasons.BROKEN_METADATA, f"{member.name} is not JSON: {error}") from error
    if not isinstance(record, dict):
        told = f"{member.name} holds a JSON {type(record).__name__}, and an object is needed"
        raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    return record


def _text(member: Member) -> str:
    try:
        return _content(member).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UnusableError(reasons.BROKEN_METADATA, f"{member.name} is not UTF-8: {error}") from error


def _content(member: Member) -> bytes:
    if member.content is None:
        told = f"{member.name} has {member.size} bytes, {MOST_TEXT_BYTES} are read at most"
        raise UnusableError(reasons.BROKEN_METADATA, told)
    return member.content
