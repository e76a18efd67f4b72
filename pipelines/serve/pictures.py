"""Pictures of requests, as a model takes them: whoever sent one that cannot be taken is told so."""

from __future__ import annotations

from collections.abc import Sequence

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.data.images import decode
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError

__all__ = ["prepare_picture", "prepare_pictures"]

# Processors scale the shorter side to the model's and cut the longer one only then: a strip of one row of a
# million pixels, a few thousand bytes as sent, would take a hundred gigabytes on the way.
LONGEST_SHAPE = 50


def prepare_pictures(
    backbone: HuggingFaceBackbone, images: Sequence[bytes], max_pixels: int
) -> list[PreparedPicture]:
    """Encoded pictures -> as the model takes them.

    Args:
        max_pixels: of one picture, decoded.

    Raises:
        DataError: one is unreadable, too large, or of a shape that no model takes; says which.
    """
    prepared = list[PreparedPicture]()
    for number, image in enumerate(images, start=1):
        try:
            prepared.append(prepare_picture(backbone, image, max_pixels))
        except DataError as error:
            raise DataError(f"picture {number} of {len(images)}: {error}") from error
    return prepared


def prepare_picture(backbone: HuggingFaceBackbone, image: bytes, max_pixels: int) -> PreparedPicture:
    """One of them. Raises as above."""
    picture = decode(image, max_pixels=max_pixels)
    width, height = picture.size
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise DataError(
            f"it has {width} x {height} pixels, and one side may be {LONGEST_SHAPE} times as long as the "
            "other: cut it"
        )
    try:
        (prepared,) = backbone.prepare([picture])
    # Processors of foreign libraries refuse some shapes by errors of their own.
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the model cannot take its {width} x {height} pixels ({error}): send another"
        ) from error
    return prepared
