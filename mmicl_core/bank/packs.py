"""Packs as files: FOLDER/<digest of the tenant's name>/<pack id>.safetensors.

Nothing that could go stale is kept: every call looks at the file, and what was read of it counts only
while time, size and inode are the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmicl_core.bank.encoding import decode, encode, read_entry
from mmicl_core.bank.entries import (
    DamagedPackError,
    FullBankError,
    Pack,
    PackEntry,
    UnknownPackError,
    check_id,
)
from mmicl_core.bank.files import SUFFIX, disk_errors, locked, stored_files
from mmicl_core.bank.memory import Recent
from mmicl_core.data.files import write_atomic

__all__ = ["PackFiles"]

log = logging.getLogger("mmicl")

ENTRIES_KEPT = 10_000
# The clock of a disk is coarse: within one tick, a file and what replaced it can look alike.
SETTLED_NS = 100_000_000


class PackFiles:
    """The packs of all tenants.

    Args:
        folder: made with the first pack.
        max_packs: most packs of one tenant.
    """

    def __init__(self, folder: Path, max_packs: int) -> None:
        self._folder, self._max_packs = folder, max_packs
        self._entries = Recent[Path, tuple[tuple[int, int, int], PackEntry]](ENTRIES_KEPT)

    def put(self, tenant: str, pack: Pack, stays: Callable[[Pack], bool]) -> PackEntry:
        """Store a pack.

        Args:
            stays: whether this one, intact and of the same id, stays.

        Raises:
            FullBankError: the tenant has as many as it may.
            BankError: the disk refuses.
        """
        path = self._path(tenant, pack.entry.id)
        with disk_errors(self._folder), locked(path.parent / ".lock"):
            try:
                found = self.read(tenant, pack.entry.id)
                if stays(found):
                    return found.entry
            except UnknownPackError:
                self._check_room(path.parent)
            except DamagedPackError as error:
                log.warning("%s; it is replaced", error)
            write_atomic(path, encode(pack))
        return pack.entry

    def describe(self, tenant: str, pack_id: str) -> PackEntry:
        """The entry of a pack, from its header.

        Raises:
            UnknownPackError: there is none.
            DamagedPackError: its file is damaged.
        """
        return self._describe(self._path(tenant, pack_id))

    def read(self, tenant: str, pack_id: str) -> Pack:
        """A pack, verified. Raises as `describe` does."""
        return self._read(self._path(tenant, pack_id))[1]

    def export(self, tenant: str, pack_id: str) -> bytes:
        """The file of a pack, verified. Raises as `describe` does."""
        return self._read(self._path(tenant, pack_id))[0]

    def entries(self, tenant: str) -> list[PackEntry]:
        """Of all packs of a tenant, newest first; a damaged one is logged and left out."""
        found = list[PackEntry]()
        with disk_errors(self._folder):
            paths = self._paths(self._tenant_folder(tenant))
        for path in paths:
            try:
                found.append(self._describe(path))
            except DamagedPackError as error:
                log.warning("a listing leaves out a pack: %s", error)
            except UnknownPackError:
                # Deleted since the folder was read.
                continue
        return sorted(found, key=lambda entry: (-entry.created, entry.id))

    def delete(self, tenant: str, pack_id: str) -> None:
        """Remove a pack, damaged or not.

        Raises:
            UnknownPackError: there is none.
        """
        path = self._path(tenant, pack_id)
        with disk_errors(self._folder), _known(pack_id):
            path.unlink()
        self._entries.drop(path)

    def _read(self, path: Path) -> tuple[bytes, Pack]:
        with disk_errors(self._folder), _known(path.stem):
            data = path.read_bytes()
        pack = decode(data, f"pack {path.stem}")
        _check_name(pack.entry, path.stem)
        return data, pack

    def _describe(self, path: Path) -> PackEntry:
        pack_id = path.stem
        with disk_errors(self._folder), _known(pack_id):
            found = self._entries.get(path)
            if found is not None and found[0] == _state(path.stat()):
                return found[1]
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                entry = read_entry(file, status.st_size, f"pack {pack_id}")
        _check_name(entry, pack_id)
        if time.time_ns() - status.st_mtime_ns > SETTLED_NS:
            self._entries.put(path, (_state(status), entry), 1)
        return entry

    def _check_room(self, folder: Path) -> None:
        count = len(self._paths(folder))
        if count >= self._max_packs:
            raise FullBankError(
                f"{count} packs are kept, and there is room for {self._max_packs}: delete some, or raise "
                "max_packs"
            )

    def _paths(self, folder: Path) -> list[Path]:
        return [Path(file.path) for file in stored_files(folder)]

    def _tenant_folder(self, tenant: str) -> Path:
        # The name of a tenant may hold anything, and folders may be looked at by others.
        return self._folder / hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _path(self, tenant: str, pack_id: str) -> Path:
        check_id(pack_id)
        return self._tenant_folder(tenant) / f"{pack_id}{SUFFIX}"


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino


@contextmanager
def _known(pack_id: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UnknownPackError(
            f"there is no pack {pack_id}: register its demonstrations, again if it was deleted"
        ) from error


def _check_name(entry: PackEntry, pack_id: str) -> None:
    if entry.id != pack_id:
        raise DamagedPackError(
            f"pack {pack_id} is damaged (its file is that of {entry.id}): register its demonstrations again"
        )
