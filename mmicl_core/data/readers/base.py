"""What every reader of a corpus is: files in, rows out; a row that cannot be used says why.

A reader knows the form of its files and nothing of pixels: it gives where the encoded bytes of a picture
lie, or, where they cannot be read by their place (a compressed archive, a Parquet cell), the bytes
themselves, which the ingest copies once. What it cannot use is a `Row` with a reason, never silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mmicl_core.data.schema import PAIR

__all__ = ["MOST_PICTURE_BYTES", "Reader", "Row", "Unit", "image_at", "skip", "usable"]

NOTHING: Mapping[str, Any] = dict.fromkeys(PAIR.names)

# Other dots belong to a name, and may be all that tells two apart: `part.0.parquet`, `part.1.parquet`.
SUFFIXES = re.compile(r"(\.(tar|tgz|gz|zst|zip|parquet|jsonl?))+$", re.IGNORECASE)

MOST_PICTURE_BYTES = 256 * 2**20
"""Largest encoded picture; an archive may claim any length."""


@dataclass(frozen=True)
class Unit:
    """A piece of a corpus that one worker reads at a time.

    Args:
        path: file (or class folder) relative to the corpus's location.
        part: which part of it, where a file is read in parts (a Parquet row group).
        size: bytes of the file, for the identity of the corpus.
        time_ns: its time, for the same.
    """

    path: str
    part: int = 0
    size: int = 0
    time_ns: int = 0

    @property
    def key(self) -> str:
        """What the keys of its pictures begin with: the path without its suffixes."""
        return SUFFIXES.sub("", self.path)


@dataclass(frozen=True)
class Row:
    """One sample of a corpus: usable, or with the reason why not.

    Unless `skipped` is set, the picture is at `pair["image"]`, or `encoded`, or to be loaded from `url`,
    in this order; `pair["url"]` may tell where it once came from beside any of them.
    """

    pair: dict[str, Any]
    """All columns of PAIR."""
    encoded: bytes | None = None
    """The picture itself, to be copied."""
    url: str | None = None
    """Where to load the picture from."""
    skipped: str | None = None
    """The reason, a few words that are the same for all samples with this fault."""
    detail: str = ""
    """What exactly was found."""


class Reader(Protocol):
    """Reads one kind of corpus."""

    def units(self) -> list[Unit]:
        """The pieces of the corpus, in an order that depends on names alone.

        Raises:
            DataError: the corpus has no file of this kind.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Row]:
        """The rows of a piece, as they lie in it. A broken file ends with a row that says so."""
        ...


def usable(
    picture: str,
    *,
    image: Mapping[str, Any] | None = None,
    encoded: bytes | None = None,
    load: str | None = None,
    **columns: Any,
) -> Row:
    """A row with what is known; the other columns of PAIR are null. `load` is a URL to load it from."""
    known = {"url": load} if load is not None else {}
    return Row({**NOTHING, "picture": picture, "image": image, **known, **columns}, encoded, load)


def skip(picture: str, reason: str, detail: str = "", image: Mapping[str, Any] | None = None) -> Row:
    """A row that cannot be used."""
    return Row({**NOTHING, "picture": picture, "image": image}, skipped=reason, detail=detail)


def image_at(path: str, *, member: str = "", offset: int = 0, size: int) -> dict[str, Any]:
    """An IMAGE reference; `path` with its prefix."""
    return {"path": path, "member": member, "offset": offset, "size": size}
