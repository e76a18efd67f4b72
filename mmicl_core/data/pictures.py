"""Pictures by their references, as one model takes them; bytes stay where they are until asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmicl_core.data.augment import augment_versions
from mmicl_core.data.images import decode
from mmicl_core.data.storage import PictureReader
from mmicl_core.errors import ConfigError

__all__ = ["VISUAL", "PixelStore", "PreparedPicture", "change_version", "images_of", "usual_picture"]

MOST_BYTES = 2 << 30
VISUAL = -1
USUAL_SIDE = 336
PIXELS, PIXEL_AXES, PATCH_AXES = "pixel_values", 4, 2


@dataclass(frozen=True)
class PreparedPicture:
    """One picture for one model: its place in a prompt, and what the model's vision part reads or gave."""

    ids: tuple[int, ...]
    """What stands for it in a prompt: token ids, and `VISUAL` for each of its V visual tokens."""
    grid: tuple[int, ...] = ()
    """Frames, rows and columns of patches, where positions have three axes."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What the vision part reads, by the model's own names, each with a leading axis of its own."""
    features: np.ndarray[Any, np.dtype[np.floating[Any]]] | None = None
    """What it gave: visual tokens (V, D), or states of the tower (R, W); None where it was not asked."""

    @property
    def nbytes(self) -> int:
        """Memory of what the vision part reads."""
        return sum(tensor.nbytes for tensor in self.inputs.values())

    @property
    def patches_in_rows(self) -> int | None:
        """How many patches it was cut into, where the vision part is handed them one by one, (P, values of
        one), as towers are that take any size."""
        pixels = self.inputs.get(PIXELS)
        return len(pixels) if pixels is not None and pixels.ndim == PATCH_AXES else None


def usual_picture() -> Image.Image:
    """A picture of the usual size, to count by what is not known yet of a corpus."""
    return Image.new("RGB", (USUAL_SIDE, USUAL_SIDE), "grey")


def images_of(episodes: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Where the pictures of EPISODE rows lie: IMAGE references by key."""
    return {
        turn["picture"]: turn["image"]
        for episode in episodes
        for turn in episode["turns"]
        if turn["picture"] is not None
    }


class PixelStore:
    """Pictures and their augmented versions, as a vision part takes them.

    Args:
        reader: reads encoded pictures.
        prepare: pictures -> what the model's processor makes of each.
        most_bytes: of prepared pictures that are kept for the next pass; those not seen for longest go.
    """

    def __init__(
        self,
        reader: PictureReader,
        prepare: Callable[[Sequence[Image.Image]], Sequence[PreparedPicture]],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._reader, self._prepare, self._left = reader, prepare, most_bytes
        self._prepared = OrderedDict[tuple[Any, ...], PreparedPicture]()

    def look(self, turns: Iterable[Mapping[str, Any]]) -> dict[str, PreparedPicture]:
        """All pictures of turns, by the key that the turn has.

        Args:
            turns: with `picture` and `image`; one that `vary_turns` has changed, with its `version` too.

        Raises:
            ConfigError: a version is asked for, but the model does not read pictures as plain pixels.
        """
        seen: dict[str, PreparedPicture] = {}
        for turn in turns:
            key = turn["picture"]
            if key is None or key in seen:
                continue
            prepared = self._look(turn["image"])
            seen[key] = change_version(prepared, key) if turn.get("version") else prepared
        return seen

    def _look(self, image: Mapping[str, Any]) -> PreparedPicture:
        place = tuple(image.values())
        if place not in self._prepared:
            (prepared,) = self._prepare([decode(self._reader.read(image))])
            # Sixteen bits: every pass over the corpus needs all of them again.
            kept = _with_inputs(
                prepared, lambda tensor: tensor.half() if tensor.is_floating_point() else tensor
            )
            self._prepared[place] = kept
            self._left -= kept.nbytes
        self._prepared.move_to_end(place)
        kept = self._prepared[place]
        while self._left < 0:
            self._left += self._prepared.popitem(last=False)[1].nbytes
        return _with_inputs(kept, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _with_inputs(picture: PreparedPicture, change: Callable[[Tensor], Tensor]) -> PreparedPicture:
    inputs = {name: change(tensor) for name, tensor in picture.inputs.items()}
    return PreparedPicture(picture.ids, picture.grid, inputs)


def change_version(picture: PreparedPicture, key: str) -> PreparedPicture:
    """A picture changed as its `variant_key` says.

    Raises:
        ConfigError: the model does not read pictures as plain pixels.
    """
    pixels = picture.inputs.get(PIXELS)
    if pixels is None or len(picture.inputs) > 1 or pixels.ndim != PIXEL_AXES or len(pixels) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in picture.inputs.items()}
        raise ConfigError(
            f"train.picture_variants changes pictures as (3, height, width), but the model reads {shapes}: "
            "set it to 1"
        )
    return PreparedPicture(picture.ids, picture.grid, {PIXELS: augment_versions(pixels, [key])})
