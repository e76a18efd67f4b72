"""Records of JSON files one by one: JSON lines or one array, plain, in gzip or in zip.

Memory holds a chunk and a record, whatever the size of the file. A record that cannot be read is a `Fault`
in its place; a file that breaks ends with one, and the records before it stand.

Hazard: in an array nothing but the records themselves tells where the next one begins, so one broken record
ends the file; in JSON lines it costs its line. Event parsers would not help: what they keep for each level
of nesting grows with the depth, and a megabyte of brackets takes gigabytes.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeGuard

from pyarrow import ArrowException

from mmicl_core.data import reasons
from mmicl_core.data.readers.base import Row, skip
from mmicl_core.data.storage import Location

__all__ = ["MOST_BYTES", "Fault", "is_text", "read_json_array", "read_json_lines"]

MOST_BYTES = 2**24
"""Longest record; longer ones are broken, or somebody else's file."""

CHUNK_BYTES = 2**16
FAILURES = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    zipfile.BadZipFile,
    ArrowException,
    NotImplementedError,
)
AFTER_ITEMS = frozenset(" \t\n\r,]")
SPACES = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Fault:
    """Why a record, or the rest of a file, cannot be read."""

    reason: str
    detail: str

    def row(self, picture: str) -> Row:
        """The row that says so."""
        return skip(picture, self.reason, self.detail)


class _BrokenFileError(ValueError):
    """What is wrong with a file from here on."""


def read_json_lines(location: Location, path: str) -> Iterator[tuple[int, Any]]:
    """Numbers of lines, from 0, each with its value or a `Fault`; blank lines are no records.

    The last fault has the number -1 if it is the file that is broken.

    Args:
        path: `.gz` is decompressed, and of a `.zip` the one `.jsonl` inside is read.
    """
    try:
        for number, line in enumerate(_lines(_chunks(location, path))):
            if line is None:
                yield number, Fault(reasons.BROKEN_METADATA, f"line {number}: longer than {MOST_BYTES} bytes")
            elif line.strip():
                yield number, _parse(number, line)
    except FAILURES as error:
        yield -1, _broken_file(path, error)


def read_json_array(location: Location, path: str) -> Iterator[tuple[int, Any]]:
    """Numbers of the items of an array, from 0, each with its value.

    A file that breaks, or is no array, ends with the number -1 and a `Fault`.
    """
    try:
        yield from enumerate(_items(_Text(_chunks(location, path))))
    except FAILURES as error:
        yield -1, _broken_file(path, error)


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a string that can be stored: JSON can escape half of a character, and UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _broken_file(path: str, error: Exception) -> Fault:
    told = str(error) if isinstance(error, _BrokenFileError) else f"{type(error).__name__}: {error}"
    return Fault(reasons.BROKEN_FILE, f"{path}: {told}")


def _parse(number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        told = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        return Fault(reasons.BROKEN_METADATA, f"line {number}: {told}")


def _chunks(location: Location, path: str) -> Iterator[bytes]:
    """The content of a file. What a broken archive holds before its flaw is given before the error."""
    with ExitStack() as stack:
        if path.lower().endswith(".zip"):
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(location.open(path))))
            file: Any = stack.enter_context(archive.open(_only_member(archive)))
        else:
            file = stack.enter_context(location.stream(path))
            if path.lower().endswith(".gz"):
                if location.filesystem.get_file_info(location.full(path)).size == 0:
                    # gzip takes it for an archive of nothing.
                    raise _BrokenFileError("the archive is empty")
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
        # `read` would go on until it has all that is asked for, and lose what it has where it meets a flaw.
        while chunk := file.read1(CHUNK_BYTES):
            yield chunk


def _only_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if member.filename.lower().endswith(".jsonl")]
    if len(members) != 1:
        raise _BrokenFileError(f"the archive holds {len(members)} .jsonl files instead of one")
    if members[0].flag_bits & 1:
        raise _BrokenFileError("the archive is encrypted")
    return members[0]


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is too long."""
    pieces, size = list[bytes](), 0
    for chunk in chunks:
        for number, piece in enumerate(chunk.split(b"\n")):
            if number:
                yield b"".join(pieces) if size <= MOST_BYTES else None
                pieces, size = [], 0
            size += len(piece)
            if size <= MOST_BYTES:
                pieces.append(piece)
    if size:
        yield b"".join(pieces) if size <= MOST_BYTES else None


def _items(text: _Text) -> Iterator[Any]:
    if text.take() != "[":
        raise _BrokenFileError("it is not an array, so it has no items")
    if text.take_if("]"):
        mark = "]"
    else:
        yield text.value()
        while (mark := text.take()) == ",":
            yield text.value()
    if mark != "]":
        raise _BrokenFileError(
            text.flaw or f"{mark or 'nothing'!r} follows an item: the array is cut or broken"
        )
    if (mark := text.take()) or text.flaw:
        raise _BrokenFileError(text.flaw or f"{mark!r} follows the end of the array")


class _Text:
    """A window on a long JSON text that moves on as values are taken from it."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8")()
        self._window, self._at, self._ended = "", 0, False
        self._decode = json.JSONDecoder().raw_decode
        self.flaw = ""
        """Why the text ends where it does, if not because the file ends."""

    def take(self) -> str:
        """The next character that is no space; empty at the end."""
        self._skip_spaces()
        taken = self._window[self._at : self._at + 1]
        self._at += len(taken)
        return taken

    def take_if(self, wanted: str) -> bool:
        """Take the next character that is no space if it is `wanted`."""
        self._skip_spaces()
        found = self._window.startswith(wanted, self._at)
        self._at += len(wanted) * found
        return found

    def value(self) -> Any:
        """The next value.

        Raises:
            _BrokenFileError: there is none, or it is broken.
        """
        self._skip_spaces()
        while True:
            try:
                value, end = self._decode(self._window, self._at)
            except json.JSONDecodeError as error:
                # Cut by the window or broken: more of the text tells.
                if self._more():
                    continue
                raise _BrokenFileError(self.flaw or f"an item is cut or broken: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise _BrokenFileError(f"an item cannot be read: {type(error).__name__}") from error
            # A number may go on behind the window: `12`, and `1.5e3` from every place in it.
            if self._window[end : end + 1] in AFTER_ITEMS or not self._more():
                self._at = end
                return value

    def _skip_spaces(self) -> None:
        while True:
            spaces = SPACES.match(self._window, self._at)
            assert spaces is not None
            self._at = spaces.end()
            if self._at < len(self._window) or not self._more():
                return

    def _more(self) -> bool:
        """Widen the window to twice what is left of it; whether that brought anything."""
        left = self._window[self._at :]
        if len(left) > MOST_BYTES:
            self.flaw, self._ended = f"an item is longer than {MOST_BYTES} characters, or broken", True
        self._window, self._at = left, 0
        pieces, missing = [left], max(len(left), 1)
        while missing > 0 and not self._ended:
            pieces.append(self._read())
            missing -= len(pieces[-1])
        self._window = "".join(pieces)
        return len(self._window) > len(left)

    def _read(self) -> str:
        try:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            return self._bytes_to_text.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            self.flaw, self._ended = "the text is not UTF-8 from here on", True
            return bytes(error.object[: error.start]).decode()
        except FAILURES as error:
            self.flaw, self._ended = f"{type(error).__name__}: {error}", True
            return ""
