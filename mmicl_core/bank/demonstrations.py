"""Single demonstrations as files, bounded together; those not used for longest go first.

    FOLDER/<two digits>/<key>.safetensors    a pack of one; its time of change is that of its last use
    FOLDER/.total                            bytes of all files, and the lock of those who change it

Every process adds to the same total before it writes, so the bound holds for all of them together, and the
folder is only searched when the bound is reached. A writer that is killed leaves the total too large, which
the next search mends.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from mmicl_core.bank.encoding import decode, encode
from mmicl_core.bank.entries import DamagedPackError, Known, Pack, PackEntry, digest_arrays
from mmicl_core.bank.files import SUFFIX, locked, stored_files
from mmicl_core.data.files import write_atomic

__all__ = ["DemonstrationFiles"]

log = logging.getLogger("mmicl")

# A search of the folder makes room for many files.
KEPT_SHARE = 7 / 8


class DemonstrationFiles:
    """Demonstrations of all tenants, by keys that others cannot come to. What the disk refuses is an
    OSError.

    Args:
        folder: made with the first one.
        most: bytes of all files.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self._most = folder, most

    def get(self, key: str) -> Known | None:
        """Read and verified, it counts as used; a damaged one is logged, removed and none."""
        path = self._path(key)
        try:
            pack = decode(path.read_bytes(), f"demonstration {key}", remedy="the model reads it again")
            if pack.entry.id != key:
                raise DamagedPackError(
                    f"demonstration {key} is damaged (its file is that of {pack.entry.id})"
                )
        except FileNotFoundError:
            return None
        except DamagedPackError as error:
            log.warning("%s", error)
            path.unlink(missing_ok=True)
            return None
        self.touch(key)
        vector = None if pack.vectors is None else pack.vectors[0]
        return Known(pack.fused[0], pack.entry.tokens_full[0], vector)

    def touch(self, key: str) -> bool:
        """Count it as used; False where it is not there, or the folder cannot be written."""
        try:
            os.utime(self._path(key))
        except OSError:
            return False
        return True

    def put(self, key: str, known: Known) -> None:
        """Store it, unless it alone is too large."""
        data = _encode(key, known)
        if len(data) > self._most or self.touch(key):
            return
        with locked(self.folder / ".total") as total:
            self._reserve(total, len(data))
            write_atomic(self._path(key), data, durable=False)

    def _reserve(self, file: TextIO, nbytes: int) -> None:
        file.seek(0)
        text = file.read()
        total = int(text) if text.isdecimal() else self._make_room(self._most - nbytes)
        if total + nbytes > self._most:
            total = self._make_room(int(self._most * KEPT_SHARE) - nbytes)
        file.truncate(0)
        file.write(str(total + nbytes))

    def _make_room(self, most: int) -> int:
        found, total = list[tuple[int, int, str]](), 0
        for folder in self.folder.glob("??"):
            for file in stored_files(folder):
                # Another process may remove a damaged one.
                with suppress(FileNotFoundError):
                    status = file.stat()
                    found.append((status.st_mtime_ns, status.st_size, file.path))
                    total += status.st_size
        for _, size, path in sorted(found):
            if total <= max(most, 0):
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"


def _encode(key: str, known: Known) -> bytes:
    fused, vectors = (known.fused,), None if known.vector is None else known.vector[None]
    entry = PackEntry(
        id=key,
        model="",
        created=0,
        tokens_full=(known.tokens_full,),
        tokens_fused=(len(known.fused),),
        digest=digest_arrays(fused, vectors),
        maker={},
    )
    return encode(Pack(entry, fused, vectors))
