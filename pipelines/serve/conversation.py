"""A request as turns and pictures. Nothing is fetched and nothing is opened: pictures come as bytes.

A `user` message is a question about any number of pictures, an `assistant` message its answer; turns with
an answer are demonstrations written out in full. Pictures stand where the model's chat template puts them,
before the text, wherever they stood in the message.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import replace

from mmicl_core.bank import Demonstration
from mmicl_core.config.serve import ServeConfig
from mmicl_core.prompts import Turn
from pipelines.serve.errors import RequestError
from pipelines.serve.schema import DemoPackRequest, Message

__all__ = ["read_conversation", "read_demonstrations_sent"]

DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def read_conversation(
    messages: Sequence[Message], limits: ServeConfig
) -> tuple[tuple[Turn, ...], dict[str, bytes]]:
    """Messages -> turns, the last one unanswered, and their pictures by reference.

    Raises:
        RequestError: messages do not alternate, or a picture is missing, too many, or no data URI.
    """
    turns: list[Turn] = []
    pictures: dict[str, bytes] = {}
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            raise RequestError(
                f"{where} has role {message.role!r} where {expected!r} belongs: user and assistant take "
                "turns, beginning and ending with user",
                f"{where}.role",
            )
        urls = [
            (f"{where}.content.{place}.image_url.url", part.image_url.url)
            for place, part in enumerate(message.content)
            if part.image_url is not None
        ]
        text = "\n".join(part.text for part in message.content if part.text is not None)
        if message.role == "assistant":
            _refuse_pictures_of_the_assistant(urls)
            turns[-1] = replace(turns[-1], answer=text)
            continue
        if not text and not urls:
            raise RequestError(f"{where} says nothing: give it a picture or a text", f"{where}.content")
        keys = tuple(f"{number}.{place}" for place in range(len(urls)))
        for key, (param, url) in zip(keys, urls, strict=True):
            pictures[key] = _picture(url, limits, param)
        turns.append(Turn(keys, text, None))
    if turns[-1].answer is not None:
        raise RequestError("the last message is an answer: end with a user message", "messages")
    _refuse_too_many(len(pictures), limits, "messages")
    return tuple(turns), pictures


def read_demonstrations_sent(request: DemoPackRequest, limits: ServeConfig) -> tuple[Demonstration, ...]:
    """The demonstrations of a pack.

    Raises:
        RequestError: there are too many, or a picture is no data URI, no base64, or too large.
    """
    _refuse_too_many(len(request.demonstrations), limits, "demonstrations")
    found = []
    for number, sent in enumerate(request.demonstrations):
        where = f"demonstrations.{number}"
        if sent.image_url is not None:
            image = _picture(sent.image_url.url, limits, f"{where}.image_url.url")
        else:
            assert sent.image is not None
            image = _bytes(sent.image, limits, f"{where}.image")
        found.append(Demonstration((image,), sent.question, sent.answer))
    return tuple(found)


def _picture(url: str, limits: ServeConfig, param: str) -> bytes:
    start = DATA_URI.match(url)
    if start is None:
        raise RequestError(
            f"{param} is {url[:40]!r}, not a data URI: this server fetches nothing, send the picture "
            "itself as data:image/png;base64,...",
            param,
        )
    return _bytes(url[start.end() :], limits, param)


def _bytes(text: str, limits: ServeConfig, param: str) -> bytes:
    # Four letters are three bytes: what is too large is refused before it is decoded.
    size = len(text) // 4 * 3 - text[-2:].count("=")
    if size > limits.max_image_bytes:
        raise RequestError(
            f"{param} holds a picture of {size} bytes, {limits.max_image_bytes} are allowed "
            "(serve.max_image_bytes): send a smaller one",
            param,
        )
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RequestError(
            f"{param} is not base64 ({error}): encode the picture's file again", param
        ) from error


def _refuse_pictures_of_the_assistant(urls: Sequence[tuple[str, str]]) -> None:
    if urls:
        raise RequestError(
            f"{urls[0][0]} is a picture in an assistant message: pictures belong to user messages", urls[0][0]
        )


def _refuse_too_many(pictures: int, limits: ServeConfig, param: str) -> None:
    if pictures > limits.max_images:
        raise RequestError(
            f"the request holds {pictures} pictures, {limits.max_images} are allowed (serve.max_images): "
            "send fewer, or register demonstrations as a demo_pack",
            param,
        )
