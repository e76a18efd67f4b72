"""Values in memory, bounded by their weight."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["Recent"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key, for many threads; what was not used for longest goes first.

    Args:
        most: weight of all that is kept; 0 keeps none.
    """

    def __init__(self, most: int) -> None:
        self._most, self._weight = most, 0
        self._kept = OrderedDict[Key, tuple[Value, int]]()
        self._lock = Lock()

    @property
    def weight(self) -> int:
        """Of all that is kept."""
        return self._weight

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Value | None:
        """Looked up, it counts as used."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Key, value: Value, weight: int) -> None:
        """Keep it, unless it alone is too heavy."""
        with self._lock:
            self._drop(key)
            if weight > self._most:
                return
            self._kept[key] = (value, weight)
            self._weight += weight
            while self._weight > self._most:
                self._drop(next(iter(self._kept)))

    def drop(self, key: Key) -> None:
        """Keep it no longer."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        if key in self._kept:
            self._weight -= self._kept.pop(key)[1]
