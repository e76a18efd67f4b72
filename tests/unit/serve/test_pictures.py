"""Pictures that a model cannot take are the mistake of whoever sent them."""

from __future__ import annotations

import pytest
from PIL import Image

from mmicl_core.errors import DataError
from pipelines.serve.pictures import prepare_pictures
from tests.fakes import draw_picture, encode_picture, tiny_backbone

MAX_PIXELS = 10_000


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"GIF89a", "picture 2 of 2: the bytes are not a readable picture"),
        (encode_picture(draw_picture(0, side=101)), "picture 2 of 2: .* 101 x 101 pixels, 10000 are allowed"),
        (encode_picture(Image.new("RGB", (5000, 2))), "picture 2 of 2: it has 5000 x 2 pixels.*50 times"),
        (encode_picture(Image.new("RGB", (1, 51))), "picture 2 of 2: it has 1 x 51 pixels.*50 times"),
    ],
)
def test_picture_that_cannot_be_taken_is_refused_by_its_number(image, reason):
    with pytest.raises(DataError, match=reason):
        prepare_pictures(tiny_backbone(), [encode_picture(draw_picture(0)), image], MAX_PIXELS)


def test_shapes_that_the_processor_refuses_are_refused(monkeypatch):
    backbone = tiny_backbone()

    def refuse(pictures):
        raise ValueError("absolute aspect ratio must be smaller than 40")

    monkeypatch.setattr(backbone, "prepare", refuse)
    with pytest.raises(DataError, match=r"picture 1 of 1: the model cannot take its 72 x 72 pixels \(absol"):
        prepare_pictures(backbone, [encode_picture(draw_picture(0))], MAX_PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 3), (2, 100), (100, 2)])
def test_small_and_long_pictures_are_taken(size):
    (prepared,) = prepare_pictures(tiny_backbone(), [encode_picture(Image.new("RGB", size))], MAX_PIXELS)
    assert prepared.inputs["pixel_values"].shape == (1, 3, 70, 70)
