"""Where files lie: local folders and whatever filesystem Arrow opens, by path, glob or URI.

A `Location` is a folder on a filesystem; files are named relative to it, so that what refers to them
stays right when the folder moves. `PictureReader` follows the IMAGE references of PAIR rows.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, fs

from mmicl_core.errors import ConfigError, DataError

__all__ = ["COPY", "CORPUS", "IMAGES", "FoundFile", "Location", "PictureReader", "locate"]

CORPUS = "corpus:"
IMAGES = "images:"
COPY = "copy:"

URI = re.compile(r"^[a-z][a-z0-9+.-]*://")
WILDCARD = re.compile(r"[*?\[]")
MOST_OPEN_FILES = 32


@dataclass(frozen=True)
class FoundFile:
    """A file of a location: its path relative to it, its size in bytes, its time in nanoseconds."""

    path: str
    size: int
    time_ns: int


@dataclass(frozen=True)
class Location:
    """A folder, on this machine or elsewhere; plain strings, so that it travels to workers.

    Args:
        uri: the folder: an absolute path, or a URI.
        pattern: which files below it are meant: a glob, the path of one file, or empty for all.
    """

    uri: str
    pattern: str = ""

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        if not URI.match(self.uri):
            return fs.LocalFileSystem(), self.uri
        try:
            filesystem, base = fs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError, ArrowException) as error:
            raise ConfigError(f"{self.uri} cannot be opened: {error}") from error
        return filesystem, str(base)

    def __str__(self) -> str:
        return f"{self.uri}/{self.pattern}" if self.pattern else self.uri

    @property
    def filesystem(self) -> Any:
        """Arrow's filesystem."""
        return self._opened[0]

    def full(self, path: str) -> str:
        """The path of a file as the filesystem takes it.

        Raises:
            DataError: it leads out of the folder.
        """
        parts = path.split("/")
        if path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
            raise DataError(f"the path {path!r} leads out of {self.uri}: paths lie below their folder")
        return f"{self._opened[1].rstrip('/')}/{path}" if path else self._opened[1]

    def open(self, path: str) -> Any:
        """A file for random access. Raises OSError."""
        return self.filesystem.open_input_file(self.full(path))

    def stream(self, path: str, buffer_bytes: int = 2**20) -> Any:
        """A file to be read from its beginning. Raises OSError."""
        return self.filesystem.open_input_stream(self.full(path), compression=None, buffer_size=buffer_bytes)

    def exists(self, path: str) -> bool:
        """Whether there is a file of that path."""
        return bool(self.filesystem.get_file_info(self.full(path)).type == fs.FileType.File)

    def find(self, *suffixes: str, folder: str = "", recursive: bool = True) -> list[FoundFile]:
        """The files that fit the pattern and end in one of `suffixes` (`""` takes all), in name order.

        Hidden files, and what lies in hidden folders, are no part of a corpus.

        Args:
            folder: the one below to look in.
            recursive: look in the folders below it, too.

        Raises:
            DataError: there is no such folder, or a name that no text can hold.
        """
        base, files = self.full("").rstrip("/"), []
        for full, info in self._list(folder, recursive):
            path = full[len(base) + 1 :]
            hidden = any(_is_hidden(part) for part in path.split("/"))
            if info.type != fs.FileType.File or hidden or not path.lower().endswith(suffixes):
                continue
            if self.pattern in ("", path) or fnmatchcase(path, self.pattern):
                files.append(FoundFile(path, int(info.size or 0), int(info.mtime_ns or 0)))
        files.sort(key=lambda file: file.path)
        # One file is meant by its own name, brackets and all.
        return [file for file in files if file.path == self.pattern] or files

    def folders(self) -> list[str]:
        """The folders right below, in name order.

        Raises:
            DataError: there is no such folder, or a name that no text can hold.
        """
        found = self._list("", recursive=False)
        names = [full.rpartition("/")[2] for full, info in found if info.type == fs.FileType.Directory]
        return sorted(name for name in names if not _is_hidden(name))

    def _list(self, folder: str, recursive: bool) -> list[tuple[str, Any]]:
        place = self.full(folder).rstrip("/") or "/"
        try:
            found = self.filesystem.get_file_info(fs.FileSelector(place, recursive=recursive))
            return [(info.path, info) for info in found]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{self.uri}{'/' * bool(folder)}{folder} is not a folder") from error
        except UnicodeDecodeError as error:
            raise DataError(f"the name of a file, {error.object!r}, is not UTF-8: rename it") from error


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def locate(path: str) -> Location:
    """The folder, and the pattern below it, of a path, a glob or a URI.

    Raises:
        ConfigError: a URI that no filesystem of Arrow takes.
        DataError: there is neither a file nor a folder of that name.
    """
    place = path if URI.match(path) else str(Path(path).absolute())
    place, mark, options = _split_options(place)
    folder, pattern = _split_glob(place)
    if pattern:
        return Location(folder + mark + options, pattern)
    location = Location(place + mark + options)
    info = location.filesystem.get_file_info(location.full(""))
    if info.type == fs.FileType.NotFound:
        raise DataError(f"{path} does not exist: name a folder, a file or a glob of files")
    if info.type == fs.FileType.File:
        folder, _, name = place.rpartition("/")
        return Location(folder + mark + options, name)
    return location


def _split_glob(place: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the rest; what exists by a name with brackets is no glob."""
    parts = place.split("/")
    for number, part in enumerate(parts):
        if WILDCARD.search(part) and not Path("/".join(parts[: number + 1])).exists():
            return "/".join(parts[:number]), "/".join(parts[number:])
    return place, ""


def _split_options(uri: str) -> tuple[str, str, str]:
    # What follows a question mark in a URI are options of its filesystem, not a wildcard.
    return uri.partition("?") if URI.match(uri) else (uri, "", "")


class PictureReader:
    """Reads encoded pictures by their IMAGE references.

    Args:
        places: the folder behind each prefix of a reference's `path`.
    """

    def __init__(self, places: Mapping[str, Location]) -> None:
        self._places = places
        self._open = OrderedDict[str, Any]()

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind where a reader travels to another process.
        return {"_places": self._places, "_open": OrderedDict()}

    def read(self, image: Mapping[str, Any]) -> bytes:
        """The encoded bytes of a picture.

        Raises:
            DataError: the file is missing or ends before the picture does.
        """
        try:
            data = bytes(self._file(image["path"]).read_at(image["size"], image["offset"]))
        except OSError as error:
            raise DataError(f"{image['path']} cannot be read: {error}") from error
        if len(data) != image["size"]:
            raise DataError(
                f"{image['path']} holds {len(data)} of the {image['size']} bytes of {image['member']!r} from "
                f"byte {image['offset']} on: it was changed or cut after the corpus was read"
            )
        return data

    def close(self) -> None:
        """Close the files that are open."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, path: str) -> Any:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        prefix, colon, rest = path.partition(":")
        location = self._places.get(prefix + colon)
        if location is None:
            raise DataError(f"the reference {path!r} begins with none of {', '.join(self._places)}")
        file = self._open[path] = location.open(rest)
        if len(self._open) > MOST_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file
