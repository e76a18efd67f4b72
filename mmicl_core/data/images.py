"""Encoded bytes -> pictures, with limits: a small file can hold a huge picture."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from mmicl_core.errors import DataError

__all__ = ["decode"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def decode(data: bytes, *, max_pixels: int = 16_000_000) -> Image.Image:
    """Decode to RGB; what is transparent becomes white.

    Raises:
        DataError: not a picture, a truncated one, or one with more than `max_pixels` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise DataError(
                    f"the picture has {picture.width} x {picture.height} pixels, {max_pixels} are "
                    "allowed: send a smaller one"
                )
            if picture.mode == "RGB":
                return picture.copy()
            rgba = picture.convert("RGBA")
    except DataError:
        raise
    # A PNG whose header chunk is cut short is a bare ValueError in PIL.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the bytes are not a readable picture: {error}") from error
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
