from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmicl_core.data import reasons
from mmicl_core.data.images import PictureError, decode, examine
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


JPEG = encode_picture(draw_picture(5, side=200), "JPEG")
PNG = encode_picture(draw_picture(6, side=64))
UNUSABLE = {
    "nothing": (b"", reasons.EMPTY_PICTURE),
    "a page": (b"<!DOCTYPE html><html><body>404", reasons.WEB_PAGE),
    "a page behind a mark and spaces": (b"\xef\xbb\xbf \n<html>", reasons.WEB_PAGE),
    "a page behind a comment": (b"<!-- served by\nsomebody --> <HTML>", reasons.WEB_PAGE),
    "text": (b"not found", reasons.NOT_A_PICTURE),
    "zeros": (bytes(1000), reasons.NOT_A_PICTURE),
    "half a jpeg": (JPEG[: len(JPEG) // 2], reasons.TRUNCATED_PICTURE),
    "half a png": (PNG[: len(PNG) // 2], reasons.TRUNCATED_PICTURE),
    "a drawing": (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", reasons.UNSUPPORTED_FORMAT),
    "a tiff": (b"II*\0" + bytes(100), reasons.UNSUPPORTED_FORMAT),
    "an avif": (b"\0\0\0\x20ftypavif" + bytes(100), reasons.UNSUPPORTED_FORMAT),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_bytes_that_are_no_usable_picture_are_told_by_their_reason(what: str) -> None:
    data, reason = UNUSABLE[what]
    with pytest.raises(PictureError) as told:
        examine(data, max_pixels=10**6)
    assert told.value.reason == reason


def _png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return PNG[:8] + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]


@pytest.mark.parametrize("side", [11_000, 30_000])
def test_a_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    with pytest.raises(PictureError) as told:
        examine(_png_that_claims(side, side), max_pixels=64_000_000)
    assert told.value.reason == reasons.TOO_MANY_PIXELS


def test_sixteen_bits_are_scaled_to_eight_and_remarked() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    seen = examine(encode_picture(Image.fromarray(ramp)), max_pixels=10**6)
    assert seen.remark == "16 bits"
    assert np.array_equal(np.asarray(seen.picture)[..., 0].ravel(), np.arange(256))


def test_printing_colours_a_palette_and_a_first_frame_are_kept_and_remarked() -> None:
    picture = draw_picture(7)
    printed = examine(encode_picture(picture.convert("CMYK"), "JPEG"), max_pixels=10**6)
    assert printed.remark == "CMYK"
    assert np.abs(np.asarray(printed.picture).astype(int) - np.asarray(picture)).mean() < 12
    assert examine(encode_picture(picture.quantize(16)), max_pixels=10**6).remark == "palette"
    moving = io.BytesIO()
    picture.save(moving, "WEBP", save_all=True, append_images=[draw_picture(8)], lossless=True)
    first = examine(moving.getvalue(), max_pixels=10**6)
    assert first.remark == "animated"
    assert np.array_equal(np.asarray(first.picture), np.asarray(picture))


def test_what_a_picture_is_is_told_by_its_bytes_and_a_wrong_name_is_remarked() -> None:
    told = [examine(JPEG, max_pixels=10**6, suffix=suffix).remark for suffix in ("png", "jpg", "JPEG", "")]
    assert told == ["wrong extension", "", "", ""]


def test_a_photograph_taken_sideways_is_turned_upright() -> None:
    picture = draw_picture(9, side=64).crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    upright = examine(file.getvalue(), max_pixels=10**6).picture
    assert np.array_equal(np.asarray(upright), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_wanted_small_is_decoded_small_but_never_below_what_is_wanted(kind: str) -> None:
    data = encode_picture(draw_picture(10, side=1024), kind)
    seen = examine(data, max_pixels=10**7, side=200)
    assert (seen.width, seen.height) == (1024, 1024)
    assert 200 <= min(seen.picture.size) < 400
    whole = decode(data).resize(seen.picture.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(seen.picture).astype(int) - np.asarray(whole)).mean() < 3


def noted(*tags: bytes) -> bytes:
    """A JPEG with these entries among a camera's notes."""
    table = struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    notes = b"Exif\0\0II*\0\x08\0\0\0" + table
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(notes) + 2) + notes + JPEG[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_followed_as_pillow_does(orientation: int) -> None:
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    data = noted(tag)
    with Image.open(io.BytesIO(data)) as picture:
        expected = ImageOps.exif_transpose(picture).convert("RGB")
    assert decode(data).tobytes() == expected.tobytes()


def test_a_picture_turned_by_notes_that_cannot_be_written_again_is_turned() -> None:
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    odd = struct.pack("<HHII", 0x0101, 2, 4, 0x61616161)
    expected = Image.open(io.BytesIO(JPEG)).transpose(Image.Transpose.ROTATE_270)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(noted(tag, odd))))
    assert decode(noted(tag, odd)).tobytes() == expected.tobytes()


def test_a_jpeg_of_more_scans_than_any_encoder_writes_is_refused_unread() -> None:
    whole = encode_picture(Image.new("L", (64, 64), 77), "JPEG")
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(PictureError, match="a JPEG of 101 scans, 100 are read"):
        decode(whole[:-2] + scan * 100 + whole[-2:])
