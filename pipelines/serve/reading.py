"""Bodies of requests, and the pictures in them.

Large bodies are taken apart on a thread, so that a request full of pictures does not hold up the others. How
large they may be is seen to before, in `middleware`. Pictures come as bytes or as addresses; here none is
opened, only what is certainly no picture is refused.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from mmicl_core.config.serve import ServeConfig
from pipelines.serve.errors import MediaTypeError, RequestError, explain_request
from pipelines.serve.media import Media

__all__ = ["Pictures", "check_media_type", "read_json"]

DATA_URI = re.compile(r"data:image/([\w.+-]+);base64,", re.IGNORECASE)
WEB = re.compile(r"https?://", re.IGNORECASE)
# What `mmicl_core.data.images` opens begins like this.
BEGINNING = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM", re.S)
SHOWN = 40
# Taken apart in less time than a thread needs to take over.
SMALL_BYTES = 64 * 1024
JSON = "application/json"

Sent = TypeVar("Sent", bound=BaseModel)
Made = TypeVar("Made")


async def read_json(request: Request, kind: type[Sent], make: Callable[[Sent], Made]) -> tuple[Sent, Made]:
    """The body as its model, and what `make` makes of it; of a large one on a thread.

    Raises:
        RequestError: it is no JSON, or does not fit the model.
        MediaTypeError: it does not say that it is JSON.
    """
    check_media_type(request, JSON)
    body = await request.body()
    if len(body) < SMALL_BYTES:
        return _take_apart(body, kind, make)
    return await asyncio.to_thread(_take_apart, body, kind, make)


def check_media_type(request: Request, wanted: str) -> None:
    """Refuse a body that is declared as something else.

    Web pages may send forms and plain text to any server without asking it; these types they may not.
    """
    declared = request.headers.get("content-type", "none")
    if declared.partition(";")[0].strip().lower() != wanted:
        raise MediaTypeError(
            f"the body is declared as {declared[:SHOWN]!r}: send it with the header `content-type: {wanted}`"
        )


class Pictures:
    """The pictures of one request by their keys, in order; those that have an address are not here yet.

    Args:
        limits: how many there may be, and how large.
    """

    def __init__(self, limits: ServeConfig) -> None:
        self._limits = limits
        self._bytes: dict[str, bytes] = {}
        self._addresses: dict[str, tuple[str, str]] = {}

    def add(self, key: str, url: str, where: str) -> None:
        """A picture as a data URI, or where it is to be loaded from.

        Args:
            where: the field of the request that holds it.

        Raises:
            RequestError: it is neither, none, or too large, or there are too many.
        """
        if WEB.match(url) is not None:
            self._refuse_too_many(where)
            self._addresses[key] = (url, where)
            return
        start = DATA_URI.match(url)
        if start is None:
            raise RequestError(
                f"{where} is {url[:SHOWN]!r}, neither a picture nor an http(s) address: send the picture "
                "itself as data:image/png;base64,...",
                where,
            )
        if start[1].lower().startswith("svg"):
            raise RequestError(f"{where} is an SVG, which is not read: send it as a PNG", where)
        self.add_base64(key, url[start.end() :], where)

    def add_base64(self, key: str, text: str, where: str) -> None:
        """A picture's file in base64. Raises as `add` does."""
        self._refuse_too_many(where)
        most = self._limits.max_image_bytes
        # Four letters are three bytes: what is too large is refused before it is decoded.
        size = len(text) // 4 * 3 - text[-2:].count("=")
        if size > most:
            raise RequestError(
                f"{where} holds a picture of {size} bytes, {most} are allowed (serve.max_image_bytes): send "
                "a smaller one",
                where,
            )
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except ValueError as error:
            raise RequestError(
                f"{where} is not base64 ({error}): encode the picture's file again", where
            ) from error
        if BEGINNING.match(data) is None:
            raise RequestError(
                f"{where} does not begin as a JPEG, PNG, WEBP, GIF or BMP does: send one of these", where
            )
        self._bytes[key] = data

    async def load(self, media: Media) -> dict[str, bytes]:
        """All of them, with those that had to be loaded; equal addresses are loaded once.

        Raises:
            RequestError: one cannot be.
        """
        if not self._addresses:
            return self._bytes
        wheres = dict(self._addresses.values())
        loads = {url: asyncio.ensure_future(media.load(url, where)) for url, where in wheres.items()}
        try:
            await asyncio.gather(*loads.values())
        finally:
            for load in loads.values():
                load.cancel()
            await asyncio.gather(*loads.values(), return_exceptions=True)
        return self._bytes | {key: loads[url].result() for key, (url, _) in self._addresses.items()}

    def __len__(self) -> int:
        return len(self._bytes) + len(self._addresses)

    def _refuse_too_many(self, where: str) -> None:
        if len(self) >= self._limits.max_images:
            raise RequestError(
                f"{where} is picture {len(self) + 1} of the request, {self._limits.max_images} are allowed "
                "(serve.max_images): send fewer, or register demonstrations as a demo_pack",
                where,
            )


def _take_apart(body: bytes, kind: type[Sent], make: Callable[[Sent], Made]) -> tuple[Sent, Made]:
    try:
        sent = kind.model_validate_json(body)
    except ValidationError as error:
        raise explain_request(error) from error
    return sent, make(sent)
