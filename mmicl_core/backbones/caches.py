"""Keys and values of what a language model has read: put side by side, shared, and grown without copies.

A cache of the library grows by a column a token, and copies all of itself to do so. Where every layer keeps
everything, layers with room behind their last column take its place: a token is written where it belongs.

    keys, values (B, H, L, E) = the first L columns of (B, H, L + room, E)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

__all__ = ["changed", "keeps_all", "side_by_side", "with_room"]

ROOM = 64


class _RoomyLayer(DynamicLayer):
    """Writes a token into the room behind those it has. Whoever gives it other keys and values takes the
    room away, and with the next token there is new one."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        assert self.keys is not None and self.values is not None
        self.keys = self._write("keys", self.keys, key_states)
        self.values = self._write("values", self.values, value_states)
        return self.keys, self.values

    def _write(self, name: str, known: Tensor, new: Tensor) -> Tensor:
        end = known.shape[-2] + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or end > room.shape[-2] or not _begins(room, known):
            room = self._rooms[name] = known.new_empty(*known.shape[:2], end + ROOM, known.shape[-1])
            room[..., : known.shape[-2], :] = known
        room[..., known.shape[-2] : end, :] = new
        return room[..., :end, :]


def _begins(room: Tensor, known: Tensor) -> bool:
    """Whether these are the first columns of the room, and not of another."""
    return (
        room.data_ptr() == known.data_ptr()
        and room.stride() == known.stride()
        and room.shape[:2] == known.shape[:2]
    )


def keeps_all(cache: Any) -> bool:
    """Whether every layer keeps all keys and values, by column, and nothing else."""
    return all(type(layer) in (DynamicLayer, _RoomyLayer) for layer in cache.layers)


def with_room(cache: Any) -> Any:
    """The same cache, which grows without copies if every layer keeps all; that of `cache` goes with it."""
    if keeps_all(cache):
        cache.layers = [_RoomyLayer(layer) for layer in cache.layers]
    return cache


def side_by_side(caches: Sequence[Any], width: int) -> Any:
    """One cache of all rows of several, each padded on the left to `width` columns.

    Args:
        caches: of layers that keep all keys and values.
    """
    joined = _copied(caches[0])
    for number, layer in enumerate(joined.layers):
        for name in ("keys", "values"):
            rows = [getattr(cache.layers[number], name) for cache in caches]
            setattr(layer, name, torch.cat([F.pad(one, (0, 0, width - one.shape[-2], 0)) for one in rows]))
    return joined


def changed(cache: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Another cache whose keys and values are made of those of `cache`, which stay as they are."""
    copied = _copied(cache)
    for layer in copied.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return copied


def _copied(cache: Any) -> Any:
    copied = copy(cache)
    # Two must not write into one room.
    copied.layers = [
        _RoomyLayer(layer) if isinstance(layer, _RoomyLayer) else copy(layer) for layer in cache.layers
    ]
    return copied
