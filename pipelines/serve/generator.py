"""Deployment: questions -> text, many at once, by the project's own engine.

    question --prepared--> job --> engine's thread of its backbone --> events, as they happen

Adapters are exchanged while it answers: an answer ends with the model that it began with, and what only an
exchanged adapter needed goes with its last answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.serve import ServeConfig
from mmicl_core.serving.jobs import Job
from pipelines.serve.asking import Preparation, name_of_prefix
from pipelines.serve.contracts import Event, Question, ServedModel
from pipelines.serve.engine_thread import EngineThread
from pipelines.serve.errors import OverloadedError
from pipelines.serve.loaded import Loaded, LoadedModels
from pipelines.serve.telling import Teller, late

__all__ = ["Generator"]


class Generator:
    """Answers questions. Adapters come with `reconfigure`.

    Args:
        backbone: folder of the model, loaded once for all adapters that do not change it.
        config: of the server.
    """

    def __init__(self, backbone: Path, config: ServeConfig) -> None:
        self._config = config
        self._models = LoadedModels(backbone, config.model_name)
        self._preparation = Preparation(config)
        self._shared = self._thread_for(self._models.backbone)
        self._own = dict[str, EngineThread]()
        self._exchange = asyncio.Lock()

    def close(self) -> None:
        """End the threads, when their last answers have ended."""
        self._preparation.close()
        for thread in self._threads():
            thread.retire()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve these adapters and no others; answers under way end with those that they began with.

        Args:
            user_config: {"adapters": {name: {"folder": ...}}}.

        Raises:
            CheckpointError: one cannot be loaded; all stay as they were.
        """
        folders = {name: str(resolve(about["folder"])) for name, about in user_config["adapters"].items()}
        async with self._exchange:
            await asyncio.to_thread(self._models.reload, folders)
            self._arrange()

    async def check_health(self) -> None:
        """Make sure that the threads work, and compute a little, which fails where a GPU has been lost.

        Raises:
            RuntimeError: one has died.
        """
        for thread in self._threads():
            thread.check_health()
        if (device := self._models.backbone.device).type != "cpu":
            await asyncio.to_thread(lambda: float(torch.ones(1, device=device).sum()))

    async def models(self) -> tuple[ServedModel, ...]:
        """All that it serves, the base model first."""
        return tuple(loaded.served for loaded in self._models.all())

    async def answer(self, question: Question) -> tuple[Event, ...]:
        """All events at once.

        Raises:
            DataError: what was asked cannot be answered.
            BankError: its pack is gone, damaged, or of another model.
            DeadlineError: it came too late.
            OverloadedError: too many questions wait.
        """
        async with aclosing(self.stream(question)) as groups:
            return tuple([event async for group in groups for event in group])

    async def stream(self, question: Question) -> AsyncGenerator[tuple[Event, ...], None]:
        """Events as they happen, in groups of those that happened together. Raises as `answer` does."""
        arrived = time.monotonic()
        deadline = asyncio.get_running_loop().time() + question.seconds
        loaded = self._models.get(question.model)
        thread = self._thread_of(loaded)
        try:
            async with asyncio.timeout_at(deadline):
                job, teller = await self._prepare(question, loaded, thread, arrived)
        except TimeoutError as error:
            raise late(question) from error
        if (waiting := thread.engine.waiting) >= self._config.generator.queued:
            raise OverloadedError(f"{waiting} questions wait for this replica already: ask again later")
        thread.add(job, teller)
        try:
            async for group in teller.groups(deadline):
                yield group
        finally:
            thread.forget(job)

    async def _prepare(
        self, question: Question, loaded: Loaded, thread: EngineThread, arrived: float
    ) -> tuple[Job, Teller]:
        # What comes fused needs nothing of the adapter any more, and is read by the plain model.
        method = self._models.all()[0].method if loaded.served.fuses else loaded.method
        name = name_of_prefix(question, loaded.identity)
        known = thread.engine.prefixes.get(name) if name is not None and method.writes_turns_apart else None
        asked = await self._preparation.prepare(question, loaded, method, known)
        teller = Teller(question, asked.saved, method.backbone.tokenizer, arrived)
        job = Job(
            method,
            question.turns,
            asked.pictures,
            question.samplings,
            teller.tell,
            fused=asked.fused,
            system=question.system,
            prefix=name,
            known=known,
            deadline=arrived + question.seconds,
            stopped=teller.stopped,
        )
        return job, teller

    def _arrange(self) -> None:
        """A thread for every backbone; those of backbones that are gone end."""
        own = dict[str, EngineThread]()
        for loaded in self._models.all():
            backbone, model = loaded.method.backbone, loaded.served.id
            if backbone is self._models.backbone:
                continue
            before = self._own.get(model)
            kept = before is not None and before.backbone is backbone
            own[model] = before if before is not None and kept else self._thread_for(backbone)
        for model, thread in self._own.items():
            if own.get(model) is not thread:
                thread.retire()
        self._own = own

    def _thread_of(self, loaded: Loaded) -> EngineThread:
        if loaded.method.backbone is self._models.backbone:
            return self._shared
        return self._own[loaded.served.id]

    def _threads(self) -> tuple[EngineThread, ...]:
        return (self._shared, *self._own.values())

    def _thread_for(self, backbone: HuggingFaceBackbone) -> EngineThread:
        return EngineThread(backbone, self._config.rows, self._config.prefix_bytes)
