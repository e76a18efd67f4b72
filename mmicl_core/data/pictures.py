"""Pictures by their references; bytes stay where they are until asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmicl_core.data.augment import augment_versions
from mmicl_core.data.images import decode
from mmicl_core.data.storage import PictureReader

__all__ = ["PixelStore", "images_of"]

MOST_BYTES = 2 << 30

Pixels = np.ndarray[Any, np.dtype[np.float32]]


def images_of(episodes: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Where the pictures of EPISODE rows lie: IMAGE references by key."""
    return {
        turn["picture"]: turn["image"]
        for episode in episodes
        for turn in episode["turns"]
        if turn["picture"] is not None
    }


class PixelStore:
    """Pictures and their augmented versions, as a vision tower takes them.

    Args:
        reader: reads encoded pictures.
        prepare: pictures -> (N, 3, height, width).
        most_bytes: of prepared pictures that are kept for the next pass; those not seen for longest go.
    """

    def __init__(
        self,
        reader: PictureReader,
        prepare: Callable[[Sequence[Image.Image]], Tensor],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._reader, self._prepare, self._left = reader, prepare, most_bytes
        self._prepared = OrderedDict[tuple[Any, ...], Tensor]()

    def look(self, turns: Iterable[Mapping[str, Any]]) -> dict[str, Pixels]:
        """The pixels of all pictures of turns, (3, height, width) each, by the key that the turn has.

        Args:
            turns: with `picture` and `image`; one that `vary_turns` has changed, with its `version` too.
        """
        seen: dict[str, Pixels] = {}
        for turn in turns:
            key = turn["picture"]
            if key is None or key in seen:
                continue
            pixels = self._pixels(turn["image"])
            seen[key] = (augment_versions(pixels[None], [key])[0] if turn.get("version") else pixels).numpy()
        return seen

    def _pixels(self, image: Mapping[str, Any]) -> Tensor:
        place = tuple(image.values())
        if place not in self._prepared:
            # Sixteen bits: every pass over the corpus needs all of them again.
            pixels = self._prepare([decode(self._reader.read(image))])[0].half()
            self._prepared[place] = pixels
            self._left -= pixels.nbytes
        self._prepared.move_to_end(place)
        found = self._prepared[place].float()
        while self._left < 0:
            self._left += self._prepared.popitem(last=False)[1].nbytes
        return found
