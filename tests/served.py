"""Replicas that are none, and the HTTP API in front of them: what its tests speak to.

The fakes keep the contracts of `pipelines.serve.contracts`, and no more: fused tokens are numbers made of a
demonstration's digest, an answer is what the test says. Everything between a client and them is real.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
import threading
import time
import zlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from mmicl_core.bank import Bank, Demonstration, Known, PackEntry
from mmicl_core.config.serve import ServeConfig
from pipelines.serve.contracts import (
    Embeddings,
    Event,
    Finished,
    Fusion,
    PackReference,
    Piece,
    Question,
    ServedModel,
    Started,
    TokenLogprob,
)
from pipelines.serve.keys import Keys
from pipelines.serve.limits import Limits
from pipelines.serve.media import Media
from pipelines.serve.metrics import Metrics
from pipelines.serve.openai_api import build_api
from pipelines.serve.services import Services

__all__ = [
    "AIM",
    "BASE",
    "FakeCompressor",
    "FakeGenerator",
    "ask",
    "assistant",
    "call",
    "data_uri",
    "error_of",
    "events_of",
    "make_services",
    "png",
    "served",
    "user",
]

TOKENS_OF_A_PICTURE, WIDTH, START_SECONDS = 16, 4, 10
BASE = ServedModel("nano", "base", False, {}, 4096)
AIM = ServedModel(
    "nano@aim",
    "aim",
    True,
    {"format": "3", "backbone": "b" * 64, "template": "t" * 64, "adapter": "a" * 64},
    4096,
)


def png(colour: int = 0, side: int = 2) -> bytes:
    """A grey PNG; equal arguments, equal bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = (b"\0" + bytes([colour]) * side) * side
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def data_uri(picture: bytes, kind: str = "image/png") -> str:
    """A picture as requests hold it."""
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


class FakeCompressor:
    """Fused tokens that say nothing, and a note of what was asked.

    Args:
        bank: keeps what is registered.
        model: whose packs these are.
        errors: raised by the next calls, one each.
        seconds: that fusing takes.
    """

    def __init__(
        self, bank: Bank, model: ServedModel = AIM, errors: Sequence[Exception] = (), seconds: float = 0
    ) -> None:
        self._bank, self._model, self._errors, self._seconds = bank, model, list(errors), seconds
        self.asked: list[tuple[Any, ...]] = []
        """Name and arguments of every call."""
        self.cancelled = 0
        """Calls that were."""

    async def fuse(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> Fusion:
        await self._begin("fuse", model, tenant, tuple(demonstrations))
        return _fusion([known_of(one) for one in demonstrations])

    async def register(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> PackEntry:
        await self._begin("register", model, tenant, tuple(demonstrations))
        known = [known_of(one) for one in demonstrations]
        return self._bank.put_pack(tenant, model, self._model.maker, demonstrations, known)

    async def select(self, model: str, pack: PackReference, pictures: Sequence[bytes], count: int) -> Fusion:
        await self._begin("select", model, pack, tuple(pictures), count)
        loaded = self._bank.load(pack.tenant, pack.pack_id, self._model.maker)
        sizes = loaded.entry.tokens_full[-count:]
        return _fusion(
            [Known(fused, size, None) for fused, size in zip(loaded.fused[-count:], sizes, strict=True)]
        )

    async def embed(self, pictures: Sequence[bytes]) -> Embeddings:
        await self._begin("embed", tuple(pictures))
        vectors = tuple(_vector(picture) for picture in pictures)
        return Embeddings(vectors, TOKENS_OF_A_PICTURE * len(pictures))

    async def _begin(self, *call: Any) -> None:
        self.asked.append(call)
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._errors:
            raise self._errors.pop(0)


class FakeGenerator:
    """Answers every question with the same pieces, and remembers the questions.

    Args:
        pieces: of text, one token each.
        models: that are served.
        errors: raised in the place of the next answers, one each.
        break_off: raised after the last piece of every answer.
        begin: seconds until the prompt is read.
        seconds: that a piece takes.
    """

    def __init__(
        self,
        pieces: Sequence[str] = ("bako", " mute"),
        models: Sequence[ServedModel] = (BASE, AIM),
        errors: Sequence[Exception] = (),
        break_off: Exception | None = None,
        begin: float = 0,
        seconds: float = 0,
    ) -> None:
        self.pieces, self.served = tuple(pieces), tuple(models)
        self._errors, self._break_off = list(errors), break_off
        self._begin, self._seconds = begin, seconds
        self.questions: list[Question] = []
        self.cancelled = 0
        """Answers that were not waited for."""
        self.ended = 0
        """Answers that are complete or failed."""

    @property
    def question(self) -> Question:
        """The last one."""
        return self.questions[-1]

    async def models(self) -> tuple[ServedModel, ...]:
        return self.served

    async def answer(self, question: Question) -> tuple[Event, ...]:
        return tuple([event async for group in self.stream(question) for event in group])

    async def stream(self, question: Question) -> AsyncGenerator[tuple[Event, ...], None]:
        self.questions.append(question)
        try:
            await asyncio.sleep(self._begin)
            if self._errors:
                raise self._errors.pop(0)
            yield (self._started(question),)
            choices = range(len(question.samplings))
            for piece in self.pieces:
                await asyncio.sleep(self._seconds)
                yield tuple(self._piece(question, index, piece) for index in choices)
            if self._break_off is not None:
                raise self._break_off
            yield tuple(Finished(index, "stop", len(self.pieces), 12.5) for index in choices)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    def _started(self, question: Question) -> Started:
        earlier = question.turns[:-1]
        written = sum(TOKENS_OF_A_PICTURE * len(turn.pictures) + 4 for turn in earlier)
        full = sum(question.fusion.tokens_full) if question.fusion else 0
        fused = sum(question.fusion.tokens_fused) if question.fusion else 0
        return Started(30 + written + fused, 7, written + full, written + fused, 1.5, len(question.samplings))

    def _piece(self, question: Question, index: int, text: str) -> Piece:
        count = question.samplings[index].top_logprobs
        if count is None:
            return Piece(index, text)
        likeliest = tuple((f"{text}{place or ''}", -0.5 - place) for place in range(count))
        return Piece(index, text, (TokenLogprob(text, -0.5, likeliest),))


def known_of(demonstration: Demonstration) -> Known:
    """What the bank keeps of a demonstration: a token for each word."""
    words = len(f"{demonstration.question} {demonstration.answer}".split())
    content = b"".join(
        [*demonstration.images, demonstration.question.encode(), demonstration.answer.encode()]
    )
    fused = np.outer(np.arange(1, words + 1), _vector(content)).astype(np.float32)
    full = words + TOKENS_OF_A_PICTURE * len(demonstration.images)
    return Known(fused, full, np.array(_vector(content), np.float32))


def make_services(
    folder: Path,
    *,
    compressor: Any = None,
    generator: Any = None,
    replicas: Mapping[str, int] | None = None,
    **settings: Any,
) -> Services:
    """Services around fakes, or around what is given, with the bank in `folder`."""
    config = ServeConfig(**({"bank": str(folder / "bank")} | settings))
    bank = Bank(Path(config.bank), max_packs=config.max_packs)

    async def count() -> Mapping[str, int]:
        return {"compressor": 1, "generator": 1} if replicas is None else replicas

    return Services(
        config=config,
        compressor=compressor or FakeCompressor(bank),
        generator=generator or FakeGenerator(),
        bank=bank,
        media=Media(config),
        keys=Keys(None if config.keys is None else Path(config.keys)),
        limits=Limits(config),
        metrics=Metrics(),
        replicas=count,
    )


@contextmanager
def served(app: Any) -> Iterator[str]:
    """An ASGI application on a free port of this machine; gives its address, `http://HOST:PORT`."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="warning",
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
        assert not thread.is_alive(), "a request keeps the server from ending"


def call(services: Services, method: str, path: str, **more: Any) -> httpx.Response:
    """One request to the API, without a socket."""

    async def request() -> httpx.Response:
        # An unexpected error is answered with 500; the transport would raise it here as well.
        transport = httpx.ASGITransport(build_api(services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **more)

    return asyncio.run(request())


def ask(services: Services, messages: Any = None, **fields: Any) -> httpx.Response:
    """A chat request to the model that fuses, or to `model`."""
    said = [user("This is")] if messages is None else messages
    return call(services, "POST", "/v1/chat/completions", json={"model": AIM.id, "messages": said} | fields)


def user(text: str, *pictures: bytes | str) -> dict[str, Any]:
    """A question about pictures, or about what is at addresses."""
    urls = [data_uri(one) if isinstance(one, bytes) else one for one in pictures]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *shown]}


def assistant(text: Any) -> dict[str, Any]:
    """An answer."""
    return {"role": "assistant", "content": text}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """What a response of that status says."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream; the last one is `[DONE]` where all went well."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def _fusion(known: Sequence[Known]) -> Fusion:
    digest = hashlib.sha256(b"".join(one.fused.tobytes() for one in known)).hexdigest()
    full = tuple(one.tokens_full for one in known)
    return Fusion(digest, full, tuple(len(one.fused) for one in known), 0, tuple(one.fused for one in known))


def _vector(content: bytes) -> tuple[float, ...]:
    numbers = np.frombuffer(hashlib.sha256(content).digest()[:WIDTH], np.uint8).astype(np.float64) + 1
    return tuple(float(one) for one in numbers / np.linalg.norm(numbers))
