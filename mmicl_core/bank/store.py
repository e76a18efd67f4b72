"""The bank: packs and single demonstrations, in memory before the files."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmicl_core.bank.demonstrations import DemonstrationFiles
from mmicl_core.bank.encoding import decode
from mmicl_core.bank.entries import (
    Demonstration,
    Known,
    Maker,
    Pack,
    PackEntry,
    check_maker,
    demonstration_key,
    digest_arrays,
    is_pack_id,
    pack_id,
    seal,
)
from mmicl_core.bank.memory import Recent
from mmicl_core.bank.packs import PackFiles
from mmicl_core.errors import BankError

__all__ = ["Bank"]

log = logging.getLogger("mmicl")

# What a value takes in memory beside its arrays.
OVERHEAD_BYTES = 1024


class Bank:
    """Packs and demonstrations of all tenants, in one folder that several processes may share.

    Arrays that it gives out are shared and read-only.

    Args:
        folder: made when something is stored.
        memory_bytes: of packs and demonstrations that are kept in memory; 0 keeps none.
        disk_bytes: of the files of single demonstrations, of all processes together; 0 keeps none.
        max_packs: most packs of one tenant.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory_bytes: int = 0,
        disk_bytes: int = 2 * 2**30,
        max_packs: int = 1000,
    ) -> None:
        self._packs = PackFiles(folder / "packs", max_packs)
        self._files = DemonstrationFiles(folder / "demonstrations", disk_bytes)
        self._recent = Recent[tuple[str, ...], Pack | Known](memory_bytes)

    def put_pack(
        self,
        tenant: str,
        model: str,
        maker: Maker,
        demonstrations: Sequence[Demonstration],
        known: Sequence[Known],
    ) -> PackEntry:
        """Store a pack; an equal one that was made here stays as it is.

        Args:
            model: as requests name it.
            known: what `model` made of each demonstration; all have a vector, or none has.

        Raises:
            FullBankError: the tenant has as many packs as it may.
            BankError: there is nothing to store, numbers are not finite, or the disk refuses.
        """
        if not demonstrations:
            raise BankError("a pack of no demonstrations cannot be stored: give one or more")
        assert len(known) == len(demonstrations), (len(known), len(demonstrations))
        sealed = [seal(each, f"demonstration {number}") for number, each in enumerate(known)]
        fused = tuple(each.fused for each in sealed)
        found = [each.vector for each in sealed if each.vector is not None]
        assert len(found) in (0, len(sealed)), "some demonstrations have a vector, others have none"
        vectors = np.stack(found) if found else None
        entry = PackEntry(
            id=pack_id(maker, demonstrations),
            model=model,
            created=int(time.time()),
            tokens_full=tuple(each.tokens_full for each in sealed),
            tokens_fused=tuple(len(array) for array in fused),
            digest=digest_arrays(fused, vectors),
            maker=dict(maker),
        )
        return self._packs.put(tenant, Pack(entry, fused, vectors), lambda found: not found.entry.imported)

    def describe(self, tenant: str, pack_id: str) -> PackEntry:
        """What a pack is, without its arrays.

        Raises:
            UnknownPackError: the tenant has none of that id.
            BankError: its file is damaged.
        """
        return self._packs.describe(tenant, pack_id)

    def load(self, tenant: str, pack_id: str, maker: Maker | None = None) -> Pack:
        """A pack with its arrays, verified.

        Args:
            maker: refuse a pack of another one; None takes any.

        Raises:
            UnknownPackError: the tenant has none of that id.
            OtherMakerError: another maker made it.
            BankError: its file is damaged.
        """
        entry = self._packs.describe(tenant, pack_id)
        if maker is not None:
            check_maker(entry, [maker])
        key = (tenant, pack_id, entry.digest)
        pack = self._recent.get(key)
        if not isinstance(pack, Pack) or pack.entry != entry:
            pack = self._packs.read(tenant, pack_id)
            if maker is not None:
                # The file may have been replaced since it was described.
                check_maker(pack.entry, [maker])
            self._recent.put((tenant, pack_id, pack.entry.digest), pack, pack.nbytes + OVERHEAD_BYTES)
        return pack

    def packs(self, tenant: str) -> list[PackEntry]:
        """All packs of a tenant, newest first; a damaged one is logged and left out."""
        return self._packs.entries(tenant)

    def delete(self, tenant: str, pack_id: str) -> None:
        """Remove a pack, damaged or not.

        Raises:
            UnknownPackError: the tenant has none of that id.
        """
        self._packs.delete(tenant, pack_id)

    def export(self, tenant: str, pack_id: str) -> bytes:
        """A pack as a safetensors file, verified.

        Raises:
            UnknownPackError: the tenant has none of that id.
            BankError: its file is damaged.
        """
        return self._packs.export(tenant, pack_id)

    def take_in(self, tenant: str, data: bytes, makers: Sequence[Maker]) -> PackEntry:
        """Store a pack that was exported, here or elsewhere; an equal one stays as it is.

        Args:
            data: the file; all of it is checked. Its size is the caller's to bound.
            makers: those whose packs are of use.

        Raises:
            OtherMakerError: none of `makers` made it.
            FullBankError: the tenant has as many packs as it may.
            BankError: the file is damaged or no pack, or there is another one of its id.
        """
        pack = decode(data, "the file", remedy="export the pack again")
        if not is_pack_id(pack.entry.id):
            raise BankError(f"the file is no pack (its id is {pack.entry.id!r}): export a pack")
        check_maker(pack.entry, makers)
        pack = replace(pack, entry=replace(pack.entry, imported=True))
        return self._packs.put(tenant, pack, lambda found: _is_same(found.entry, pack.entry))

    def get(self, tenant: str, maker: Maker, demonstration: Demonstration) -> Known | None:
        """What is known of a tenant's demonstration; None where `maker` has to read it."""
        key = demonstration_key(tenant, maker, demonstration)
        known = self._recent.get((key,))
        try:
            if isinstance(known, Known):
                self._files.touch(key)
                return known
            known = self._files.get(key)
        except OSError as error:
            log.warning("demonstrations cannot be read in %s: %s", self._files.folder, error)
        if isinstance(known, Known):
            self._recent.put((key,), known, known.nbytes + OVERHEAD_BYTES)
            return known
        return None

    def keep(self, tenant: str, maker: Maker, demonstration: Demonstration, known: Known) -> None:
        """Keep what `maker` made of a demonstration, for as long as there is room.

        What the disk refuses is logged and kept in memory alone: the answer is ready without it.

        Raises:
            BankError: numbers are not finite.
        """
        key = demonstration_key(tenant, maker, demonstration)
        sealed = seal(known, "a demonstration")
        self._recent.put((key,), sealed, sealed.nbytes + OVERHEAD_BYTES)
        try:
            self._files.put(key, sealed)
        except OSError as error:
            log.warning("demonstrations cannot be kept in %s: %s", self._files.folder, error)


def _is_same(found: PackEntry, imported: PackEntry) -> bool:
    if found.digest != imported.digest:
        raise BankError(
            f"there is a pack {found.id} already, with other fused tokens than the file's: delete it first"
        )
    return True
