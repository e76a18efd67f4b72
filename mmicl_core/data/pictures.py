"""Pictures by their references; bytes stay where they are until asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmicl_core.data.augment import VARIANT_MARK, augment_versions
from mmicl_core.data.images import decode
from mmicl_core.data.storage import PictureReader
from mmicl_core.errors import DataError

__all__ = ["PixelStore", "images_of"]


def images_of(episodes: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Where the pictures of EPISODE rows lie: IMAGE references by key."""
    return {
        turn["picture"]: turn["image"]
        for episode in episodes
        for turn in episode["turns"]
        if turn["picture"] is not None
    }


class PixelStore:
    """Pictures and their augmented versions by `variant_key`, as a vision tower takes them.

    Args:
        reader: reads encoded pictures.
        images: IMAGE references by the key of the picture.
        prepare: pictures -> (N, 3, height, width).
    """

    def __init__(
        self,
        reader: PictureReader,
        images: Mapping[str, Mapping[str, Any]],
        prepare: Callable[[Sequence[Image.Image]], Tensor],
    ) -> None:
        self._reader, self._images, self._prepare = reader, images, prepare
        self._prepared: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The pixels of a version, (3, height, width).

        Raises:
            DataError: there is no picture of that key.
        """
        picture = key if key in self._images else key.rpartition(VARIANT_MARK)[0] or key
        if picture not in self._prepared:
            if picture not in self._images:
                raise DataError(f"there is no picture {picture!r} among the {len(self._images)} of this run")
            seen = decode(self._reader.read(self._images[picture]))
            # Sixteen bits: every pass over the corpus needs all of them again.
            self._prepared[picture] = self._prepare([seen])[0].half()
        pixels = self._prepared[picture].float()
        return (pixels if key == picture else augment_versions(pixels[None], [key])[0]).numpy()
