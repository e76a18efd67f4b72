"""Pictures that a corpus names by path: files below `corpus.images`, or members of a tar there."""

from __future__ import annotations

import reprlib
from typing import Any

from pyarrow import fs

from mmicl_core.data import reasons
from mmicl_core.data.readers.base import image_at
from mmicl_core.data.readers.fields import UnusableError
from mmicl_core.data.readers.tar import BrokenTarError, iter_members
from mmicl_core.data.storage import IMAGES, Location
from mmicl_core.errors import DataError

__all__ = ["PictureShard", "find_picture"]


def find_picture(images: Location, path: str) -> dict[str, Any]:
    """The IMAGE reference of a picture file.

    Args:
        path: relative to `images`.

    Raises:
        UnusableError: there is no such file, or the path leads elsewhere.
    """
    told = reprlib.repr(path)
    try:
        info = images.filesystem.get_file_info(images.full(path))
    except DataError as error:
        raise UnusableError(reasons.FORGED_PATH, told) from error
    except OSError as error:
        # A name that is too long for a file, for example.
        raise UnusableError(reasons.MISSING_FILE, f"{told}: {type(error).__name__}") from error
    if info.type != fs.FileType.File:
        raise UnusableError(reasons.MISSING_FILE, f"corpus.images has no file {told}")
    return image_at(IMAGES + path, size=int(info.size))


class PictureShard:
    """The pictures of one shard of documents, found by name.

    They lie in a tar `KEY.tar` (by the last part of its members' names), in a folder `KEY_images` or
    `KEY.jsonl_images`, as MMC4's own script for loading pictures makes it, or in `images` itself; in this
    order they are looked for.

    Args:
        images: where these are.
        key: of the shard: its path without suffixes.
    """

    def __init__(self, images: Location, key: str) -> None:
        self._images = images
        self._flaw = ""
        self._members = self._index(f"{key}.tar") if images.exists(f"{key}.tar") else {}
        folders = (f"{key}_images", f"{key}.jsonl_images")
        found = images.filesystem.get_file_info([images.full(folder) for folder in folders])
        kinds = dict(zip(folders, (info.type for info in found), strict=True))
        self._folders = [*(f"{name}/" for name in folders if kinds[name] == fs.FileType.Directory), ""]

    def find(self, name: str) -> dict[str, Any]:
        """The IMAGE reference of a picture.

        Raises:
            UnusableError: it is nowhere, or its name leads elsewhere.
        """
        if name in self._members:
            return self._members[name]
        for folder in self._folders:
            try:
                return find_picture(self._images, folder + name)
            except UnusableError as fault:
                if fault.reason == reasons.FORGED_PATH:
                    raise
        raise UnusableError(reasons.MISSING_FILE, f"corpus.images has no {reprlib.repr(name)}{self._flaw}")

    def _index(self, path: str) -> dict[str, dict[str, Any]]:
        members = {}
        try:
            for member in iter_members(self._images, path):
                assert member.offset is not None
                place = image_at(IMAGES + path, member=member.name, offset=member.offset, size=member.size)
                members[member.name.rpartition("/")[2]] = place
        except BrokenTarError as error:
            self._flaw = f"; {error}"
        return members
