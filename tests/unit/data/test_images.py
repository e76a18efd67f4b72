from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from mmicl_core.data.images import decode
from mmicl_core.errors import DataError
from tests.fakes import draw_picture, encode_picture


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_decoding_a_lossless_file_gives_its_pixels(kind: str) -> None:
    picture = draw_picture(3)
    assert np.array_equal(np.asarray(decode(encode_picture(picture, kind))), np.asarray(picture))


def test_decoding_draws_what_is_transparent_on_white() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    pixels = np.asarray(decode(encode_picture(clear)))
    assert pixels.tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_a_small_file_of_a_huge_picture_is_refused_with_both_sizes() -> None:
    data = encode_picture(Image.new("L", (2000, 1000)))
    with pytest.raises(DataError, match="2000 x 1000 pixels, 1000000 are allowed"):
        decode(data, max_pixels=1_000_000)


# A header may claim a size that PIL warns of before `decode` refuses it.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "GIF", "BMP"])
def test_decoding_broken_bytes_gives_a_picture_or_a_data_error(kind: str) -> None:
    rng = random.Random(kind)
    whole = encode_picture(draw_picture(0, side=24), kind)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 60))] = rng.randrange(256)
        try:
            picture = decode(bytes(data[: rng.randint(1, len(data))]))
        except DataError:
            continue
        assert picture.mode == "RGB"


def test_a_png_whose_header_chunk_is_cut_short_is_a_data_error() -> None:
    data = bytearray(encode_picture(draw_picture(0)))
    # The length of the IHDR chunk; PIL answers a short one with a bare ValueError.
    data[8:12] = (5).to_bytes(4, "big")
    with pytest.raises(DataError, match="not a readable picture"):
        decode(bytes(data))
