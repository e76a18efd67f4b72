from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance

from mmicl_core.data import reasons
from mmicl_core.data.images import decode
from mmicl_core.data.look import Looker, perceptual_hash
from mmicl_core.data.schema import IMAGE, LOOKED
from mmicl_core.errors import DataError
from tests.fakes import draw_picture, encode_picture

FILES = {
    "good.png": encode_picture(draw_picture(1)),
    "page.jpg": b"<html>not here</html>",
    "photo.png": encode_picture(draw_picture(2, side=300), "JPEG"),
    "cut.jpg": encode_picture(draw_picture(3, side=300), "JPEG")[:900],
    "empty.jpg": b"",
}


class _Embedder:
    """Width two: the mean brightness of the picture, or the length of the text, and one."""

    width, side = 2, 64

    def __init__(self, *, embeds_pictures: bool = True) -> None:
        self.embeds_pictures = embeds_pictures

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return np.array([[np.asarray(picture).mean() / 255, 1] for picture in pictures], np.float32)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(text), 1] for text in texts], np.float32)


def _read(image: dict[str, str]) -> bytes:
    if image["path"] == "missing":
        raise DataError("missing cannot be read")
    return FILES[image["member"]]


def _pairs(*members: str) -> pa.Table:
    rows = [
        {
            "picture": f"key/{member}",
            "image": {
                "path": member if member == "missing" else "x.tar",
                "member": member,
                "offset": 0,
                "size": 1,
            },
            "text": "t" * number or None,
        }
        for number, member in enumerate(members)
    ]
    return pa.Table.from_pylist(
        rows, schema=pa.schema([("picture", pa.string()), ("image", IMAGE), ("text", pa.string())])
    )


def test_a_look_gives_a_row_for_every_pair_and_a_reason_for_every_unusable_one() -> None:
    looked, vectors = Looker(_read, 10**6)(_pairs(*FILES, "missing"))
    assert vectors is None and looked.schema == LOOKED
    told = dict(zip(looked.column("picture").to_pylist(), looked.column("skipped").to_pylist(), strict=True))
    assert told == {
        "key/good.png": None,
        "key/page.jpg": reasons.WEB_PAGE,
        "key/photo.png": None,
        "key/cut.jpg": reasons.TRUNCATED_PICTURE,
        "key/empty.jpg": reasons.EMPTY_PICTURE,
        "key/missing": reasons.BROKEN_FILE,
    }
    good, _, photo, *_ = looked.to_pylist()
    assert good["sha256"] == hashlib.sha256(FILES["good.png"]).digest()
    assert (good["width"], good["height"], good["format"], good["remark"]) == (72, 72, "PNG", "")
    assert (photo["width"], photo["format"], photo["remark"]) == (300, "JPEG", "wrong extension")


def test_embeddings_stand_beside_their_rows_and_are_zero_where_there_is_no_picture() -> None:
    looked, vectors = Looker(_read, 10**6, _Embedder())(_pairs("page.jpg", "good.png", "empty.jpg"))
    assert vectors is not None and vectors.dtype == np.float16
    brightness = np.asarray(draw_picture(1)).mean() / 255
    np.testing.assert_allclose(vectors, [[0, 0], [brightness, 1], [0, 0]], atol=1e-3)


def test_text_embedder_tells_a_pair_by_its_text_and_a_pair_without_one_by_zeros() -> None:
    _, vectors = Looker(_read, 10**6, _Embedder(embeds_pictures=False))(_pairs("good.png", "photo.png"))
    assert vectors is not None
    np.testing.assert_array_equal(vectors, [[0, 0], [1, 1]])


def test_rows_do_not_depend_on_how_many_are_looked_at_together() -> None:
    many = _pairs(*(["good.png", "photo.png", "cut.jpg"] * 50))
    whole, vectors = Looker(_read, 10**6, _Embedder())(many)
    halves = [Looker(_read, 10**6, _Embedder())(many.slice(start, 50)) for start in range(0, 150, 50)]
    assert pa.concat_tables([table for table, _ in halves]).equals(whole)
    np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in halves]), vectors)


def _distance(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


@pytest.mark.parametrize("seed", range(5))
def test_look_alikes_differ_in_few_bits_and_other_pictures_in_many(seed: int) -> None:
    picture = draw_picture(seed, side=256)
    alikes = [
        picture.resize((180, 180), Image.Resampling.BICUBIC),
        ImageEnhance.Brightness(picture).enhance(0.8),
        decode(encode_picture(picture, "JPEG")),
    ]
    assert max(_distance(picture, alike) for alike in alikes) <= 10
    assert min(_distance(picture, draw_picture(other, side=256)) for other in range(10, 20)) > 10
