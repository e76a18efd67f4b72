"""Waiting for replicas: no longer than the deadline, and no longer than whoever asked does.

Work that nobody waits for is cancelled, which reaches the replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from pipelines.serve.errors import ClientGoneError, DeadlineError

__all__ = ["Deadline", "EventStream", "attend", "is_proxied"]

SENDING_SECONDS = 10.0
"""After the deadline, for a client that reads slowly what was written in time."""

Result = TypeVar("Result")


class Deadline:
    """When a request is too late.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = asyncio.get_running_loop().time() + seconds
        """By the clock of the event loop."""

    def shorten(self, seconds: float | None) -> None:
        """From its beginning, and only if that is sooner."""
        if seconds is not None and seconds < self.seconds:
            self.at -= self.seconds - seconds
            self.seconds = seconds

    @property
    def left(self) -> float:
        """Seconds; at least one millisecond, after which it is too late in any case."""
        return max(0.001, self.at - asyncio.get_running_loop().time())

    def error(self) -> DeadlineError:
        """What to tell of a request that is too late."""
        return DeadlineError(
            f"no answer within {self.seconds:g} seconds (timeout_seconds, or serve.request_seconds): ask for "
            "fewer tokens, or when the server is less busy",
            "timeout_seconds",
        )


async def attend(request: Request, deadline: Deadline, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work` on a request whose body has been read.

    Raises:
        ClientGoneError: whoever asked has hung up.
        DeadlineError: it takes too long.
    """
    task, gone = asyncio.ensure_future(work), _watch(request.scope, request.receive)
    try:
        done, _ = await asyncio.wait((task, gone), timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientGoneError if gone in done else deadline.error()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """An answer that is sent as it is made: server-sent events.

    Args:
        parts: what is sent; closed in any case.
        source: what the parts are made of; closed in any case, also where no part was ever asked for.
        deadline: of the request.
    """

    media_type = "text/event-stream"

    def __init__(
        self, parts: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None], deadline: Deadline
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        # Its length is not known.
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]
        self._parts, self._source, self._deadline = parts, source, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, the deadline, or until whoever asked hangs up."""
        sending = asyncio.ensure_future(self._send(send))
        gone = _watch(scope, receive)
        try:
            limit = self._deadline.left + SENDING_SECONDS
            done, _ = await asyncio.wait((sending, gone), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if sending in done:
                sending.result()
        finally:
            await _end(sending, gone)
            await self._parts.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_proxied(scope: Scope) -> bool:
    """Whether a proxy stands in front of the server, as `app.state.proxied` says."""
    return bool(getattr(getattr(scope.get("app"), "state", None), "proxied", False))


def _watch(scope: Scope, receive: Receive) -> asyncio.Future[None]:
    """Done when whoever asked has hung up.

    Ray cancels the whole request then, and where its own proxy is used, each look would be a call to it.
    """
    if is_proxied(scope):
        return asyncio.get_running_loop().create_future()
    return asyncio.ensure_future(_gone(receive))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    # What was cancelled has let go of what it held before the request is over.
    await asyncio.gather(*tasks, return_exceptions=True)
