"""What every request passes first, whatever it asks for: id, key, limits, size, time; then it is counted.

    id          `x-request-id` of the request where it is well formed, else a new one; on every answer
    key         on every route, unknown ones too, but those that say whether the server lives, and the page
    limits      of the key, see `limits`; /metrics is free of them, so that a busy server can be watched
    body        refused by its declared size before any of it is read, cut where it is larger than it may be,
                and given up where it does not come
    errors      in OpenAI's shape, also where nobody expected one
    told        one line of the log and the metrics, without what was asked or answered

Plain ASGI: an answer passes as it is made, message by message, so that streams stay streams.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmicl_core.errors import MmiclError
from pipelines.serve.errors import (
    RateLimitError,
    SlowUploadError,
    TooLargeError,
    error_body,
    error_headers,
    status_of,
)
from pipelines.serve.keys import PUBLIC
from pipelines.serve.limits import SMALL_BODY_BYTES, body_limit
from pipelines.serve.logs import RequestLine, write_line
from pipelines.serve.services import Services
from pipelines.serve.waiting import is_proxied

__all__ = ["Gate", "install"]

log = logging.getLogger("ray.serve")

OPEN = frozenset({"/healthz", "/readyz"})
PAGE, PAGE_FILES = "/", "/playground/"
UNLIMITED = frozenset({"/metrics"})
API = "/v1/"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADERS_READ = frozenset({b"authorization", b"content-length", b"x-request-id"})
MOST_DIGITS = 18
IDLE_SECONDS = 10.0
"""Without a byte of a body that is not complete."""
TOKENS = ("ttft_ms", "prompt_tokens", "completion_tokens", "cached_tokens")
"""Of what a route notes on `request.state`, what is logged."""


def install(app: FastAPI, services: Services) -> None:
    """Let every request to `app` pass `Gate` first."""
    app.add_middleware(Gate, services=services)


class Gate:
    """The middleware. Sets `request.state.request_id` and `request.state.tenant`.

    A route that notes `model`, `ttft_ms`, `prompt_tokens`, `completion_tokens` or `cached_tokens` on
    `request.state` has them logged. Where `app.state.proxied` is true, what stands in front of the server
    writes the id on answers: Ray Serve's proxy does, and a second one would be joined to it.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app, self._services = app, services
        self._body_limit = body_limit(services.config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "websocket":
            # No route speaks it.
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._services.config.request_seconds)
        began = time.perf_counter()
        self._services.metrics.request_started()
        try:
            await self._pass_on(exchange)
        except Exception as error:
            await exchange.fail(error)
        finally:
            self._tell(exchange, time.perf_counter() - began)

    async def _pass_on(self, exchange: _Exchange) -> None:
        path, state = _path(exchange.scope), exchange.state
        state["request_id"], state["tenant"] = exchange.line.request_id, PUBLIC
        if self._is_open(path):
            await self._app(exchange.scope, exchange.receive, exchange.send)
            return
        tenant = self._services.keys.tenant_of(exchange.headers.get(b"authorization"))
        state["tenant"] = exchange.line.tenant = tenant
        if path.startswith(API):
            exchange.most_bytes = self._body_limit
        if path in UNLIMITED:
            await self._app(exchange.scope, exchange.receive, exchange.send)
            return
        with self._services.limits.admit(tenant):
            exchange.refuse_declared_size()
            await self._app(exchange.scope, exchange.receive, exchange.send)

    def _is_open(self, path: str) -> bool:
        is_page = path == PAGE or path.startswith(PAGE_FILES)
        return path in OPEN or (is_page and self._services.config.playground)

    def _tell(self, exchange: _Exchange, seconds: float) -> None:
        line, state = exchange.line, exchange.state
        metrics = self._services.metrics
        line.route = str(getattr(exchange.scope.get("route"), "path", line.route))
        line.seconds = round(seconds, 6)
        model = state.get("model")
        line.model = metrics.model_label(model, line.status) or None
        for name in TOKENS:
            setattr(line, name, state.get(name))
        metrics.request_finished(line.method, line.route, line.status, seconds, model, exchange.limited)
        write_line(line)


class _Exchange:
    """One request and its answer, on their way through."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.state: dict[str, Any] = scope.setdefault("state", {})
        self.headers = _headers(scope)
        asked = self.headers.get(b"x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        self.line = RequestLine(request_id, scope["method"])
        self.most_bytes = SMALL_BODY_BYTES
        self.gone = False
        """Whether the client has hung up."""
        self.limited = False
        """Whether the key's limits refused it."""
        self._proxied = is_proxied(scope)
        self._deadline = time.monotonic() + seconds
        self._body_is_over = False
        self._slow = False
        self._started = False

    async def receive(self) -> Message:
        if self._body_is_over:
            return await self._receive()
        left = min(IDLE_SECONDS, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError as error:
            self._slow = True
            raise SlowUploadError(
                f"the body did not come in time: {self.line.bytes_in} bytes, and then nothing for "
                f"{IDLE_SECONDS:g} s, or not all within serve.request_seconds"
            ) from error
        if message["type"] == "http.disconnect":
            self.gone = self._body_is_over = True
            return message
        self.line.bytes_in += len(message.get("body", b""))
        self._body_is_over = not message.get("more_body", False)
        if self.line.bytes_in > self.most_bytes:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self.line.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._own_headers()]}
        elif message["type"] == "http.response.body":
            self.line.bytes_out += len(message.get("body", b""))
        await self._send(message)
        if message["type"] == "http.response.body":
            self.line.complete = not message.get("more_body", False)

    def refuse_declared_size(self) -> None:
        declared = self.headers.get(b"content-length", "")
        if declared.isdecimal() and (len(declared) > MOST_DIGITS or int(declared) > self.most_bytes):
            raise self._too_large()

    async def fail(self, error: Exception) -> None:
        """Answer with an error, while that is possible."""
        if self.gone:
            log.info("a request failed after its client had gone: %r", error)
            return
        if self._started:
            # Only an answer that breaks off still says that it is none.
            raise error
        self.limited = isinstance(error, RateLimitError)
        answer = JSONResponse(error_body(error), status_of(error)[0], error_headers(error))
        await answer(self.scope, self.receive, self.send)

    def _too_large(self) -> MmiclError:
        return TooLargeError(
            f"the body is larger than {self.most_bytes} bytes, which serve.max_images pictures of "
            "serve.max_image_bytes take: send fewer or smaller pictures"
            if self.most_bytes > SMALL_BODY_BYTES
            else f"the body is larger than {self.most_bytes} bytes, and none is expected here"
        )

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        headers = [] if self._proxied else [(b"x-request-id", self.line.request_id.encode("ascii"))]
        # What is still to come of the body would be taken for the next request's.
        return [*headers, (b"connection", b"close")] if self._slow else headers


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def _headers(scope: Scope) -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        if name in HEADERS_READ:
            found.setdefault(name, value.decode("latin-1"))
    return found
