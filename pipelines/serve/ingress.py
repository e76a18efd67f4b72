"""Deployment: the HTTP API in front of the handles of compressor and generator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from mmicl_core.bank import Demonstration, Pack, PackEntry
from mmicl_core.config.serve import ServeConfig
from pipelines.serve.contracts import Answer, Question
from pipelines.serve.openai_api import build_api

__all__ = ["Ingress"]


class RemoteCompressor:
    """Compressor replicas; an error of theirs arrives as it was raised."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def register(self, demonstrations: Sequence[Demonstration]) -> PackEntry:
        """Fuse and store demonstrations."""
        entry: PackEntry = await _unwrapped(self._handle.register.remote(demonstrations))
        return entry

    async def describe(self, pack_id: str) -> PackEntry:
        """Token counts of a pack."""
        entry: PackEntry = await _unwrapped(self._handle.describe.remote(pack_id))
        return entry

    async def load(self, pack_id: str) -> Pack:
        """A pack with its fused tokens."""
        pack: Pack = await _unwrapped(self._handle.load.remote(pack_id))
        return pack


class RemoteGenerator:
    """Generator replicas; an error of theirs arrives as it was raised."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def answer(self, question: Question) -> Answer:
        """The whole answer."""
        answer: Answer = await _unwrapped(self._handle.answer.remote(question))
        return answer

    async def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        """Text as it grows, and the whole answer last."""
        parts: Any = self._handle.options(stream=True).stream.remote(question)
        try:
            async for part in parts:
                yield part
        except RayTaskError as error:
            raise error.cause from error


@serve.ingress()
class Ingress:
    """Takes requests apart and passes them on; does no arithmetic.

    Args:
        config: limits and the model's name.
        compressor: handle of the compressor deployment.
        generator: handle of the generator deployment.
    """

    def __init__(
        self, config: ServeConfig, compressor: DeploymentHandle[Any], generator: DeploymentHandle[Any]
    ) -> None:
        self._config = config
        self._compressor = RemoteCompressor(compressor)
        self._generator = RemoteGenerator(generator)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for the application once the replica is constructed."""
        return build_api(self._config, self._compressor, self._generator)


async def _unwrapped(response: Awaitable[Any]) -> Any:
    try:
        return await response
    except RayTaskError as error:
        raise error.cause from error
