"""One look at every picture: its bytes are read once and decoded once.

    bytes --sha256--> exact identity
          --decode--> pixels --perceptual hash--> look-alikes
                             --embedder--> embedding

The hash of looks is pHash: 64 signs of the low frequencies of the picture in grey. What comes in are PAIR
rows with references; what goes out are LOOKED rows in the same order, and one embedding a row where there
is an embedder: zeros for what could not be used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image

from mmicl_core.data import reasons
from mmicl_core.data.images import PictureError, examine
from mmicl_core.data.schema import LOOKED
from mmicl_core.errors import DataError

__all__ = ["LOOKED_AT", "Looker", "PictureEmbedder", "perceptual_hash"]

LOOKED_AT = ("picture", "image", "text")
"""The columns of PAIR that a look needs."""

HASH_SIDE = 64
PICTURES_AT_ONCE = 64

Vectors = np.ndarray[Any, np.dtype[np.float16]]


class PictureEmbedder(Protocol):
    """What a look asks of an embedder."""

    @property
    def width(self) -> int:
        """E."""
        ...

    @property
    def side(self) -> int:
        """Pixels that a picture needs in both directions."""
        ...

    @property
    def embeds_pictures(self) -> bool:
        """Whether a pair is told by its picture, or by its text."""
        ...

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(N, E), normalised."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, E), normalised."""
        ...


class Looker:
    """Looks at tables of PAIR rows.

    Args:
        read: an IMAGE reference -> encoded bytes.
        max_pixels: larger pictures are not decoded.
        embedder: gives each pair a vector; None gives none.
    """

    def __init__(
        self,
        read: Callable[[Mapping[str, Any]], bytes],
        max_pixels: int,
        embedder: PictureEmbedder | None = None,
    ) -> None:
        self._read, self._max_pixels, self._embedder = read, max_pixels, embedder
        by_picture = embedder is not None and embedder.embeds_pictures
        self._side = max(HASH_SIDE, embedder.side) if by_picture and embedder is not None else HASH_SIDE

    def __call__(self, pairs: pa.Table) -> tuple[pa.Table, Vectors | None]:
        """LOOKED rows, and (N, E) embeddings in 16 bits."""
        looked: list[dict[str, Any]] = []
        vectors = []
        for start in range(0, pairs.num_rows, PICTURES_AT_ONCE):
            rows = pairs.slice(start, PICTURES_AT_ONCE).to_pylist()
            pictures, told = zip(*map(self._look, rows), strict=True)
            looked += told
            if self._embedder is not None:
                vectors.append(self._embed(rows, pictures))
        table = pa.Table.from_pylist(looked, schema=LOOKED)
        return table, np.concatenate(vectors) if vectors else self._no_vectors()

    def _no_vectors(self) -> Vectors | None:
        return None if self._embedder is None else np.zeros((0, self._embedder.width), np.float16)

    def _look(self, row: Mapping[str, Any]) -> tuple[Image.Image | None, dict[str, Any]]:
        told: dict[str, Any] = {"picture": row["picture"]}
        image = row["image"]
        name = image["member"] or image["path"]
        try:
            data = self._read(image)
            told["sha256"] = hashlib.sha256(data).digest()
            suffix = name.rpartition(".")[2] if "." in name.rpartition("/")[2] else ""
            seen = examine(data, max_pixels=self._max_pixels, side=self._side, suffix=suffix)
        except PictureError as error:
            return None, told | {"skipped": error.reason, "detail": str(error)}
        except DataError as error:
            return None, told | {"skipped": reasons.BROKEN_FILE, "detail": str(error)}
        told |= {"width": seen.width, "height": seen.height, "format": seen.format, "remark": seen.remark}
        return seen.picture, told | {"perceptual_hash": perceptual_hash(seen.picture)}

    def _embed(self, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image | None]) -> Vectors:
        assert self._embedder is not None
        if self._embedder.embeds_pictures:
            usable = [number for number, picture in enumerate(pictures) if picture is not None]
            seen = [picture for picture in pictures if picture is not None]
            found = self._embedder.pictures(seen) if seen else None
        else:
            usable = [number for number, row in enumerate(rows) if row["text"]]
            found = self._embedder.texts([rows[number]["text"] for number in usable]) if usable else None
        vectors = np.zeros((len(rows), self._embedder.width), np.float16)
        if found is not None:
            vectors[usable] = found
        return vectors


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits; look-alikes differ in few of them."""
    small = picture.reduce(max(1, min(picture.size) // HASH_SIDE))
    bits = imagehash.phash(small).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
