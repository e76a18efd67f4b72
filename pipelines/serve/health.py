"""Whether the server lives, whether it can answer, and what it has done: for probes and for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from pipelines.serve.services import Services

__all__ = ["Health", "router"]

log = logging.getLogger("ray.serve")

READY_SECONDS = 1.0
"""Within which a generator has to say what it serves."""
KEEP_SECONDS = 1.0
"""That a finding is told again: anybody may ask, and each time would cost a replica a call."""
COUNT_SECONDS = 2.0


class Health(BaseModel):
    """What probes read; they look at the status alone."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None
    """What is missing."""


class _Readiness:
    """Finds out whether requests can be answered, at most once a second."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = asyncio.Lock()
        self._found: tuple[float, str | None] | None = None

    async def reason(self) -> str | None:
        """Why no request can be answered; None if they can."""
        async with self._lock:
            now = time.monotonic()
            if self._found is None or now - self._found[0] >= KEEP_SECONDS:
                reason = await self._generator() or await self._bank()
                self._found = time.monotonic(), reason
            return self._found[1]

    async def _generator(self) -> str | None:
        if self._services.config.generator.fewest == 0:
            # The question itself would start a replica that nobody needs.
            return None
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._services.generator.models()
        except TimeoutError:
            return f"no generator says within {READY_SECONDS:g} s what it serves"
        except Exception as error:
            log.warning("the generator fails", exc_info=error)
            return "the generator fails; the log says why"
        return None

    async def _bank(self) -> str | None:
        try:
            async with asyncio.timeout(READY_SECONDS):
                await asyncio.to_thread(_try_to_write, Path(self._services.config.bank))
        except TimeoutError:
            return f"the bank's folder takes no file within {READY_SECONDS:g} s"
        except OSError as error:
            log.warning("the bank's folder cannot be written to: %s", error)
            return "the bank's folder cannot be written to; the log says why"
        return None


def router(services: Services) -> APIRouter:
    """`/healthz`, `/readyz` and `/metrics`."""
    routes = APIRouter(tags=["operations"])
    readiness = _Readiness(services)

    @routes.get("/healthz", response_model_exclude_none=True)
    async def alive() -> Health:
        """Whether the process answers; asks nothing else."""
        return Health(status="ok")

    @routes.get(
        "/readyz",
        response_model=Health,
        response_model_exclude_none=True,
        responses={HTTPStatus.SERVICE_UNAVAILABLE.value: {"model": Health, "description": "Not ready"}},
    )
    async def ready() -> Response:
        """Whether a generator answers and the bank can be written to."""
        reason = await readiness.reason()
        found = Health(status="ok" if reason is None else "unavailable", reason=reason)
        status = HTTPStatus.OK if reason is None else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse(found.model_dump(exclude_none=True), status)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What Prometheus reads."""
        body, kind = services.metrics.page(await _replicas(services))
        return Response(body, media_type=kind)

    return routes


async def _replicas(services: Services) -> Mapping[str, int]:
    try:
        async with asyncio.timeout(COUNT_SECONDS):
            return await services.replicas()
    except Exception as error:
        # All other numbers are worth having then, and most of all.
        log.warning("replicas cannot be counted", exc_info=error)
        return {}


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"ready")
        file.flush()
