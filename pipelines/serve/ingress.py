"""Deployment: the HTTP API in front of the handles of compressor and generator. No torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from mmicl_core.bank import Bank
from mmicl_core.config.serve import ServeConfig
from pipelines.serve.keys import Keys
from pipelines.serve.limits import Limits
from pipelines.serve.media import Media
from pipelines.serve.metrics import Metrics
from pipelines.serve.openai_api import build_api
from pipelines.serve.page import page_router
from pipelines.serve.remote import RemoteCompressor, RemoteGenerator
from pipelines.serve.services import Services

__all__ = ["Ingress"]

STATUS_SECONDS = 3.0
RUNNING = "RUNNING"


@serve.ingress()
class Ingress:
    """Takes requests apart and passes them on; does no arithmetic.

    Args:
        config: limits and names.
        compressor: handle of the compressor deployment.
        generator: handle of the generator deployment.
        application: name of the application, whose replicas are counted.
    """

    def __init__(
        self,
        config: ServeConfig,
        compressor: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        application: str,
    ) -> None:
        self._config = config
        self._compressor = RemoteCompressor(compressor, config)
        self._generator = RemoteGenerator(generator, config)
        self._replicas = ReplicaCounts(application)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Ray Serve tells which adapters there are to be."""
        self._generator.expect(user_config["adapters"])

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for the application once the replica is constructed."""
        config = self._config
        several = config.ingress_replicas > 1
        services = Services(
            config=config,
            compressor=self._compressor,
            generator=self._generator,
            bank=Bank(Path(config.bank), disk_bytes=config.bank_disk_bytes, max_packs=config.max_packs),
            media=Media(config),
            keys=Keys(None if config.keys is None else Path(config.keys)),
            limits=Limits(config),
            metrics=Metrics(serve.get_replica_context().replica_tag if several else ""),
            replicas=self._replicas,
        )
        api = build_api(services, [page_router(config)] if config.playground else [])
        # Ray writes the id of a request on its answer, as the request gave it or as it made it.
        api.state.proxied = True
        return api


class ReplicaCounts:
    """How many replicas of each deployment run, asked of Ray at most every few seconds.

    Args:
        application: name of the application.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._known: Mapping[str, int] = {}
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()

    async def __call__(self) -> Mapping[str, int]:
        """Counts by deployment."""
        async with self._lock:
            if time.monotonic() - self._asked_at > STATUS_SECONDS:
                # Ray's client blocks until its controller has answered.
                self._known = await asyncio.to_thread(self._count)
                self._asked_at = time.monotonic()
        return self._known

    def _count(self) -> Mapping[str, int]:
        application = serve.status().applications.get(self._application)
        deployments = {} if application is None else application.deployments
        return {
            name: sum(count for state, count in status.replica_states.items() if state == RUNNING)
            for name, status in deployments.items()
        }
