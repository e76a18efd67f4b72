"""Keys and values of what stands before a question, computed once and used by every question behind it.

    name of the content --> cache of one row, as the language model gave it

Bounded by bytes; what was not used for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

__all__ = ["Prefix", "Prefixes"]


@dataclass(frozen=True)
class Prefix:
    """What one prefix left in the language model."""

    cache: Any
    """As `Decoding` takes it."""
    length: int
    """Columns that it takes."""
    nbytes: int


class Prefixes:
    """Prefixes by name.

    Args:
        most_bytes: of keys and values that are kept; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._kept = most_bytes, OrderedDict[str, Prefix]()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(prefix.nbytes for prefix in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def get(self, name: str) -> Prefix | None:
        """Looked up, it counts as used."""
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def put(self, name: str, prefix: Prefix) -> None:
        """Keep it, unless it alone is too large."""
        self._kept[name] = prefix
        self._kept.move_to_end(name)
        while self._kept and self.nbytes > self._most:
            self._kept.popitem(last=False)
