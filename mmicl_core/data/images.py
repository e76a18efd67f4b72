"""Encoded bytes -> pictures, within limits: a small file can hold a huge picture, or none.

What a picture is is told by its bytes, never by its name. Colours end as 8-bit RGB: what is transparent
becomes white, 16 bits are scaled to 8, an animation gives its first frame, and a camera's note on which
side is up is followed. JPEGs are decoded at a reduced size where a smaller picture is wanted, which is
several times faster and needs no second look.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmicl_core.data import reasons
from mmicl_core.errors import DataError

__all__ = ["Examined", "PictureError", "decode", "examine"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = {
    "jpg": ("JPEG", "MPO"),
    "jpeg": ("JPEG", "MPO"),
    "png": ("PNG",),
    "webp": ("WEBP",),
    "gif": ("GIF",),
    "bmp": ("BMP",),
}
PAGE = re.compile(
    rb"^(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body|script|div|p\b)", re.I | re.S
)
# Pictures of other kinds, told by their first bytes, so that they are not called broken.
OTHER_KINDS = re.compile(
    rb"^(II\*\x00|MM\x00\*|....ftyp(avif|heic|mif1)|\x00\x00\x01\x00|8BPS|%PDF|\x00\x00\x00\x0cjP"
    rb"|\s*(<\?xml.*?>\s*)?<svg)",
    re.S,
)
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEG, SCAN = b"\xff\xd8\xff", b"\xff\xda"
# A progressive JPEG has about ten. Each costs a pass over the whole picture, and may take a few bytes.
MOST_SCANS = 100
# What Pillow's readers raise over files that are not as they must be.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, TypeError, LookupError)


class PictureError(DataError):
    """Bytes that are no usable picture; `reason` is one of `reasons`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Examined:
    """A decoded picture, and what its file says."""

    picture: Image.Image
    """RGB; smaller than the file's where that was asked for."""
    width: int
    height: int
    """Pixels of the file."""
    format: str
    remark: str
    """What is unusual, joined by commas."""


def decode(data: bytes, *, max_pixels: int = 16_000_000) -> Image.Image:
    """The picture in full size, RGB.

    Raises:
        PictureError: not a picture, a broken one, or one with more than `max_pixels` pixels.
    """
    return examine(data, max_pixels=max_pixels).picture


def examine(data: bytes, *, max_pixels: int, side: int | None = None, suffix: str = "") -> Examined:
    """Decode once and tell what is there.

    Args:
        side: the picture is wanted no smaller than this in both directions, in pixels; None wants all.
        suffix: of the file's name, to be held against what it is.

    Raises:
        PictureError: as `decode`.
    """
    _refuse_what_is_no_picture(data)
    try:
        with _open(data) as picture:
            size = picture.size
            if size[0] * size[1] > max_pixels:
                raise PictureError(
                    reasons.TOO_MANY_PIXELS,
                    f"the picture has {size[0]} x {size[1]} pixels, {max_pixels} are allowed: send a "
                    "smaller one",
                )
            remark = _remark(picture, suffix)
            kind = str(picture.format)
            if side is not None and picture.mode == "RGB":
                picture.draft("RGB", (side, side))
            rgb = _reduce(_rgb(picture), side)
    except Image.DecompressionBombError as error:
        raise PictureError(reasons.TOO_MANY_PIXELS, f"the picture is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise PictureError(reasons.NOT_A_PICTURE, "the bytes are not a readable picture") from error
    except BROKEN as error:
        if isinstance(error, PictureError):
            raise
        cut = "truncated" in str(error) or "Truncated" in str(error) or isinstance(error, EOFError)
        reason = reasons.TRUNCATED_PICTURE if cut else reasons.CORRUPT_PICTURE
        raise PictureError(reason, f"the bytes are not a readable picture: {error}") from error
    return Examined(rgb, *size, kind, remark)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # The limit of the caller is the one that counts.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _refuse_what_is_no_picture(data: bytes) -> None:
    start = data[:512]
    if not data:
        raise PictureError(reasons.EMPTY_PICTURE, "the picture is empty: 0 bytes")
    if PAGE.match(start):
        raise PictureError(reasons.WEB_PAGE, f"the bytes are a web page: {start[:60]!r}")
    if data.startswith(JPEG) and (scans := data.count(SCAN)) > MOST_SCANS:
        raise PictureError(
            reasons.CORRUPT_PICTURE,
            f"the picture is a JPEG of {scans} scans, {MOST_SCANS} are read: write it anew",
        )
    if OTHER_KINDS.match(start):
        raise PictureError(
            reasons.UNSUPPORTED_FORMAT,
            f"the picture is of a kind that is not read ({start[:12]!r}): use {', '.join(FORMATS)}",
        )


def _remark(picture: Image.Image, suffix: str) -> str:
    remarks = []
    kind = str(picture.format)
    if suffix and kind not in SUFFIXES.get(suffix.lower(), (kind,)):
        remarks.append("wrong extension")
    if picture.mode == "CMYK":
        remarks.append("CMYK")
    if picture.mode.startswith("I"):
        remarks.append("16 bits")
    if picture.mode in ("P", "PA"):
        remarks.append("palette")
    # Several pictures in a JPEG are previews of one photograph.
    if kind in ("GIF", "PNG", "WEBP") and getattr(picture, "is_animated", False):
        remarks.append("animated")
    return ", ".join(remarks)


def _rgb(picture: Image.Image) -> Image.Image:
    # Pillow's own way writes all notes anew, and fails over some that nobody reads.
    if (turn := TURNS.get(_orientation(picture))) is not None:
        picture = picture.transpose(turn)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        picture.load()
        return picture.copy()
    if picture.mode.startswith("I"):
        # Pillow's own conversion cuts off what is above 255.
        values = np.asarray(picture).astype(np.float64)
        scaled = values / 257 if values.max(initial=0) > 255 else values
        return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8), "L").convert("RGB")
    if picture.mode in ("L", "CMYK", "YCbCr", "LAB", "HSV", "1") and "transparency" not in picture.info:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _orientation(picture: Image.Image) -> int:
    if "exif" not in picture.info:
        return 1
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except BROKEN:
        # Notes that cannot be read say nothing, and the picture is none the worse.
        return 1
    return found if isinstance(found, int) else 1


def _reduce(picture: Image.Image, side: int | None) -> Image.Image:
    """Shrink by a whole factor while both directions keep `side` pixels."""
    factor = 1 if side is None else min(picture.size) // side
    return picture.reduce(factor) if factor > 1 else picture
