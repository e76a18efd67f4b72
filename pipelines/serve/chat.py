"""`POST /v1/chat/completions`: a request becomes a question, and the events of its answer a response.

demonstrations that are fused --compressor--> fused tokens (by reference)
a pack                        --bank's files--> what it is called and counts; the generator loads it
what is left of the turns     --generator-----> events
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from mmicl_core.bank import OtherMakerError
from mmicl_core.config.serve import ServeConfig
from mmicl_core.prompts import Turn
from mmicl_core.serving.sampling import Sampling
from pipelines.serve.contracts import Event, Fusion, PackReference, Question, ServedModel
from pipelines.serve.conversation import (
    Conversation,
    as_demonstrations,
    count_fused,
    prefix_digest,
    read_conversation,
)
from pipelines.serve.document import answers, body, stream_of
from pipelines.serve.errors import RequestError
from pipelines.serve.model_routes import find_fusing, find_model, model_of
from pipelines.serve.reading import read_json
from pipelines.serve.replies import Reply
from pipelines.serve.schema import ChatCompletion, ChatCompletionChunk, ChatRequest, PackUse
from pipelines.serve.services import Services
from pipelines.serve.waiting import Deadline, EventStream, attend

__all__ = ["chat_routes"]

SEED_BITS = 63


def chat_routes(services: Services) -> APIRouter:
    """The one route of chat."""
    router = APIRouter(tags=["chat"])
    documented = answers(
        ChatCompletion, 400, 404, 408, 409, 413, 415, 429, 503, 504, also=stream_of(ChatCompletionChunk)
    )

    @router.post("/v1/chat/completions", openapi_extra=body(ChatRequest), **documented)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events that ends with `[DONE]`.

        An error after a stream has begun is an event with the field `error`.
        """
        deadline = Deadline(services.config.request_seconds)
        sent, conversation = await read_json(
            request, ChatRequest, lambda sent: read_conversation(sent.messages, services.config)
        )
        deadline.shorten(sent.timeout_seconds)
        request.state.model = sent.model
        asking = _Asking(services, request.state.tenant, sent, conversation)
        exchange = _Exchange(services, request, sent, asking, deadline)
        return await (exchange.streamed() if sent.stream else exchange.whole())

    return router


@dataclass(frozen=True)
class _Exchange:
    """A question to the generator, and its answer to whoever asked."""

    services: Services
    request: Request
    sent: ChatRequest
    asking: _Asking
    deadline: Deadline

    async def whole(self) -> Response:
        """All at once."""
        events, reply = await attend(self.request, self.deadline, self._answer()), Reply(self.sent)
        response = Response(reply.whole(events), media_type="application/json")
        self._note(reply)
        return response

    async def streamed(self) -> Response:
        """As it is made. What cannot be answered fails here, while the status can still say so."""
        first, source = await attend(self.request, self.deadline, self._begin())
        parts = self._parts(Reply(self.sent), first, source)
        return EventStream(parts, source, self.deadline)

    async def _answer(self) -> Sequence[Event]:
        question = await self.asking.question(self.deadline)
        began = time.perf_counter()
        events = await self.services.generator.answer(question)
        self.services.metrics.observe_answer(question.model, events, time.perf_counter() - began)
        return events

    async def _begin(self) -> tuple[Sequence[Event], AsyncGenerator[Sequence[Event], None]]:
        question = await self.asking.question(self.deadline)
        events = self.services.metrics.follow(question.model, self.services.generator.stream(question))
        # It can be closed, which ends the work of the replica.
        source = cast("AsyncGenerator[Sequence[Event], None]", events)
        return await anext(source), source

    async def _parts(
        self, reply: Reply, first: Sequence[Event], source: AsyncGenerator[Sequence[Event], None]
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(reply.events(first, source, self.deadline)) as parts:
            async for part in parts:
                yield part
        if reply.ended:
            self._note(reply)

    def _note(self, reply: Reply) -> None:
        """For the log."""
        state, usage = self.request.state, reply.usage
        state.ttft_ms = reply.ttft_ms
        state.prompt_tokens, state.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        state.cached_tokens = usage.cached_tokens


@dataclass(frozen=True)
class _Asking:
    """Makes the question of one request."""

    services: Services
    tenant: str
    sent: ChatRequest
    conversation: Conversation

    async def question(self, deadline: Deadline) -> Question:
        """Raises what is wrong with the request."""
        samplings = _samplings(self.sent, self.services.config)
        models = await self.services.generator.models()
        model = find_model(models, self.sent.model)
        count = self._count_fused(models, model)
        pictures = await self.conversation.pictures.load(self.services.media)
        turns = self.conversation.turns[count:]
        if count:
            demonstrations = as_demonstrations(self.conversation.turns[:count], pictures)
            fusion = await self.services.compressor.fuse(model.id, self.tenant, demonstrations)
        elif self.sent.demo_pack is not None:
            shown = [pictures[key] for key in turns[-1].pictures]
            fusion = await self._pack(models, model, self.sent.demo_pack, shown)
        else:
            fusion = None
        if fusion is not None:
            self.services.metrics.observe_fusion(fusion)
        prefix = None
        if len(turns) > 1 or self.conversation.system is not None or fusion is not None:
            prefix = await self._prefix(turns[:-1], pictures)
        return Question(
            model=model.id,
            turns=turns,
            pictures={key: pictures[key] for turn in turns for key in turn.pictures},
            samplings=samplings,
            seconds=deadline.left,
            fusion=fusion,
            system=self.conversation.system,
            prefix=prefix,
        )

    async def _prefix(self, turns: Sequence[Turn], pictures: Mapping[str, bytes]) -> str:
        what = (self.tenant, self.conversation.system, turns, pictures)
        if any(turn.pictures for turn in turns):
            return await asyncio.to_thread(prefix_digest, *what)
        return prefix_digest(*what)

    def _count_fused(self, models: Sequence[ServedModel], model: ServedModel) -> int:
        turns, mode = self.conversation.turns, self.sent.demonstrations
        if self.sent.demo_pack is not None:
            if mode == "fused" and len(turns) > 1:
                raise RequestError(
                    'demo_pack and "demonstrations": "fused" exclude each other where there are earlier '
                    "turns: register these with the pack, or have them written out",
                    "demonstrations",
                )
            return 0
        mode = mode or self.services.config.demonstrations
        if mode == "fused" and len(turns) > 1:
            find_fusing(models, model.id)
        return count_fused(turns, mode, model.fuses)

    async def _pack(
        self, models: Sequence[ServedModel], model: ServedModel, use: PackUse, shown: Sequence[bytes]
    ) -> Fusion:
        entry = await asyncio.to_thread(self.services.bank.describe, self.tenant, use.id)
        maker = model_of(models, entry.maker)
        if not model.fuses:
            name = entry.model if maker is None else maker.id
            raise RequestError(
                f"model {model.id!r} does not take demo packs, and {use.id} is one of {name!r}: name that as "
                "the model",
                "model",
            )
        if dict(entry.maker) != dict(model.maker):
            raise OtherMakerError(
                f"{use.id} was made by {entry.model!r} as it was then, not by {model.id!r}: "
                + (f"name {maker.id!r} as the model" if maker else "register its demonstrations again")
            )
        reference = PackReference(self.tenant, use.id)
        if use.select is None:
            size = len(entry.tokens_full)
            return Fusion(entry.digest, entry.tokens_full, entry.tokens_fused, size, reference)
        if not shown:
            raise RequestError(
                "demo_pack.select chooses what is nearest to the pictures of the last message, which has "
                "none: send one, or leave select out",
                "demo_pack.select",
            )
        if use.select > len(entry.tokens_full):
            raise RequestError(
                f"demo_pack.select is {use.select}, and {use.id} holds {len(entry.tokens_full)} "
                "demonstrations: select fewer, or leave select out",
                "demo_pack.select",
            )
        return await self.services.compressor.select(model.id, reference, shown, use.select)


def _samplings(sent: ChatRequest, config: ServeConfig) -> tuple[Sampling, ...]:
    answers = sent.n or 1
    if answers > config.max_choices:
        raise RequestError(
            f"n is {answers}, {config.max_choices} are allowed (serve.max_choices): ask for fewer", "n"
        )
    # A seed of its own lets a replica that takes over say the same again.
    seed = secrets.randbits(SEED_BITS) if sent.seed is None else sent.seed
    return tuple(
        Sampling(
            max_new_tokens=sent.max_tokens or sent.max_completion_tokens or config.max_new_tokens,
            temperature=sent.temperature or 0.0,
            top_p=sent.top_p or 1.0,
            seed=(seed + index) % 2**SEED_BITS,
            stop=tuple(sent.stop or ()),
            top_logprobs=(sent.top_logprobs or 0) if sent.logprobs else None,
            ignore_eos=sent.ignore_eos or False,
        )
        for index in range(answers)
    )
