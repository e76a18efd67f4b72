"""Compressor and generator behind Ray handles, as the ingress asks them.

What a replica raises arrives as it was raised. Of a replica that dies, and of fused tokens that died with the
replica that made them, the same is asked again until the deadline; an answer that was half passed on is made
anew, with the same text, and goes on where it stopped. A caller that leaves takes the replica's work along.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from time import monotonic
from typing import Any, TypeVar

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from mmicl_core.bank import Demonstration, PackEntry
from mmicl_core.config.serve import ServeConfig
from pipelines.serve.contracts import Embeddings, Event, Fusion, PackReference, Question, ServedModel
from pipelines.serve.errors import DeadlineError, OverloadedError, UnavailableError
from pipelines.serve.replay import Replay

__all__ = ["RemoteCompressor", "RemoteGenerator"]

log = logging.getLogger("ray.serve")

Result = TypeVar("Result")

DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, ReplicaUnavailableError, TaskCancelledError)
# A request that has outlived so many replicas may be what kills them.
MOST_DEATHS = 5
# Ray needs a moment to notice a death; until then, it may choose the dead replica again.
FIRST_PAUSE_SECONDS = 0.05
RETRY_SECONDS = 1.0
# The list of models, which every request reads, is asked for anew when it is so old, and waited for when it
# is older than the second: then the generator may be gone.
MODELS_SECONDS, MODELS_AT_MOST_SECONDS = 1.0, 10.0


@dataclass(frozen=True)
class MadeFusion(Fusion):
    """Fused tokens that live as long as the replica that made them, and how to have them made again."""

    again: Callable[[], Awaitable[Fusion]]


class RemoteCompressor:
    """Compressor replicas.

    Args:
        handle: of the deployment.
        config: says how long to wait.
    """

    def __init__(self, handle: DeploymentHandle[Any], config: ServeConfig) -> None:
        self._handle, self._seconds = handle, config.request_seconds

    async def fuse(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> Fusion:
        """Fuse demonstrations."""
        return await self._fusion("fuse", model, tenant, demonstrations)

    async def register(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> PackEntry:
        """Fuse demonstrations and store them as a pack."""
        entry: PackEntry = await self._ask("register", model, tenant, demonstrations)
        return entry

    async def select(self, model: str, pack: PackReference, pictures: Sequence[bytes], count: int) -> Fusion:
        """The demonstrations of a pack that are nearest to pictures."""
        return await self._fusion("select", model, pack, pictures, count)

    async def embed(self, pictures: Sequence[bytes]) -> Embeddings:
        """Pictures as vectors."""
        embeddings: Embeddings = await self._ask("embed", pictures)
        return embeddings

    async def _fusion(self, method: str, *arguments: object) -> Fusion:
        async def make() -> Fusion:
            fusion: Fusion = await self._ask(method, *arguments)
            return fusion

        return MadeFusion(**_values(await make()), again=make)

    async def _ask(self, method: str, *arguments: object) -> Any:
        handle = self._handle.options(method_name=method)
        return await _Attempts(self._seconds).ask(lambda: handle.remote(*arguments))


class RemoteGenerator:
    """Generator replicas.

    Each of them holds all models around one backbone, so that any can take any question: Ray's own
    multiplexing, which sends a model's questions to the replicas that have loaded it, has nothing to choose.

    Args:
        handle: of the deployment.
        config: says how long to wait, and which models there are to be.
    """

    def __init__(self, handle: DeploymentHandle[Any], config: ServeConfig) -> None:
        self._answers = handle.options(method_name="answer")
        self._streams = handle.options(method_name="stream", stream=True)
        self._models = handle.options(method_name="models")
        self._config = config
        self._expected = set(config.model_ids)
        self._known: tuple[ServedModel, ...] = ()
        self._asked_at = 0.0
        self._asking: asyncio.Task[tuple[ServedModel, ...]] | None = None

    def expect(self, adapters: Mapping[str, Any]) -> None:
        """Adapters have changed."""
        self._expected = {self._config.model_id(name) for name in (None, *adapters)}

    async def models(self) -> tuple[ServedModel, ...]:
        """What is served. Known for a moment, and asked anew beside the requests, not before them."""
        age = monotonic() - self._asked_at
        is_wrong = age > MODELS_AT_MOST_SECONDS or {model.id for model in self._known} != self._expected
        asking = self._asking
        if asking is None and (is_wrong or age > MODELS_SECONDS):
            asking = self._asking = asyncio.create_task(self._ask_models())
            asking.add_done_callback(self._asked)
        return await asyncio.shield(asking) if is_wrong and asking is not None else self._known

    async def answer(self, question: Question) -> tuple[Event, ...]:
        """All events at once."""
        asked = _Asked(question)
        answer: tuple[Event, ...] = await asked.ask(lambda: self._answers.remote(asked.question))
        return answer

    async def stream(self, question: Question) -> AsyncGenerator[tuple[Event, ...], None]:
        """Events as they happen."""
        asked, replay = _Asked(question), Replay()
        while True:
            parts: Any = self._streams.remote(asked.question)
            try:
                while (events := await asked.in_time(_next(parts))) is not None:
                    if rest := replay.rest(events):
                        yield rest
                return
            except (RayError, RayServeException) as error:
                await asked.bear(error)
                replay.restart()
            except BaseException:
                _cancel(parts)
                raise

    async def _ask_models(self) -> tuple[ServedModel, ...]:
        models: tuple[ServedModel, ...] = await _Attempts(self._config.request_seconds).ask(
            self._models.remote
        )
        self._known, self._asked_at = models, monotonic()
        return models

    def _asked(self, task: asyncio.Task[tuple[ServedModel, ...]]) -> None:
        self._asking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("the models of the generator are not known: %s", error)


class _Attempts:
    """One request, which is asked until it is answered, too late, or hopeless."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._deaths = 0

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    async def ask(self, send: Callable[[], Any]) -> Any:
        """Send until there is a result."""
        while True:
            response = send()
            try:
                return await self.in_time(response)
            except (RayError, RayServeException) as error:
                await self.bear(error)
            except BaseException:
                _cancel(response)
                raise

    async def in_time(self, awaited: Awaitable[Result]) -> Result:
        """Wait for something, at most until the deadline.

        Raises:
            DeadlineError: it did not come.
            TaskCancelledError: the replica gave it up, although nobody here did.
        """
        try:
            async with asyncio.timeout_at(self._deadline) as limit:
                return await awaited
        except TimeoutError:
            if limit.expired():
                raise DeadlineError(
                    f"no answer within {self._seconds:g} seconds", "timeout_seconds"
                ) from None
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise TaskCancelledError(error_message="the replica stopped") from None

    async def bear(self, error: RayError | RayServeException) -> None:
        """Return after a pause if it is worth asking again.

        Raises:
            Exception: it is not; as the caller is to be told.
        """
        cause = _cause(error)
        if isinstance(cause, BackPressureError):
            raise OverloadedError(f"too many requests wait: {cause.message}", RETRY_SECONDS) from error
        if isinstance(cause, DeploymentUnavailableError):
            raise UnavailableError(f"the server is stopping or failed: {cause.message}") from error
        if not isinstance(cause, (*DEATHS, ObjectLostError)):
            raise cause from error
        self._deaths += 1
        log.warning("a replica died with a request, time %d: %s", self._deaths, type(cause).__name__)
        if self._deaths >= MOST_DEATHS:
            raise UnavailableError(
                f"{self._deaths} replicas died while they worked on this request"
            ) from error
        await self.in_time(asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (self._deaths - 1)))


class _Asked(_Attempts):
    """A question, which fused tokens that are lost are made anew for."""

    def __init__(self, question: Question) -> None:
        super().__init__(question.seconds)
        self._question, self._fusion = question, question.fusion

    @property
    def question(self) -> Question:
        """As it is sent: with the time that is left, and without what makes fused tokens anew."""
        fusion = self._fusion
        sent = Fusion(**_values(fusion)) if fusion is not None else None
        return replace(self._question, seconds=self.left, fusion=sent)

    async def bear(self, error: RayError | RayServeException) -> None:
        """As above; then the fused tokens are there again."""
        await super().bear(error)
        made = self._question.fusion
        if isinstance(_cause(error), ObjectLostError) and isinstance(made, MadeFusion):
            self._fusion = await self.in_time(made.again())


def _cause(error: BaseException) -> BaseException:
    """What happened, out of what Ray wraps around it."""
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else None
        if inner is None and type(error) is RayServeException:
            inner = error.__cause__
        if inner is None or inner is error:
            return error
        error = inner


def _values(fusion: Fusion) -> dict[str, Any]:
    return {field.name: getattr(fusion, field.name) for field in fields(Fusion)}


async def _next(parts: AsyncIterator[Result]) -> Result | None:
    return await anext(parts, None)


def _cancel(response: Any) -> None:
    # What it raised before it was cancelled is no longer of interest.
    with suppress(RayError, RayServeException):
        response.cancel()
