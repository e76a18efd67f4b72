"""What the bank holds, and the names that follow from it.

    pack id              digest of the maker and, in order, every picture's bytes and words
    demonstration key    the same of one demonstration, with its tenant

A maker is what decides fused tokens: format, backbone, template, adapter. Where it tells their `width` and
the `vector_width`, a file with arrays of another is refused: a forged one would only fail in the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from mmicl_core.errors import BankError

__all__ = [
    "DamagedPackError",
    "Demonstration",
    "FullBankError",
    "Fused",
    "Known",
    "Maker",
    "OtherMakerError",
    "Pack",
    "PackEntry",
    "VECTOR_WIDTH",
    "WIDTH",
    "UnknownPackError",
    "check_id",
    "check_maker",
    "demonstration_key",
    "digest_arrays",
    "is_pack_id",
    "pack_id",
    "seal",
]

Fused: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Maker: TypeAlias = Mapping[str, str]

ID_PATTERN = re.compile(r"pack-[0-9a-f]{32}")
WIDTH, VECTOR_WIDTH = "width", "vector_width"
SHOWN = 60


class UnknownPackError(BankError):
    """The tenant has no pack of that id."""


class OtherMakerError(BankError):
    """The pack was made by a model other than the one that is to use it."""


class DamagedPackError(BankError):
    """The file is not what was stored."""


class FullBankError(BankError):
    """The tenant has as many packs as it may."""


@dataclass(frozen=True)
class Demonstration:
    """Pictures, as encoded, with a question and its answer."""

    images: tuple[bytes, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Known:
    """One demonstration as a model read it."""

    fused: Fused
    """(T, D)."""
    tokens_full: int
    """Visual and text tokens of the demonstration written out."""
    vector: Fused | None = None
    """(E,), near to those of demonstrations that look alike."""

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return self.fused.nbytes + (0 if self.vector is None else self.vector.nbytes)


@dataclass(frozen=True)
class PackEntry:
    """What a pack is and what it costs in a prompt."""

    id: str
    model: str
    """As the request that made it named the model."""
    created: int
    """Unix seconds."""
    tokens_full: tuple[int, ...]
    """Of each demonstration, written out."""
    tokens_fused: tuple[int, ...]
    """Of each, fused."""
    digest: str
    """SHA-256 of the arrays: equal digests, equal fused tokens."""
    maker: Maker
    imported: bool = field(default=False, compare=False)
    """Whether it came as a file. Its id is then what the file says, which nobody can verify without the
    pictures: fuse demonstrations that are here rather than to take such a pack for theirs."""


@dataclass(frozen=True)
class Pack:
    """A pack with its arrays, which may be shared and are read-only."""

    entry: PackEntry
    fused: tuple[Fused, ...]
    """(T, D) for each demonstration."""
    vectors: Fused | None
    """(S, E), one for each demonstration."""

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return sum(array.nbytes for array in self.fused) + (
            0 if self.vectors is None else self.vectors.nbytes
        )


def pack_id(maker: Maker, demonstrations: Sequence[Demonstration]) -> str:
    """The id of a pack; equal for equal content, whenever and for whomever it is made."""
    return f"pack-{_digest_content(b'pack', maker, demonstrations)[:32]}"


def demonstration_key(tenant: str, maker: Maker, demonstration: Demonstration) -> str:
    """The name of one demonstration, which other tenants cannot come to."""
    return _digest_content(b"tenant" + _encode(tenant), maker, [demonstration])


def is_pack_id(name: str) -> bool:
    """Whether a text has the form of a pack's id."""
    return ID_PATTERN.fullmatch(name) is not None


def check_id(name: str) -> None:
    """Refuse what is not the id of a pack: ids come from clients and become file names.

    Raises:
        UnknownPackError: it is none.
    """
    if not is_pack_id(name):
        raise UnknownPackError(
            f"{name[:SHOWN]!r} is not the id of a pack, which is `pack-` and 32 hexadecimal digits"
        )


def check_maker(entry: PackEntry, makers: Sequence[Maker]) -> None:
    """Refuse a pack that none of `makers` made.

    Raises:
        OtherMakerError: it names what differs from the nearest of them.
    """
    if not makers:
        raise OtherMakerError(f"pack {entry.id} is of no use: no model that is served makes packs")
    differing = min((_differences(entry.maker, maker) for maker in makers), key=len)
    if differing:
        key, found, wanted = differing[0]
        raise OtherMakerError(
            f"pack {entry.id} was made for {key} {found[:SHOWN]}, the server runs {wanted[:SHOWN]}: register "
            "its demonstrations again"
        )


def digest_arrays(fused: Iterable[Fused], vectors: Fused | None) -> str:
    """SHA-256 of arrays and their shapes."""
    digest = hashlib.sha256()
    for array in (*fused, *([] if vectors is None else [vectors])):
        digest.update(b"".join(size.to_bytes(8, "big") for size in (array.ndim, *array.shape)))
        digest.update(array.tobytes())
    return digest.hexdigest()


def seal(known: Known, where: str) -> Known:
    """The same with arrays of its own that nobody can write to.

    Args:
        where: whose arrays they are, for the message.

    Raises:
        BankError: they hold nothing, or numbers that are not finite.
    """
    assert known.fused.dtype == np.float32 and known.fused.ndim == 2, (known.fused.dtype, known.fused.shape)
    if 0 in known.fused.shape:
        raise BankError(f"{where} has no fused tokens (shape {known.fused.shape}): give it words")
    vector = None if known.vector is None else _own(known.vector)
    assert vector is None or vector.ndim == 1, vector.shape
    fused = _own(known.fused)
    if not np.isfinite(fused).all() or not (vector is None or np.isfinite(vector).all()):
        raise BankError(
            f"the fused tokens of {where} are not finite: the backbone or the adapter overflows at its "
            "precision"
        )
    return Known(fused, int(known.tokens_full), vector)


def _own(array: Fused) -> Fused:
    # A view would keep the whole batch alive that it was cut from.
    copy = np.array(array, dtype="<f4", order="C")
    copy.flags.writeable = False
    return copy


def _differences(found: Maker, wanted: Maker) -> list[tuple[str, str, str]]:
    keys = sorted(found.keys() | wanted.keys())
    pairs = [(key, found.get(key, "none"), wanted.get(key, "none")) for key in keys]
    return [(key, one, other) for key, one, other in pairs if one != other]


def _digest_content(owner: bytes, maker: Maker, demonstrations: Sequence[Demonstration]) -> str:
    made = json.dumps(dict(maker), sort_keys=True).encode()
    digest = hashlib.sha256()
    for part in (owner, made, *_parts(demonstrations)):
        # The length keeps "ab" + "c" apart from "a" + "bc".
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(demonstrations: Sequence[Demonstration]) -> Iterable[bytes]:
    for demonstration in demonstrations:
        yield len(demonstration.images).to_bytes(8, "big")
        yield from demonstration.images
        yield _encode(demonstration.question)
        yield _encode(demonstration.answer)


def _encode(text: str) -> bytes:
    # Half of a surrogate pair, which JSON can carry, is no reason to fail here.
    return text.encode("utf-8", "surrogatepass")
