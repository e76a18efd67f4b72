"""The members of a tar, local or remote, in one pass forwards: where their bytes lie, or the bytes.

A local plain tar is read by headers alone: what lies between them is jumped over. Other filesystems answer
a jump with a round trip, so there the file streams by in large pieces and what is not wanted is dropped; so
does a compressed tar, whose bytes have no place of their own. Links, devices and folders are no files, and
members with holes (GNU's sparse form) are left out, because their bytes do not lie in one piece.

Hazard: behind the first member, Python's tarfile takes a broken header, or a block that was zeroed by
accident, for the end of the archive. Here a header is whole, or the archive is broken; and behind the end
there are only zeros.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from pyarrow import ArrowException, fs

from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError

__all__ = ["TAR_SUFFIXES", "BrokenTarError", "Member", "compression_of", "iter_members"]

COMPRESSIONS = {".tar": None, ".tar.gz": "gzip", ".tgz": "gzip", ".tar.zst": "zstd"}
TAR_SUFFIXES = tuple(COMPRESSIONS)
STREAM_BYTES = 8 * 2**20
PIECE_BYTES = 64 * 2**10
# A long name, or other extended headers; tarfile believes any length that the archive claims.
MOST_HEADER_BYTES = 2**20

# Beside what is meant to be raised: tarfile follows one header to the next by recursion.
BREAKS = (tarfile.TarError, OSError, EOFError, ValueError, ArrowException, RecursionError)


class BrokenTarError(DataError):
    """An archive that cannot be read on from here; `cut` names the member that it ends in, if it is one."""

    def __init__(self, message: str, cut: str = "") -> None:
        super().__init__(message)
        self.cut = cut


@dataclass(frozen=True)
class Member:
    """A regular file in an archive, whole.

    Args:
        name: as the archive has it; bytes that are not UTF-8 as `\\xNN`.
        size: in bytes.
        offset: of its first byte in the file, in bytes; None in a compressed archive.
        content: its bytes, if they were wanted.
    """

    name: str
    size: int
    offset: int | None
    content: bytes | None


def compression_of(path: str) -> str | None:
    """How a tar is compressed, by the suffix of its name: `gzip`, `zstd`, or None for a plain one."""
    name = path.lower()
    return next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)


def iter_members(
    location: Location, path: str, wanted: Callable[[str, int], bool] = lambda name, size: False
) -> Iterator[Member]:
    """The regular files of an archive, in their order.

    Args:
        wanted: name and size in bytes of a member -> whether its content is read.

    Raises:
        BrokenTarError: the file is missing, is no tar, or ends or breaks here; the members before stand.
    """
    compression = compression_of(path)
    cut = ""
    try:
        with _open(location, path, compression) as tape, _unpack(tape) as archive:
            while (member := archive.next()) is not None:
                # The archive would remember every header.
                archive.members.clear()
                if not member.isreg() or member.issparse():
                    continue
                cut, offset = member.name, tape.tell()
                content = tape.take(member.size) if wanted(cut, member.size) else None
                tape.seek(offset + member.size)
                if tape.tell() < offset + member.size:
                    raise tarfile.ReadError(f"it ends within {cut!r}")
                cut = ""
                yield Member(member.name, member.size, None if compression else offset, content)
            _check_rest(tape)
    except BREAKS as error:
        raise BrokenTarError(f"{path} is broken: {str(error) or type(error).__name__}", cut) from error


def _open(location: Location, path: str, compression: str | None) -> _Tape:
    if compression is not None:
        stream = location.filesystem.open_input_stream(
            location.full(path), compression=compression, buffer_size=STREAM_BYTES
        )
        return _Tape(stream)
    if isinstance(location.filesystem, fs.LocalFileSystem):
        file = location.open(path)
        return _Tape(file, file.size())
    return _Tape(location.stream(path, STREAM_BYTES))


def _unpack(tape: Any) -> Any:
    return tarfile.open(fileobj=tape, mode="r:", tarinfo=_Header, encoding="utf-8", errors="backslashreplace")


def _check_rest(tape: _Tape) -> None:
    while piece := tape.take(PIECE_BYTES):
        if piece.count(0) != len(piece):
            raise tarfile.ReadError(f"there is more behind its end, before byte {tape.tell()}")


class _Header(tarfile.TarInfo):
    """A member's header: whole, or the archive is broken."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            what = "the mark of its end is missing" if str(error) == "empty header" else str(error)
            raise tarfile.ReadError(what) from error
        if member.size < 0:
            # tarfile would go back by as much, and round and round.
            raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
        return member


class _Tape:
    """A file that is read forwards only, for tarfile.

    Args:
        file: from Arrow.
        size: in bytes, of a file that can jump; None reads what it should jump over.
    """

    def __init__(self, file: Any, size: int | None = None) -> None:
        self._file, self._size, self._position = file, size, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tell(self) -> int:
        """Bytes passed so far."""
        return self._position

    def read(self, size: int) -> bytes:
        """The next `size` bytes of a header, fewer at the end."""
        if size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {size} bytes, {MOST_HEADER_BYTES} are read at most")
        return self.take(size)

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        pieces = []
        while size > 0 and (piece := self._file.read(size)):
            pieces.append(piece)
            size -= len(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def seek(self, position: int) -> None:
        """Go forwards to a byte, or to the end."""
        if self._size is not None and position > self._position:
            self._position = min(position, self._size)
            self._file.seek(self._position)
        while self._position < position and self.take(min(position - self._position, PIECE_BYTES)):
            pass
