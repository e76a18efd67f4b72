"""A pack as one safetensors file, verified whenever it is read.

    array NUMBER     float32 (T, D), for each demonstration
    array `vectors`  float32 (S, E), where demonstrations have them
    header           under `pack`, JSON with the entry: what made it, token counts, a digest of the arrays;
                     under `sha256`, the digest of that JSON

One file holds all, so that a pack is whole or absent, and two writers of the same pack cannot mix their
halves. Files come from clients too: nothing of one is believed before it is checked, and its size is the
most that reading it can take.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import fields
from io import BytesIO
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mmicl_core.bank.entries import (
    VECTOR_WIDTH,
    WIDTH,
    DamagedPackError,
    Fused,
    Pack,
    PackEntry,
    digest_arrays,
)

__all__ = ["decode", "encode", "read_entry"]

FORMAT = 3
ABOUT = "pack"
ABOUT_DIGEST = "sha256"
VECTORS = "vectors"
LONGEST_HEADER = 4 * 2**20
REGISTER = "register its demonstrations again"
LENGTH_BYTES = 8
SHOWN = 3
LAST_SECOND = 253_402_300_799
"""Of the year 9999, the last that dates are written of."""

Count = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, lt=2**31)]


class About(BaseModel):
    """The entry of a pack as the header holds it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal[3]
    id: str = Field(pattern=r"^[a-z0-9-]{1,80}$")
    model: str = Field(max_length=200, pattern=r"^[!-~]*$")
    created: int = Field(ge=0, le=LAST_SECOND)
    tokens_full: tuple[Count, ...] = Field(min_length=1)
    tokens_fused: tuple[Size, ...] = Field(min_length=1)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    maker: dict[str, str]
    imported: bool

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if len(self.tokens_full) != len(self.tokens_fused):
            raise ValueError(
                f"{len(self.tokens_full)} counts of full tokens, {len(self.tokens_fused)} of fused ones"
            )
        return self


class ArrayPlace(BaseModel):
    """Where an array lies, as safetensors writes it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    dtype: Literal["F32"]
    shape: tuple[Size, ...] = Field(min_length=2, max_length=2)
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Header(BaseModel):
    """Of a safetensors file: its metadata, and every other key an array."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    __pydantic_extra__: dict[str, ArrayPlace]

    metadata: dict[str, str] = Field(alias="__metadata__")

    @property
    def arrays(self) -> dict[str, ArrayPlace]:
        """By name."""
        return self.__pydantic_extra__


def encode(pack: Pack) -> bytes:
    """A pack as the content of a file."""
    arrays = {str(number): array for number, array in enumerate(pack.fused)}
    if pack.vectors is not None:
        arrays[VECTORS] = pack.vectors
    about = About.model_validate(vars(pack.entry) | {"format": FORMAT, "maker": dict(pack.entry.maker)})
    text = about.model_dump_json()
    return save(arrays, metadata={ABOUT: text, ABOUT_DIGEST: _digest_text(text)})


def read_entry(file: BinaryIO, size: int, what: str, remedy: str = REGISTER) -> PackEntry:
    """The entry of a file, without reading its arrays, which are there and of the right shapes.

    Args:
        size: bytes of the file.
        what: the file, for the message.

    Raises:
        DamagedPackError: it is damaged, or no pack.
    """
    return _read_header(file, size, what, remedy)[0]


def decode(data: bytes, what: str, remedy: str = REGISTER) -> Pack:
    """A file as the pack that it holds, verified.

    Raises:
        DamagedPackError: it is damaged, or no pack.
    """
    entry, shapes = _read_header(BytesIO(data), len(data), what, remedy)
    try:
        arrays: dict[str, Fused] = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(what, error, remedy) from error
    # JSON may say a thing twice, and the library may believe the other one.
    if {name: (array.dtype, array.shape) for name, array in arrays.items()} != shapes:
        raise _damaged(what, "its header says two things", remedy)
    vectors = arrays.pop(VECTORS, None)
    fused = tuple(arrays[str(number)] for number in range(len(arrays)))
    for array in (*fused, *([] if vectors is None else [vectors])):
        array.flags.writeable = False
        if not np.isfinite(array).all():
            raise _damaged(what, "its numbers are not finite", remedy)
    if digest_arrays(fused, vectors) != entry.digest:
        raise _damaged(what, "its fused tokens changed", remedy)
    return Pack(entry, fused, vectors)


def _read_header(
    file: BinaryIO, size: int, what: str, remedy: str
) -> tuple[PackEntry, dict[str, tuple[np.dtype[Any], tuple[int, ...]]]]:
    try:
        start = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if start > min(LONGEST_HEADER, size - LENGTH_BYTES):
            raise ValueError(f"a header of {start} bytes in a file of {size}")
        header = Header.model_validate_json(file.read(start))
        text = header.metadata.get(ABOUT)
        if text is None:
            raise ValueError(f"its header has nothing under `{ABOUT}`")
        about = About.model_validate_json(text)
        if header.metadata.get(ABOUT_DIGEST) != _digest_text(text):
            raise ValueError("its header changed")
        _check_places(header.arrays, about, size - LENGTH_BYTES - start)
    except ValueError as error:
        raise _damaged(what, error, remedy) from error
    entry = PackEntry(**{field.name: getattr(about, field.name) for field in fields(PackEntry)})
    return entry, {name: (np.dtype("float32"), place.shape) for name, place in header.arrays.items()}


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_places(places: dict[str, ArrayPlace], about: About, nbytes: int) -> None:
    names = {str(number): tokens for number, tokens in enumerate(about.tokens_fused)}
    if places.keys() - {VECTORS} != names.keys():
        raise ValueError(f"{len(places.keys() - {VECTORS})} arrays for {len(names)} demonstrations")
    widths = {places[name].shape[1] for name in names}
    rows = names | ({VECTORS: len(names)} if VECTORS in places else {})
    if len(widths) != 1 or any(places[name].shape[0] != count for name, count in rows.items()):
        raise ValueError(f"arrays of shapes {[places[name].shape for name in list(rows)[:SHOWN]]}")
    for name, key in (("0", WIDTH), (VECTORS, VECTOR_WIDTH)):
        width = str(places[name].shape[1]) if name in places else None
        if width is not None and about.maker.get(key, width) != width:
            raise ValueError(f"arrays of {key} {width}, and its maker's are of {about.maker[key][:20]}")
    if sum(4 * math.prod(place.shape) for place in places.values()) != nbytes:
        raise ValueError(f"{nbytes} bytes of arrays, which is not what their shapes take")


def _damaged(what: str, why: object, remedy: str) -> DamagedPackError:
    reason = why.errors(include_url=False)[0]["msg"] if isinstance(why, ValidationError) else why
    return DamagedPackError(f"{what} is damaged ({reason}): {remedy}")
