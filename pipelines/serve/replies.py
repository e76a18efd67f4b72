"""Events of a replica -> OpenAI's responses: whole, or as the events of a stream.

Chunks are thousands and nearly the same, so that they are put together as text: what all of one stream
share is written once.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from pipelines.serve.contracts import Event, Finished, Piece, Started, TokenLogprob
from pipelines.serve.errors import error_body
from pipelines.serve.schema import (
    ChatCompletion,
    ChatRequest,
    Choice,
    LikelyToken,
    Logprobs,
    PromptTokensDetails,
    ResponseMessage,
    Telemetry,
    TokenLikelihood,
    Usage,
)
from pipelines.serve.waiting import Deadline

__all__ = ["Reply"]

LEAST_LOGPROB = -9999.0
"""Stands for what JSON cannot say, as OpenAI's does."""
REPLACEMENT = "\ufffd"
DONE = b"data: [DONE]\n\n"


class Reply:
    """Writes the response to one chat request.

    Args:
        sent: the request.
    """

    def __init__(self, sent: ChatRequest) -> None:
        self._sent = sent
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._started: Started | None = None
        self._finished: dict[int, Finished] = {}

    @property
    def usage(self) -> Usage:
        """As far as the events tell."""
        assert self._started is not None, "a replica tells first that it read the prompt"
        prompt, cached = self._started.prompt_tokens, self._started.cached_tokens
        completion = sum(one.completion_tokens for one in self._finished.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            cached_tokens=cached,
            demo_tokens_full=self._started.demo_tokens_full,
            demo_tokens_fused=self._started.demo_tokens,
        )

    @property
    def ended(self) -> bool:
        """Whether all answers are complete."""
        return len(self._finished) == (self._sent.n or 1)

    @property
    def ttft_ms(self) -> float:
        """Of the answer that began first."""
        return min(one.ttft_ms for one in self._finished.values())

    def whole(self, events: Sequence[Event]) -> str:
        """The response that is no stream, as JSON."""
        pieces: dict[int, list[Piece]] = {index: [] for index in range(self._sent.n or 1)}
        for event in events:
            self._note(event)
            if isinstance(event, Piece):
                pieces[event.index].append(event)
        completion = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._sent.model,
            choices=[self._choice(index, parts) for index, parts in pieces.items()],
            usage=self.usage,
            mmicl=self._telemetry(self.ttft_ms),
        )
        return completion.model_dump_json()

    async def events(
        self, first: Sequence[Event], others: AsyncIterator[Sequence[Event]], deadline: Deadline
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream; what happened together is sent together."""
        from_here = _Chunks(self._id, self._created, self._sent)
        group = first
        try:
            while True:
                written = b"".join(self._chunk(from_here, event) for event in group)
                if self.ended:
                    break
                if written:
                    yield written
                group = await _in_time(others, deadline)
        except Exception as error:
            # The status is sent, so that only the stream itself can still say what went wrong.
            yield f"data: {json.dumps(error_body(error))}\n\n".encode()
            return
        if from_here.with_usage:
            written += from_here.usage(self.usage, self._telemetry(self.ttft_ms))
        yield written + DONE

    def _chunk(self, chunks: _Chunks, event: Event) -> bytes:
        self._note(event)
        if isinstance(event, Started):
            return b"".join(chunks.opening(index) for index in range(self._sent.n or 1))
        if isinstance(event, Finished):
            return chunks.ending(event.index, event.reason, self._telemetry(event.ttft_ms))
        return chunks.piece(event) if event.text or event.logprobs else b""

    def _note(self, event: Event) -> None:
        if isinstance(event, Started):
            self._started = event
        elif isinstance(event, Finished):
            self._finished[event.index] = event

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Choice:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.logprobs]
        return Choice(
            index=index,
            message=ResponseMessage(role="assistant", content=text, refusal=None),
            logprobs=_logprobs(tokens) if self._sent.logprobs else None,
            finish_reason=self._finished[index].reason,
        )

    def _telemetry(self, ttft_ms: float) -> Telemetry:
        assert self._started is not None, "a replica tells first that it read the prompt"
        return Telemetry(ttft_ms=ttft_ms, queued_ms=self._started.queued_ms)


class _Chunks:
    """Writes chunks of one stream."""

    def __init__(self, name: str, created: int, sent: ChatRequest) -> None:
        options = sent.stream_options
        self.with_usage = options is not None and bool(options.include_usage)
        head = {"id": name, "object": "chat.completion.chunk", "created": created, "model": sent.model}
        self._head = f'data: {json.dumps(head)[:-1]}, "choices": ['
        self._usage = ', "usage": null' if self.with_usage else ""
        self._logprobs = bool(sent.logprobs)

    def opening(self, index: int) -> bytes:
        """Says whose the answer is."""
        return self._choice(index, '{"role": "assistant", "content": ""}')

    def piece(self, piece: Piece) -> bytes:
        """More text."""
        likelihood = _logprobs(piece.logprobs).model_dump_json() if self._logprobs else "null"
        return self._choice(piece.index, f'{{"content": {json.dumps(piece.text)}}}', likelihood)

    def ending(self, index: int, reason: str, telemetry: Telemetry) -> bytes:
        """Says why the answer ended."""
        more = f', "mmicl": {telemetry.model_dump_json()}'
        return self._choice(index, "{}", reason=f'"{reason}"', more=more)

    def usage(self, usage: Usage, telemetry: Telemetry) -> bytes:
        """The last one."""
        told = f'"usage": {usage.model_dump_json()}, "mmicl": {telemetry.model_dump_json()}'
        return f"{self._head}], {told}}}\n\n".encode()

    def _choice(
        self, index: int, delta: str, likelihood: str = "null", reason: str = "null", more: str = ""
    ) -> bytes:
        choice = f'"index": {index}, "delta": {delta}, "logprobs": {likelihood}, "finish_reason": {reason}'
        return f"{self._head}{{{choice}}}]{self._usage}{more}}}\n\n".encode()


async def _in_time(others: AsyncIterator[Sequence[Event]], deadline: Deadline) -> Sequence[Event]:
    try:
        async with asyncio.timeout_at(deadline.at) as limit:
            return await anext(others)
    except TimeoutError:
        if limit.expired():
            raise deadline.error() from None
        raise
    except StopAsyncIteration as end:
        raise RuntimeError("a replica ended its stream before all answers had ended") from end


def _logprobs(tokens: Sequence[TokenLogprob]) -> Logprobs:
    content = [
        TokenLikelihood(
            **_token(token.text, token.logprob),
            top_logprobs=[LikelyToken(**_token(*likely)) for likely in token.likeliest],
        )
        for token in tokens
    ]
    return Logprobs(content=content, refusal=None)


def _token(text: str, logprob: float) -> dict[str, Any]:
    whole = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": whole}
