"""What compressor and generator share: a frozen backbone that one thread works for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mmicl_core.backbones.decoding import context_length
from mmicl_core.backbones.hugging_face import load_for_inference
from mmicl_core.data.images import decode
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError

__all__ = ["Replica"]

Result = TypeVar("Result")


class Replica:
    """Loads the backbone when it is constructed, on a GPU where Ray gave one.

    All arithmetic runs on one thread: requests take turns there, and the event loop stays free to
    accept, answer and cancel.

    Args:
        backbone: folder of the model.
        max_image_pixels: largest picture, decoded.
    """

    def __init__(self, backbone: Path, max_image_pixels: int) -> None:
        self.backbone = load_for_inference(backbone)
        self.chat = self.backbone.chat
        self.context_length = context_length(self.backbone)
        self._max_image_pixels = max_image_pixels
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run `work` on the arithmetic thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def prepare(self, images: Mapping[str, bytes]) -> dict[str, PreparedPicture]:
        """Encoded pictures by key -> as the model takes them.

        Raises:
            DataError: one is unreadable or too large; says which.
        """
        pictures = []
        for number, image in enumerate(images.values(), start=1):
            try:
                pictures.append(decode(image, max_pixels=self._max_image_pixels))
            except DataError as error:
                raise DataError(f"picture {number} of {len(images)}: {error}") from error
        return dict(zip(images, self.backbone.prepare(pictures), strict=True)) if pictures else {}
