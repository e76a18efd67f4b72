"""Keys and values of what stands before a question, computed once and used by every question behind it.

    name of the content --> cache of one row, as the language model gave it

Bounded by bytes; what was not used for longest goes first. Any thread may look one up and hold it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

__all__ = ["Prefix", "Prefixes"]


@dataclass(frozen=True, eq=False)
class Prefix:
    """What one prefix left in the language model."""

    cache: Any
    """As `Decoding` takes it."""
    length: int
    """Columns that it takes."""
    next_position: int
    """Of what comes behind; pictures may take fewer positions than columns."""
    demo_tokens: int = 0
    """Of its columns, those of demonstrations."""

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(one.nbytes for layer in self.cache.layers for one in (layer.keys, layer.values))


class Prefixes:
    """Prefixes by name.

    Args:
        most_bytes: of keys and values that are kept; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._kept, self._lock = most_bytes, OrderedDict[str, Prefix](), Lock()
        self.nbytes = 0
        """Of all that is kept."""

    @property
    def keeps_any(self) -> bool:
        """Whether there is room at all."""
        return self._most > 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def get(self, name: str) -> Prefix | None:
        """Looked up, it counts as used."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def put(self, name: str, prefix: Prefix) -> None:
        """Keep it, unless it alone is too large."""
        if prefix.nbytes > self._most:
            return
        with self._lock:
            if name in self._kept:
                self.nbytes -= self._kept.pop(name).nbytes
            self._kept[name] = prefix
            self.nbytes += prefix.nbytes
            while self.nbytes > self._most:
                _, gone = self._kept.popitem(last=False)
                self.nbytes -= gone.nbytes
