"""Asks a server that speaks OpenAI's protocol, whoever runs it: a conversation a request, several at a time.

Log-probabilities of choices come from those of the first token, of which servers tell the twenty likeliest:
the protocol has no way to ask for those of a given answer.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletion

from mmicl_core.errors import BackboneError
from mmicl_core.evaluation.answering import Cost, Reply, Request, picture_of, spans
from mmicl_core.evaluation.controls import BLANK
from mmicl_core.evaluation.tasks.base import PictureSource

__all__ = ["EndpointAnswerer"]

AT_ONCE = 8
RETRIES = 6
SECONDS = 600.0
LIKELIEST = 20
# What files of a kind begin with.
KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif"}


class EndpointAnswerer:
    """A model behind a server.

    Args:
        url: up to and with `/v1`.
        model: as the server calls it.
        key: what the server knows us by.
    """

    def __init__(self, url: str, model: str, key: str) -> None:
        self._client = OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=SECONDS)
        self._url, self._model = url, model

    def answer(self, requests: Sequence[Request], pictures: PictureSource) -> list[Reply]:
        """Replies in the order of the requests; what fails for a moment is tried again.

        Raises:
            BackboneError: the server refused, or did not answer.
        """
        # Pictures are read one after the other: a source need not be ready for several threads.
        messages = [_messages(request, pictures) for request in requests]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._ask, requests, messages))

    def time(self, request: Request, pictures: PictureSource) -> Cost:
        """Time until the first piece of an answer arrives; the server's memory is not known."""
        asked: dict[str, Any] = {
            "model": self._model,
            "messages": _messages(request, pictures),
            "temperature": 0,
            "max_tokens": request.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begun, moments, usage, arrived = time.perf_counter(), list[float](), None, 0
        try:
            for piece in self._client.chat.completions.create(**asked):
                usage, arrived = piece.usage or usage, arrived + 1
                if piece.choices and piece.choices[0].delta.content:
                    moments.append(time.perf_counter())
        except OpenAIError as error:
            raise BackboneError(f"{self._url} did not answer as {self._model!r}: {error}") from error
        if not arrived:
            raise BackboneError(f"{self._url} did not answer as {self._model!r}: nothing that is a chat came")
        ttft_ms, later = spans(begun, moments)
        tokens = usage.completion_tokens - 1 if usage is not None else 0
        return Cost(
            usage.prompt_tokens if usage is not None else None,
            None,
            ttft_ms,
            tokens / later if later and tokens > 0 else None,
        )

    def _ask(self, request: Request, messages: list[dict[str, Any]]) -> Reply:
        asked: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": request.max_new_tokens,
        }
        if request.choices:
            asked |= {"logprobs": True, "top_logprobs": LIKELIEST}
        try:
            reply = self._client.chat.completions.create(**asked)
        except OpenAIError as error:
            raise BackboneError(f"{self._url} did not answer as {self._model!r}: {error}") from error
        if not isinstance(reply, ChatCompletion) or not reply.choices:
            raise BackboneError(
                f"{self._url} did not answer as {self._model!r}: what came is no chat completion; is this "
                "the address up to and with /v1?"
            )
        chosen = reply.choices[0]
        told = self._choices(request.choices, chosen.logprobs) if request.choices else {}
        tokens = reply.usage.prompt_tokens if reply.usage is not None else None
        return Reply(chosen.message.content or "", tokens, told)

    def _choices(self, choices: Sequence[str], told: Any) -> Mapping[str, float]:
        if told is None or not told.content or not told.content[0].top_logprobs:
            raise BackboneError(
                f"{self._url} gives no log-probabilities, which this task is scored by: ask a server that "
                "does"
            )
        likeliest = [(one.token.strip().lower(), one.logprob) for one in told.content[0].top_logprobs]
        # What is not among them is less likely than all of them.
        least = min(logprob for _, logprob in likeliest)
        return {choice: _log_probability(choice.lower(), likeliest, least) for choice in choices}


def _log_probability(choice: str, likeliest: Sequence[tuple[str, float]], least: float) -> float:
    begun = [logprob for token, logprob in likeliest if token and choice.startswith(token)]
    return float(np.logaddexp.reduce(begun)) if begun else least


def _messages(request: Request, pictures: PictureSource) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in request.turns:
        shown = [{"type": "image_url", "image_url": {"url": _uri(key, pictures)}} for key in turn.pictures]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _uri(key: str, pictures: PictureSource) -> str:
    """The encoded picture as it is, where servers read its kind; otherwise as PNG."""
    if not key.startswith(BLANK):
        data = pictures.read(key)
        kind = next((kind for begin, kind in KINDS.items() if data.startswith(begin)), None)
        if kind is not None:
            return _data_uri(kind, data)
    buffer = io.BytesIO()
    picture_of(key, pictures).save(buffer, "PNG")
    return _data_uri("png", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
