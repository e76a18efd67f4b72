"""Demonstration bank: fused tokens on disk, named by everything that they were made from.

Demonstrations are read apart from each other and from the query, so their fused tokens can be kept
and put before any query. The bank keeps two kinds:

    pack                  a few demonstrations that are used together, under an id, until it is deleted
    single demonstration  what was fused on the way to an answer, bounded; not used for longest goes first

Several processes share one folder, and no tenant reaches what another stored. No model is known here:
bytes, arrays and what made them.
"""

from mmicl_core.bank.entries import (
    Demonstration,
    FullBankError,
    Fused,
    Known,
    Maker,
    OtherMakerError,
    Pack,
    PackEntry,
    UnknownPackError,
    pack_id,
)
from mmicl_core.bank.store import Bank

__all__ = [
    "Bank",
    "Demonstration",
    "FullBankError",
    "Fused",
    "Known",
    "Maker",
    "OtherMakerError",
    "Pack",
    "PackEntry",
    "UnknownPackError",
    "pack_id",
]
