"""The HTTP API: OpenAI's chat completions and models, and demonstration packs.

Bodies are read up to a limit and taken apart on a thread, so that a request full of pictures does not
hold up the others. The replicas behind it are whatever keeps the contracts: Ray handles or fakes.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError

from mmicl_core.bank import Pack, PackEntry
from mmicl_core.config.serve import ServeConfig
from mmicl_core.prompts import Turn
from pipelines.serve.contracts import Answer, Compressing, Generating, Question
from pipelines.serve.conversation import read_conversation, read_demonstrations_sent
from pipelines.serve.errors import (
    TooLargeError,
    UnknownModelError,
    error_body,
    explain_request,
    install_error_handlers,
)
from pipelines.serve.schema import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    DemoPack,
    DemoPackRequest,
    Model,
    ModelList,
    ResponseMessage,
    Telemetry,
    Usage,
)

__all__ = ["build_api"]

TEXT_BYTES = 2**20
"""Room for everything in a body that is no picture."""

Sent = TypeVar("Sent", bound=BaseModel)
Made = TypeVar("Made")


def build_api(config: ServeConfig, compressor: Compressing, generator: Generating) -> FastAPI:
    """The application, in front of `compressor` and `generator`."""
    app = FastAPI(title="mmicl", openapi_url=None)
    install_error_handlers(app)
    model = Model(id=config.model_name, object="model", created=int(time.time()), owned_by="mmicl")
    body_limit = config.max_images * (config.max_image_bytes * 4 // 3 + 1024) + TEXT_BYTES

    async def read(request: Request, kind: type[Sent], make: Callable[[Sent], Made]) -> tuple[Sent, Made]:
        body = await _body(request, body_limit)
        return await run_in_threadpool(_take_apart, body, kind, make)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(object="list", data=[model])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        _refuse_other_model(name, config, "model")
        return model

    @app.post("/v1/demo_packs")
    async def register(request: Request) -> DemoPack:
        _, demonstrations = await read(
            request, DemoPackRequest, lambda sent: read_demonstrations_sent(sent, config)
        )
        return _demo_pack(await compressor.register(demonstrations))

    @app.get("/v1/demo_packs/{pack_id}")
    async def describe(pack_id: str) -> DemoPack:
        return _demo_pack(await compressor.describe(pack_id))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> ChatCompletion | StreamingResponse:
        sent, (turns, pictures) = await read(request, ChatRequest, lambda sent: _conversation(sent, config))
        pack = None if sent.demo_pack is None else await compressor.load(sent.demo_pack)
        limit = sent.max_tokens or sent.max_completion_tokens or config.max_new_tokens
        question = Question(turns, pictures, limit, pack.fused if pack else ())
        reply = _Reply(sent, pack)
        if not sent.stream:
            return reply.whole(await generator.answer(question))
        parts = generator.stream(question)
        # A question that cannot be answered fails here, while the status can still say so.
        first = await anext(parts)
        return StreamingResponse(reply.events(first, parts), media_type="text/event-stream")

    return app


async def _body(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLargeError(
                f"the request is larger than {limit} bytes, which serve.max_images pictures of "
                "serve.max_image_bytes take: send fewer or smaller pictures"
            )
        parts.append(part)
    return b"".join(parts)


def _take_apart(body: bytes, kind: type[Sent], make: Callable[[Sent], Made]) -> tuple[Sent, Made]:
    try:
        sent = kind.model_validate_json(body)
    except ValidationError as error:
        raise explain_request(error) from error
    return sent, make(sent)


def _conversation(sent: ChatRequest, config: ServeConfig) -> tuple[tuple[Turn, ...], dict[str, bytes]]:
    _refuse_other_model(sent.model, config, "model")
    return read_conversation(sent.messages, config)


def _refuse_other_model(name: str, config: ServeConfig, param: str) -> None:
    if name != config.model_name:
        raise UnknownModelError(f"model {name!r} is not served here, {config.model_name!r} is", param)


def _demo_pack(entry: PackEntry) -> DemoPack:
    return DemoPack(
        id=entry.id,
        object="demo_pack",
        demonstrations=len(entry.tokens_full),
        tokens_full=sum(entry.tokens_full),
        tokens_fused=sum(entry.tokens_fused),
    )


class _Reply:
    """Writes the response to one chat request."""

    def __init__(self, sent: ChatRequest, pack: Pack | None) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = sent.model
        self._with_usage = sent.stream_options is not None and sent.stream_options.include_usage
        self._tokens_full = sum(pack.entry.tokens_full) if pack else 0
        self._tokens_fused = sum(pack.entry.tokens_fused) if pack else 0

    def whole(self, answer: Answer) -> ChatCompletion:
        """The response that is no stream."""
        message = ResponseMessage(role="assistant", content=answer.text)
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[Choice(index=0, message=message, finish_reason=answer.finish_reason)],
            usage=self._usage(answer),
            mmicl=Telemetry(ttft_ms=answer.ttft_ms),
        )

    async def events(self, first: str | Answer, others: AsyncIterator[str | Answer]) -> AsyncIterator[str]:
        """The events of a stream."""
        yield _event(self._chunk(_grown(Delta(role="assistant", content=""))))
        part = first
        try:
            while isinstance(part, str):
                yield _event(self._chunk(_grown(Delta(content=part))))
                part = await anext(others)
        except Exception as error:
            # The status is sent, so that only the stream itself can still say what went wrong.
            yield f"data: {json.dumps(error_body(error))}\n\n"
            return
        ended = ChunkChoice(index=0, delta=Delta(), finish_reason=part.finish_reason)
        yield _event(self._chunk(ended, mmicl=Telemetry(ttft_ms=part.ttft_ms)))
        if self._with_usage:
            yield _event(self._chunk(usage=self._usage(part)))
        yield "data: [DONE]\n\n"

    def _chunk(self, *choices: ChunkChoice, **extra: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=list(choices),
            **extra,
        )

    def _usage(self, answer: Answer) -> Usage:
        return Usage(
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            total_tokens=answer.prompt_tokens + answer.completion_tokens,
            demo_tokens_full=self._tokens_full,
            demo_tokens_fused=self._tokens_fused,
        )


def _grown(delta: Delta) -> ChunkChoice:
    return ChunkChoice(index=0, delta=delta, finish_reason=None)


def _event(chunk: ChatCompletionChunk) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
